"""One timed pass of a model over a batch of prompts, and decoding from where it ended.

A pass is the whole forward with a cache being filled, logits for the last token only, as generation
starts. On a CPU the attention's share is timed in the same pass; on a GPU that needs waiting after
each layer, so it's a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.compare.dense import Watch, dense
from foveate.hf import use
from foveate.ops import AttentionOutput, Layout
from foveate.parts import Attention, Context
from foveate.parts.attention import mask_layout
from foveate.parts.by_heads import joined
from foveate.parts.context import Work
from foveate.runs.memory import Peak


@dataclass
class Sample:
    """What one layer's attention was given and gave, kept to check it."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    layout: Layout | None
    ctx: Context
    method: Any = None


@dataclass
class Log:
    """What the layers of one pass report; seconds, and counts per (batch entry, head)."""

    build_seconds: float = 0.0
    attend_seconds: float = 0.0
    outside_seconds: float = 0.0
    pairs: dict[int, float] = field(default_factory=dict)
    area: dict[int, float] = field(default_factory=dict)
    mask_pairs: dict[int, float] = field(default_factory=dict)
    mask_area: dict[int, float] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()
    samples: list[Sample] = field(default_factory=list)

    def count(self, layer: int, share: float, work: Layout | Work, whole: Layout) -> None:
        """Add what was visited by a share of a layer's heads, and what the mask allows."""
        for table, value in (
            (self.pairs, work.pairs),
            (self.area, work.tile_area),
            (self.mask_pairs, whole.pairs),
            (self.mask_area, whole.tile_area),
        ):
            table[layer] = table.get(layer, 0.0) + share * value


class Recorder(Attention):
    """A method that tells a log about each call; what it computes stays the same.

    Args:
        method: the attention.
        log: what hears of its calls.
        synchronise: whether to wait for the device at each time.
        heads: how many query heads of a layer it runs; None is all.
    """

    def __init__(
        self, method: Any, log: Log, synchronise: bool, heads: tuple[int, int] | None = None
    ) -> None:
        self.method = method
        self.log = log
        self._synchronise = synchronise
        self._clock = Watch(synchronise)
        self._share = 1.0 if heads is None else heads[0] / heads[1]

    # What a model in use asks of its method.
    @property
    def wants_query_rope(self) -> bool:  # type: ignore[override]
        """As the method."""
        return bool(self.method.wants_query_rope)

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """As the method."""
        return bool(self.method.evicts)

    def split(self, layer: int) -> list[tuple[tuple[int, ...] | None, Attention]] | None:
        """As the method, each part recorded."""
        parts = self.method.split(layer)
        if parts is None:
            return None
        named = [(heads, part) for heads, part in parts if heads is not None]
        if len(named) < len(parts):
            return [(heads, Recorder(part, self.log, self._synchronise)) for heads, part in parts]
        total = sum(len(heads) for heads, _ in named)
        return [
            (tuple(heads), Recorder(part, self.log, self._synchronise, (len(heads), total)))
            for heads, part in joined(named)  # as the model runs them
        ]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Run the method; shapes as in `Attention`."""
        ctx = Context() if ctx is None else ctx
        told: list[Layout | Work] = []
        outside = self.log.outside_seconds

        def stats(
            *, layer: int, layout: Layout | Work, build_seconds: float, attend_seconds: float
        ) -> None:
            start = self._clock.now()
            self.log.build_seconds += build_seconds
            self.log.attend_seconds += attend_seconds
            self.log.count(layer, self._share, layout, mask_layout(ctx.mask, q, k, ctx))
            told.append(layout)
            self.log.outside_seconds += self._clock.now() - start

        start = self._clock.now()
        result: AttentionOutput = self.method(q, k, v, replace(ctx, stats=stats))
        if not told:
            # It tells of no layout, so all of its time is attention.
            spent = self._clock.now() - start - (self.log.outside_seconds - outside)
            self.log.attend_seconds += spent
        if ctx.layer in self.log.keep:
            layout = told[-1] if told and isinstance(told[-1], Layout) else None
            method, q, k = self.method.alone(q, k, ctx)
            kept = replace(ctx, stats=None, store={}, cache=None)
            self.log.samples.append(Sample(ctx.layer, q, k, v, result.out, layout, kept, method))
        return result


@dataclass
class Pass:
    """A finished pass over (B, L) tokens.

    Attributes:
        seconds: for the forward, without what the measuring itself took.
        attention_seconds: of which in attention, layouts apart; None if not timed in this pass.
        build_seconds: of which building layouts.
        hidden: (B, L, dim), what the output head is given.
        logits: (B, vocabulary) of the last token; None for an encoder.
        cache: to go on decoding from; None for an encoder.
        peak_bytes: memory beyond what was held before; None where it can't be measured.
        log: what the layers reported; None for the baseline.
        cache_bytes: of the cache after prefill.
    """

    seconds: float
    attention_seconds: float | None
    build_seconds: float
    hidden: Tensor
    logits: Tensor | None
    cache: Any
    peak_bytes: int | None
    log: Log | None
    cache_bytes: int = 0


class Machine:
    """A model on a device, ready to run passes.

    Args:
        model: transformers' model, in evaluation mode.
        kind: causal-lm, encoder or audio-encoder.
    """

    def __init__(self, model: Any, kind: str) -> None:
        self.model = model
        self.kind = kind
        self.device = torch.device(model.device)
        self.synchronise = self.device.type == "cuda"

    @torch.inference_mode()
    def run(
        self,
        inputs: Tensor,
        method: Any | None,
        *,
        inspect: bool,
        keep: frozenset[int] = frozenset(),
    ) -> Pass:
        """One pass.

        Args:
            inputs: (B, L) int64 tokens, or features of an audio encoder.
            method: an attention; None is the baseline.
            inspect: time the attention as well.
            keep: layers whose q, k, v, output and layout are kept in the log.
        """
        log = Log(keep=keep)
        watch = Watch(self.synchronise)
        inputs = inputs.to(self.device)
        with (
            self._running(method, log if inspect else None, watch if inspect else None),
            Peak(self.device) as peak,
        ):
            start = watch.now()
            hidden, logits, cache = self._forward(inputs)
            seconds = watch.now() - start
        attention = None
        if inspect:
            attention = watch.seconds if method is None else log.attend_seconds
        return Pass(
            seconds - log.outside_seconds,
            attention,
            log.build_seconds,
            hidden,
            logits,
            cache,
            peak.bytes,
            None if method is None else log,
        )

    @torch.inference_mode()
    def decode(
        self, method: Any | None, tokens: Tensor, cache: Any, steps: int
    ) -> tuple[Tensor, list[float]]:
        """Greedy tokens from a cache.

        Args:
            method: as in `run`.
            tokens: (B,) int64, the token that comes first.
            cache: of the pass, goes on growing.
            steps: how many tokens to compute after it.

        Returns:
            The tokens (B, steps), and the seconds of each step.
        """
        made, seconds = [], []
        clock = Watch(self.synchronise)
        with self._running(method, None, None):
            for _ in range(steps):
                start = clock.now()
                out = self.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
                tokens = out.logits[:, -1].argmax(-1)
                seconds.append(clock.now() - start)
                made.append(tokens)
        return torch.stack(made, 1).cpu(), seconds

    @torch.inference_mode()
    def decode_samples(
        self, method: Any, tokens: Tensor, cache: Any, keep: frozenset[int]
    ) -> list[Sample]:
        """One more step of decoding, untimed: what the layers in `keep` were given and gave."""
        log = Log(keep=keep)
        with self._running(method, log, None):
            self.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
        return log.samples

    @torch.inference_mode()
    def follow(self, method: Any, inputs: Tensor, count: int) -> Tensor:
        """Hidden states (B, L, dim) of a text whose last `count` tokens are read one by one.

        So they see what a method that drops keys has kept of those before, as in decoding.
        """
        inputs = inputs.to(self.device)
        caught: list[Tensor] = []
        handle = self._catch(caught)
        try:
            with self._running(method, None, None):
                more: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
                out = self.model(input_ids=inputs[:, :-count], **more)
                for at in range(inputs.shape[1] - count, inputs.shape[1]):
                    more["past_key_values"] = out.past_key_values
                    out = self.model(input_ids=inputs[:, at : at + 1], **more)
        finally:
            handle.remove()
        return torch.cat(caught, 1)

    @contextmanager
    def _running(self, method: Any | None, log: Log | None, watch: Watch | None) -> Iterator[None]:
        if method is None:
            with dense(self.model, watch):
                yield
        else:
            with use(self.model, Recorder(method, log, self.synchronise) if log else method):
                yield

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, Any]:
        if self.kind == "audio-encoder":
            return self.model(inputs).last_hidden_state, None, None
        if self.kind == "encoder":
            return self.model(input_ids=inputs).last_hidden_state, None, None
        caught: list[Tensor] = []
        handle = self._catch(caught)
        try:
            out = self.model(input_ids=inputs, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()
        return caught[-1], out.logits[:, -1], out.past_key_values

    def _catch(self, caught: list[Tensor]) -> Any:
        """Keep what the model's head is given, until the handle is removed."""

        def catch(module: Any, args: Any, output: Any) -> None:
            caught.append(output[0])

        return self.model.base_model.register_forward_hook(catch)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys, values and states that a transformers cache holds."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        told = getattr(layer, "bytes", None)
        if told is not None:
            total += told()
            continue
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                total += value.numel() * value.element_size()
    return total
