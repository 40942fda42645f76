"""Attention of a query to pairs of tokens, exact or in near-linear time; arXiv 2310.04064."""

from foveate.methods.tensor_attention.features import (
    causal_scan,
    full,
    key_features,
    query_features,
    rank,
)
from foveate.methods.tensor_attention.layer import TensorAttention, TensorLayer
from foveate.methods.tensor_attention.method import Form, bound, tensor_attention
from foveate.methods.tensor_attention.polynomial import Polynomial, degree_for, polynomial

__all__ = [
    "Form", "Polynomial", "TensorAttention", "TensorLayer", "bound", "causal_scan", "degree_for",
    "full", "key_features", "polynomial", "query_features", "rank", "tensor_attention",
]  # fmt: skip
