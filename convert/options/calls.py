"""What every call of the library has around it: the options in its signature and help, and a look at its other arguments.

In: a function, and the keywords that it takes. Out: the same, which refuses what is of a wrong type, and whose errors
speak of arguments. It knows no option.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from convert.errors import UsageError
from convert.options import values
from convert.options.keywords import options_of
from convert.options.option import Named
from convert.options.wording import in_python

_Function = TypeVar("_Function", bound=Callable[..., object])
_READ: Mapping[str, Callable[[object], object]] = {
    "str | Path": values.location,
    "str": values.word,
    "bool": values.switch,
    "Mapping[str, str]": values.mapping,
    "Mapping[str, int]": values.mapping,
    "Mapping[str, Any]": values.mapping,
    "Progress": values.function,
    "Processes": values.processes,
}
"""How an argument that is no option is looked at, by its annotation, which stands in the sources as text."""


def documented(keywords: type) -> Callable[[_Function], _Function]:
    """Show the options in a function's signature and docstring, where `help()` and notebooks look, and check its arguments."""

    def with_options(function: _Function) -> _Function:
        found = list(options_of(keywords))
        signature = inspect.signature(function)
        plain = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=_type(keywords, each))
            for each in found
        ]
        whole = signature.replace(parameters=[*plain, *shown])
        lines = [f"    {each.name}: {each.sentence}." for each in found]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> object:
            given = whole.bind(*arguments, **keywords).arguments  # an unknown keyword is a `TypeError`, as of any function
            with in_python():
                _check(plain, given)
                return function(*arguments, **keywords)

        checked.__signature__ = whole  # type: ignore[attr-defined]
        return cast(_Function, checked)

    return with_options


def _check(parameters: list[inspect.Parameter], given: Mapping[str, object]) -> None:
    """See that each argument is of its type; those of options are seen when they are completed.

    Raises:
        UsageError: one is not; names it.
    """
    for each in parameters:
        kind = str(each.annotation).removesuffix(" | None")
        if kind not in _READ or given.get(each.name, each.default) is each.default:
            continue
        try:
            _READ[kind](given[each.name])
        except ValueError as error:
            raise UsageError(f"{each.name}: {error}") from None


def _type(keywords: type, each: Named) -> object:
    """The type as it is written there."""
    hint = keywords.__annotations__[each.name]
    return getattr(hint, "__forward_arg__", hint)
