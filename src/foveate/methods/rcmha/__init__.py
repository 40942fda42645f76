"""RCMHA: relative attention over queries, keys and values that a short convolution has mixed."""

from foveate.methods.rcmha.convolution import HeadConvolution
from foveate.methods.rcmha.method import RCMHA, RelativeConvolutional

__all__ = ["RCMHA", "HeadConvolution", "RelativeConvolutional"]
