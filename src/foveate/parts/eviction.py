"""A cache that lets go of keys: which ones it keeps, each sequence and key head says for itself.

Attention over a set of keys doesn't ask for their order, so a new token takes the place of the one
that was dropped before it, and a decoding step moves nothing else. What a policy must know of what
is kept (its position, its score) lies beside the keys.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops import AttentionOutput, Layout
from foveate.ops.errors import InputError
from foveate.ops.masks.base import positions
from foveate.ops.masks.checks import whole
from foveate.parts.attention import EVERYTHING, Pattern, clock, mask_layout, remember
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.tokens import tokens_of

PADDING = -1
_ROOM = 8


class EvictingCache:
    """Keys and values of one layer, and of each its position in the sequence and its score.

    All heads keep as many places; left padding counts as a place, stands in front and goes first.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._length = 0
        self._hole: Tensor | None = None  # (B, Hkv, 1) place of what was dropped last
        self.known = 0  # tokens of which is known whether they are padding
        self._pads: Tensor | None = None  # (B,) padding that came in
        self._started: Tensor | None = None  # (B,) whether a real token came in
        self.started = False  # whether one did in every row: no padding can come any more
        self.padded = False  # whether any padding came in
        self._held: dict[str, Tensor] = {}

    # -- what it holds ---------------------------------------------------------------------------
    def __len__(self) -> int:
        """Places kept in each head, padding included."""
        return self._length - (self._hole is not None)

    def __repr__(self) -> str:
        return f"EvictingCache({len(self)} of {self.seen} tokens)"

    def _view(self, name: str) -> Tensor:
        return self._held[name][:, :, : self._length]

    def _filled(self, name: str) -> Tensor:
        """The same without the hole: a view where there is none."""
        found = self._view(name)
        if self._hole is None:
            return found
        places = torch.arange(self._length - 1, device=found.device)
        return found.gather(2, places + (places >= self._hole))

    @property
    def positions(self) -> Tensor:
        """(B, Hkv, n) int32: index of each kept token in its row, PADDING for none."""
        return self._filled("positions")

    @property
    def scores(self) -> Tensor:
        """(B, Hkv, n) fp32; a policy adds to them in place between `update` and `keep`."""
        return self._filled("scores")

    @property
    def pads(self) -> Tensor:
        """(B,) int64: tokens of padding in front of each row, as they came in."""
        if self._pads is None:
            raise InputError("The cache hasn't been told of padding yet: call learn first.")
        return self._pads

    @property
    def evicted(self) -> int:
        """Places dropped so far."""
        return self.seen - len(self)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The tensors it keeps; empty before the first update."""
        return tuple(
            Field(name, "token", (x.shape[1], *x.shape[3:]), None) for name, x in self._held.items()
        )

    def bytes(self) -> int:
        """Bytes of all that is held, with the room for tokens to come, measured on the tensors."""
        return sum(x.numel() * x.element_size() for x in self._held.values())

    # -- one step ---------------------------------------------------------------------------------
    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new tokens and give back all that is kept with them.

        Args:
            key: (B, Hkv, c, D).
            value: (B, Hkv, c, Dv).

        Returns:
            (B, Hkv, n, D) and (B, Hkv, n, Dv). Several new ones stand at the end in their order; a
            single one may stand anywhere, and sees all.

        Raises:
            InputError: shapes that don't fit each other, or what is held.
        """
        self._check(key, value)
        new = key.shape[2]
        if self._hole is not None and new == 1 and not key.requires_grad:
            self._fill(key, value)
            self.seen += 1
            return self._view("keys"), self._view("values")
        at = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=key.device)
        fresh = {
            "keys": key,
            "values": value,
            "positions": at.expand(*key.shape[:2], -1),
            "scores": torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device),
        }
        if not self._held:
            self._held = {name: x.clone() for name, x in fresh.items()}
            self._length = new
        elif key.requires_grad or value.requires_grad:
            # A buffer that is written to again can't be differentiated.
            self._close()
            self._held = {name: torch.cat((self._view(name), x), 2) for name, x in fresh.items()}
            self._length += new
        else:
            self._close()
            self._make_room(new)
            for name, x in fresh.items():
                self._held[name][:, :, self._length : self._length + new] = x
            self._length += new
        self.seen += new
        return self._view("keys"), self._view("values")

    def _fill(self, key: Tensor, value: Tensor) -> None:
        """Put a single new token into the hole of each head."""
        assert self._hole is not None
        self._make_room(0)
        for name, x in (("keys", key), ("values", value)):
            self._held[name].scatter_(2, _wide(self._hole, x.shape[3]), x)
        self._held["positions"].scatter_(2, self._hole, self.seen)
        self._held["scores"].scatter_(2, self._hole, 0.0)
        self._hole = None

    def _make_room(self, new: int) -> None:
        """Buffers that may be written to, with room for `new` more places."""
        need = self._length + new
        for name, x in self._held.items():
            # What was made under inference_mode can't be written to outside of it.
            frozen = x.is_inference() and not torch.is_inference_mode_enabled()
            if need <= x.shape[2] and not frozen and x.grad_fn is None:
                continue
            # What grows token by token gets room for some, and never much.
            room = max(need, self._length + max(_ROOM, self._length // 16)) if new else need
            grown = x.new_zeros(*x.shape[:2], room, *x.shape[3:])
            grown[:, :, : self._length] = x[:, :, : self._length]
            self._held[name] = grown

    def learn(self, real: Tensor) -> None:
        """Tell which of the last tokens that came in are real: (B' or 1, n) bool.

        Raises:
            InputError: padding behind a real token.
        """
        new, batch = real.shape[1], self._held["keys"].shape[0]
        real = real.expand(batch, -1)
        if self._started is None or self._pads is None:
            self._started = torch.zeros(batch, dtype=torch.bool, device=real.device)
            self._pads = torch.zeros(batch, dtype=torch.int64, device=real.device)
        front = real.cumsum(1) == 0
        if bool((self._started[:, None] & ~real).any()) or bool((~real & ~front).any()):
            raise InputError(
                "A cache that drops keys takes padding on the left only, and no holes; pad the "
                "prompt on the left (tokenizer.padding_side = 'left')."
            )
        self.known = self.seen
        if not bool(front.any()):
            self._started, self.started = torch.ones_like(self._started), True
            return
        self.padded = True
        self._pads = self._pads + front.sum(1)
        self._started = self._started | real.any(1)
        self.started = bool(self._started.all())
        last = self._view("positions")[..., -new:]
        last.masked_fill_(front[:, None], PADDING)

    def keep(self, rank: Tensor, size: int) -> None:
        """Keep the `size` places of the highest rank in each head; of equal ones the earlier.

        Padding goes first. To be called at most once after each update.

        Args:
            rank: (B, Hkv, n) floats; NaN counts as the lowest.
            size: what is left, if there is more.
        """
        if self._length <= size or self._hole is not None:
            return
        rank = rank.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self.padded:
            # The last place of padding goes before others, so that it stays in front.
            low = torch.finfo(rank.dtype).min
            nothing = self._view("positions") == PADDING
            rank = rank.clamp_min(low).masked_fill(nothing, -torch.inf)
        if self._length == size + 1:
            places = torch.arange(self._length, device=rank.device)
            least = rank == rank.amin(2, keepdim=True)
            self._hole = torch.where(least, places, -1).amax(2, keepdim=True)
            return
        order = torch.sort(rank, dim=2, descending=True, stable=True).indices[..., :size]
        self._gather(order.sort(2).values)

    def _close(self) -> None:
        """Put what is kept in the order of arrival again, the hole at the end cut off."""
        if self._hole is None:
            return
        order = self._view("positions").long().scatter(2, self._hole, self.seen)
        index = torch.sort(order, dim=2, stable=True).indices[..., : self._length - 1]
        self._gather(index)

    def _gather(self, index: Tensor) -> None:
        """Keep the places index (B, Hkv, n), and no room."""
        self._hole = None
        for name in self._held:
            x = self._view(name)
            self._held[name] = x.gather(2, index if x.dim() == 3 else _wide(index, x.shape[3]))
        self._length = index.shape[2]

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise InputError(
                "update(key, value): expected (B, Hkv, c, D) and (B, Hkv, c, Dv), got "
                f"{tuple(key.shape)} and {tuple(value.shape)}."
            )
        if key.shape[2] < 1:
            raise InputError("update(key, value): expected at least one new token, got none.")
        for name, new in (("keys", key), ("values", value)) if self._held else ():
            held = self._held[name]
            same = new.shape[:2] == held.shape[:2] and new.shape[3] == held.shape[3]
            if not same or new.dtype != held.dtype:
                raise InputError(
                    f"update: the cache's {name} are {tuple(held.shape)} of {held.dtype}, which "
                    f"{tuple(new.shape)} of {new.dtype} don't continue; only the number of tokens "
                    "may differ."
                )

    # -- editing ----------------------------------------------------------------------------------
    def truncate(self, seen: int) -> None:
        """Take back tokens, so that the cache has seen `seen` of them.

        What their queries have added to scores stays.

        Raises:
            InputError: that would bring back tokens that were dropped.
        """
        back = self.seen - whole("truncate", "seen", seen, least=0)
        if back == 0:
            return
        if back < 0 or self.evicted:
            raise InputError(
                f"truncate({seen}): {self.seen} tokens were seen and {self.evicted} of them "
                "dropped; only a cache that dropped nothing can go back, and only to fewer."
            )
        if not seen:
            self.reset()
            return
        self._length = self.seen = seen
        self.known = min(self.known, seen)
        if self._pads is not None:
            nothing = self._view("positions")[:, 0, : self.known] == PADDING
            self._pads = nothing.sum(1)
            self._started = self._pads < self.known
            self.started = bool(self._started.all())

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row rows[b] holds (beam search); rows (B',) int64."""

        def picked(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        self._held = {name: picked(x) for name, x in self._held.items()}
        self._hole = None if self._hole is None else picked(self._hole)
        self._pads = None if self._pads is None else picked(self._pads)
        self._started = None if self._started is None else picked(self._started)

    def reset(self) -> None:
        """Forget everything."""
        self.seen = self._length = self.known = 0
        self._hole, self._pads, self._started, self._held = None, None, None, {}
        self.started = self.padded = False


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(*index.shape, width)


class EvictionPolicy(Pattern):
    """Full attention over what is cached, after which the cache lets go of keys.

    The cache is `ctx.cache`; without one (in training, say) this is full attention. A subclass
    writes `evict`. What was dropped is gone for all later queries, so outputs are dense attention's
    as long as everything fits in the budget.
    """

    evicts: ClassVar[bool] = True

    @override
    def is_dense(self, q: Tensor, k: Tensor, ctx: Context) -> bool:
        return True

    @override
    def layout(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Layout:
        return mask_layout(ctx.mask, q, k, ctx)

    @abstractmethod
    def evict(self, q: Tensor, k: Tensor, lse: Tensor, ctx: Context, cache: EvictingCache) -> None:
        """Let the cache drop what isn't kept.

        Args:
            q: (B, Hq, c, D), the new queries.
            k: (B, Hkv, n, D), all keys that they saw.
            lse: (B, Hq, c), of that attention.
            ctx: of the call.
            cache: which holds these n keys.
        """

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend to all that is kept, then evict; the choice counts as building time."""
        ctx = Context() if ctx is None else ctx
        cache = ctx.cache
        if not isinstance(cache, EvictingCache):
            return super().__call__(q, k, v, ctx)
        told: list[dict[str, Any]] = []
        listen = None if ctx.stats is None else lambda **facts: told.append(facts)
        result = super().__call__(q, k, v, replace(ctx, stats=listen))
        start = clock(q, ctx)
        with torch.no_grad():
            _tell(cache, q, k, ctx)
            self.evict(q.detach(), k.detach(), result.lse.detach(), ctx, cache)
        spent = clock(q, ctx) - start
        for facts in told if ctx.stats is not None else ():
            assert ctx.stats is not None
            ctx.stats(**(facts | {"build_seconds": facts["build_seconds"] + spent}))
        return result


def _tell(cache: EvictingCache, q: Tensor, k: Tensor, ctx: Context) -> None:
    """Let the cache learn of padding: a token is real if it may see itself."""
    new = q.shape[2]
    unknown = cache.seen - cache.known
    if new == unknown == 1 and cache.started:
        cache.known = cache.seen
        return
    mask = EVERYTHING if ctx.mask is None else ctx.mask

    def build() -> Tensor:
        at = positions(new, k.shape[2], ctx.q_positions, ctx.kv_positions, q.device)[0]
        heads = range(mask.groups()[1])
        return torch.stack(
            [
                torch.stack([mask._element(p, p, b, h) for h in heads]).any(0)
                for b in range(max(mask.groups()[0], len(at)))
                for p in [at[b if len(at) > 1 else 0]]
            ]
        )

    real = remember(ctx, (_tell, mask, new, k.shape[2]), build)
    if unknown > new:  # of tokens that came before the policy
        before = tokens_of(q, k, ctx).k_real[:, : unknown - new]
        real = torch.cat((before.expand(len(real), -1), real.expand(len(before), -1)), 1)
    cache.learn(real)


def of_group(x: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads that share a key head: (B, Hq, ...) to (B, Hkv, ...)."""
    return x.unflatten(1, (kv_heads, -1)).mean(2)
