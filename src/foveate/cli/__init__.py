"""The `foveate` command. typer and rich load when it runs; without them it says what to install."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDS = "The foveate command needs typer and rich: pip install 'foveate[cli]'"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: the arguments, without the program's name; default those of the process.

    Returns:
        0, or 2 for what the user can mend (bad input, a missing extra), or what a command says.
    """
    try:
        from foveate.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in {"typer", "rich", "click"}:
            raise
        print(NEEDS, file=sys.stderr)
        return 2
    return run(sys.argv[1:] if args is None else list(args))
