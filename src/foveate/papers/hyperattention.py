"""HyperAttention: near-linear work, and hashing that finds what random samples miss.

Three parts:

- **counts**: elements of the tiles that the method's own layouts visit, at 4,096 to 131,072 tokens,
  with the paper's b = m = 256 and min_seq_len = 4096. The exponent of the growth is 1 without a
  mask; causal attention, whose triangles are exact, is taken between 16,384 and 131,072.
- **clustered**: queries and keys around the same 64 unit centroids (4 c + 0.3 N(0, I), d = 32,
  scale 1), values around one vector for each. Relative error of the output in the Frobenius norm at
  n = 2048 with b = m = 64: sorted blocks and samples, against as many samples without blocks,
  random blocks and samples, and sorted blocks alone. With 32 centroids, where as many samples do
  nearly as well, the same is told without a condition.
- **model**: SmolLM2-135M with the prefill of its last k layers replaced, at 2,048 tokens of
  Wikipedia with b = m = 64 and min_seq_len = 256: perplexity, without and with the first 32 columns
  in M_H, and the median over heads of alpha / n. Told without a condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from foveate.methods import make
from foveate.methods.hyperattention import HyperAttention, alpha
from foveate.ops import AttentionOutput, attention, causal
from foveate.papers.harness import Check, Found, Paper, Trial, at_most, difference
from foveate.parts import Attention, Context
from foveate.runs.clusters import clusters

OURS, BLOCKS = "sortLSH + samples", "sortLSH blocks"
SAMPLES, RANDOM = "samples only", "random blocks + samples"
FEW = "32 centroids: "
SIZES = (4096, 16_384, 131_072)
LAST = (5, 10, 20, 30)
FIRST = 32
DENSE, IN_HEAVY = "dense", ", {} columns in M_H"


def run(trial: Trial) -> Found:
    """Run one part."""
    if trial.cell == "counts":
        return counts()
    if trial.cell == "model":
        return model(trial)
    few = trial.cell == "clustered 32"
    found = clustered(trial, 32 if few else 64)
    return {FEW * few + arm: {"error": error} for arm, error in found.items()}


# -- counts -------------------------------------------------------------------------------------
@torch.no_grad()
def counts() -> Found:
    """Elements visited at each size, the exponents, and the cost formula's."""
    method = HyperAttention()
    both, work, area = method.block_size + method.sample_size, {}, {}
    for n in SIZES:
        x = torch.randn(1, 1, n, 8)
        for name, mask in (("", None), ("causal ", causal())):
            layouts = method.layouts(x, x, x, Context(mask=mask))
            area[name, n] = sum(
                one.cols.numel() * one.q_tile * one.kv_tile for one in layouts if one is not None
            )
            levels = math.log2(n / method.min_seq_len)
            half = n * method.min_seq_len / 2 + levels * n / 2 * both
            work[name, n] = half if mask is not None else n * both
    least, middle, most = SIZES
    off = max(abs(area[at] / work[at] - 1) for at in area)
    return {
        "HyperAttention": {
            "exponent": _exponent(area["", least], area["", most], most / least),
            "causal exponent": _exponent(
                area["causal ", middle], area["causal ", most], most / middle
            ),
            "off the formula": off,
        },
        "exact": {
            "exponent": 2.0,
            "causal exponent": _exponent(
                causal().pairs(middle, middle), causal().pairs(most, most), most / middle
            ),
        },
    }


def _exponent(small: float, large: float, times: float) -> float:
    return round(math.log(large / small, times), 6)


# -- clustered data -----------------------------------------------------------------------------
@dataclass(frozen=True)
class RandomBlocks(HyperAttention):
    """Sorted by nothing: blocks of random queries and random keys."""

    @override
    def order(self, q: Tensor, k: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(q.shape[:3]).argsort(-1), torch.rand(k.shape[:3]).argsort(-1)


@torch.no_grad()
def clustered(trial: Trial, centroids: int) -> dict[str, float]:
    """Relative error of each arm."""
    torch.manual_seed(trial.seed)
    n, size = (512, 32) if trial.quick else (2048, 64)
    q, k, v = clusters(n, centroids)
    true = attention(q, k, v, scale=1.0).out
    ctx = Context(scale=1.0)
    fields: dict[str, Any] = {"block_size": size, "min_seq_len": 2, "seed": trial.seed}
    at = torch.randint(n, (2 * size,))
    outs = {
        OURS: HyperAttention(sample_size=size, **fields)(q, k, v, ctx),
        SAMPLES: attention(q, k[:, :, at], v[:, :, at], scale=1.0),
        RANDOM: RandomBlocks(sample_size=size, **fields)(q, k, v, ctx),
        BLOCKS: HyperAttention(sample_size=0, **fields)(q, k, v, ctx),
    }
    return {arm: float(relative_error(made.out, true)) for arm, made in outs.items()}


def relative_error(out: Tensor, true: Tensor) -> Tensor:
    """||out - true|| / ||true||."""
    return (out - true).norm() / true.norm()


# -- a real model -------------------------------------------------------------------------------
@torch.inference_mode()
def model(trial: Trial) -> Found:
    """Perplexity with the last k layers replaced, and alpha of all heads."""
    from foveate.hf import Assignment, use
    from foveate.hf.load import load_model

    lm, tokenizer, _ = load_model(device=trial.device)
    n = 256 if trial.quick else 2048
    ids = _text(tokenizer, trial.seed, n).to(trial.device)
    count = lm.config.num_hidden_layers
    spec = "hyperattention(block_size=64, sample_size=64, min_seq_len={}, sinks={}, seed={})"
    found: dict[str, dict[str, Any]] = {DENSE: {"perplexity": _perplexity(lm, ids)}}
    for number, (last, sinks) in enumerate(_REPLACED):
        trial.tell(number / len(_REPLACED), _arm(last, sinks))
        own = spec.format(n // 8, sinks, trial.seed)
        with use(lm, Assignment(dict.fromkeys(range(count - last, count), own))):
            found[_arm(last, sinks)] = {"perplexity": _perplexity(lm, ids)}
    kept = frozenset((0, count // 2, count - 1) if trial.quick else range(count))
    for skip, shares in _alphas(lm, ids, kept).items():
        found.setdefault(DENSE + IN_HEAVY.format(skip) * (skip > 0), {}).update(shares)
    return found


_REPLACED = [(last, sinks) for last in LAST for sinks in (0, FIRST)]


def _arm(last: int, sinks: int) -> str:
    return f"last {last} layers" + IN_HEAVY.format(sinks) * (sinks > 0)


def _perplexity(lm: Any, ids: Tensor) -> float:
    logits = lm(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


def _text(tokenizer: Any, seed: int, n: int) -> Tensor:
    from foveate.runs.text import default_text

    text = default_text()
    start = seed % 64 * 15_000
    ids: Tensor = tokenizer(text[start : start + 12 * n], return_tensors="pt").input_ids[:, :n]
    return ids


class _Watched(Attention):
    """Full attention that keeps alpha / n of some layers' heads, by columns left out."""

    def __init__(self, layers: frozenset[int]) -> None:
        self.method = make("full")
        self.layers = layers
        self.found: dict[int, dict[int, Tensor]] = {0: {}, FIRST: {}}

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        result: AttentionOutput = self.method(q, k, v, ctx)
        if ctx is None or ctx.layer not in self.layers:
            return result
        lse = attention(q, k, v, causal()).lse
        for skip, shares in self.found.items():
            shares[ctx.layer] = alpha(q, k, lse, causal(), skip=skip).flatten() / k.shape[-2]
        return result


def _alphas(lm: Any, ids: Tensor, layers: frozenset[int]) -> dict[int, dict[str, float]]:
    """Median of alpha / n over the heads of each third of the layers, by columns left out."""
    from foveate.hf import use

    watched = _Watched(layers)
    with use(lm, watched):
        lm(input_ids=ids)
    count = lm.config.num_hidden_layers
    told: dict[int, dict[str, float]] = {}
    for skip, shares in watched.found.items():
        thirds = [[x for i, x in shares.items() if i * 3 // count == third] for third in range(3)]
        told[skip] = {
            f"alpha/n, {name} third": float(torch.cat(values).median())
            for name, values in zip(("first", "middle", "last"), thirds)
            if values
        }
    return told


def _exact(name: str, metric: str, most: float) -> Check:
    return at_most(name, lambda at: at["HyperAttention"][metric], most, exact=True)


PAPER = Paper(
    key="hyperattention",
    claim="Hashing finds the large entries that random samples miss, at work that grows about "
    "linearly with the length.",
    metric="elements of visited tiles; relative error of the output",
    cells=("counts", "clustered 64", "clustered 32", "model"),
    run=run,
    baseline=(
        "exact", SAMPLES, RANDOM, BLOCKS, FEW + SAMPLES, FEW + RANDOM, FEW + BLOCKS, DENSE,
        DENSE + IN_HEAVY.format(FIRST),
    ),
    ours=("HyperAttention", OURS, FEW + OURS, *(_arm(*given) for given in _REPLACED)),
    checks=(
        _exact("exponent", "exponent", 1.01),
        _exact("causal exponent", "causal exponent", 1.15),
        _exact("largest |visited / formula - 1|", "off the formula", 0.05),
        difference(OURS, SAMPLES, 0.0, "error"),
        difference(OURS, RANDOM, 0.0, "error"),
        difference(OURS, BLOCKS, 0.0, "error", refuted=math.inf),
    ),
    seeds=tuple(range(10)),
    requires=("transformers",),
)  # fmt: skip
