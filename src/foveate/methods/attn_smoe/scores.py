"""The scores of the routers that the paper compares with: XMoE's and SMoE-Dropout's.

XMoE            l_e = (P u) . e_e / ||e_e||, P from D to a few dimensions
SMoE-Dropout    l = W u with a random W that stays as it was drawn; the number of experts that run
                for a token grows linearly over the training, from K to all of them

Chi et al. 2022, arXiv 2204.09179, and Chen et al. 2023, arXiv 2303.01610, as in the code base that
the paper's language models match: u isn't normalised, P has 8 dimensions, the embeddings e have
norm 1.5 (which the product doesn't see), and 0.3 is the temperature in the balance loss alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from foveate.parts.routing import Scores

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


class FrozenScores(Scores):
    """SMoE-Dropout's: see the module's text. In evaluation as many run as training has reached.

    Args:
        dim: D.
        experts: E.
    """

    weight: Tensor
    done: Tensor

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(experts, dim))
        # In millionths: an integer stays what it is when the model's dtype changes.
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
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

    @override
    def advance(self, share: float) -> None:
        self.done.fill_(round(MILLION * min(1.0, max(0.0, share))))
