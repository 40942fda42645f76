"""Flow-Attention: linear attention with competition and allocation from flow conservation."""

from foveate.methods.flowformer.flows import Flows
from foveate.methods.flowformer.method import Flowformer

__all__ = ["Flowformer", "Flows"]
