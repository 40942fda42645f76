"""Decoding with attention and experts on different ranks (AFD), as Step-3 does it.

    torchrun --nproc-per-node 3 -m foveate.parallel.disaggregate --attention 1 --ffn 2

Attention ranks hold the caches and go through the layers with several micro-batches in flight; FFN
ranks hold the experts and no state. `Plan` says who does what, `serve` runs a rank.
Step-3, arXiv 2507.19427.
"""

from foveate.parallel.disaggregate.batch import Request
from foveate.parallel.disaggregate.decoder import Decoded
from foveate.parallel.disaggregate.plan import Plan
from foveate.parallel.disaggregate.run import Served, serve, serve_alone
from foveate.parallel.disaggregate.stages import Pace, chrome_trace, write_trace
from foveate.parallel.disaggregate.watch import RankLostError

__all__ = [
    "Decoded",
    "Pace",
    "Plan",
    "RankLostError",
    "Request",
    "Served",
    "chrome_trace",
    "serve",
    "serve_alone",
    "write_trace",
]
