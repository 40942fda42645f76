"""Out-of-context reasoning: one head deduces what it never saw, if its output and value maps are
factorised, and can't if they are one matrix.

n facts b_i and implications c_i; the implications of test subjects are held out (`lens/ocr.py`).
Full-batch gradient descent, 8,000 steps, rate 0.5 factorised and 1.0 merged, initial deviation
0.05; a merged W_OV begins as large as the product does. Nothing is tuned. Three sizes "n, m_train,
m_test". At 5, 4, 4 also:

- **d_h = 2 ... 12** instead of d_h = d = 52;
- **shuffled**: facts paired with implications at random, which must make no difference;
- **merged, tau**: every singular value is lowered by tau after each step (4,000 steps), which
  should restore it, and **merged, decay**: L2 of 1e-3 instead, which shouldn't;
- **merged, W_KQ learnt**, from a symmetric start (theorem 3: the test loss is log n at least, at
  all times), and the factorised model with W_KQ learnt, with softmax, with Adam (rate 0.01, 2,000
  steps), and from a large start (deviation 1), for the record.

"cosine" compares a trained W_OV (the answers' rows, less the mean of each column) with the two
support vector machines, which are solved to 1e-6. Their test margins are counted:
min(1, sqrt(m_train / m_test)) for the nuclear norm and 0 for Frobenius'.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate.lens.ocr import FactRecall, Recalled, recalled
from foveate.lens.ocr_models import OneHead, fit_recall
from foveate.lens.ocr_svm import Machine, in_answers, support_vectors
from foveate.papers.harness import Check, Found, Paper, Trial, at_least, at_most

SIZES = {"5, 4, 4": FactRecall(5, 4, 4), "5, 1, 4": FactRecall(5, 1, 4),
         "10, 2, 8": FactRecall(10, 2, 8)}  # fmt: skip
TASK = SIZES["5, 4, 4"]
RANKS = (2, 4, 6, 8, 12)
MACHINES = ((2, 1, 1), (3, 1, 1), (3, 1, 3), (3, 2, 1), (4, 1, 2))
STEPS, RATE, MERGED_RATE, STD = 8000, 0.5, 1.0, 0.05
FACTORISED, MERGED = "factorised", "merged"
DECAY, LEARNT = "merged, decay", "merged, W_KQ learnt"
TAUS = {"merged, tau 0.001": 1e-3, "merged, tau 0.01": 1e-2}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W_KQ learnt": ({"learn_kq": True}, {"lr": 0.2}),
    "softmax": ({"attention": "softmax"}, {"lr": 1.0}),
    "Adam": ({}, {"optimizer": "adam", "lr": 0.01, "steps": 2000}),
    "large start": ({"std": 1.0}, {}),
}


def run(trial: Trial) -> Found:
    """Solve the machines, or train the models of one cell."""
    if trial.cell == "machines":
        return machines()
    arms: list[tuple[str, FactRecall, dict[str, Any], dict[str, Any]]] = []
    if trial.cell in SIZES:
        task = SIZES[trial.cell]
        arms = [(f"{FACTORISED} {trial.cell}", task, {"rank": task.vocab}, {}),
                (f"{MERGED} {trial.cell}", task, {}, {})]  # fmt: skip
    elif trial.cell == "ranks":
        arms = [(f"d_h = {rank}", TASK, {"rank": rank}, {}) for rank in RANKS]
    else:
        full = {"rank": TASK.vocab}
        shuffled = FactRecall(TASK.answers, TASK.train, TASK.test, pairing=trial.seed + 1)
        arms = [("shuffled", shuffled, full, {})]
        arms += [(name, TASK, {}, {"shrink": tau, "steps": 4000}) for name, tau in TAUS.items()]
        arms += [(DECAY, TASK, {}, {"weight_decay": 1e-3, "steps": 4000})]
        arms += [(LEARNT, TASK, {"learn_kq": True, "std": 0.0}, {"lr": 0.2})]
        arms += [(name, TASK, full | model, fit) for name, (model, fit) in OTHERS.items()]
    figures: dict[str, dict[str, Any]] = {}
    for number, (name, task, model, fit) in enumerate(arms):

        def tell(share: float, doing: str, number: int = number, name: str = name) -> None:
            trial.tell((number + share) / len(arms), f"{name}: {doing}")

        trained, figures[name] = arm(trial, task, model, fit, tell)
        if trial.cell in SIZES:
            figures[name] |= _cosines(trained, task)
    return figures


def arm(
    trial: Trial, task: FactRecall, model: dict[str, Any], fit: dict[str, Any], tell: Any
) -> tuple[OneHead, dict[str, Any]]:
    """Train one model and take its figures; "least loss" is the least test loss on its way."""
    made = OneHead(task, **({"std": STD, "seed": trial.seed} | model))
    rate = RATE if made.merged is None else MERGED_RATE
    chosen = {"lr": rate, "steps": STEPS} | fit
    steps = chosen.pop("steps") if not trial.quick else 40
    chosen.pop("steps", None)
    parts = 1 if "optimizer" in chosen else 20  # plain descent has no state that a pause would lose
    least = math.inf
    for part in range(parts):
        tell(part / parts, "training")
        fit_recall(made, task, steps=steps // parts, **chosen)
        found = recalled(made, task)
        least = min(least, found.test_loss)
    return made, _figures(found) | {"least loss": least}


def _figures(found: Recalled) -> dict[str, Any]:
    return {
        "train loss": found.train_loss, "test loss": found.test_loss,
        "accuracy": found.accuracy, "among c's": found.among, "loss among c's": found.among_loss,
        "margin ratio": found.ratio if found.train_margin > 0 else 0.0,
    }  # fmt: skip


def _cosines(model: OneHead, task: FactRecall) -> dict[str, float]:
    mine = in_answers(model.ov().detach().double(), task)
    mine = mine - mine.mean(0)
    found = {}
    for name, norm in (("nuclear", "nuclear"), ("Frobenius", "frobenius")):
        other = _solved(task, norm).matrix
        cosine = torch.nn.functional.cosine_similarity(mine.flatten(), other.flatten(), dim=0)
        found[f"cosine {name}"] = float(cosine)
    return found


_KEPT: dict[tuple[FactRecall, str], Machine] = {}


def _solved(task: FactRecall, norm: Any) -> Machine:
    if (task, norm) not in _KEPT:
        _KEPT[task, norm] = support_vectors(task, norm, tolerance=1e-4)
    return _KEPT[task, norm]


def machines() -> Found:
    """Test margins of both support vector machines, and how far the first is from its law."""
    nuclear, frobenius = {}, {}
    for sizes in MACHINES:
        task, name = FactRecall(*sizes), ", ".join(map(str, sizes))
        law = min(1.0, math.sqrt(task.train / task.test))
        margin = support_vectors(task, "nuclear").margin(task)
        nuclear[name], nuclear[f"off the law {name}"] = margin, abs(margin - law)
        frobenius[name] = support_vectors(task, "frobenius").margin(task)
    return {"nuclear machine": nuclear, "Frobenius machine": frobenius}


def _of_size(name: str, task: FactRecall) -> tuple[Check, ...]:
    ours, theirs = f"{FACTORISED} {name}", f"{MERGED} {name}"
    share = task.train / (task.train + task.test)
    chance = math.log(task.answers)
    return (
        at_least(f"accuracy: {ours}", lambda at: at[ours]["accuracy"], 1.0,
                 refuted=1 / task.answers + 0.2),
        at_least(f"margin ratio: {ours}", lambda at: at[ours]["margin ratio"], share, refuted=0.0),
        at_least(f"test loss: {theirs}", lambda at: at[theirs]["test loss"], chance - 0.02,
                 refuted=chance - 0.1),
        at_most(f"accuracy: {theirs}", lambda at: at[theirs]["accuracy"], 1 / task.answers + 0.2),
        at_least(f"cosine: {ours}, nuclear - Frobenius",
                 lambda at: at[ours]["cosine nuclear"] - at[ours]["cosine Frobenius"], 0.0,
                 refuted=-math.inf),
        at_least(f"cosine: {theirs}, Frobenius - nuclear",
                 lambda at: at[theirs]["cosine Frobenius"] - at[theirs]["cosine nuclear"], 0.0,
                 refuted=-math.inf),
    )  # fmt: skip


def _off(at: Found) -> float:
    return max(value for name, value in at["nuclear machine"].items() if name.startswith("off"))


PAPER = Paper(
    key="ocr",
    claim="A head with factorised output and value maps deduces implications that it never saw, "
    "causal or not; the same head with one merged map can't, since gradient descent ends at the "
    "smallest Frobenius norm instead of the smallest nuclear norm.",
    metric="test loss in nats, share of held-out implications told right, margins",
    cells=("machines", *SIZES, "ranks", "ablations"),
    run=run,
    baseline=(*(f"{MERGED} {name}" for name in SIZES), "Frobenius machine", DECAY, LEARNT),
    ours=(*(f"{FACTORISED} {name}" for name in SIZES), "nuclear machine",
          *(f"d_h = {rank}" for rank in RANKS), "shuffled", *TAUS, *OTHERS),
    checks=(
        *(check for name, task in SIZES.items() for check in _of_size(name, task)),
        at_least("accuracy: d_h = 4", lambda at: at["d_h = 4"]["accuracy"], 1.0, refuted=0.4),
        at_least("accuracy: shuffled", lambda at: at["shuffled"]["accuracy"], 1.0, refuted=0.4),
        *(at_least(f"accuracy: {name}", lambda at, name=name: at[name]["accuracy"], 1.0,  # type: ignore[misc]
                   refuted=-math.inf) for name in TAUS),
        at_most(f"accuracy: {DECAY}", lambda at: at[DECAY]["accuracy"], 0.4, refuted=math.inf),
        at_least(f"least loss: {LEARNT}", lambda at: at[LEARNT]["least loss"],
                 math.log(TASK.answers) - 1e-4),
        at_most("margin of the nuclear machine off min(1, sqrt(m_train / m_test))", _off, 1e-3,
                exact=True),
        at_most("margin of the Frobenius machine",
                lambda at: max(map(abs, at["Frobenius machine"].values())), 1e-3, exact=True),
    ),
    needs=tuple(
        at_most(f"train loss: {arm}", lambda at, arm=arm: at[arm]["train loss"], 0.05)  # type: ignore[misc]
        for name in SIZES for arm in (f"{FACTORISED} {name}", f"{MERGED} {name}")
    ),
)  # fmt: skip
