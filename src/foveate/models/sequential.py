"""A recommender of the next item: MQSA-TED, and SASRec as its case without both.

    h = dropout(E[x] sqrt(D) + P)                      positions count from the end of a sequence
    s = alpha LN(short branch(h)) + (1 - alpha) LN(long branch(h))
    scores = s E^T
    L = cross entropy of the next items + distil x L_kd + l2 / 2 x |all weights|^2

Zhu et al. 2024, arXiv 2311.01056. Training's softmax has one class more, for padding, whose score
is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.methods.mqsa_ted import MQSATED, ROOM, Transitions, WindowQuery, WindowState, log_sums
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole


class Branch(nn.Module):
    """Blocks of one window and a layer norm behind them."""

    def __init__(self, recipe: MQSATED, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(recipe.build(window) for _ in range(recipe.blocks))
        self.norm = nn.LayerNorm(recipe.dim, recipe.eps)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), 0 at padding."""
        for block in self.blocks:
            h = block(h, real)
        h = torch.where(real[..., None], h, torch.ones_like(h))
        return self.norm(h).masked_fill(~real[..., None], 0)

    def step(self, h: Tensor, states: list[WindowState]) -> tuple[Tensor, list[WindowState]]:
        """The next items, all real."""
        after = []
        for block, state in zip(self.blocks, states):
            assert isinstance(block, WindowQuery)
            h, state = block.step(h, state)
            after.append(state)
        return self.norm(h), after


class SequenceState(NamedTuple):
    """What is kept of sequences: their length, and each branch's blocks' states."""

    length: int
    branches: list[list[WindowState]]

    def reorder(self, rows: Tensor) -> SequenceState:
        """The state of these sequences, (B',) int64."""
        moved = [[state.reorder(rows) for state in states] for states in self.branches]
        return SequenceState(self.length, moved)


class SequentialRecommender(nn.Module):
    """Items (B, T) int64, `items` (= V) for padding on the left, to states and scores.

    Args:
        items: V.
        recipe: the hyper-parameters.

    Attributes:
        table: E (V, D).
        places: P (T, D); the last row is the latest item's.
        branches: "short" unless alpha is 0, "long" unless alpha is 1.
    """

    def __init__(self, items: int, recipe: MQSATED | None = None) -> None:
        super().__init__()
        self.items = whole("SequentialRecommender", "items", items, least=1)
        self.recipe = recipe = MQSATED() if recipe is None else recipe
        self.table = nn.Parameter(torch.empty(items, recipe.dim).normal_(0, 0.01))
        self.places = nn.Parameter(torch.empty(recipe.length, recipe.dim).normal_(0, 0.01))
        windows = {"short": 1, "long": recipe.window}
        shares = {"short": recipe.alpha, "long": 1 - recipe.alpha}
        self.shares = {name: share for name, share in shares.items() if share > 0}
        self.branches = nn.ModuleDict({n: Branch(recipe, windows[n]) for n in self.shares})

    def enter(self, items: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """H (B, T, D) and which places are real (B, T).

        Args:
            items: (B, T), T at most the recipe's length.
            places: rows of P, (T,); None aligns to the right end.

        Raises:
            InputError: too many items, or numbers out of range.
        """
        count = items.shape[1]
        if items.dim() != 2 or count > self.recipe.length:
            raise InputError(
                f"SequentialRecommender: expected (B, T) with T of {self.recipe.length} at most, "
                f"got {tuple(items.shape)}; give the last {self.recipe.length} items."
            )
        if items.numel() and not (int(items.min()) >= 0 and int(items.max()) <= self.items):
            raise InputError(
                f"SequentialRecommender: items are 0 ... {self.items - 1}, and {self.items} for "
                f"padding; got {int(items.min())} ... {int(items.max())}."
            )
        real = items < self.items
        padded = torch.cat((self.table, self.table.new_zeros(1, self.table.shape[1])))
        p = self.places[-count:] if places is None else self.places[places]
        h = padded[items] * self.recipe.dim**0.5 + p
        h = functional.dropout(h, self.recipe.dropout, self.training)
        return h.masked_fill(~real[..., None], 0), real

    def forward(self, items: Tensor, places: Tensor | None = None) -> Tensor:
        """States s (B, T, D); scores of all items are `s @ table.T`."""
        h, real = self.enter(items, places)
        mixed = [share * self.branches[name](h, real) for name, share in self.shares.items()]
        return torch.stack(mixed).sum(0)

    def scores(self, items: Tensor) -> Tensor:
        """Of all items to come next, (B, V)."""
        return self(items)[:, -1] @ self.table.T

    @torch.no_grad()
    def looks(self, items: Tensor) -> dict[str, Tensor]:
        """What each branch's last block looked at for the next item: (B, T), a mean over heads."""
        h, real = self.enter(items)
        found = {}
        for name, branch in self.branches.items():
            assert isinstance(branch, Branch)
            x = h
            *before, last = (block for block in branch.blocks if isinstance(block, WindowQuery))
            for block in before:
                x = block(x, real)
            found[name] = last.looks(x, real).mean(1)
        return found

    def new_state(self, batch: int = 1) -> SequenceState:
        """For `step`: sequences without items."""
        states = []
        for branch in self.branches.values():
            assert isinstance(branch, Branch)
            blocks = [block for block in branch.blocks if isinstance(block, WindowQuery)]
            states.append([block.new_state(batch, self.table) for block in blocks])
        return SequenceState(0, states)

    def step(
        self, items: Tensor, state: SequenceState, first: int = 0
    ) -> tuple[Tensor, SequenceState]:
        """The next items (B, n), all real, of sequences whose rows of P were fixed at the start.

        An item keeps its row of P for good, as a cache of keys needs: a sequence's first item has
        row `first`. `forward` counts rows from the end instead, as the paper does, so that each new
        item moves all rows; the two agree where `forward` is given the same `places`.

        Returns:
            s (B, n, D) and the state behind them.
        """
        count = items.shape[1]
        begin = first + state.length
        if begin + count > self.recipe.length:
            raise InputError(
                f"SequentialRecommender.step: rows {begin} ... {begin + count - 1} of "
                f"{self.recipe.length}; begin anew with the latest items."
            )
        h, real = self.enter(items, torch.arange(begin, begin + count, device=items.device))
        if not bool(real.all()):
            raise InputError("SequentialRecommender.step: expected no padding among new items.")
        mixed, after = [], []
        for (name, share), states in zip(self.shares.items(), state.branches):
            branch = self.branches[name]
            assert isinstance(branch, Branch)
            s, kept = branch.step(h, states)
            mixed.append(share * s)
            after.append(kept)
        return torch.stack(mixed).sum(0), SequenceState(state.length + count, after)

    def losses(
        self,
        items: Tensor,
        targets: Tensor,
        teacher: Transitions | None = None,
        l2: float = 0.0,
        room: int = ROOM,
    ) -> dict[str, Tensor]:
        """The parts of L, weighted, so that their sum is it.

        Args:
            items: (B, T), padded on the left.
            targets: (B, T), the item that follows each; read where `items` is real.
            teacher: for L_kd; needed unless the recipe's `distil` is 0.
            l2: weight of all weights' squared norm.
            room: as `log_sums`.

        Raises:
            InputError: there is no teacher, or no real item.
        """
        recipe, real = self.recipe, items < self.items
        if not bool(real.any()):
            raise InputError("SequentialRecommender.losses: there is no item in the batch.")
        s = self(items)[real]
        own = (s * self.table[targets[real]]).sum(1)
        every = log_sums(s, self.table, room)
        found = {"next": (torch.logaddexp(every, torch.zeros_like(every)) - own).mean()}
        if recipe.distil:
            if teacher is None:
                raise InputError(
                    f"SequentialRecommender: distil={recipe.distil} needs the transitions of the "
                    "training sequences, foveate.methods.mqsa_ted.Transitions."
                )
            dropout = recipe.dropout if self.training else 0.0
            found["transitions"] = recipe.distil * teacher.loss(
                self.table, items[real], recipe.tau, dropout, room
            )
        if l2:
            squares = torch.stack([p.square().sum() for p in self.parameters()])
            found["l2"] = l2 / 2 * squares.sum()
        return found
