"""How the cost of training grows with length: one layer's token mixing, forward and backward.

For each method and length: the counted work (`foveate.runs.work`) and the seconds of a forward and
backward, and over the lengths the exponent a of cost ~ n^a, fitted to their logarithms, beside the
one that theory gives. Attentions get their queries, keys and values from a layer, whose maps aren't
counted; mixers are their own layer. A method whose output isn't that of the same method in float64
gets no figure; one whose next call would take too long stops at the lengths before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foveate import catalog
from foveate.bench.job import Begin, check_clock, check_sizes, run_cells, told
from foveate.methods import make
from foveate.nn import Attention, MixerLayer
from foveate.ops import AttentionOutput, causal
from foveate.ops.errors import InputError
from foveate.parts import Attention as Method
from foveate.parts import Context
from foveate.parts.growth import exponent
from foveate.parts.mixer import MixerRecipe
from foveate.runs.growth import TRAINED, at_length, setting_of
from foveate.runs.records import Records
from foveate.runs.timing import Pace, race, spread
from foveate.runs.work import Work

TOLERANCE = 1e-4  # of the largest output, against float64


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    method: str
    text: str
    length: int
    dim: int
    heads: int
    both_ways: bool
    threads: int

    def __str__(self) -> str:
        return f"{self.text}, {self.length} tokens, threads={self.threads}"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        methods: keys with settings of their own here, or texts as `foveate.Attention` and
            `MixerLayer` take them, with {n}, {root} and {rest} for what grows with the length.
        lengths: tokens.
        dim: width of the layer.
        heads: of the layer.
        both_ways: no mask; otherwise causal.
        threads: of torch.
        limit: seconds of a call above which a method isn't tried at longer lengths.
        check: tokens at which the output is held against float64.
        pace: how long to measure.
        seed: of weights and inputs.
    """

    methods: tuple[str, ...] = ("full", *TRAINED)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    dim: int = 128
    heads: int = 2
    both_ways: bool = False
    threads: tuple[int, ...] = (1,)
    limit: float = 60.0
    check: int = 256
    pace: Pace = field(default_factory=lambda: Pace(repeats=3))
    seed: int = 0

    def check_all(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: a method is unknown or can't be read, or a size makes no sense.
        """
        if not self.methods or not self.lengths:
            raise InputError("Name at least one method and one length.")
        check_clock(self.pace.clock, self.threads)
        check_sizes(lengths=self.lengths, dim=(self.dim,), heads=(self.heads,), check=(self.check,))
        check_sizes(threads=self.threads, repeats=(self.pace.repeats,))
        if not self.limit > 0:
            raise InputError(f"--limit {self.limit}: expected seconds above 0.")
        for method in self.methods:
            layer_of(at_length(setting_of(method).text, self.lengths[0]), self.dim, self.heads)

    def cells(self, threads: int, method: str) -> Iterator[Cell]:
        """Lengths of a method, short ones first."""
        for n in sorted(self.lengths):
            text = at_length(setting_of(method).text, n)
            yield Cell(method, text, n, self.dim, self.heads, self.both_ways, threads)


def layer_of(text: str, dim: int, heads: int) -> Attention | MixerLayer:
    """A layer of a method.

    Raises:
        UnknownMethodError: there is no such method.
        InputError: it can't be read, or is neither an attention nor a mixer.
    """
    made = make(text)
    if isinstance(made, MixerRecipe):
        return MixerLayer(dim, heads, made)
    return Attention(dim, heads, attention=made, position="none")


def known(methods: Sequence[str]) -> tuple[str, ...]:
    """Those whose key the catalog has."""
    keys = catalog.keys()
    return tuple(name for name in methods if name in keys)


class _Kept(Method, nn.Module):
    """An attention that keeps what it was called with."""

    def __init__(self, inner: Method) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.call: tuple[Tensor, Tensor, Tensor, Context] | None = None

    @override
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None
    ) -> AttentionOutput:
        assert ctx is not None
        self.call = (q, k, v, ctx)
        return self.inner(q, k, v, ctx)


class Runner:
    """One method in training at one length.

    Args:
        text: the method.
        length: tokens.
        options: sizes, mask and seed.
    """

    def __init__(self, text: str, length: int, options: Options) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.layer = layer_of(text, options.dim, options.heads)
            self.x = torch.randn(1, length, options.dim)
            self.weight = torch.randn(1, 1, 1, options.dim)
        self.mask = None if options.both_ways else causal()
        self.seed = options.seed

    def double(self) -> Runner:
        """The same in float64."""
        made = copy.copy(self)
        made.layer = copy.deepcopy(self.layer).double()
        made.x, made.weight = self.x.double(), self.weight.double()
        return made

    def prepared(self) -> Callable[[], Tensor]:
        """A function that runs forward and backward once and returns the output."""
        layer, x = self.layer.train(), self.x
        if isinstance(layer, MixerLayer):
            leaf = x.detach().requires_grad_()
            weight = self.weight[0].expand(x.shape)
            return lambda: _run(lambda: self._mixed(layer, leaf), weight, [leaf], layer)
        inner = layer.attention
        kept = _Kept(inner)
        layer.attention = kept
        with torch.no_grad():
            layer(x, mask=self.mask)
        del layer.attention  # a module's place takes only modules
        layer.attention = inner
        assert kept.call is not None
        *qkv, ctx = kept.call
        q, k, v = (t.detach().requires_grad_() for t in qkv)
        hidden = None if ctx.hidden is None else ctx.hidden.detach().requires_grad_()
        raw_query, raw_key = (
            None if t is None else t.detach() for t in (ctx.raw_query, ctx.raw_key)
        )
        ctx = replace(ctx, hidden=hidden, phase="train", raw_query=raw_query, raw_key=raw_key)
        weight = self.weight[..., : v.shape[3]].expand(1, q.shape[1], q.shape[2], -1)

        def attend() -> tuple[Tensor, dict[str, Tensor]]:
            told = replace(ctx, store={}, aux={})
            return inner(q, k, v, told).out, told.aux

        leaves = [t for t in (q, k, v, hidden) if t is not None]
        return lambda: _run(attend, weight, leaves, inner)

    def _mixed(self, layer: MixerLayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y, _, aux = layer(x, mask=self.mask)
        return y, aux


def _run(
    forward: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    weight: Tensor,
    leaves: list[Tensor],
    module: object,
) -> Tensor:
    """Forward, and the gradients of everything."""
    for x in (*leaves, *(module.parameters() if isinstance(module, nn.Module) else ())):
        x.grad = None
    out, aux = forward()
    losses = [x for name, x in aux.items() if name.endswith("_loss") and x.requires_grad]
    torch.autograd.backward([out, *losses], [weight.to(out.dtype), *map(torch.ones_like, losses)])
    return out.detach()


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """One cell: check, count, race; the record's values."""
    values: dict[str, Any] = {"theory": setting_of(cell.method).exponent}
    try:
        values["error"] = error_of(cell.text, options)
        if not values["error"] <= TOLERANCE:
            wrong = f"off by {values['error']:.1e} of the largest output"
            return values | {"failed": f"wrong: {wrong} at {options.check} tokens"}
        call = Runner(cell.text, cell.length, options).prepared()
        with Work() as work:
            call()
        samples = race({"ours": call}, options.pace)["ours"]
    except Exception as error:  # one that breaks must not end a long job
        return values | {"failed": told(error)}
    seconds = spread(samples.by(options.pace.clock))
    return values | {"flops": work.flops, "numbers": work.numbers, "seconds": seconds}


def error_of(text: str, options: Options) -> float:
    """Largest difference to the same call in float64, as a share of the largest output."""
    short = Runner(text, options.check, options)
    wide = short.double()
    found = []
    for one in (wide, short):
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            found.append(one.prepared()().double())
    return float((found[1] - found[0]).abs().max() / found[0].abs().max())


def run(
    options: Options, records: Records | None = None, begin: Begin | None = None
) -> list[dict[str, Any]]:
    """Measure every cell that isn't in the records yet; as `job.run_cells`.

    A method stops where its next call would take more than `options.limit` seconds; such lengths
    are told as {"skipped": why}.
    """
    options.check_all()
    how = {
        "pace": asdict(options.pace), "seed": options.seed, "check": options.check, "form": 1,
    }  # fmt: skip
    total = len(options.methods) * len(options.lengths) * len(options.threads)
    done: list[dict[str, Any]] = []
    for threads in options.threads:
        for method in options.methods:
            last: dict[str, Any] | None = None
            for cell in options.cells(threads, method):
                expected = predicted(last, cell)
                if expected is None or expected > options.limit:
                    why = "shorter ones failed" if expected is None else f"about {expected:.0f} s"
                    done.append({"cell": {"job": "scaling", **asdict(cell)},
                                 "values": {"skipped": why}})  # fmt: skip
                    continue

                def told_once(label: str, _: int, __: int) -> None:
                    if begin is not None:
                        begin(label, len(done), total)

                last = run_cells(
                    "scaling", [cell], how, lambda c: measure(c, options), records, told_once,
                    noting=False,
                )[0]  # fmt: skip
                done.append(last)
    return done


def predicted(last: dict[str, Any] | None, cell: Cell) -> float | None:
    """Seconds that a call should take, from the length before; None if that failed."""
    if last is None:
        return 0.0
    if "seconds" not in last["values"]:
        return None
    exponent = setting_of(cell.method).exponent or 2.0
    growth = cell.length / last["cell"]["length"]
    return float(last["values"]["seconds"]["median"] * growth**exponent)


def fits(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents by method and number of threads.

    Returns:
        For each: method, threads, lengths, theory, and for flops, numbers and seconds the exponent
        over all lengths, and "tail", over the longer half of them.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in found:
        if "seconds" in one["values"]:
            groups.setdefault((one["cell"]["method"], one["cell"]["threads"]), []).append(one)
    out = []
    for (method, threads), mine in groups.items():
        mine.sort(key=lambda one: one["cell"]["length"])
        lengths = [one["cell"]["length"] for one in mine]
        fit: dict[str, Any] = {"method": method, "threads": threads, "lengths": lengths}
        fit["theory"] = mine[-1]["values"]["theory"]
        for name in ("flops", "numbers", "seconds"):
            y = [one["values"][name] for one in mine]
            y = [v["median"] if isinstance(v, dict) else v for v in y]
            half = len(y) // 2
            fit[name] = {"exponent": slope(lengths, y), "tail": slope(lengths[half:], y[half:])}
        out.append(fit)
    return out


def slope(lengths: Sequence[int], costs: Sequence[float]) -> float | None:
    """The a of cost ~ n^a; None with fewer than two points, or where nothing was counted."""
    if len(lengths) < 2 or min(costs) <= 0:
        return None
    return exponent(lengths, costs)
