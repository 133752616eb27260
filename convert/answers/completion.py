"""What a shell may offer behind an option, or for a path: looked up when it asks (`pip install 'moe-convert[completion]'`).

In: what stands there already. Out: words. The tables are imported only here, because `convert --help` is light.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping


def _layouts(**_: object) -> list[str]:
    from layouts.tables.targets import TARGETS

    return list(TARGETS)


def _sources(**_: object) -> list[str]:
    from layouts.tables.natives import SOURCES

    return [*_layouts(), *SOURCES]


def _families(**_: object) -> list[str]:
    from layouts.tables.families import FAMILIES

    return [family.name for family in FAMILIES]


def paths_or_families(prefix: str, parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
    """Files and directories; behind `--families` the names of families."""
    from argcomplete.completers import FilesCompleter

    return _families() if parsed_args.families else list(FilesCompleter()(prefix))


COMPLETERS: Mapping[str, Callable[..., list[str]]] = {
    **dict.fromkeys(("family", "family_b"), _families),
    **dict.fromkeys(("source_layout", "source_layout_b"), _sources),
    "layout": _layouts,
}
"""Options by name -> the words that they take."""
