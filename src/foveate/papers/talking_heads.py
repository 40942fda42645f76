"""Talking heads: channels between heads, found in weights, tested by taking them away.

Attention-only models of two layers (`lens/attention_only.py`: width 64, 4 heads of 16, learned
positions, no norm), one for each cell and seed; nothing is tuned.

"induction": a random string twice, 1,200 steps of 64 at 3e-3. The previous-token head is that of
layer 0 that looks most at the token before, induction heads are those of layer 1 that look at what
followed the last time (at least half as much as the one that does so most). From weights: the
composition of whole heads into the induction heads' keys, and of every singular component of the
previous-token head. By removal: accuracy on the second copy with the head keeping only its k
components of highest, or of lowest, score. "share" is (accuracy - that without the head) / (that of
the model - that without the head).

"laundry": N = 3 ... 8 of 24 symbols are listed, all but one again, which is left? Trained until 60%
of the validation lists are right, 8,000 steps at most, so that long lists still fail. Then
components of layer 0, by z of their scores into queries, keys or values of layer 1, the top one,
two or three of them times one factor that is chosen on training lists of N = 8 and judged on
others; as a control as many components of the lowest z, rescaled and chosen alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveate.lens.attention_only import AttentionOnly
from foveate.lens.circuits import Heads, Spectrum
from foveate.lens.composition import KINDS, chance, component_scores, standardised, whole_scores
from foveate.lens.interventions import Edit, edited
from foveate.lens.prompts import best_factor
from foveate.lens.reading import Reading
from foveate.lens.watching import watched
from foveate.papers.harness import Found, Paper, Trial, at_least, at_most
from foveate.papers.tasks import IGNORED, Batch, Laundry, Repeated
from foveate.papers.training.loop import train
from foveate.papers.training.objective import evaluate, next_token
from foveate.papers.training.regime import Regime, optimizer_of

DIM, HEADS, LAYERS = 64, 4, 2
KEPT = (1, 2, 3, 4, 6, 8)
ITEMS = (3, 4, 5, 6, 7, 8)
SYMBOLS = 24
FACTORS = (0.0, 0.5, 1.5, 2.0, 3.0)
STEPS, ENOUGH = {"induction": 1200, "laundry": 8000}, 0.6
MODEL, WHOLE, HIGH, LOW = "model", "whole heads", "highest CS", "lowest CS"
SINGLE, LIST, RESCALED, CONTROL = "single removals", "laundry", "rescaled", "rescaled, lowest z"


def run(trial: Trial) -> Found:
    """Train a cell's model and look into it."""
    task: Repeated | Laundry
    if trial.cell == "induction":
        task = Repeated(held=64 if trial.quick else 512)
        length = 2 * task.most
    else:
        task = Laundry(symbols=SYMBOLS, held=64 if trial.quick else 512)
        length = task.length
    steps = 6 if trial.quick else STEPS[trial.cell]
    model = AttentionOnly(task.vocab, DIM, HEADS, LAYERS, length).to(trial.device)

    def tell(share: float, doing: str) -> None:
        trial.tell(0.8 * share, doing)

    if isinstance(task, Laundry):
        learn(model, task, steps, trial.seed, tell)
        return lists(model, task, trial.seed)
    regime = Regime(
        steps=steps, batch=64, lr=3e-3, every=max(1, steps // 3), weight_decay=0.01, seed=trial.seed
    )
    train(model, task, regime, folder=trial.folder, tell=tell)
    return induction(model, task)


def learn(
    model: nn.Module, task: Laundry, steps: int, seed: int, tell: Callable[[float, str], None]
) -> None:
    """Train until ENOUGH of the validation lists are told right: before they all are.

    AdamW at 2e-3, else as in "induction"; looked at every 250 steps, `steps` at most.
    """
    optimizer = optimizer_of(model, Regime(lr=2e-3, weight_decay=0.01))
    for step in range(steps):
        if step % 250 == 0:
            found = evaluate(model, task, "validation", 64)["accuracy"]
            tell(step / steps, f"step {step}, {found:.0%} right")
            if found >= ENOUGH:
                break
        model.train()
        batch = task.batch(seed, step, 64)
        loss = next_token(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


# -- induction -------------------------------------------------------------------------------------
def induction(model: nn.Module, task: Repeated) -> Found:
    """Figures of the channel from the previous-token head to the induction heads' keys."""
    back, copying = looks(model, next(iter(task.held_out("validation", 64))))
    best = int(back.argmax())
    inductive = [h for h in range(HEADS) if copying[h] >= copying.max() / 2]
    heads = Reading()(model)
    spectrum = heads.ov().svd()
    whole = whole_scores(heads, "k")[:HEADS, HEADS:]  # early heads by later ones
    into = [float(x) for x in whole[best, inductive]]
    lead = min(
        float(whole[best, h] - whole[[e for e in range(HEADS) if e != best], h].max())
        for h in inductive
    )
    main = int(copying.argmax())
    scores = component_scores(spectrum, heads, "k")[best, :, HEADS + main]
    v, s = spectrum.v[best], spectrum.s[best]

    def accuracy(factors: Tensor) -> float:
        with edited(model, Edit(0, best, v, factors.tolist())):
            return evaluate(model, task, "test", 64)["accuracy"]

    count = len(s)
    base = evaluate(model, task, "test", 64)
    ablated = accuracy(torch.zeros(count))
    gap = base["accuracy"] - ablated
    order = scores.argsort(descending=True)

    def curve(order: Tensor) -> dict[str, float]:
        found = {}
        for k in KEPT:
            factors = torch.zeros(count)
            factors[order[:k]] = 1.0
            kept = accuracy(factors)
            found[f"accuracy k={k}"] = kept
            found[f"share k={k}"] = (kept - ablated) / gap if gap > 0 else 0.0
        return found

    drops = torch.tensor(
        [base["accuracy"] - accuracy((torch.arange(count) != i).float()) for i in range(count)]
    )
    return {
        MODEL: {"loss": base["loss"], "accuracy": base["accuracy"], "without the head": ablated,
                "back": float(back[best]), "induction": float(copying[main])},
        WHOLE: {"least K times sqrt(D)": min(into) / chance(DIM), "lead": lead},
        HIGH: curve(order),
        LOW: curve(order.flip(0)),
        SINGLE: {"Spearman CS": spearman(drops, scores), "Spearman s": spearman(drops, s),
                 "Spearman s CS": spearman(drops, s * scores)},
    }  # fmt: skip


@torch.no_grad()
def looks(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean attention of layer 0's heads to the token before, and of layer 1's to what followed.

    Returns:
        (H,) each. What followed the last time of the token at t stands at t - length + 1.
    """
    with watched(model) as watch:
        model(batch.inputs)
        first, second = watch.weights(0), watch.weights(1)
    back = first.diagonal(-1, 2, 3).mean((0, 2))
    total, count = torch.zeros(HEADS), 0
    scored = batch.targets != IGNORED
    for b, row in enumerate(scored):
        at = row.nonzero()[:, 0]
        total += second[b][:, at, at - int(at[0]) + 1].sum(1)
        count += len(at)
    return back, total / count


def spearman(one: Tensor, two: Tensor) -> float:
    """Rank correlation; equal values share their mean rank, and 0 where all are equal."""
    a, b = (_ranks(x.double()) for x in (one, two))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


# -- the list --------------------------------------------------------------------------------------
def lists(model: nn.Module, task: Laundry, seed: int) -> Found:
    """Accuracy by N, and what rescaling a few components does at the largest."""
    by_items = {n: evaluate(model, task.of(n), "test", 64)["accuracy"] for n in ITEMS}
    longest = task.of(ITEMS[-1])
    shown = [longest.batch(seed, 500_000 + n, 64) for n in range(8)]
    heads = Reading()(model)
    spectrum = heads.ov().svd()
    ranked = _ranked(heads, spectrum)
    before = _right(model, shown)

    def rescaled(chosen: list[tuple[int, int]]) -> dict[str, float]:
        """The best factor on the first one, two or three of these, and what it gives."""
        best = (before, 0, 1.0)
        for count in (1, 2, 3):

            def score(factor: float, count: int = count) -> float:
                with edited(model, *_edits(spectrum, chosen[:count], factor)):
                    return _right(model, shown)

            factor, scores = best_factor(score, FACTORS)
            best = max(best, (scores[factor], count, factor), key=lambda one: one[0])
        gain, count, factor = best
        with edited(model, *_edits(spectrum, chosen[:count], factor)):
            after = evaluate(model, longest, "test", 64)["accuracy"]
        return {"chosen on": gain - before, "gain": after - by_items[ITEMS[-1]],
                "components": float(count), "factor": factor}  # fmt: skip

    return {
        LIST: {f"accuracy N={n}": value for n, value in by_items.items()},
        RESCALED: rescaled(ranked[:3]),
        CONTROL: rescaled(ranked[-3:]),
    }


def _ranked(heads: Heads, spectrum: Spectrum) -> list[tuple[int, int]]:
    """(head, component) of layer 0 by their highest z into any map of layer 1."""
    best = torch.stack([
        standardised(component_scores(spectrum, heads, kind))[:HEADS, :, HEADS:].amax(2)
        for kind in KINDS
    ]).amax(0)  # fmt: skip
    order = best.flatten().argsort(descending=True).tolist()
    return [divmod(at, best.shape[1]) for at in order]


def _edits(spectrum: Spectrum, chosen: list[tuple[int, int]], factor: float) -> list[Edit]:
    return [
        Edit(0, head, spectrum.v[head][:, [i for h, i in chosen if h == head]], factor)
        for head in sorted({head for head, _ in chosen})
    ]


@torch.no_grad()
def _right(model: nn.Module, batches: list[Batch]) -> float:
    right = count = 0
    for batch in batches:
        scored = batch.targets != IGNORED
        right += int((model(batch.inputs).argmax(-1) == batch.targets)[scored].sum())
        count += int(scored.sum())
    return right / count


def _figure(arm: str, metric: str) -> Callable[[Found], float]:
    return lambda at: float(at[arm][metric])


def _falls(at: Found) -> float:
    return float(at[LIST]["accuracy N=3"] - at[LIST]["accuracy N=8"])


PAPER = Paper(
    key="talking-heads",
    claim="Singular components of heads' output maps that later heads read along are the channels "
    "by which heads talk: keeping the few that stand out keeps what the head is for, and rescaling "
    "a few repairs recall from long lists.",
    metric="accuracy; composition scores; share of a head's effect that is recovered",
    cells=("induction", "laundry"),
    run=run,
    baseline=(MODEL, WHOLE, LOW, LIST, CONTROL),
    ours=(HIGH, SINGLE, RESCALED),
    checks=(
        at_least("share of the head's effect: 4 of highest CS", _figure(HIGH, "share k=4"), 0.5,
                 refuted=0.2),
        at_most("share of the head's effect: 4 of lowest CS", _figure(LOW, "share k=4"), 0.2,
                refuted=0.5),
        at_least("K-composition into induction heads: previous-token head - next best",
                 _figure(WHOLE, "lead"), 0.0, refuted=-math.inf),
        at_least("K-composition into every induction head / chance",
                 _figure(WHOLE, "least K times sqrt(D)"), 1.3, refuted=1.0),
        at_least("rank correlation of CS and what a single removal costs",
                 _figure(SINGLE, "Spearman CS"), 0.3),
        at_least("accuracy: N=3 - N=8", _falls, 0.05, refuted=0.0),
        at_least("held-out gain at N=8, best components rescaled", _figure(RESCALED, "gain"), 0.01,
                 refuted=0.0),
        at_least("held-out gain at N=8: components of highest z - of lowest",
                 lambda at: at[RESCALED]["gain"] - at[CONTROL]["gain"], 0.0, refuted=-math.inf),
    ),
    needs=(
        at_most("loss: model", _figure(MODEL, "loss"), 0.4),
        at_least("accuracy: model - without the head",
                 lambda at: at[MODEL]["accuracy"] - at[MODEL]["without the head"], 0.05),
        at_least("accuracy: N=3", _figure(LIST, "accuracy N=3"), 0.5),
    ),
    seeds=tuple(range(12)),
)  # fmt: skip
