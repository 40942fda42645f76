"""Where chunks end: greedy choice of boundaries from the predictor's logits.

Position i is the last token of a chunk, so the boundary's value is i + 1. Boundaries are
b_0 = 0 < b_1 < ... < b_Nc = L, and chunk c is [b_c, b_{c+1}). DHSA, arXiv 2510.24606.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.errors import InputError


def pick(
    logits: Tensor, *, look: int, theta: float, nms: int, most: int, instruction: int = 0
) -> Tensor:
    """Boundaries from logits, best first, none within `nms` of an accepted one.

    Args:
        logits: (L,), of position i being the last of a chunk.
        look: the predictor's w; the first w - 1 and the last w positions are never chosen.
        theta: least logit (compared with the logit, not with a probability).
        nms: accepted positions are more than this apart.
        most: accepted positions, at most.
        instruction: last tokens that are one chunk (accepted first, none after it); 0 is none.

    Returns:
        (Nc + 1,) int64 on the CPU: 0, the boundaries, L.
    """
    length = logits.shape[0]
    if length < 1:
        raise InputError("pick(logits): expected at least one position.")
    open_ = logits.detach().float().cpu().clone()
    open_[: look - 1] = -torch.inf
    open_[max(0, length - look) :] = -torch.inf
    taken: list[int] = []
    blocked = bytearray(length)

    def accept(i: int) -> None:
        taken.append(i)
        low, high = max(0, i - nms), min(length, i + nms + 1)
        blocked[low:high] = b"\1" * (high - low)

    if 0 < instruction < length and most > 0:
        accept(length - instruction - 1)
        open_[length - instruction - 1 :] = -torch.inf
    order = open_.argsort(descending=True, stable=True)
    for i in order[: int((open_ > theta).sum())].tolist():
        if len(taken) >= most:
            break
        if not blocked[i]:
            accept(i)
    return torch.tensor([0, *(i + 1 for i in sorted(taken)), length], device="cpu")


def equal(length: int, chunk: int) -> Tensor:
    """Boundaries of chunks of `chunk` tokens, the last one shorter: the block-sparse baseline."""
    inner = torch.arange(0, length, chunk, device="cpu")
    return torch.cat((inner, torch.tensor([length], device="cpu")))


def with_instruction(bounds: Tensor, instruction: int) -> Tensor:
    """The same boundaries with the last `instruction` tokens as one chunk."""
    length = int(bounds[-1])
    if not 0 < instruction < length:
        return bounds
    start = length - instruction
    return torch.cat((bounds[bounds < start], bounds.new_tensor([start, length])))


def check(bounds: Tensor, length: int) -> None:
    """Refuse what aren't boundaries of `length` tokens."""
    whole = bounds.dim() == 1 and not bounds.is_floating_point() and len(bounds) > 1
    if not whole or int(bounds[0]) or int(bounds[-1]) != length or bool((bounds.diff() < 1).any()):
        raise InputError(
            f"boundaries {bounds.tolist()}: expected integers that rise from 0 to {length}."
        )
