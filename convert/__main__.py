"""`python -m convert` is the `convert` command."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # as `moe_convert` says
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from convert.cli import command

sys.exit(command())
