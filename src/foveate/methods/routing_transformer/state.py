"""What a Routing Transformer's layer keeps of the past: tokens, their scores, and who is held.

Every token's key, value and scores stay (a truncated state needs them again); beside them the
members that each cluster has now, so that a step looks at one new score for each cluster, and
at w keys where the new token is among the best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods.routing_transformer.members import Held, best
from foveate.ops.errors import InputError
from foveate.parts.cache import Field
from foveate.parts.kv_cache import TokenCache, token_field
from foveate.parts.state import State

if TYPE_CHECKING:
    from foveate.methods.routing_transformer.layer import RoutingAttention


class RoutingState(State):
    """State of one layer.

    Args:
        layer: whose state it is.

    Attributes:
        tokens: by name, all tokens' entries: local_key, local_value of the local heads; key (as
            normalised), value, score (B, Hq, len, C) and, where keys aren't the queries, key_score
            (B, Hkv, len, C) of the routing heads; -inf is padding.
        held: members of each cluster now: place and held_score (B, H, C, w) of queries and the
            lowest score, bar (B, H, C); key_place, held_key_score and key_bar of keys where they
            are others.

    Raises:
        InputError: clusters without a number of members.
    """

    def __init__(self, layer: RoutingAttention) -> None:
        heads, hyper = layer.heads, layer.hyper
        self.separate = not layer.shares(True)
        fields = []
        if layer.local:
            fields.append(token_field("local_key", layer.local_kv, heads.key_dim))
            fields.append(token_field("local_value", layer.local_kv, heads.value_dim))
        members = []
        if layer.routed:
            if hyper.window is None:
                raise InputError(
                    "routing-transformer(window=None): decoding needs the number of a cluster's "
                    "members, which must not grow with the length; give window=."
                )
            keys = layer.routed_kv if self.separate else layer.routed
            fields.append(token_field("key", keys, heads.key_dim))
            fields.append(token_field("value", layer.routed_kv, heads.value_dim))
            fields.append(token_field("score", layer.routed, hyper.clusters))
            size = (hyper.clusters, hyper.window)
            members = [Field("place", "sequence", (layer.routed, *size), 1)]
            members.append(Field("held_score", "sequence", (layer.routed, *size), 1))
            members.append(Field("bar", "sequence", (layer.routed, hyper.clusters), 1))
            if self.separate:
                fields.append(token_field("key_score", keys, hyper.clusters))
                members.append(Field("key_place", "sequence", (keys, *size), 1))
                members.append(Field("held_key_score", "sequence", (keys, *size), 1))
                members.append(Field("key_bar", "sequence", (keys, hyper.clusters), 1))
        super().__init__([*fields, *members])
        self.window = hyper.window
        self.tokens = TokenCache(fields)

    def take(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep new tokens' entries, (B, H, n, width) each; all entries, theirs last."""
        entries = self.tokens.append(new)
        self.length = len(self.tokens)
        return entries

    def members(self, of_keys: bool = False) -> Held:
        """Who is in each cluster now."""
        head = "key_" if of_keys and self.separate else ""
        return Held(self.held[f"{head}place"], self.held[f"held_{head}score"])

    def hold(self, held: Held, of_keys: bool = False) -> None:
        """Who is from now on."""
        head = "key_" if of_keys else ""
        self.held[f"{head}place"], self.held[f"held_{head}score"] = held
        self.held[f"{head}bar"] = held.score.amin(-1)

    def enter(self, score: Tensor, t: int, of_keys: bool = False) -> Tensor:
        """Let token t in where it is among the best: bool (B, H, C).

        Args:
            score: (B, H, C), -inf for padding.
            t: its place.
            of_keys: as in `hold`.
        """
        head = "key_" if of_keys else ""
        names = (f"{head}place", f"held_{head}score", f"{head}bar")
        if not torch.is_inference_mode_enabled():
            for name in names:  # what was made under inference_mode can't be written to
                if self.held[name].is_inference():
                    self.held[name] = self.held[name].clone()
        places, scores, bar = (self.held[name] for name in names)
        enters = score > bar  # the bar is -inf while there is room
        rows = enters.nonzero(as_tuple=True)
        place, kept = places[rows], scores[rows]
        width = place.shape[1]
        count = (place >= 0).sum(1)
        full = count == width
        # Of equal scores the later token goes, as in `best`.
        drop = torch.where(full, width - 1 - kept.flip(1).argmin(1), width)
        steps = torch.arange(width, device=place.device)
        source = (steps + (steps >= drop[:, None])).clamp_max(width - 1)
        slot = torch.where(full, width - 1, count)[:, None]
        place = place.gather(1, source).scatter(1, slot, t)
        kept = kept.gather(1, source).scatter(1, slot, score[rows][:, None])
        places[rows], scores[rows], bar[rows] = place, kept, kept.amin(1)
        return enters

    @property
    @override
    def batch(self) -> int | None:
        return next((len(x) for x in self.tokens.entries.values()), None)

    @override
    def bytes(self) -> int:
        """Bytes held, measured on the tensors; all rows of the batch together."""
        return super().bytes() + self.tokens.bytes()

    @override
    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens.reset()

    @override
    def reorder(self, rows: Tensor) -> None:
        """Let row b go on from what row rows[b] holds; rows (B',) int64."""
        super().reorder(rows)
        self.tokens.reorder(rows)

    @override
    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; members are those of that prefix again.

        Raises:
            InputError: there are fewer.
        """
        self.tokens.truncate(length)
        self.length = length
        if not length:
            self.reset()
        for of_keys in (False, True):
            name = "key_score" if of_keys else "score"
            if name in self.tokens.entries and self.held:
                self.hold(_members(self.tokens.entries[name].mT, self.window), of_keys)


def _members(scores: Tensor, count: int | None) -> Held:
    assert count is not None
    place = best(scores, count, scores > -torch.inf)
    kept = scores.gather(-1, place.clamp_min(0)).masked_fill(place < 0, -torch.inf)
    return Held(place, kept)
