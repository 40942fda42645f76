"""SEA: sparse linear attention with an estimated mask, distilled from a dense teacher.

arXiv 2310.01777.
"""

from foveate.methods.sea.method import SEA, SEAAttention, Trace

__all__ = ["SEA", "SEAAttention", "Trace"]
