"""The job of `foveate circuits`: channels from weights, then what happens without them.

    read the heads -> decompose OV -> score every component into every later head -> rank
    with a task: find the heads that look at the answer, remove what they are told, rescale it

Without a task no token is run: weights alone say who could talk to whom. With one, a component that
stands out into a mover's query is taken away at the last token: first for that mover alone (its
inhibition, attention to the answer minus that to another, should shrink), then for all (the answers
should get worse). As a control the same is done with random directions of the same heads' outputs.

The component that matters most is then set to multiples of what it is ("steered"), and the mover's
attention to the first, second ... listed word watched. Laundry also rescales: up to three of the
components taken away, those that inhibit most, times one factor that is chosen on other prompts
than it is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.lens.circuits_look import Keep, Look, Tell, measure_anew
from foveate.lens.composition import KINDS
from foveate.lens.reading import Reading
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole

TASKS = ("none", "ioi", "laundry")


@dataclass(frozen=True)
class Circuits:
    """What is looked for in a model's heads.

    Attributes:
        fold: the gain of the norm before attention goes into the maps that read.
        offset: how far keys stand behind queries, where positions are rotary; None leaves the
            rotation out.
        kinds: of what later heads are fed: any of "q", "k", "v".
        top: channels to tell of each kind.
        into: later heads as "layer.head"; None is all.
        task: "ioi", "laundry", or "none" for weights alone.
        items: the longest list of the laundry task.
        prompts: of the task.
        movers: heads that are looked at closely.
        tried: components taken away, of each mover.
        seed: of prompts and controls.

    Raises:
        InputError: a number out of its range, or an unknown word.
    """

    fold: bool = True
    offset: int | None = None
    kinds: str = "qkv"
    top: int = 10
    into: Sequence[str] | None = None
    task: str = "none"
    items: int = 8
    prompts: int = 32
    movers: int = 2
    tried: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        Reading(self.fold, offset=self.offset)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise InputError(f"Circuits(kinds={self.kinds!r}): expected letters out of qkv.")
        if self.task not in TASKS:
            raise InputError(f"Circuits(task={self.task!r}): {nearest(str(self.task), TASKS)}")
        for name in ("top", "prompts", "movers", "tried"):
            whole("Circuits", name, getattr(self, name), least=1)
        whole("Circuits", "items", self.items, least=3)
        self.places()

    def places(self) -> list[tuple[int, int]] | None:
        """`into` as numbers."""
        if self.into is None:
            return None
        found = []
        for text in self.into:
            layer, dot, head = str(text).partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise InputError(f"Circuits(into={text!r}): expected layer.head, such as 9.6.")
            found.append((int(layer), int(head)))
        return found

    def __call__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        tell: Tell = lambda share, doing: None,
        keep: Keep = measure_anew,
    ) -> dict[str, Any]:
        """Look into a model.

        Args:
            model: any that `Reading` reads, in evaluation mode.
            tokenizer: of transformers, for a task.
            tell: takes the share that is done, and what it is doing.
            keep: where figures of the task are kept, so that a look that was stopped goes on.

        Returns:
            Plain data: "channels" by kind, "maps" (by kind the composition of whole heads and the
            highest z of a component, as N x N lists with None), and the task's figures.

        Raises:
            InputError: a model whose heads can't be read, or a head that isn't there.
        """
        if self.task != "none" and tokenizer is None:
            raise InputError(f"Circuits(task={self.task!r}): its prompts need a tokenizer.")
        tell(0.0, "reading the heads")
        look = Look(model, self, tell, keep)
        facts = look.weights()
        if self.task != "none":
            facts["task"] = look.task(tokenizer)
        tell(1.0, "")
        return facts
