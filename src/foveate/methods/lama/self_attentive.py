"""Self-attentive pooling: m attentions over the words, scored by a small network.

    A = softmax over t of (W_2 tanh(W_1 H^T)),   S = A H

W_1 (d_a, d), W_2 (m, d_a). Lin et al. 2017, "A Structured Self-attentive Sentence Embedding",
arXiv 1703.03130, section 2.1; what LAMA is held to, with d d_a + d_a m numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from foveate.methods.lama.method import check_penalty
from foveate.methods.lama.weights import checked, clean, losses, over_tokens
from foveate.ops.masks.checks import whole
from foveate.parts.pooler import Pooled, Pooler, PoolerRecipe


@dataclass(frozen=True)
class SelfAttentive(PoolerRecipe):
    """Self-attentive pooling; see the module's text.

    Attributes:
        heads: m; the paper's r = 30.
        hidden: d_a, the paper's 350.
        penalty: times ||A A^T - I||_F^2 is a loss in `aux`, "redundancy_loss" (the paper's 1).

    Raises:
        InputError: a number below its least.
    """

    heads: int = 30
    hidden: int = 350
    penalty: float = 1.0

    def __post_init__(self) -> None:
        whole("SelfAttentive", "heads", self.heads, least=1)
        whole("SelfAttentive", "hidden", self.hidden, least=1)
        check_penalty("SelfAttentive", self.penalty)

    @override
    def build(self, dim: int) -> SelfAttentivePooler:
        return SelfAttentivePooler(self, dim)


class SelfAttentivePooler(Pooler):
    """Self-attentive pooling for tokens of one width.

    Args:
        recipe: the hyper-parameters.
        dim: d.
    """

    def __init__(self, recipe: SelfAttentive, dim: int) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        self.first = nn.Linear(dim, recipe.hidden, bias=False)
        self.second = nn.Linear(recipe.hidden, recipe.heads, bias=False)
        self.width = recipe.heads * dim

    @override
    def forward(
        self, x: Tensor, real: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Pooled:
        """Pool; shapes as in `Pooler.forward`."""
        checked("SelfAttentive", x, real, self.dim)
        x = clean(x, real)
        scores = self.second(self.first(x).tanh()).mT
        weights = over_tokens(scores.float() if x.dtype.itemsize < 4 else scores, real)
        vector = (weights.to(x.dtype) @ x).flatten(1)
        return Pooled(vector, weights, losses(weights, self.recipe.penalty))
