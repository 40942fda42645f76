"""Experts in the models that `foveate train` and `foveate classify` make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

BALANCE = 0.01  # of the experts' load; Step-3's report doesn't say how it keeps them in use


@dataclass(frozen=True)
class Experts:
    """Experts in every layer of a model, in the place of dense feed-forward layers.

    Attributes:
        count: E.
        top_k: that run for a token, their weights renormalised.
        router: of the catalog, such as "similarity-smoe".

    Raises:
        InputError: there are fewer experts than run for a token.
    """

    count: int
    top_k: int = 2
    router: str = "top-k"

    def __post_init__(self) -> None:
        whole("Experts", "count", self.count, least=1)
        whole("Experts", "top_k", self.top_k, least=1)
        if self.top_k > self.count:
            raise InputError(
                f"{self.top_k} experts can't run for a token where there are {self.count}."
            )

    def fields(self, layers: int, dim: int) -> dict[str, Any]:
        """Of `FoveateConfig`: the experts of a token are as wide as one dense layer."""
        dense = -(-dim // 3) * 8
        return {
            "moe_layers": list(range(layers)),
            "num_experts": self.count,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": max(1, dense // self.top_k),
            "router": self.router,
            "router_renormalize": True,
            "router_balance": BALANCE,
            "router_balance_per_slot": True,
        }
