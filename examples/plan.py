"""Plan a deployment: what decoding a token costs by context, and which strides of a window pay.

    python examples/plan.py

The same as `foveate cost decode` and `foveate cost tiles`, whose output is read here as JSON.
"""

import io
import json
from contextlib import redirect_stdout
from typing import Any

from foveate.cli import main as foveate


def ask(*arguments: str) -> Any:
    """What a command prints with --json."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = foveate([*arguments, "--json"])
    assert code == 0, said.getvalue()
    return json.loads(said.getvalue())


def main() -> None:
    found = ask("cost", "decode", "--preset", "step-3", "--contexts", "8K,32K")
    for price in sorted(found["prices"], key=lambda price: (price["context"], price["usd"])):
        print(
            f"{price['context']:>6} tokens on {price['hardware']}: {price['usd']:.3f} USD for a "
            f"million tokens, attention bound by {price['bound']}"
        )
    for stride in ("1x1x1", "16x8x8"):
        window = ("--shape", "30x48x80", "--window", "18x24x24", "--stride", stride)
        best = max(ask("cost", "tiles", *window), key=lambda choice: choice["serial"])
        print(
            f"stride {stride}: {best['flops']:.1f} times fewer operations, {best['serial']:.1f} "
            f"times fewer tiles (queries {best['q_tile']}, keys {best['kv_tile']})"
        )


if __name__ == "__main__":
    main()
