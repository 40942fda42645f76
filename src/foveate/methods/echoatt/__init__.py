"""EchoAtt: layers that copy an earlier layer's attention map, and the choice of these layers."""

from foveate.methods.echoatt.attention import EchoAtt, leader_map
from foveate.methods.echoatt.values import EchoValues, ValuesProjection

__all__ = ["EchoAtt", "EchoValues", "ValuesProjection", "leader_map"]
