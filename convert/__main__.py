"""`python -m convert` is the `convert` command."""

import sys

from convert.cli import command

sys.exit(command())
