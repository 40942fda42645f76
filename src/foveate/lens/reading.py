"""Where a model's heads lie in its weights, and their maps as `Heads`.

Read are foveate's own layers with multi-head, grouped-query or multi-query projections, and of
transformers the families that name their maps q_proj, k_proj, v_proj and o_proj (Llama, Qwen2,
Mistral, OPT ...), GPT-2's c_attn and GPT-NeoX's query_key_value (Pythia).

Norms before attention fold into the maps that read: norm(x) W = x_hat (diag(gamma) W), and a
LayerNorm, which subtracts the mean, sees nothing of the direction of all ones: it is taken out of
the columns of what reads and the rows of what writes. Biases and the norm's own offset are left
aside. The gain is measured on the norm itself, so that (1 + gamma) is right too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.lens.circuits import Heads
from foveate.methods.gqa import GroupedProjection
from foveate.nn import Attention, Block
from foveate.ops.errors import InputError
from foveate.parts.rope import Rope

_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_BEHIND = ("pre_feedforward_layernorm", "post_self_attn_layernorm")  # Gemma 2, GLM-4 and their kin
_BETWEEN = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
_SCALES = (
    "residual_multiplier", "attention_in_multiplier", "attention_out_multiplier", "key_multiplier",
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """The heads of one map: a linear module, and which of its outputs (or inputs) each head has.

    Attributes:
        module: nn.Linear, or GPT-2's Conv1D (whose weight is transposed).
        index: (H, d) int64.
        reads: the heads are parts of the module's output; else of its input (W_O).
    """

    module: nn.Module
    index: Tensor
    reads: bool = True

    def weight(self) -> Tensor:
        """(H, D, d) of a map that reads, (H, d, D) of W_O; a copy."""
        return self._taken(self.index)

    def weight_of(self, head: int) -> Tensor:
        """(D, d) of one head of a map that reads, (d, D) of W_O; a copy."""
        return self._taken(self.index[head])

    def _taken(self, index: Tensor) -> Tensor:
        given: Any = self.module.weight
        matrix = given if type(self.module).__name__ == "Conv1D" else given.T  # (in, out)
        index = index.to(given.device)
        if self.reads:
            return matrix.detach()[:, index].movedim(0, -2)  # (D, H, d) -> (H, D, d)
        return matrix.detach()[index]


@dataclass(frozen=True)
class Place:
    """One attention layer of a model.

    Attributes:
        layer: its index, from 0.
        norm: what its input goes through first; None is nothing.
        query, key, value, out: the maps; of grouped heads key and value have fewer.
        rope: its rotary positions, or None.
        source: the attention module.
    """

    layer: int
    norm: nn.Module | None
    query: Slot
    key: Slot
    value: Slot
    out: Slot
    rope: Rope | None
    source: nn.Module

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.query.index)

    def slot(self, kind: str) -> Slot:
        """The map of "q", "k" or "v"."""
        return {"q": self.query, "k": self.key, "v": self.value}[kind]


@dataclass(frozen=True)
class Reading:
    """How the heads of a model are read, before anything is decomposed.

    Attributes:
        fold: the gain of the norm before attention goes into the maps that read.
        centre: behind a LayerNorm, the direction of all ones is taken out; without `fold`, too.
        offset: how far keys stand behind queries, where positions are rotary; None leaves the
            rotation out.
        double: decompose in float64, else in the weights' own precision, at least float32.

    Raises:
        InputError: offset is no integer of 0 or more.
    """

    fold: bool = True
    centre: bool = True
    offset: int | None = None
    double: bool = True

    def __post_init__(self) -> None:
        if self.offset is not None and (not isinstance(self.offset, int) or self.offset < 0):
            raise InputError(
                f"Reading(offset={self.offset!r}): expected 0 or more tokens, or None for no "
                "rotation."
            )

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Heads:
        """The heads of a model's self-attention, by layer.

        Raises:
            InputError: the model's attention isn't of a kind that can be read.
        """
        found: list[tuple[Tensor, ...]] = []
        ropes: dict[int, Rope | None] = {}
        for place in places(model):
            work = torch.promote_types(place.query.weight().dtype, torch.float32)
            work = torch.float64 if self.double else work
            q, k, v, o = (
                s.weight().to(work) for s in (place.query, place.key, place.value, place.out)
            )
            dim = q.shape[1]
            if place.norm is not None:
                gain, centres = gain_of(place.norm, dim)
                if self.fold:
                    q, k, v = (gain.to(q)[:, None] * x for x in (q, k, v))
                if self.centre and centres:
                    q, k, v = (x - x.mean(1, keepdim=True) for x in (q, k, v))
                    o = o - o.mean(2, keepdim=True)
            group = len(q) // len(k)
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            head = torch.arange(len(q))
            found.append((q, k, v, o, torch.full_like(head, place.layer), head))
            ropes[place.layer] = place.rope
        q, k, v, o, layer, head = (torch.cat(parts) for parts in zip(*found))
        return Heads(q, k, v, o, layer, head, ropes)


@torch.no_grad()
def gain_of(norm: nn.Module, dim: int) -> tuple[Tensor, bool]:
    """The gain (dim,) of a norm, and whether it subtracts the mean, found by trying it."""
    like = next(norm.parameters(), torch.zeros(1))
    far = 1e3  # its epsilon is nothing beside that
    wave = torch.arange(dim, dtype=torch.float64) % 2 * 2 - 1
    if dim % 2:  # of mean 0, without a zero
        wave = torch.where(torch.arange(dim) == dim - 1, 2.0, wave)
        wave[0] -= wave.sum()
    wave = wave / wave.square().mean().sqrt()
    given = (far * wave).to(like)
    ahead = norm(given[None, None])[0, 0].double() - norm(-given[None, None])[0, 0].double()
    gain = ahead / 2 / (given.double() / far)
    flat = torch.full((1, 1, dim), far).to(like)
    moved = (norm(flat) - norm(-flat)).double().abs().max()
    return gain, bool(moved <= 0.1 * gain.abs().max())


def places(model: nn.Module) -> list[Place]:
    """The self-attention layers of a model, in order.

    Raises:
        InputError: it has none that can be read.
    """
    ours = [m for m in model.modules() if isinstance(m, Attention)]
    found = list(_ours(model, ours) if ours else _transformers(model))
    if not found:
        raise InputError(
            f"{type(model).__name__} has no attention that can be read; expected foveate.Attention "
            "layers, or a causal model of transformers."
        )
    return found


def _ours(model: nn.Module, layers: list[Attention]) -> Iterator[Place]:
    norms = {id(b.attention): b.attention_norm for b in model.modules() if isinstance(b, Block)}
    for number, layer in enumerate(layers):
        p = layer.projection
        if type(p) is not GroupedProjection:
            raise InputError(
                f"Layer {number}: its projection is {type(p).__name__}; heads are read of mha, gqa "
                "and mqa, whose W_Q, W_K, W_V and W_O can be sliced by head."
            )
        yield Place(
            number,
            norms.get(id(layer)),
            *_parted(p.q, p.k, p.v, p.out, p.heads, p.kv_heads, p.head_dim),
            layer.rope,
            layer,
        )


def _parted(
    q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module, heads: int, kv_heads: int, width: int
) -> tuple[Slot, Slot, Slot, Slot]:
    mine, theirs = _counted(heads, width), _counted(kv_heads, width)
    return Slot(q, mine), Slot(k, theirs), Slot(v, theirs), Slot(out, mine, reads=False)


def _counted(heads: int, width: int, step: int | None = None, first: int = 0) -> Tensor:
    """(heads, width) indices: head h has first + step h ... of `width` numbers."""
    starts = first + torch.arange(heads) * (width if step is None else step)
    return starts[:, None] + torch.arange(width)


def _transformers(model: nn.Module) -> Iterator[Place]:
    if not hasattr(model, "config"):
        return
    from foveate.hf.places import sites
    from foveate.hf.rotary import ropes

    given: Any = model.config
    config = given.get_text_config(decoder=True)
    if any(getattr(config, name, 1.0) != 1.0 for name in _SCALES):
        raise InputError(
            f"{type(model).__name__} scales what its layers read or add to the residual stream, so "
            "it isn't what its maps read and write; such models can't be read."
        )
    if not getattr(config, "do_layer_norm_before", True):
        raise InputError(f"{type(model).__name__} normalises behind its layers, not before them.")
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    rotary = any(n.rpartition(".")[2] == "rotary_emb" for n, _ in model.named_modules())
    turning: dict[int, Rope | None] = ropes(model) if rotary else {}
    for module, site in sites(model).items():
        if site.cross:
            raise InputError(f"{site.name} attends across; heads are read of decoders only.")
        parent: Any = model.get_submodule(site.name.rpartition(".")[0])
        norm = next((getattr(parent, n) for n in _NORMS if hasattr(parent, n)), None)
        if norm is None:
            raise InputError(
                f"{site.name}: the norm before it isn't found ({', '.join(_NORMS)}), so what its "
                "heads read isn't known; heads are read of pre-norm decoders."
            )
        if any(hasattr(parent, name) for name in _BEHIND):
            raise InputError(
                f"{site.name}: what its heads write is normalised before it is added, so it is "
                "no product of two matrices and has no OV circuit."
            )
        if any(getattr(module, name, None) is not None for name in _BETWEEN):
            raise InputError(
                f"{site.name} normalises queries and keys, so that its scores are no product of "
                "two matrices and have no QK circuit."
            )
        slots = _slots(module, heads, kv_heads)
        if (odd := _unknown(module, slots)) is not None:
            raise InputError(
                f"{site.name} has {odd} beside its four maps, so what its heads read or write may "
                "be no product of two matrices; such models can't be read."
            )
        yield Place(site.layer, norm, *slots, turning.get(site.layer), module)


def _unknown(module: nn.Module, slots: tuple[Slot, ...]) -> str | None:
    """The name of a part that does something to heads, such as a norm before W_O or a gate."""
    maps = {id(slot.module) for slot in slots}
    for name, part in module.named_children():
        harmless = isinstance(part, nn.Dropout | nn.Identity) or "rotary" in name
        if id(part) not in maps and not harmless:
            return name
    return None


def _slots(module: Any, heads: int, kv_heads: int) -> tuple[Slot, Slot, Slot, Slot]:
    out = next((n for n in ("o_proj", "out_proj", "c_proj", "dense") if hasattr(module, n)), None)
    if out is not None and all(hasattr(module, f"{name}_proj") for name in "qkv"):
        width = module.q_proj.weight.shape[0] // heads
        maps = (module.q_proj, module.k_proj, module.v_proj, getattr(module, out))
        return _parted(*maps, heads, kv_heads, width)
    if out is not None and hasattr(module, "c_attn"):  # [q | k | v], each head by head
        if type(module.c_attn).__name__ != "Conv1D":  # GPTBigCode's: other orders, shared keys
            raise InputError(f"{type(module).__name__}: its heads stand in an unknown order.")
        width = module.c_attn.weight.shape[1] // (3 * heads)
        parts = [Slot(module.c_attn, _counted(heads, width, first=n * heads * width)) for n in
                 range(3)]  # fmt: skip
        return (*parts, Slot(getattr(module, out), _counted(heads, width), reads=False))  # type: ignore[return-value]
    if out is not None and hasattr(module, "query_key_value"):  # head by head, each [q | k | v]
        width = module.query_key_value.weight.shape[0] // (3 * heads)
        if module.query_key_value.weight.shape[0] != 3 * heads * width or kv_heads != heads:
            raise InputError(f"{type(module).__name__}: its heads share keys, in an unknown order.")
        parts = [
            Slot(module.query_key_value, _counted(heads, width, 3 * width, n * width))
            for n in range(3)
        ]
        return (*parts, Slot(getattr(module, out), _counted(heads, width), reads=False))  # type: ignore[return-value]
    raise InputError(
        f"{type(module).__name__}: its maps aren't named as in Llama (q_proj ...), GPT-2 (c_attn) "
        "or GPT-NeoX (query_key_value), so its heads can't be read."
    )
