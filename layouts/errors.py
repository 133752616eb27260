"""What can be wrong with an input, seen from the reading side.

In: nothing. Out: error types. They never print or exit.

The whole tree, with the errors of the engine, is drawn in `convert.errors`; these two live here because `layouts` raises
them and never imports `convert`.
"""


class ConvertError(Exception):
    """Base of every error a user can cause: what is wrong, where, and what to do, in one message."""

    exit_code = 70
    command: str | None = None
    """The message in the words of the command, with its flags, once a call of the library has put it into those of Python."""


class InputError(ConvertError):
    """The input is missing, corrupt or unsafe to read."""

    exit_code = 3


class PlanError(ConvertError):
    """The input is sound but no lossless plan exists: unknown family, missing experts, an unmarked layout."""

    exit_code = 4
