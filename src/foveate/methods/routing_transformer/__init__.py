"""Routing Transformer: local heads, and heads that attend within clusters of like tokens."""

from foveate.methods.routing_transformer.layer import RoutingAttention
from foveate.methods.routing_transformer.recipe import RoutingTransformer

__all__ = ["RoutingAttention", "RoutingTransformer"]
