"""A transformers model as `parts.fitting.Frozen`: it runs with any attention and doesn't change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.hf.errors import ModelError
from foveate.hf.fit.artefacts import fingerprint
from foveate.hf.places import sites
from foveate.hf.using import use
from foveate.parts.attention import Attention
from foveate.parts.fitting import Batch

_CHUNK = 512  # tokens whose logits are held at once


class FrozenModel:
    """A causal model of transformers, its weights frozen while it is fitted on.

    Raises:
        ModelError: it isn't one, or its attention can't be reached.
    """

    def __init__(self, model: Any) -> None:
        found = [s for s in sites(model).values() if not s.cross]
        config = model.config.get_text_config(decoder=True)
        if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "lm_head"):
            raise ModelError(
                f"{type(model).__name__} is no causal language model, which is what fits run on."
            )
        self.model = model.eval().requires_grad_(False)
        self.layers = tuple(site.layer for site in found)
        heads = config.num_attention_heads
        self.heads = int(heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.fingerprint = fingerprint(model)

    def run(self, ids: Tensor, attention: Attention) -> Tensor:
        """Hidden states (B, L, dim) of tokens (B, L), with this attention in every layer."""
        with use(self.model, attention):
            out = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy over each sequence's scored tokens: (B,) in fp32."""
        scored = batch.scored.to(hidden.device)[:, 1:]
        ids = batch.ids.to(hidden.device)[:, 1:]
        found = []
        for b in range(len(ids)):
            at = scored[b].nonzero()[:, 0]
            total = hidden.new_zeros((), dtype=torch.float32)
            for part in at.split(_CHUNK):
                logits = self.model.lm_head(hidden[b, part]).float()
                total = total + torch.nn.functional.cross_entropy(
                    logits, ids[b, part], reduction="sum"
                )
            found.append(total / max(1, len(at)))
        return torch.stack(found)
