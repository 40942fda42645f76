"""A video diffusion transformer's self attention at full size: chosen blocks against dense.

A small DiT (`foveate denoise`) looks at one noised clip of at least 8,192 tokens; every method
takes the place of its attention. For each method:

* times: one layer's attention, choosing included, in turn with dense attention in the same rounds,
  by layer; "ideal" is all pairs over the pairs in visited tiles, "share" how much of it was got;
* off: relative error of each layer's output on the dense model's own q, k and v;
* model off: that of the predicted clip, all layers replaced.

Rectified SpaAttn is run without its neighbouring blocks: of the 64 blocks of 8,192 tokens they are
two in five, of a real video's 900 few. Without a folder the model is trained first, on small grids
and then for a few steps on the whole one (positions are computed, so the weights fit both). A speed
is given only if the method's output agrees with its own in float64 on plain torch, near ties of
choices aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate.bench.job import Begin, check_clock, check_sizes, run_cells
from foveate.methods import make
from foveate.models.denoise import STEP, denoising_loss, load, noised
from foveate.models.dit import DiT
from foveate.ops import AttentionOutput, attention
from foveate.ops.errors import InputError
from foveate.parts import Attention, Context
from foveate.runs.clips import Clips
from foveate.runs.records import Records
from foveate.runs.timing import Pace, paired, race, spread

TOLERANCE = 2e-3  # relative, of the whole output: scores that are nearly equal may fall otherwise
METHODS = (
    "vmoba(frames=1, tile=(8, 8), box=(4, 8, 8))",
    "vmoba(frames=1, tile=(8, 8), box=(4, 8, 8), scope='query', select='topk', topk=(2, 4, 6))",
    "rectified-spaattn(drop=0.75, neighbours=False)",
    "rectified-spaattn(drop=0.75, neighbours=False, rectify=False)",
    "rectified-spaattn(drop=0.9, neighbours=False)",
    "rectified-spaattn(drop=0.9, neighbours=False, rectify=False)",
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        methods: texts of the catalog.
        sizes: frames, height, width of the clip; tokens are single latents.
        model: folder of `foveate denoise`; None trains one of 3 layers with 2 heads of 64.
        steps: of that training, (on half of each side, on the whole grid).
        threads: of torch.
        pace: how long to measure.
        seed: of the model and the clip.
    """

    methods: tuple[str, ...] = METHODS
    sizes: tuple[int, int, int] = (8, 32, 32)
    model: str | None = None
    steps: tuple[int, int] = (300, 10)
    threads: tuple[int, ...] = (1,)
    pace: Pace = field(default_factory=lambda: Pace(repeats=5))
    seed: int = 0

    def check(self) -> None:
        """Refuse what can't be measured, before any work.

        Raises:
            InputError: which option, and what was expected.
        """
        check_sizes(size=self.sizes, threads=self.threads)
        check_clock(self.pace.clock, self.threads)
        if len(self.sizes) != 3 or min(self.steps) < 0:
            raise InputError(
                "bench video: expected frames x height x width, and steps of 0 or more."
            )
        for text in self.methods:
            if not isinstance(make(text), Attention):
                raise InputError(f"bench video: {text} is no attention; see foveate methods.")


@dataclass(frozen=True)
class Cell:
    """One method."""

    method: str
    sizes: tuple[int, int, int]
    threads: int

    def __str__(self) -> str:
        return f"{self.method}, {math.prod(self.sizes)} tokens, {self.threads} threads"


class _Kept(Attention):
    """Full attention that keeps every layer's q, k and v."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        assert ctx is not None
        self.layers[ctx.layer] = (q, k, v)
        return attention(q, k, v, **ctx.options)


@dataclass
class _Seen:
    """The model, what it is shown, what it predicts densely, and its layers' q, k and v."""

    model: DiT
    inputs: tuple[Tensor, Tensor]
    predicted: Tensor
    layers: dict[int, tuple[Tensor, Tensor, Tensor]]


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; see `run_cells`."""
    options.check()
    cells = [
        Cell(method, options.sizes, threads)
        for threads in options.threads
        for method in options.methods
    ]
    how = {
        "pace": asdict(options.pace), "seed": options.seed, "model": options.model,
        "steps": options.steps,
    }  # fmt: skip
    seen: list[_Seen] = []

    def measure_one(cell: Cell) -> dict[str, Any]:
        if not seen:
            seen.append(_look(options, begin))
        return measure(cell, seen[0], options)

    return run_cells("video", cells, how, measure_one, records, begin)


def trained(options: Options, tell: Callable[[float, str], None] | None = None) -> DiT:
    """The model that is measured."""
    if options.model is not None:
        return load(options.model, sizes=options.sizes, patch=(1, 1, 1), attention="full")
    frames, height, width = (max(1, n // 2) for n in options.sizes)
    small = (frames, height, width)
    shape: dict[str, Any] = {"patch": (1, 1, 1), "dim": 128, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = DiT(small, **shape)
        whole = DiT(options.sizes, **shape)
    for grid, one, steps, batch in (
        (small, model, options.steps[0], 2), (options.sizes, whole, options.steps[1], 1)
    ):  # fmt: skip
        one.load_state_dict(model.state_dict())
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for step in range(steps):
            loss = denoising_loss(one, *Clips(grid).training(batch, options.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            if tell is not None:
                tell((step + 1) / steps, f"step {step + 1}, error {loss.item():.3f}")
    return whole.eval()


@torch.no_grad()
def _look(options: Options, begin: Begin | None) -> _Seen:
    def tell(share: float, doing: str) -> None:
        if begin is not None:
            begin(f"training the model: {doing}", round(100 * share), 100)

    with torch.enable_grad():
        model = trained(options, tell)
    kept = _Kept()
    clean = Clips(options.sizes).draw(1, "test", options.seed)
    random = torch.Generator().manual_seed(options.seed)
    t = torch.tensor([0.5])
    seen = noised(clean, t, torch.randn(clean.shape, generator=random))
    predicted = model.swap(kept)(seen, t * STEP)
    return _Seen(model, (seen, t * STEP), predicted, dict(sorted(kept.layers.items())))


@torch.no_grad()
def measure(cell: Cell, seen: _Seen, options: Options) -> dict[str, Any]:
    """One method: checked, then timed layer by layer; the record's values."""
    method = make(cell.method)
    base = Context(grid=seen.model.grid)
    layers = []
    for layer, (q, k, v) in seen.layers.items():
        ctx = replace(base, layer=layer)

        def fresh(ctx: Context = ctx) -> Context:
            return replace(ctx, store={})

        out, dense = method(q, k, v, fresh()).out, attention(q, k, v).out
        wide = (q.double(), k.double(), v.double())  # all heads: they may choose together
        right = method(*wide, replace(fresh(), backend="blocks")).out
        error = _off(out.double(), right)
        found: dict[str, Any] = {
            "layer": layer,
            "error": error,
            "off": _off(out, dense),
        }
        visited = _layout(method, q, k, v, fresh())
        found |= {"density": visited.density, "ideal": 1 / visited.tile_density}
        layers.append(found)
        if not error <= TOLERANCE:
            found["failed"] = f"wrong: off by {error:.1e} from its own float64"
            continue
        raced = race(_calls(method, q, k, v, ctx), options.pace)
        samples = {name: sample.by(options.pace.clock) for name, sample in raced.items()}
        best = min(("dense", "sdpa"), key=lambda name: spread(samples[name])["median"])
        found["seconds"] = spread(samples["ours"])
        found["dense_seconds"] = spread(samples[best])
        found["times_faster"] = paired(samples[best], samples["ours"])
        found["share"] = paired(samples[best], samples["ours"], 1 / found["ideal"])
    predicted = seen.model.swap(method)(*seen.inputs)
    mean = {name: sum(one[name] for one in layers) / len(layers) for name in ("off", "density")}
    values: dict[str, Any] = {"tokens": math.prod(cell.sizes), "layers": layers, **mean}
    values["model_off"] = _off(predicted, seen.predicted)
    timed = [one for one in layers if "seconds" in one]
    if len(timed) == len(layers):
        dense_time = sum(one["dense_seconds"]["median"] for one in timed)
        values["times_faster"] = dense_time / sum(one["seconds"]["median"] for one in timed)
        values["ideal"] = len(layers) / sum(1 / one["ideal"] for one in layers)
    return values


def _calls(
    method: Attention, q: Tensor, k: Tensor, v: Tensor, ctx: Context
) -> dict[str, Callable[[], object]]:
    return {
        "dense": lambda: attention(q, k, v),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "ours": lambda: method(q, k, v, replace(ctx, store={})),
    }


def _layout(method: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Any:
    """What a call visited, as the method tells it."""
    told: list[Any] = []
    method(q, k, v, replace(ctx, stats=lambda **said: told.append(said["layout"])))
    found = told[0]
    if not hasattr(found, "density"):  # a `Work`
        area = q.shape[2] * k.shape[2]
        return _Share(found.pairs / area, found.tile_area / area)
    return found


@dataclass(frozen=True)
class _Share:
    density: float
    tile_density: float


def _off(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())
