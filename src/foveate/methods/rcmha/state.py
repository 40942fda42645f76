"""What RCMHA keeps of the tokens before: keys and values with the convolution's last inputs, or x.

Nothing that is kept has a gradient: as in Transformer-XL it flows through the current segment alone
(Dai et al. 2019, arXiv 1901.02860, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Heads
from foveate.parts.cache import Field
from foveate.parts.kv_cache import token_field
from foveate.parts.state import State
from foveate.parts.token_state import TokenState


class CarriedState(TokenState):
    """Keys and values behind the convolution, and what it needs to go on: its last K - 1 inputs.

    Fields k (Hkv, D) and v (Hkv, Dv) of each token, the last `limit` of them where there is one;
    rings before_q (Hq, D), before_k and before_v of K - 1 tokens, as the projection made them.

    Args:
        heads: sizes of the layer.
        reach: K - 1; 0 has no rings.
        limit: most tokens that are kept between two calls; None keeps all.
    """

    def __init__(self, heads: Heads, reach: int, limit: int | None) -> None:
        super().__init__(
            (
                token_field("k", heads.kv, heads.key_dim),
                token_field("v", heads.kv, heads.value_dim),
            )
        )
        shapes = {
            "q": (heads.query, heads.key_dim),
            "k": (heads.kv, heads.key_dim),
            "v": (heads.kv, heads.value_dim),
        }
        self.reach, self.limit = reach, limit
        self.came = 0
        self.before: dict[str, Tensor] = {}
        rings = [Field(f"before_{name}", "ring", shapes[name], reach) for name in shapes]
        self.fields = (*(f._replace(limit=limit) for f in self.fields), *(rings if reach else ()))

    def take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new keys and values (B, Hkv, n, ..), and give back all that are held."""
        found = self.append({"k": k, "v": v})
        self.came += k.shape[2]
        self._follow()
        return found["k"], found["v"]

    def go_on(self, **inputs: Tensor) -> None:
        """Keep the last inputs of the convolution, q, k and v (B, heads, n, D); then cut.

        What has gone in is complete now: it loses its gradient, and the oldest beyond the limit go.
        """
        if self.reach:
            for name, x in inputs.items():
                kept = self.before.get(name)
                if kept is None:
                    kept = x.new_zeros(*x.shape[:2], self.reach, x.shape[3])
                self.before[name] = torch.cat((kept, x.detach()), 2)[:, :, -self.reach :]
        self._tokens.detach()
        excess = len(self._tokens) - (len(self._tokens) if self.limit is None else self.limit)
        if excess > 0:
            self._tokens.evict(torch.arange(excess))
        self._follow()

    @override
    def reset(self) -> None:
        self.came, self.before = 0, {}
        super().reset()

    @override
    def reorder(self, rows: Tensor) -> None:
        picked = {n: x.index_select(0, rows.to(x.device)) for n, x in self.before.items()}
        self.before = picked
        super().reorder(rows)

    @override
    def truncate(self, length: int) -> None:
        length = whole("truncate", "length", length, least=0)
        dropped = self.came - len(self._tokens)
        if 0 < length < self.came and (self.reach or dropped):
            raise InputError(
                f"truncate({length}): of the {self.came} tokens only the last {self.reach} are "
                f"kept as they go into the convolution, and {dropped} were dropped, so that none "
                "can be taken back; run the shorter prompt again."
            )
        if length == self.came:
            return
        if not length:
            self.reset()
            return
        super().truncate(length)  # refuses more than there are
        self.came = length
        self._follow()

    @override
    def _follow(self) -> None:
        rings = {f"before_{name}": x for name, x in self.before.items()}
        self.held = self._tokens.entries | rings
        self.length = self.came


class Memory(State):
    """The layer's input of the last tokens, from which keys and values are made anew.

    Args:
        dim: width of the layer's input.
        limit: M, tokens; None keeps all.
    """

    def __init__(self, dim: int, limit: int | None) -> None:
        unit = "token" if limit is None else "ring"
        super().__init__((Field("hidden", unit, (dim,), limit),))
        self.limit = limit

    @property
    def hidden(self) -> Tensor | None:
        """(B, m, dim); None before the first tokens."""
        return self.held.get("hidden")

    def take(self, hidden: Tensor) -> None:
        """Take in the layer's input of new tokens, (B, n, dim)."""
        kept = [x for x in (self.hidden, hidden.detach()) if x is not None]
        whole = torch.cat(kept, 1)
        start = 0 if self.limit is None else max(0, whole.shape[1] - self.limit)
        self.held = {"hidden": whole[:, start:]}
        self.length += hidden.shape[1]

    @override
    def truncate(self, length: int) -> None:
        length = whole("truncate", "length", length, least=0)
        hidden = self.hidden
        if 0 < length < self.length and hidden is not None and hidden.shape[1] == self.length:
            self.held = {"hidden": hidden[:, :length]}
            self.length = length
            return
        super().truncate(length)
