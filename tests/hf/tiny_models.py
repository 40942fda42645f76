"""Tiny random models of several families, and batches of random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCAB = 97
WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CAUSAL = ("llama", "qwen3", "gemma2", "gemma3", "gpt_oss")
FULL = ("llama", "qwen3")


def tiny(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A model with random weights, in eval mode, on eager attention."""
    torch.manual_seed(seed)
    model = _make(family, SIZES | sizes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Scores far from uniform, so that a wrong mask shows.
            if weight.dim() > 1:
                weight.normal_(0.0, 0.3)
            if name.endswith("sinks"):
                weight.normal_(0.0, 1.0)
    model.set_attn_implementation("eager")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def _make(family: str, sizes: dict[str, Any]) -> PreTrainedModel:
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    windowed = sizes | {"sliding_window": WINDOW, "layer_types": MIXED}
    if family == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(**windowed, attn_logit_softcapping=2.0, query_pre_attn_scalar=16)
        )
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**windowed, query_pre_attn_scalar=16))
    if family == "gpt_oss":
        return GptOssForCausalLM(
            GptOssConfig(**windowed, num_local_experts=2, num_experts_per_tok=1)
        )
    if family == "bert":
        small = {k: sizes[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
        return BertModel(
            BertConfig(
                **small, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
            )
        )
    if family == "whisper":
        return WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCAB,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=30,
                max_target_positions=64,
                decoder_start_token_id=1,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    raise ValueError(family)


def tokens(*shape: int) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCAB, shape)


def padded(batch: int, length: int, side: str) -> Tensor:
    """A 2-D mask whose rows have ever fewer real tokens."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        pads = 3 * row + 1
        if side == "left":
            mask[row, :pads] = 0
        else:
            mask[row, -pads:] = 0
    return mask


def additive(allowed: Tensor) -> Tensor:
    """A boolean mask as floats to add to the scores."""
    floor = torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape).masked_fill(~allowed, floor)
