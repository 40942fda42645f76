"""Context parallelism: exact attention over a sequence whose tokens lie on several ranks."""

from foveate.parallel.context.all_gather import AllGather
from foveate.parallel.context.attend import SHARDINGS, ContextParallel, Sequence, sharding_of
from foveate.parallel.context.decode import ShardedCache
from foveate.parallel.context.group_cast import GroupCast
from foveate.parallel.context.groups import GroupLinks, MeshLinks, links_of
from foveate.parallel.context.links import LinkError, Links, Traffic
from foveate.parallel.context.local import LocalLinks, run_local
from foveate.parallel.context.model import use
from foveate.parallel.context.ring import Ring
from foveate.parallel.context.scheme import SCHEMES, scheme_of
from foveate.parallel.context.sharding import (
    Sharding,
    by_work,
    contiguous,
    document_zigzag,
    striped,
    zigzag,
)
from foveate.parallel.context.theory import Sizes, Volume, volume
from foveate.parallel.context.ulysses import Ulysses
from foveate.parallel.context.varlen import Varlen, varlen
from foveate.parallel.context.work import Balance, balance, row_pairs

__all__ = [
    "SCHEMES",
    "SHARDINGS",
    "AllGather",
    "Balance",
    "ContextParallel",
    "GroupCast",
    "GroupLinks",
    "LinkError",
    "Links",
    "LocalLinks",
    "MeshLinks",
    "Ring",
    "Sequence",
    "ShardedCache",
    "Sharding",
    "Sizes",
    "Traffic",
    "Ulysses",
    "Varlen",
    "Volume",
    "balance",
    "by_work",
    "contiguous",
    "document_zigzag",
    "links_of",
    "row_pairs",
    "run_local",
    "scheme_of",
    "sharding_of",
    "striped",
    "use",
    "varlen",
    "volume",
    "zigzag",
]
