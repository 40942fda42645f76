"""A block's cache where its router keeps something of earlier tokens too."""

from __future__ import annotations

from torch import Tensor

from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache
from foveate.parts.state import StateCache


class BlockCache:
    """Two caches of the same tokens that are used as one.

    Args:
        mixing: of the attention layer, or of the mixer in its place.
        routes: of the router.
    """

    def __init__(self, mixing: TokenCache | StateCache, routes: TokenCache) -> None:
        self.mixing, self.routes = mixing, routes

    def __len__(self) -> int:
        """Tokens held."""
        return len(self.mixing)

    def __repr__(self) -> str:
        return f"BlockCache({self.mixing!r}, {self.routes!r})"

    @property
    def fields(self) -> tuple[Field, ...]:
        """What is kept."""
        return self.mixing.fields + self.routes.fields

    @property
    def batch(self) -> int | None:
        """Rows of the batch; None while nothing is held."""
        return self.mixing.batch

    @property
    def elements_per_token(self) -> int:
        """Numbers that every further token adds, as declared."""
        return self.mixing.elements_per_token + self.routes.elements_per_token

    def bytes(self) -> int:
        """Bytes held, measured on the tensors; all rows of the batch together."""
        return self.mixing.bytes() + self.routes.bytes()

    def reset(self) -> None:
        """Forget everything."""
        self.mixing.reset()
        self.routes.reset()

    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from row rows[b]; rows (B',) int64."""
        self.mixing.reorder(rows)
        self.routes.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer, or the mixing layer can't go back.
        """
        self.mixing.truncate(length)  # may refuse, and then nothing has changed
        self.routes.truncate(length)
