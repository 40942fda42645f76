"""transformers' Doge models with their own dynamic mask attention, run so that it is sparse.

DogeAttention makes its keep sets as a dense mask for every head, (B, H, Lq, Lkv) numbers, and runs
dense attention under it. Here the same formulas with the same weights run over the keys that are
kept (`foveate.methods.dma`); logits agree to rounding. The model's cache stays whole. Unlike
`foveate.use` this replaces the forward of the attention modules, which make the mask themselves.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.errors import ModelError
from foveate.hf.view import view_of
from foveate.methods.dma import DMA, DynamicMask
from foveate.parts import Context, Heads


def dynamic_mask(model: nn.Module) -> DogeUse:
    """Run a Doge model's attention on the keys that it keeps, until undone.

        foveate.hf.dynamic_mask(model)              # stays until .undo()
        with foveate.hf.dynamic_mask(model):
            model.generate(...)

    Weights stay where they are: training goes on, and what is saved is an ordinary Doge model. Of
    equally important keys the later one is kept (transformers' own choice is unspecified); in the
    first layer a token that occurs again is as important as before, so such ties do happen.

    Raises:
        ModelError: no Doge model, one with a sliding window, or one that is in use already.
    """
    return DogeUse(model)


class DogeUse:
    """A Doge model in use; `undo()` or the end of a `with` block puts everything back."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.models.doge.modeling_doge import DogeAttention

        found = [module for module in model.modules() if isinstance(module, DogeAttention)]
        if not found:
            raise ModelError(
                f"dynamic_mask: {type(model).__name__} has no DogeAttention; build your own model "
                'with foveate.Attention(attention="dma").'
            )
        if any(module.config.sliding_window is not None for module in found):
            raise ModelError("dynamic_mask: a Doge model with a sliding window isn't supported.")
        if any("forward" in vars(module) for module in found):
            raise ModelError("dynamic_mask: the model is in use already; call .undo() first.")
        self._modules = found
        for module in found:
            module.forward = _Forward(module)

    def undo(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        for module in self._modules:
            vars(module).pop("forward", None)
        self._modules = []

    def __enter__(self) -> DogeUse:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def method_of(module: Any) -> DynamicMask:
    """The dynamic mask attention of a DogeAttention, on that module's own W_dt and A."""
    config, dim = module.config, module.head_dim
    heads = Heads(
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, dim, dim,
        module.layer_idx or 0,
    )  # fmt: skip
    with torch.device("meta"):  # weights of its own would be drawn, from the caller's generator
        method = DMA(module.keep_window_size, bias=module.dt_proj.bias is not None).build(heads)
    method.importance.A, method.importance.dt_proj = module.A, module.dt_proj
    return method


class _Forward:
    """What a DogeAttention runs in place of its own forward."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

        module = self.module
        if kwargs.get("output_attentions"):
            raise ModelError("dynamic_mask: attention weights are never formed here.")
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q = module.q_norm(module.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = module.k_norm(module.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = module.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        view = view_of(
            attention_mask, q_len=q.shape[2], kv_len=k.shape[2], is_causal=True, sliding_window=None
        )
        ctx = Context(
            mask=view.mask,
            q_positions=view.q_positions,
            kv_positions=view.kv_positions,
            bias=view.bias,
            scale=module.scaling,
            layer=module.layer_idx or 0,
            dropout=float(module.attention_dropout or 0.0) if module.training else 0.0,
        )
        # Made anew from the module's weights: they may have been moved or replaced since.
        result = method_of(module)(q, k[:, :, : view.kv_len], v[:, :, : view.kv_len], ctx)
        return module.o_proj(result.out.transpose(1, 2).flatten(2)), None
