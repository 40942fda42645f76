"""HyperAttention: large entries found by hashing and sorting, the rest from a few weighted samples.

Han et al. 2023, arXiv 2310.05869. `sort_lsh` finds what meets on the diagonal, `recursion` halves
causal attention, `heavy` and `samples` are the two parts that `method` merges by their lse, and
`measures` has the paper's alpha and kappa.
"""

from foveate.methods.hyperattention.measures import alpha, kappa
from foveate.methods.hyperattention.method import HyperAttention

__all__ = ["HyperAttention", "alpha", "kappa"]
