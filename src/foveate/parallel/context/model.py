"""Whole models under context parallelism: ours, and those of transformers.

    cp = ContextParallel(mesh["cp"], "usp(ulysses=2)", "zigzag")
    with use(model, cp) as used:
        loss = model(input_ids=ids, labels=ids).loss        # every rank gives the whole batch
        loss.backward()

Every rank calls the model with the whole sequences; a hook takes its own tokens, with their global
positions, the labels shifted before they are shared out, and every attention layer runs over all
ranks. What comes out is this rank's (`used.sequence.gather` puts it together). The loss is so
scaled that its *mean* over ranks is the loss of one rank with everything: DDP and FSDP2 average
gradients over the same ranks, and arrive at that rank's gradients.

Everything else in a layer works on each token alone, which is why nothing else changes. What mixes
tokens otherwise (mixers, routers that balance over a batch or average over tokens, learnt absolute
positions, attentions that choose keys by their content) is refused, by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.methods import make
from foveate.methods.full import Full
from foveate.nn import Attention as Layer
from foveate.nn import MixerLayer, MoE
from foveate.ops import AttentionOutput, Mask, causal, documents
from foveate.ops.errors import InputError
from foveate.parallel.context.attend import ContextParallel, Sequence
from foveate.parts import Attention, Context, Pattern
from foveate.parts.routing import Scores

# What a layer's own mask may be made of: rules of distance, which hold for any order of tokens.
_BY_DISTANCE = re.compile(r"(causal\(\)|window\(-?\d+, -?\d+\)|[()&|~ ])*")
IGNORED = -100


def use(
    model: nn.Module,
    cp: ContextParallel,
    attention: str | Attention | None = None,
    *,
    mask: Mask | None = None,
) -> Use:
    """Run a model's sequences over several ranks, until undone; a context manager.

    Args:
        model: of `foveate.models`, or of transformers; FSDP2 may have it already, and DDP may wrap
            it (give the model itself, not the wrapper).
        cp: ranks, scheme and sharding.
        attention: of transformers' models, such as "sink-window", whose keys positions alone
            decide; None is full attention. Models of foveate bring their own.
        mask: what holds besides the model's own mask, for the whole sequence, such as
            `documents(cu_seqlens)`.

    Raises:
        InputError: the model, or an attention, needs what one rank doesn't have.
    """
    return Use(model, cp, attention, mask)


class Use:
    """A model in use; `undo()` or the end of a `with` block puts everything back.

    Attributes:
        sequence: of the last forward: who holds which tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        cp: ContextParallel,
        attention: str | Attention | None,
        mask: Mask | None,
    ) -> None:
        self.cp, self.mask = cp, mask
        self.sequence: Sequence | None = None
        self._undo: list[Any] = []
        layers = [m for m in model.modules() if isinstance(m, Layer)]
        for module in model.modules():
            if isinstance(module, MixerLayer):
                raise InputError(
                    f"Context parallelism can't run {type(module.mixer).__name__}: a mixer mixes "
                    "all tokens in its own way, and its ranks hold some of them."
                )
            if isinstance(module, MoE) and module.router.relation is not None:
                raise InputError(
                    f"Context parallelism can't run {type(module.router.relation).__name__}: its "
                    "router looks at all tokens of a sequence, and a rank holds some of them; use "
                    "FoveateConfig(router='top-k')."
                )
            if getattr(getattr(module, "config", None), "registers", 0):
                raise InputError(
                    "Context parallelism can't run a model with register tokens: every rank would "
                    "put them before its own part of the sequence."
                )
            if getattr(module, "embed_positions", None) is not None:
                raise InputError(
                    "Context parallelism needs positions that travel with the tokens (rotary ones, "
                    f"or none); {type(module).__name__} adds learnt absolute ones by index."
                )
        self._ours = bool(layers)
        if layers:
            if attention is not None:
                raise InputError("A model of foveate brings its own attention; leave it out.")
            self._take(layers)
        else:
            from foveate.hf import use as use_hf

            method = (
                make(attention or "full") if not isinstance(attention, Attention) else attention
            )
            self._undo.append(use_hf(model, Spread(self, method, "attention")).undo)
        self._undo.append(model.register_forward_pre_hook(self._share_out, with_kwargs=True).remove)

    def _take(self, layers: list[Layer]) -> None:
        for layer in layers:
            if layer.projection.selects:
                raise InputError(
                    f"Context parallelism can't run {type(layer.projection).__name__}: it chooses "
                    "heads for each token, and ranks must agree on the heads that they exchange."
                )
        for layer in layers:
            before = layer.attention
            spread = Spread(self, before, f"layer {layer.layer}")
            layer.attention = spread
            hook = layer.register_forward_pre_hook(self._place, with_kwargs=True)
            self._undo += [hook.remove, lambda at=layer, was=before: setattr(at, "attention", was)]

    def undo(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    # -- what the hooks do ---------------------------------------------------------------------
    def _place(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tell one of our layers where its tokens stand."""
        assert self.sequence is not None
        ctx = kwargs.get("ctx") or Context(mask=kwargs.pop("mask", None))
        if kwargs.get("cache") is not None:
            raise InputError(_NO_CACHE)
        at = self.positions.to(args[0].device)
        return args, kwargs | {"ctx": replace(ctx, q_positions=at, kv_positions=at)}

    def _share_out(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the model this rank's tokens in place of all."""
        if args:
            kwargs = {"input_ids": args[0]} | kwargs
            if len(args) > 1:
                raise InputError("Under context parallelism give the model's arguments by name.")
        kwargs = dict(kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise InputError(_NO_CACHE)
        self._check_routers(model, kwargs)
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        tokens = kwargs.get(name)
        if not isinstance(tokens, Tensor):
            raise InputError(
                "Under context parallelism the model needs input_ids or inputs_embeds."
            )
        batch, length = tokens.shape[:2]
        kwargs["use_cache"] = False
        self._padded = _check_padding(kwargs.pop("attention_mask", None), tokens)
        own, at = _packed(kwargs.pop("position_ids", None), length)
        base = [m for m in (causal(), own, self.mask) if m is not None]
        whole = base[0]
        for more in base[1:]:
            whole = whole & more
        self._extra = _both(own, self.mask)
        self.sequence = self.cp.sequence(length, whole)
        index = self.sequence.index
        self.positions = index if at is None else at[index]
        kwargs[name] = self.sequence.split(tokens)
        if not self._ours:
            # With a mask of ones transformers doesn't take jumps in positions for new sequences.
            here = tokens.device
            kwargs["position_ids"] = self.positions.to(here)[None].expand(batch, -1)
            kwargs["attention_mask"] = torch.ones(batch, len(index), dtype=torch.long, device=here)
        labels = kwargs.get("labels")
        if labels is not None:
            kwargs |= self._labelled(labels, kwargs)
        return (), kwargs

    def _check_routers(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        """Refuse losses that aren't sums over tokens: their mean over ranks is another loss."""
        balanced = model.training and any(isinstance(m, MoE) and m.balance for m in model.modules())
        asked = kwargs.get("output_router_logits")
        if asked is None:
            asked = getattr(getattr(model, "config", None), "output_router_logits", False)
        if balanced or asked:
            raise InputError(
                "Context parallelism can't train a router's load-balance loss: it looks at all "
                "tokens of a batch, and a rank holds some of them. Set "
                f"{'router_balance=0' if balanced else 'output_router_logits=False'}."
            )
        if any(isinstance(m, Scores) and m.learning for m in model.modules()):
            raise InputError(
                "Context parallelism can't train a router that learns to choose (stable-moe in "
                "its first stage): its loss is a mean over all tokens of a batch, and a rank holds "
                "some of them. Begin with data parallelism, or use router='top-k'."
            )

    def _labelled(self, labels: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Labels shifted before they are shared out, counted over the whole batch."""
        assert self.sequence is not None
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        count = kwargs.get("num_items_in_batch")
        count = (shifted != IGNORED).sum() if count is None else count
        return {
            "labels": self.sequence.split(labels),
            "shift_labels": self.sequence.split(shifted).contiguous(),
            "num_items_in_batch": count / self.cp.ranks,
        }


class Spread(Attention):
    """An attention of a model whose tokens lie on several ranks."""

    def __init__(self, used: Use, inner: Attention, where: str) -> None:
        self.used, self.inner = used, inner
        by_positions = isinstance(inner, Pattern) and (
            isinstance(inner, Full) or type(inner).rule is not Pattern.rule
        )
        if not by_positions:
            raise InputError(
                f"Context parallelism can't run {type(inner).__name__} ({where}): it looks at all "
                "keys, or chooses them by content, and a rank holds some of them. What positions "
                'alone decide works, such as "full", "sink-window" or "a-shape".'
            )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        """Attend over all ranks' keys; shapes of this rank's tokens."""
        sequence = self.used.sequence
        if ctx is None or sequence is None:
            raise InputError("Context parallelism: call the model, not one of its layers.")
        mask = ctx.mask
        if mask is not None and not _BY_DISTANCE.fullmatch(mask.spec):
            raise InputError(
                f"Context parallelism: a layer's own mask is {mask!r}, which isn't told by "
                "distances alone; give what packs or pads as use(model, cp, mask=...)."
            )
        if self.used._padded and (mask is None or "causal()" not in mask.spec):
            raise InputError(
                "Context parallelism: the batch is padded and its tokens see later ones, padding "
                "too; pack sequences with use(model, cp, mask=documents(...)) instead."
            )
        extra = self.used._extra
        whole = _both(mask, extra)
        assert isinstance(self.inner, Pattern)
        if not isinstance(self.inner, Full):
            whole = self.inner.rule(replace(ctx, mask=whole))
            if whole is None:
                raise InputError(
                    f"Context parallelism can't run {self.inner!r}: positions alone don't decide "
                    "its keys."
                )
        options = {name: x for name, x in ctx.options.items() if name != "backend"}
        return sequence.under(whole).attention(q, k, v, **options)


_NO_CACHE = (
    "Context parallelism runs whole sequences, without a cache; decode over "
    "foveate.parallel.context.ShardedCache, or leave `use` to generate on one rank."
)


def _both(one: Mask | None, two: Mask | None) -> Mask | None:
    if one is None or two is None:
        return two if one is None else one
    return one & two


def _check_padding(given: Any, tokens: Tensor) -> bool:
    """Whether there is padding; refused but behind, where causal queries don't see it."""
    if given is None:
        return False
    real = given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None
    if real is None or real.shape != tokens.shape[:2] or bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise InputError(
            "Under context parallelism attention_mask is (B, L), its padding behind the real "
            "tokens; pack sequences with use(model, cp, mask=documents(...)) otherwise."
        )
    return not bool(real.all())


def _packed(position_ids: Tensor | None, length: int) -> tuple[Mask | None, Tensor | None]:
    """(documents where positions begin anew, the positions); None where they just count."""
    if position_ids is None:
        return None, None
    ids = position_ids.reshape(-1, position_ids.shape[-1])
    if ids.shape[-1] != length or not bool((ids == ids[:1]).all()):
        raise InputError(
            f"Under context parallelism position_ids are the same for all rows, of all {length} "
            f"tokens; got {tuple(position_ids.shape)}."
        )
    at = ids[0].cpu().long()
    if not bool(((at.diff() == 1) | (at[1:] == 0)).all()) or int(at[0]):
        raise InputError(
            "Under context parallelism position_ids count from 0, and again from 0 where a packed "
            "sequence begins."
        )
    starts = (at == 0).nonzero()[:, 0].tolist()
    if len(starts) == 1:
        return None, None
    return documents([*starts, length]), at
