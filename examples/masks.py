"""Masks on the core op: combine them, count what they visit, merge parts, attend within documents.

python examples/masks.py
"""

import torch

import foveate
from foveate import causal, documents, sinks, window


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, 1024, 64)  # (batch, query heads, queries, head size)
    k, v = torch.randn(2, 1, 2, 1024, 64)  # two key/value heads under eight query heads

    local = causal() & (window(127, 0) | sinks(4))  # & binds tighter than |
    out, lse = foveate.attention(q, k, v, local)
    print(f"{tuple(out.shape)}, lse {tuple(lse.shape)}")
    share = local.pairs(1024, 1024) / causal().pairs(1024, 1024)
    print(f"{local!r} keeps {share:.0%} of causal's pairs")
    print(foveate.explain(q, k, v, local))

    # Results over disjoint sets of keys merge exactly by their lse.
    near = foveate.attention(q, k, v, causal() & window(127, 0))
    far = foveate.attention(q, k, v, causal() & ~window(127, 0))
    whole = foveate.attention(q, k, v, causal())
    torch.testing.assert_close(foveate.merge([near, far]).out, whole.out)

    # Packed sequences are a mask: three documents in one row, none sees another.
    packed = foveate.attention(q, k, v, causal() & documents([0, 300, 700, 1024]))
    alone = foveate.attention(q[:, :, 300:700], k[:, :, 300:700], v[:, :, 300:700], causal())
    torch.testing.assert_close(packed.out[:, :, 300:700], alone.out)
    print("documents in one row are as they are alone")


if __name__ == "__main__":
    main()
