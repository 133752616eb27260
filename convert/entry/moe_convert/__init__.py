"""The commands of this tool under a name that nobody else has, and the look at what `convert` and `layouts` are here.

In: nothing. Out: an exit code. It imports neither before it has seen that both are ours: PyPI has packages of both names, and
whichever is installed last overwrites the files of the other one, or shadows them from another folder.
"""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = {"convert": "Prefuse, split and verify Mixture-of-Experts checkpoints.", "layouts": "Layouts of MoE checkpoints:"}
"""How the docstrings of our packages begin."""


def shadowed() -> str | None:
    """What is wrong with the packages that Python would import, in one sentence; None if they are ours."""
    here = Path(__file__).resolve().parent
    for name, begin in _OURS.items():
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None:
            return f"the package {name!r} of moe-convert is not there; install moe-convert again"
        if not found.read_text(encoding="utf-8", errors="replace").startswith(f'"""{begin}'):
            return (
                f"{found} is of another package that is called {name!r}, and no part of moe-convert ({here}); uninstall it "
                f"(pip uninstall {name}), then install moe-convert again, or use an environment of its own"
            )
    return None


def interruptible() -> None:
    """Let Ctrl-C end what has nothing to tidy up yet, or no longer, as it ends others: without a traceback and exit code 1."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """The command `convert`, also called `moe-convert`; see `convert.cli`."""
    interruptible()
    if problem := shadowed():
        sys.stderr.write(f"convert: {problem}\n")
        return 2
    from convert.cli import command

    return command()


def verify_main() -> int:
    """The command `convert-verify`."""
    sys.argv.insert(1, "--verify")
    return main()
