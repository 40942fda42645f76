"""Hierarchical self-attention: the matrix closest to softmax that is constant between siblings.

Amizadeh, Abdali, Li and Koishida 2025, arXiv 2509.15448. The tokens carry a tree (`ctx.tree`:
sentences in documents, patches in images, several modalities under one root); theta_ij, i under B
and j under C, depends on the siblings B and C alone. Among such matrices whose rows sum to 1 the
one that is used minimises sum_i KL(theta_i || softmax(s)_i); `foveate.methods.hsa.solve` finds it
in O(M b^2) for M groups of at most b children, where softmax takes O(N^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from foveate.methods.hsa.columns import columns
from foveate.methods.hsa.solve import solve
from foveate.ops import AttentionOutput, Mask
from foveate.ops.errors import InputError
from foveate.ops.masks.algebra import And
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention, remember
from foveate.parts.context import Context
from foveate.parts.tokens import Tokens, tokens_of
from foveate.parts.tree import Tree

_ROWS = 256  # queries whose keys are asked for at once


@dataclass(frozen=True)
class HSA(Attention):
    """Hierarchical attention over `ctx.tree`, of the tokens that `ctx.mask` leaves real.

    Attributes:
        branch: children of a group where `ctx.tree` is None: then groups are windows of so many
            neighbouring tokens, of so many of these, and so on.
        first: tokens at the front that hang on the root of these, such as [CLS].
        own: whether a token sees itself: its energy is -s_ii, or else +inf.
        ties: "blocks" is the paper's, bidirectional; "columns" an extension that is causal, as only
            keys are tied (`foveate.methods.hsa.columns`).
        positions: width of e_B, sines and cosines of the node's place in its parent's domain; a
            pair of siblings has e_B . e_C added to its logit. 0 is none: a model's tokens tell
            their places themselves. A multiple of 4.
        position_scale: |e_B|.

    Rows are tied, so that no sum of exponentiated scores belongs to one alone: `lse` is NaN (with
    "columns" it is that of the row). The energy phi(R) is what `solve` gives.

    Raises:
        InputError: bad values.
    """

    branch: int = 16
    first: int = 0
    own: bool = True
    ties: Literal["blocks", "columns"] = "blocks"
    positions: int = 0
    position_scale: float = 1.0

    def __post_init__(self) -> None:
        whole("hsa", "branch", self.branch, least=2)
        whole("hsa", "first", self.first, least=0)
        whole("hsa", "positions", self.positions, least=0)
        if self.ties not in ("blocks", "columns"):
            raise InputError(f"hsa(ties={self.ties!r}): expected 'blocks' or 'columns'.")
        if self.positions % 4:
            raise InputError(f"hsa(positions={self.positions}): expected a multiple of 4.")
        if self.ties == "columns" and not (self.own and self.positions == 0):
            raise InputError("hsa(ties='columns'): own=False and positions are for ties='blocks'.")

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Shapes as in `Attention.__call__`; Lq = Lkv unless ties="columns".

        Raises:
            InputError: the tree is for other tokens, or what the mask or the model asks for has no
                meaning here.
        """
        ctx = Context() if ctx is None else ctx
        if not q.numel() or not k.numel():
            empty = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
            return AttentionOutput(v.new_zeros(*q.shape[:3], v.shape[3]), empty - torch.inf)
        self._refuse(q, k, ctx)
        tree = self.tree(q, k, ctx)
        scale = q.shape[3] ** -0.5 if ctx.scale is None else ctx.scale
        bias = _key_bias(ctx.bias, q, k)
        if self.ties == "columns":
            return columns(q, k, v, tree, scale=scale, key_bias=bias, backend=ctx.backend)
        e = None
        if self.positions:
            e = tree.kept((_sincos, self.positions), lambda: _sincos(tree, self.positions))
            e = e * self.position_scale
        out, _ = solve(
            q,
            k,
            v,
            tree,
            scale=scale,
            own=self.own,
            positions=e,
            key_bias=bias,
            backend=ctx.backend,
        )
        work = torch.promote_types(q.dtype, torch.float32)
        return AttentionOutput(out, q.new_full(q.shape[:3], torch.nan, dtype=work))

    def tree(self, q: Tensor, k: Tensor, ctx: Context) -> Tree:
        """The tree of a call: of its real tokens, on its device; kept in `ctx.store`."""
        tokens, given, length = tokens_of(q, k, ctx), ctx.tree, k.shape[2]
        if given is not None and not isinstance(given, Tree):
            raise InputError(
                f"Context(tree=...): expected a foveate.parts.Tree, got {type(given).__name__}."
            )
        if given is not None and given.length != length:
            raise InputError(
                f"The tree is for {given.length} tokens, the call has {length}; make one for these."
            )
        batch = q.shape[0]

        def build() -> Tree:
            if given is None and bool(tokens.k_real.all()):
                return _windows(length, self.branch, self.first, q.device).expanded(batch)
            if given is None:
                return self._of_real(tokens.k_real.expand(batch, -1))
            real = tokens.k_real.expand(batch, -1)
            return given.to(q.device).expanded(batch).only(real)

        key = (HSA, self.branch, self.first, given, ctx.mask, length, batch, q.device)
        return remember(ctx, key, build)

    def _of_real(self, real: Tensor) -> Tree:
        """Windows counted from each entry's first real token."""
        trees = []
        for mine in real:
            at = mine.nonzero()[:, 0]
            if not len(at):  # an entry of padding alone is in no tree, and its outputs are 0
                nobody = at.new_zeros(0)
                places = torch.zeros(0, 1, device=real.device)
                trees.append(Tree(nobody, nobody, (0,), 1, len(mine), places))
                continue
            one = _windows(len(at), self.branch, min(self.first, len(at) - 1), real.device)
            moved = torch.where(one.token < 0, -1, at[one.token.clamp_min(0)])
            trees.append(Tree(one.parent, moved, one.levels, 1, len(mine), one.places))
        return Tree.batched(trees, real.shape[1])

    def _refuse(self, q: Tensor, k: Tensor, ctx: Context) -> None:
        for name, value, why in (
            ("softcap", ctx.softcap, "a block's logit is the mean of its pairs' only without one"),
            ("sink_logits", ctx.sink_logits, "its rows have no sum of their own"),
            ("dropout", ctx.dropout or None, "one weight stands for a whole block of pairs"),
        ):
            if value is not None:
                raise InputError(f"hsa doesn't take {name}: {why}. Run this layer with 'full'.")
        if ctx.mask is not None:
            ctx.mask._check(q.shape[2], k.shape[2])
        tokens = tokens_of(q, k, ctx)
        if self.ties == "blocks" and q.shape[2] != k.shape[2]:
            raise InputError(
                f"hsa is self-attention over whole sequences: expected as many queries as keys, "
                f"got {q.shape[2]} and {k.shape[2]}. To decode, use hsa(ties='columns')."
            )
        key = (HSA, "fits", self.ties, ctx.mask, q.shape, k.shape)
        if remember(ctx, key, lambda: self._fits(tokens, ctx)):
            return
        if self.ties == "columns":
            raise InputError(
                "hsa(ties='columns') is causal: it takes causal(), with padding; for models that "
                "see both ways use hsa."
            )
        hint = "hsa(ties='columns') is a causal extension" if tokens.causal else "use 'full'"
        raise InputError(
            "hsa lets every token see every other one, but for padding: rows of a block are alike, "
            f"so that a causal or windowed mask can't be kept; {hint}."
        )

    def _fits(self, tokens: Tokens, ctx: Context) -> bool:
        """Whether the mask lets all real tokens see all real ones, or all earlier ones."""
        causal = self.ties == "columns"
        if causal and not tokens.regular:
            return False
        parts = ctx.mask.parts if isinstance(ctx.mask, And) else (ctx.mask,)
        kinds = {_kind(part) for part in parts}
        if kinds <= {"none", "causal", "padding"}:
            return causal == ("causal" in kinds)
        assert ctx.mask is not None
        return _sees_all(ctx.mask, tokens, causal)


def _sees_all(mask: Mask, tokens: Tokens, causal: bool) -> bool:
    """Whether each real query sees every real key, or every one that isn't later, and no other.

    Some queries at a time: a mask that says no mostly does at once, and none is ever held whole.
    """
    for b, real in enumerate(tokens.k_real):
        q, k = (x[b if len(x) > 1 else 0] for x in (tokens.q_pos, tokens.k_pos))
        for rows in q[tokens.q_real[b]].split(_ROWS):
            at = rows[:, None]
            wanted = (real & (k <= at)) if causal else real.expand(len(at), -1)
            for h in range(mask.groups()[1]):
                if not torch.equal(mask._element(at, k[None], b, h).expand_as(wanted), wanted):
                    return False
    return True


def _kind(mask: Mask | None) -> str:
    if mask is None:
        return "none"
    return "causal" if mask.spec == "causal()" else type(mask).__name__


@lru_cache(maxsize=32)
def _windows(length: int, branch: int, first: int, device: torch.device) -> Tree:
    with torch.inference_mode(False):  # what is kept must serve training, too
        return Tree.windows(length, branch, first=first, device=device)


def _sincos(tree: Tree, width: int) -> Tensor:
    """e_B, (n, width), |e_B| = 1: for each axis of the places sines and cosines, base 10,000."""
    if tree.places is None:
        raise InputError(
            f"hsa(positions={width}): the tree doesn't say where its nodes stand; make it with "
            "places, or leave positions at 0."
        )
    axes = tree.places.shape[1]
    if width % (2 * axes):
        raise InputError(f"hsa(positions={width}): expected a multiple of {2 * axes}.")
    pairs = width // (2 * axes)
    steps = torch.arange(pairs, device=tree.device) / pairs
    angle = tree.places[..., None].float() * 10_000.0**-steps
    e = torch.cat((angle.sin(), angle.cos()), -1).flatten(1)
    return e * (axes * pairs) ** -0.5


def _key_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias of the keys, (B or 1, Hq or 1, Lkv)."""
    if bias is None:
        return None
    wide = bias[(None,) * (4 - bias.dim())] if isinstance(bias, Tensor) else None
    if wide is None or wide.shape[2] != 1 or wide.shape[3] != k.shape[2]:
        raise InputError(
            "hsa takes a bias of keys alone, (B, Hq, 1, Lkv): one that differs by query has no "
            "mean over a block that is cheaper than the block. Run this layer with 'full'."
        )
    if not bool(wide.isfinite().all()):
        raise InputError(
            "hsa takes finite biases: a key of -inf would hide its whole group from itself. Leave "
            "keys out by the mask, padding(lengths)."
        )
    return wide[:, :, 0]
