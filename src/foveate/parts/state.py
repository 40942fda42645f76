"""Attentions that keep a state of their own of the past, and the cache that holds it.

Most attentions decode from keys and values, which the projection's cache keeps. Some need less (the
sums of a linear attention), something else (the values that LUCID decorrelates) or more beside them
(a token's cluster). Those are `Stateful`: `step` takes new tokens and the state of all before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod

from torch import Tensor

from foveate.ops import AttentionOutput
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.attention import Attention
from foveate.parts.cache import Field
from foveate.parts.context import Context


class State:
    """What a layer's attention keeps of the tokens so far.

    As it stands it holds tensors by name, the batch in front; a method whose past can be cut or has
    parts that aren't tensors overrides what differs.

    Args:
        fields: what is kept, with its unit ("token", "block", "sequence" or "ring") and shape.

    Attributes:
        length: tokens that came in, padding included.
        held: name -> (B, ...) tensors.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self.length = 0
        self.held: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Tokens that came in."""
        return self.length

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None while nothing is held."""
        return next((len(x) for x in self.held.values()), None)

    def bytes(self) -> int:
        """Bytes held, measured on the tensors; all rows of the batch together."""
        return sum(x.numel() * x.element_size() for x in self.held.values())

    def reset(self) -> None:
        """Forget everything, the batch size included."""
        self.length, self.held = 0, {}

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row rows[b] holds (beam search); rows (B',) int64."""
        self.held = {name: x.index_select(0, rows.to(x.device)) for name, x in self.held.items()}

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer, or the state is a sum from which none can be taken back.
        """
        length = whole("truncate", "length", length, least=0)
        if length > self.length:
            raise InputError(f"truncate({length}): the state holds only {self.length} tokens.")
        if length == self.length:
            return
        if length:
            raise InputError(
                f"truncate({length}): this attention keeps sums over all {self.length} tokens, "
                "from which none can be taken back; run the shorter prompt again."
            )
        self.reset()


class StateCache:
    """A layer's cache where its attention keeps the past itself; used as a `TokenCache` is.

    Args:
        state: an empty state of the layer's attention.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def __len__(self) -> int:
        """Tokens that came in."""
        return len(self.state)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{f.name} {f.shape} a {f.unit}" for f in self.fields)
        return f"StateCache({len(self)} tokens; {shapes})"

    @property
    def fields(self) -> tuple[Field, ...]:
        """What is kept."""
        return self.state.fields

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None while nothing is held."""
        return self.state.batch

    @property
    def elements_per_token(self) -> int:
        """Numbers that every further token adds, as declared; sums and rings add none."""
        return sum(prod(f.shape) for f in self.fields if f.unit == "token" and f.limit is None)

    def bytes(self) -> int:
        """Bytes held, measured on the tensors; all rows of the batch together."""
        return self.state.bytes()

    def reset(self) -> None:
        """Forget everything."""
        self.state.reset()

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from row rows[b]; rows (B',) int64."""
        self.state.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; see `State.truncate`."""
        self.state.truncate(length)


class Stateful(Attention):
    """An attention that decodes from a state of its own.

    With a `StateCache` in `ctx.cache` a call takes the new tokens alone, adds them to the state and
    returns their outputs, the same as the whole sequence at once would give. `ctx.mask` and the
    positions of `ctx` count all tokens, past ones included; `ctx.real` tells padding among the new.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend: `step` with a state in `ctx.cache`, `full` without."""
        ctx = Context() if ctx is None else ctx
        if isinstance(ctx.cache, StateCache):
            return self.step(q, k, v, ctx, ctx.cache.state)
        return self.full(q, k, v, ctx)

    @abstractmethod
    def full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> AttentionOutput:
        """All tokens at once; shapes as in `Attention.__call__`."""

    @abstractmethod
    def new_state(self) -> State:
        """An empty state."""

    def recalled(self, x: Tensor, x_kv: Tensor, state: State) -> Tensor:
        """What keys and values are made of, where a layer has this state.

        Mostly the new tokens alone. An attention that keeps the layer's input of earlier tokens, to
        make their keys and values anew, puts it before them; `step` then gets more keys than
        queries.

        Args:
            x: (B, n, dim), the layer's input.
            x_kv: (B, n, kv_dim), where keys and values come from; x itself, if nothing else is
                given.
            state: made by `new_state`.
        """
        return x_kv

    @abstractmethod
    def step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State) -> AttentionOutput:
        """The next n >= 1 tokens of each sequence; the first call holds the prompt.

        Args:
            q: (B, Hq, n, D).
            k: (B, Hkv, n, D), of the new tokens alone.
            v: (B, Hkv, n, Dv).
            ctx: with mask and positions over all len(state) + n tokens.
            state: made by `new_state`; it takes the new tokens in.
        """
