"""The cache of one layer: what its projection keeps of every token, and no more.

A projection declares its fields (a name, heads and width of one token's entry); keys and values are
the common two, a latent and a shared rotary key are MLA's. Entries are held in buffers that grow by
doubling, so a decoding step writes its own token and copies nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field

Entries = dict[str, Tensor]
_LEAST = 16


def token_field(name: str, heads: int, width: int) -> Field:
    """A field of `heads` rows of `width` numbers for every token, without a limit."""
    return Field(name, "token", (heads, width), None)


class TokenCache:
    """Entries of all tokens so far, by field.

    Args:
        fields: what one token's entry is made of, each (heads, width).
        capacity: tokens to make room for at once; it grows when that is not enough.

    Raises:
        InputError: a field twice, or one that isn't per token.
    """

    def __init__(self, fields: Sequence[Field], capacity: int = 0) -> None:
        names = [field.name for field in fields]
        if not fields or len(set(names)) < len(names):
            raise InputError(f"TokenCache(fields): expected different names, got {names}.")
        for field in fields:
            if field.unit != "token" or len(field.shape) != 2:
                raise InputError(
                    f"TokenCache(fields): {field.name} has unit {field.unit!r} and shape "
                    f"{field.shape}; expected one (heads, width) for every token."
                )
        self.fields = tuple(fields)
        self.capacity = whole("TokenCache", "capacity", capacity, least=0)
        self._length = 0
        self._held: Entries = {}

    # -- what it holds ---------------------------------------------------------------------------
    def __len__(self) -> int:
        """Tokens held."""
        return self._length

    def __repr__(self) -> str:
        shapes = ", ".join(f"{f.name} {f.shape}" for f in self.fields)
        return f"TokenCache({self._length} tokens; {shapes})"

    @property
    def entries(self) -> Entries:
        """All that is held: field name -> (B, heads, len, width)."""
        return {name: x[:, :, : self._length] for name, x in self._held.items()}

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None while nothing is held."""
        return next((len(x) for x in self._held.values()), None)

    @property
    def elements_per_token(self) -> int:
        """Numbers kept for each token, as declared."""
        return sum(field.shape[0] * field.shape[1] for field in self.fields)

    def bytes(self) -> int:
        """Bytes of the tokens held, measured on the tensors; all rows of the batch together."""
        return sum(x.numel() * x.element_size() for x in self.entries.values())

    def allocated(self) -> int:
        """Bytes of the buffers, with the room for tokens to come."""
        return sum(x.numel() * x.element_size() for x in self._held.values())

    # -- one step ---------------------------------------------------------------------------------
    def append(self, entries: Entries) -> Entries:
        """Take in new tokens and give back all that is held, new ones last.

        Args:
            entries: every field's (B, heads, new, width).

        Returns:
            Every field's (B, heads, len, width); views of the buffers unless gradients are on.

        Raises:
            InputError: a field is missing or unknown, or shapes differ from what is held.
        """
        new = self._check(entries)
        if not self._held:
            self._held = {name: x[:, :, :0] for name, x in entries.items()}
        if torch.is_grad_enabled():  # a buffer that is written to again can't be differentiated
            self._held = {
                name: torch.cat((self._held[name][:, :, : self._length], x), 2)
                for name, x in entries.items()
            }
        else:
            self._grow(self._length + new)
            for name, x in entries.items():
                self._held[name][:, :, self._length : self._length + new] = x
        self._length += new
        return self.entries

    def _grow(self, length: int) -> None:
        fresh = not torch.is_inference_mode_enabled()
        for name, x in self._held.items():
            # What was made under inference_mode can't be written to outside of it.
            if x.shape[2] >= length and x.grad_fn is None and not (fresh and x.is_inference()):
                continue
            room = max(length, 2 * x.shape[2], self.capacity, _LEAST)
            grown = x.new_zeros(x.shape[0], x.shape[1], room, x.shape[3])
            grown[:, :, : self._length] = x[:, :, : self._length]
            self._held[name] = grown

    def _check(self, entries: Entries) -> int:
        names = [field.name for field in self.fields]
        if set(entries) != set(names):
            raise InputError(
                f"append: the cache keeps {', '.join(names)}, got {', '.join(entries) or 'none'}."
            )
        first = entries[names[0]]
        for field in self.fields:
            x = entries[field.name]
            batch, new = first.shape[0], first.shape[2] if first.dim() == 4 else -1
            if x.shape != (batch, field.shape[0], new, field.shape[1]):
                raise InputError(
                    f"append: {field.name} is {tuple(x.shape)}; expected "
                    f"({batch}, {field.shape[0]}, new, {field.shape[1]}), new alike in all fields."
                )
            held = self._held.get(field.name)
            if held is not None and (held.shape[0], held.dtype) != (x.shape[0], x.dtype):
                raise InputError(
                    f"append: the cache holds {held.shape[0]} rows of {held.dtype}, got "
                    f"{x.shape[0]} of {x.dtype}; only the number of tokens may differ."
                )
        return first.shape[2]

    # -- editing ----------------------------------------------------------------------------------
    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer.
        """
        length = whole("truncate", "length", length, least=0)
        if length > self._length:
            raise InputError(f"truncate({length}): the cache holds only {self._length} tokens.")
        self._length = length

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row rows[b] holds (beam search); rows (B',) int64."""
        self._held = {name: x.index_select(0, rows.to(x.device)) for name, x in self._held.items()}

    def evict(self, index: Tensor) -> None:
        """Drop the tokens at index (n,); those behind move up.

        Raises:
            InputError: a place that holds no token.
        """
        places = index.reshape(-1)
        if not len(places):
            return
        if int(places.min()) < 0 or int(places.max()) >= self._length:
            raise InputError(
                f"evict: the cache holds places 0 to {self._length - 1}, got "
                f"{int(places.min())} to {int(places.max())}."
            )
        keep = torch.ones(self._length, dtype=torch.bool, device=places.device)
        keep[places] = False
        rows = keep.nonzero()[:, 0]
        self._held = {name: x.index_select(2, rows.to(x.device)) for name, x in self._held.items()}
        self._length = len(rows)

    def detach(self) -> None:
        """Let no gradient flow into what is held."""
        self._held = {name: x.detach() for name, x in self._held.items()}

    def reset(self) -> None:
        """Forget everything, the batch size included."""
        self._held, self._length = {}, 0
