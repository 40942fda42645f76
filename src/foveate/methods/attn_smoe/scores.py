"""The scores of the routers that the paper compares with: XMoE's, SMoE-Dropout's and StableMoE's.

XMoE            l_e = (P u) . e_e / ||e_e||, P from D to a few dimensions
SMoE-Dropout    l = W u with a random W that stays as it was drawn; the number of experts that run
                for a token grows linearly over the training, from K to all of them
StableMoE       l = W u; meanwhile a light router lhat = What x, x of the token's id alone, learns
                which experts that chooses (cross entropy), and from a tenth of the training on it
                chooses itself, frozen, while l goes on weighing; in evaluation it always chooses

Chi et al. 2022, arXiv 2204.09179, and Chen et al. 2023, arXiv 2303.01610, as in the code base that
the paper's language models match: u isn't normalised, P has 8 dimensions, the embeddings e have
norm 1.5 (which the product doesn't see), and 0.3 is the temperature in the balance loss alone.
Dai et al. 2022, arXiv 2204.08396: x is an embedding of 50 dimensions of its own, normal with
deviation 1 at first, and both W start orthogonal with gain 0.1. There one expert runs, weighed by a
sigmoid; here K do, weighed as by all routers, and the light one learns all K alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.parts.routing import Around, Choice, Scores

MILLION = 1_000_000


class CosineScores(Scores):
    """XMoE's: see the module's text.

    Args:
        dim: D.
        experts: E.
        width: dimensions of the experts' embeddings.
        norm: of each, when they are drawn.
        temperature: see the module's text.
    """

    def __init__(
        self, dim: int, experts: int, width: int = 8, norm: float = 1.5, temperature: float = 0.3
    ) -> None:
        super().__init__()
        self.norm, self.temperature = norm, temperature
        self.reduce = nn.Linear(dim, width, bias=False)
        self.embeddings = nn.Parameter(torch.zeros(experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random directions, as far apart as they can be."""
        self.reduce.reset_parameters()
        nn.init.orthogonal_(self.embeddings)
        with torch.no_grad():
            self.embeddings.copy_(functional.normalize(self.embeddings, dim=-1) * self.norm)

    @override
    def forward(self, u: Tensor) -> Tensor:
        small = functional.linear(u, self.reduce.weight.to(u.dtype))
        return small @ functional.normalize(self.embeddings.to(u.dtype), dim=-1).T


class Staged(Scores):
    """Scores that change as training goes on; how far it is, is saved with them."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        # In millionths: an integer stays what it is when the model's dtype changes.
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    @override
    def advance(self, share: float) -> None:
        self.done.fill_(round(MILLION * min(1.0, max(0.0, share))))


class FrozenScores(Staged):
    """SMoE-Dropout's: see the module's text. In evaluation as many run as training has reached.

    Args:
        dim: D.
        experts: E.
    """

    weight: Tensor

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's Linear."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    @override
    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))

    @override
    def count(self, top_k: int) -> int:
        experts = len(self.weight)
        more = int(self.done) * (experts - top_k + 1) // MILLION
        return min(experts, top_k + more)


class StableScores(Staged):
    """StableMoE's: see the module's text.

    Args:
        dim: D.
        experts: E.
        vocab: of the tokens' ids; 0 where they have none, and x is u, as fits where u comes from
            outside of what is trained.
        width: dimensions of x.
        first: share of the training after which the light router chooses.
    """

    def __init__(
        self, dim: int, experts: int, vocab: int = 0, width: int = 50, first: float = 0.1
    ) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.zeros(experts, dim))
        # The first is of what has no id, as register tokens.
        self.words = nn.Embedding(vocab + 1, width) if vocab else None
        self.light = nn.Parameter(torch.zeros(experts, width if vocab else dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the module's text."""
        for weight in (self.weight, self.light):
            nn.init.orthogonal_(weight, gain=0.1)
        if self.words is not None:
            nn.init.normal_(self.words.weight)

    @override
    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))

    @property
    @override
    def learning(self) -> bool:
        return self.training and int(self.done) < self.first * MILLION

    @override
    def advance(self, share: float) -> None:
        super().advance(share)
        # Frozen by more than a missing gradient, which code for many ranks fills with zeros.
        for weight in (self.light, *(() if self.words is None else (self.words.weight,))):
            weight.requires_grad_(share < self.first)

    @override
    def choose(self, u: Tensor, around: Around) -> Choice:
        x = u.detach() if self.words is None else self._words(u, around)
        return Choice(functional.linear(x, self.light.to(u.dtype)), self.learning)

    def _words(self, u: Tensor, around: Around) -> Tensor:
        assert self.words is not None
        ids, count = around.ctx.ids, u[..., 0].numel()
        if ids is None or ids.numel() != count:
            raise InputError(
                f"stable-moe routes by the tokens' ids: expected ctx.ids with one for each of "
                f"{count} tokens, got {None if ids is None else tuple(ids.shape)}; give the model "
                "input_ids, not inputs_embeds."
            )
        known = self.words.num_embeddings - 1
        if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= known:
            raise InputError(
                f"stable-moe knows {known} ids, got {int(ids.max())}; its router was made for the "
                "vocabulary of the config, and isn't resized with the model's embeddings."
            )
        return self.words(ids.reshape(u.shape[:-1]).clamp_min(-1) + 1).to(u.dtype)

    @override
    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.weight.shape[1]}, experts={len(self.weight)}, first={self.first:g}"
