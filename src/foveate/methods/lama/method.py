"""LAMA: m attentions over the words of a text, each a rank-1 bilinear form with one context vector.

    E[i, t] = c^T W_i h_t,  W_i = p_i q_i^T:      E = diag(P^T c) (Q^T H^T)
    E <- tanh(E);   E[:, t] <- E[:, t] / ||E[:, t]||_2     (over the heads, for each token)
    A = softmax over t of E;   S = A H                     (m, d), flattened

H (n, d) are the states of a bidirectional GRU or any token vectors, P and Q (d, m). c (d) is
learnt, or the mean of the text's token vectors (the paper's "+ctx"). No token is compared with
another: the cost is linear in n, and all W_i take 2 d m numbers. As cross-attention: the query of
head i is (p_i^T c) q_i, keys and values are H, there is no scale.

Mehta, Rangwala and Ramakrishnan 2019, "Low Rank Factorization for Compact Multi-Head
Self-Attention", arXiv 1912.00835; tanh and the norm over heads as in the independent PyTorch
version, which cites the paper's equation 3.13. After both |E| <= 1, so weights within a text differ
by a factor of e^2 = 7.4 at most: it is soft by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.lama.weights import checked, clean, losses, over_tokens
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.pooler import Pooled, Pooler, PoolerRecipe
from foveate.parts.projection import positive
from foveate.parts.state import State

Source = Literal["learned", "mean", "embeddings"]
Activation = Literal["tanh", "none"]
_CHUNK = 64


@dataclass(frozen=True)
class LAMA(PoolerRecipe):
    """Low-rank multi-head attention that pools; see the module's text.

    Attributes:
        heads: m. With one, the norm over heads leaves each score's sign alone.
        rank: k of W_i = P_i Q_i^T, with P_i and Q_i (d, k); the paper's is 1.
        context: c is "learned", the "mean" of the tokens that are pooled, or that of their
            "embeddings", which must be as wide.
        activation: "tanh" or "none".
        normalize: divide by the norm over heads.
        output: width of a linear map of the flattened S; None leaves m d numbers.
        penalty: times ||A A^T - I||_F^2 is a loss in `aux`, "redundancy_loss".
        eps: least norm over heads.

    Raises:
        InputError: a number below its least, or an unknown context or activation.
    """

    heads: int = 16
    rank: int = 1
    context: Source = "learned"
    activation: Activation = "tanh"
    normalize: bool = True
    output: int | None = None
    penalty: float = 0.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        whole("LAMA", "heads", self.heads, least=1)
        whole("LAMA", "rank", self.rank, least=1)
        if self.output is not None:
            whole("LAMA", "output", self.output, least=1)
        for name, kinds in (("context", Source), ("activation", Activation)):
            given = getattr(self, name)
            if given not in get_args(kinds):
                raise InputError(
                    f"LAMA({name}={given!r}) is unknown; {nearest(str(given), get_args(kinds))}"
                )
        check_penalty("LAMA", self.penalty)
        positive("LAMA", eps=self.eps)

    @property
    @override
    def wants_embeddings(self) -> bool:
        return self.context == "embeddings"

    @override
    def build(self, dim: int) -> LowRankPooler:
        return LowRankPooler(self, dim)


def check_penalty(recipe: str, penalty: float) -> None:
    """Refuse a penalty that isn't finite, or below 0."""
    if penalty:
        positive(recipe, penalty=penalty)


class LowRankPooler(Pooler):
    """LAMA for tokens of one width.

    Args:
        recipe: the hyper-parameters.
        dim: d.

    Attributes:
        p, q: P and Q, (d, m, k).
        c: (d), or None where the context isn't learnt.
        out: the linear map, or None.
    """

    def __init__(self, recipe: LAMA, dim: int) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        self.p = nn.Parameter(torch.empty(dim, recipe.heads, recipe.rank))
        self.q = nn.Parameter(torch.empty(dim, recipe.heads, recipe.rank))
        self.c: nn.Parameter | None = None
        if recipe.context == "learned":
            self.c = nn.Parameter(torch.empty(dim))
        flat = recipe.heads * dim
        self.out = None if recipe.output is None else nn.Linear(flat, recipe.output)
        self.width = flat if recipe.output is None else recipe.output
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P and Q as the independent version: uniform within m ** -0.5; c normal."""
        bound = self.recipe.heads**-0.5
        nn.init.uniform_(self.p, -bound, bound)
        nn.init.uniform_(self.q, -bound, bound)
        if self.c is not None:
            nn.init.normal_(self.c)

    @override
    def forward(
        self, x: Tensor, real: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Pooled:
        """Pool; shapes as in `Pooler.forward`.

        Raises:
            InputError: x is of another width, real isn't bool (B, L), or embeddings are asked for
                and don't fit.
        """
        checked("LAMA", x, real, self.dim)
        x = clean(x, real)
        context = self.context(x, real, embeddings)
        weights = over_tokens(self.scores(x, context), real)
        pooled = (weights.to(x.dtype) @ x).flatten(1)
        vector = pooled if self.out is None else self.out(pooled)
        return Pooled(vector, weights, losses(weights, self.recipe.penalty))

    def context(
        self, x: Tensor, real: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """The context vector c, (1 or B, d)."""
        if self.c is not None:
            return self.c[None]
        if self.recipe.context == "embeddings":
            if embeddings is None or embeddings.shape != x.shape:
                found = None if embeddings is None else tuple(embeddings.shape)
                raise InputError(
                    f"LAMA(context='embeddings'): expected embeddings {tuple(x.shape)}, as wide as "
                    f"the tokens that are pooled, got {found}; or take context='mean'."
                )
            x = clean(embeddings, real)
        if real is None:
            return x.mean(1)
        return x.sum(1) / real.sum(1, keepdim=True).clamp(min=1).to(x.dtype)

    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        """E after tanh and the norm over heads, in fp32 or wider.

        Args:
            x: (B, n, d).
            context: (1 or B, d).

        Returns:
            (B, m, n).
        """
        recipe = self.recipe
        wide = torch.promote_types(x.dtype, torch.float32)
        of_context = torch.einsum("bd,dmk->bmk", context.to(wide), self.p.to(wide))
        # (P^T c) goes into Q first, so that the rank adds nothing for each token.
        query = torch.einsum("bmk,dmk->bmd", of_context, self.q.to(wide))
        scores = query @ x.to(wide).mT
        if recipe.activation == "tanh":
            scores = scores.tanh()
        if recipe.normalize:
            scores = scores / scores.norm(dim=1, keepdim=True).clamp(min=recipe.eps)
        return scores

    # -- prefix by prefix --------------------------------------------------------------------------
    def new_state(self) -> State:
        """An empty state for `step`: for each head the log of its sum, and the pooled vector.

        Raises:
            InputError: the context is a mean. It changes with every token, and the weights of all
                earlier ones with it, so that no sum of them can be kept.
        """
        if self.c is None:
            raise InputError(
                f"LAMA(context={self.recipe.context!r}) can't go on from a state: with a mean "
                "every token changes the weights of all before it; take context='learned'."
            )
        heads = self.recipe.heads
        return State((
            Field("lse", "sequence", (heads,), 1), Field("pooled", "sequence", (heads, self.dim), 1)
        ))  # fmt: skip

    def step(self, x: Tensor, state: State, real: Tensor | None = None) -> Tensor:
        """The pooled vector of each prefix that ends with a new token.

        Args:
            x: (B, n, d), the next tokens.
            state: made by `new_state`; it takes them in.
            real: (B, n) bool, False on padding; None is all real.

        Returns:
            (B, n, width), what `forward` gives of all tokens up to each; 0 (or the map of 0) before
            the first real one.

        Raises:
            InputError: x is of another width or batch, or real isn't bool (B, n).
        """
        checked("LAMA", x, real, self.dim)
        if state.batch not in (None, len(x)):
            raise InputError(
                f"LAMA: the state holds {state.batch} texts, but {len(x)} go on; reorder it."
            )
        assert self.c is not None
        batch, heads = len(x), self.recipe.heads
        x = clean(x, real)
        scores = self.scores(x, self.c[None])
        if real is not None:
            scores = scores.masked_fill(~real[:, None], -torch.inf)
        lse = state.held.get("lse", scores.new_full((batch, heads), -torch.inf))
        pooled = state.held.get("pooled", scores.new_zeros(batch, heads, self.dim))
        found = []
        for part, e in zip(x.split(_CHUNK, 1), scores.split(_CHUNK, 2)):
            ends = torch.cat((lse[..., None], e), 2).logcumsumexp(2)[..., 1:]
            base = ends.masked_fill(ends == -torch.inf, 0.0)[..., None]  # (B, m, n, 1)
            later = torch.ones(e.shape[2], e.shape[2], dtype=torch.bool, device=e.device).triu(1)
            # Left out before exp: it may be infinite there, and its gradient 0 * inf.
            weights = torch.exp((e[:, :, None] - base).masked_fill(later, -torch.inf))
            before = torch.exp(lse[..., None, None] - base)
            pooled_at = weights @ part.to(e.dtype)[:, None] + before * pooled[:, :, None]
            found.append(pooled_at)
            lse, pooled = ends[..., -1], pooled_at[:, :, -1]
        state.held = {"lse": lse.detach(), "pooled": pooled.detach()}
        state.length += x.shape[1]
        flat = torch.cat(found, 2).transpose(1, 2).flatten(2).to(x.dtype)
        return flat if self.out is None else self.out(flat)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.dim}, {self.recipe}"
