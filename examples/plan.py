"""Plan a deployment: what decoding a token costs by context, and which strides of a window pay.

    python examples/plan.py

The same as `foveate cost decode` and `foveate cost tiles`, whose output is read here as JSON.
"""

import io
import json
from contextlib import redirect_stdout

from foveate.cli import main as foveate


def ask(*arguments: str) -> object:
    """What a command prints with --json."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = foveate([*arguments, "--json"])
    assert code == 0, said.getvalue()
    return json.loads(said.getvalue())


def main() -> None:
    for row in ask("cost", "decode", "--preset", "step-3", "--contexts", "8K,32K"):
        print(row)
    print(ask("cost", "tiles", "--shape", "30x48x80", "--window", "18x24x24", "--stride", "16x8x8"))


if __name__ == "__main__":
    main()
