"""ColBERTer on SciFact: what each reduction keeps of a passage, and what it finds.

All 5,183 abstracts, cut at 128 sub-words; the 300 test claims ask. The encoder is MiniLM, frozen,
its states made once; heads are trained on triples of the abstracts themselves (a title asks for its
own abstract, the title left out of it) and of train claims, with negatives from BM25. Train claims
about an abstract that a test claim asks for are left out: SciFact's writers negated claims, and of
300 test claims 114 have their like among the train claims, with the same answer. Teacher: MaxSim of
whole words in full width, and BM25, 1 : 1 (on 150 train claims among 1,500 abstracts BM25's weights
of 1/4, 1/2, 1 and 2 found 0.764, 0.770, 0.789 and 0.789, MaxSim alone 0.688). All trained arms have
2,000 steps on the same triples in the same order, 1,200 from the first weights and 800 behind, but
`one number`, which has 800 more.

Untrained: BM25 on whole abstracts and on the 128 sub-words; MiniLM's mean vector; its MaxSim over
sub-words and over whole words at 384 numbers; `PCA`, the first weights of all heads (128 and 32).

Trained, in the paper's stages: `two-way` (128 and 32 for each sub-word), `whole words` (BOW^2),
`stopwords` with a_CS of 0.5, 0.75 (the paper's) and 1, `one number` with exact match
(Uni-ColBERTer). `fixed mix` is two-way with gamma 0 and no loss on the single vector. `frequent
words removed` is the `whole words` arm without the words that are in most abstracts, until it has
no more vectors than `stopwords`.

nDCG@10 and recall@100 are of single vectors that find 1,000 candidates and words that rank them;
"single" and "words" tell of each alone. Bytes are the paper's formula at float16, which is what
`foveate index` writes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.hf.fit.job import FileState
from foveate.methods.colberter import Colberter, ColberterHead, Encoding, Weights, mixed
from foveate.papers.harness import Found, Paper, Trial, at_least, at_most, difference
from foveate.retrieve import fit
from foveate.retrieve import model as retrievers
from foveate.retrieve.bank import Bank, Some, all_scores, head_encoder, raw_encoder
from foveate.retrieve.bm25 import BM25
from foveate.retrieve.collection import Judged, read_judged, read_passages
from foveate.retrieve.lessons import Lessons
from foveate.retrieve.measure import judge, refined

ENCODER = "minilm"
LENGTH, CANDIDATES, STEPS, MORE = 128, 1000, 1200, 800
FULL = Colberter(single=128, tokens=32, pool="mean")
TWO_WAY = replace(FULL, whole_words=False, stopwords=False)
BM, BM_CUT, MEAN = "BM25, whole abstracts", "BM25, 128 sub-words", "MiniLM's mean vector, 384"
RAW, RAW_WORDS, PCA = "MaxSim of sub-words, 384", "MaxSim of whole words, 384", "PCA"
TWO, WORDS, UNI = "two-way", "whole words", "one number, exact match"
FIXED, FREQUENT = "fixed mix", "frequent words removed"
PRICES = {"stopwords, 0.5": 0.5, "stopwords": 0.75, "stopwords, 1": 1.0}
NDCG, RECALL = "nDCG@10", "recall@100"


@dataclass(frozen=True)
class Data:
    """The collection, encoded, and what untrained arms find."""

    lessons: Lessons
    asked: Bank
    gains: list[dict[int, float]]
    untrained: Found

    def found(self, single: Tensor, token: Tensor, gamma: Tensor) -> dict[str, float]:
        """Figures of an arm from its scores."""
        ranked = refined(single, mixed(single, token, gamma), CANDIDATES)
        figures = judge(ranked, self.gains)
        for name, scores in (("single", single), ("words", token)):
            figures |= {f"{name} {k}": v for k, v in judge(scores, self.gains).items()}
        return figures


def run(trial: Trial) -> Found:
    """Train all arms of a seed, one from another, and measure them."""
    data = _data(trial)
    steps, more = (3, 2) if trial.quick else (STEPS, MORE)
    plan = fit.Plan(steps=steps, batch=4 if trial.quick else 16, seed=trial.seed)
    found: dict[str, dict[str, Any]] = {arm: dict(f) for arm, f in data.untrained.items()}
    first = {arm: f"{arm}, first stage" for arm in (TWO, FIXED)}
    arms = [*first.values(), TWO, FIXED, WORDS, *PRICES, UNI]

    def trained(
        arm: str, recipe: Colberter, before: ColberterHead | None = None,
        weights: Weights | None = None,
    ) -> ColberterHead:  # fmt: skip
        torch.manual_seed(trial.seed)
        head = recipe.build(data.asked.states.shape[1])
        if before is None:
            fit.begin(head, data.lessons)
        else:
            fit.follow(head, before, data.lessons)
        state = None
        if trial.folder is not None:
            trial.folder.mkdir(parents=True, exist_ok=True)
            state = FileState(trial.folder / f"{arms.index(arm)}.safetensors", arm, "colberter")

        def tell(share: float, doing: str) -> None:
            trial.tell(0.4 + 0.6 * (arms.index(arm) + 0.8 * share) / len(arms), arm)

        own = plan if before is None else replace(plan, steps=more)
        history = fit.train(head, data.lessons, own, weights, state=state, tell=tell)
        if before is not None:
            found[arm] = _measured(head, data, head_encoder(head))
            found[arm]["curve"] = [
                [n + 1, entry["both_loss"]] for n, entry in enumerate(history) if n % 10 == 0
            ]
        return head

    two = trained(first[TWO], TWO_WAY)
    trained(TWO, TWO_WAY, two)  # as many steps as the arms that it is compared with
    fixed, alone = replace(TWO_WAY, learned_mix=False), Weights(1.0, 0.0, 0.0)
    trained(FIXED, fixed, trained(first[FIXED], fixed, weights=alone), alone)
    words = trained(WORDS, replace(FULL, stopwords=False), two)
    gated = {
        arm: trained(arm, FULL, two, Weights(1.0, 0.1, price)) for arm, price in PRICES.items()
    }
    trained(UNI, replace(FULL, second=1, exact=True), gated["stopwords"])
    encode = _without_frequent(words, data.lessons.passages, found["stopwords"]["vectors"])
    found[FREQUENT] = _measured(words, data, encode)
    if not trial.quick and trial.seed == PAPER.seeds[-1]:
        _KEPT.clear()  # half a gigabyte
    return found


def _measured(
    head: ColberterHead, data: Data, encode: Callable[[Some, bool], Encoding]
) -> dict[str, Any]:
    recipe = head.recipe
    single, token, kept = all_scores(encode, data.asked, data.lessons.passages, exact=recipe.exact)
    each = recipe.bytes_per_passage(1) - recipe.bytes_per_passage(0)
    size = recipe.bytes_per_passage(0) + kept * each
    return data.found(single, token, head.gamma.detach()) | {
        "vectors": kept, "bytes": size, "gamma": float(head.gamma.detach()),
    }  # fmt: skip


def _without_frequent(
    head: ColberterHead, passages: Bank, most: float
) -> Callable[[Some, bool], Encoding]:
    """Drops the words of most passages until no more than `most` are left in one on average."""
    ids = torch.tensor([i for tokens in passages.tokens for i in tokens.words.ids])
    names, counts = ids.unique(return_counts=True)
    order = counts.argsort(descending=True)
    left = (len(ids) - counts[order].cumsum(0)) / len(passages)
    many = int((left > most).sum()) + 1 if left.numel() and len(ids) / len(passages) > most else 0
    gone = names[order[:many]]
    plain = head_encoder(head)

    def encode(some: Some, passage: bool) -> Encoding:
        found = plain(some, passage)
        if passage:
            found = replace(found, real=found.real & ~torch.isin(found.ids, gone))
        return found

    return encode


_KEPT: dict[tuple[bool, str], Data] = {}


def _data(trial: Trial) -> Data:
    """Made once for all seeds of a run."""
    key = (trial.quick, ENCODER)
    if key in _KEPT:
        return _KEPT[key]
    passages, test, train = _collection(trial.quick)
    texts = [p.text for p in passages]
    place = {p.key: i for i, p in enumerate(passages)}
    gains = [{place[k]: gain for k, gain in gained.items() if k in place} for gained in test.gains]
    model = retrievers.new(ENCODER, FULL, length=LENGTH).model
    lessons = Lessons.of(
        model, passages, judged=train, tell=lambda share: trial.tell(0.3 * share, "encoding")
    )
    asked = Bank.of(model, test.texts)
    trial.tell(0.32, "untrained arms")
    data = Data(lessons, asked, gains, {})
    found = _untrained(texts, test, data)
    head = replace(FULL, stopwords=False).build(asked.states.shape[1]).eval()
    fit.begin(head, lessons)
    found[PCA] = _measured(head, data, head_encoder(head))
    _KEPT.clear()
    _KEPT[key] = replace(data, untrained=found)
    return _KEPT[key]


def _collection(quick: bool) -> tuple[list[Any], Judged, Judged]:
    """Passages, test claims and train claims; a few of each if it must be quick."""
    passages = read_passages("scifact")
    test = read_judged("scifact", "test")
    train = _apart(read_judged("scifact", "train"), test)
    if quick:
        test = Judged(test.keys[:30], test.texts[:30], test.gains[:30])
        wanted = {key for gains in test.gains for key in gains}
        cited = [p for p in passages if p.key in wanted]
        passages = cited + [p for p in passages if p.key not in wanted][:60]
    return passages, test, train


def _apart(train: Judged, test: Judged) -> Judged:
    """Train claims that no answer of a test claim answers, and that no test claim repeats."""
    answers = {key for gains in test.gains for key in gains}
    keys, texts, gains = zip(*(
        one for one in zip(train.keys, train.texts, train.gains)
        if one[1] not in test.texts and not answers & one[2].keys()
    ))  # fmt: skip
    return Judged(keys, texts, gains)


def _untrained(texts: list[str], asked: Judged, data: Data) -> dict[str, dict[str, float]]:
    """BM25 and the encoder's own states."""
    bank = data.lessons.passages
    cut = [
        text[: max((b for _, b in tokens.spans), default=0)]
        for text, tokens in zip(texts, bank.tokens)
    ]
    found: dict[str, dict[str, float]] = {}
    for arm, given in ((BM, texts), (BM_CUT, cut)):
        bm25 = BM25.of(given)
        found[arm] = judge(torch.stack([bm25.scores(text) for text in asked.texts]), data.gains)
    width = 2.0 * bank.states.shape[1]
    for arm, whole in ((RAW, False), (RAW_WORDS, True)):
        single, token, kept = all_scores(raw_encoder(whole), data.asked, bank, size=32)
        found[arm] = judge(token, data.gains) | {"vectors": kept, "bytes": kept * width}
        found[MEAN] = judge(single, data.gains) | {"vectors": 1.0, "bytes": width}
    return found


def _describe() -> str:
    """The collection with its digest, and the encoder's fingerprint."""
    passages, test, train = _collection(quick=False)
    told = repr([(p.key, p.digest) for p in passages]) + repr(test) + repr(train)
    made = hashlib.sha256(told.encode()).hexdigest()[:12]
    encoder = retrievers.locate(ENCODER)
    return (
        f"SciFact, {len(passages):,} abstracts, {len(test)} test and {len(train)} train claims, "
        f"sha256 {made}; {encoder.name} {encoder.fingerprint[:12]}"
    )


def _gain(ours: str, other: str, metric: str) -> Callable[[Found], float]:
    return lambda at: at[ours][metric] - at[other][metric]


PAPER = Paper(
    key="colberter",
    claim="Whole words and contextual stopwords halve a retriever's vectors at the same quality.",
    metric="nDCG@10 and recall@100 on SciFact; vectors and bytes of a passage",
    cells=("retrieval",),
    run=run,
    baseline=(BM, BM_CUT, MEAN, RAW, RAW_WORDS, PCA, TWO, FIXED, FREQUENT),
    ours=(WORDS, *PRICES, UNI),
    checks=(
        at_most("vectors: whole words / sub-words",
                lambda at: at[WORDS]["vectors"] / at[TWO]["vectors"], 0.65, exact=True),
        difference(TWO, WORDS, 0.01, metric=NDCG, refuted=0.05),
        at_most("vectors: stopwords / whole words",
                lambda at: at["stopwords"]["vectors"] / at[WORDS]["vectors"], 0.8,
                refuted=math.inf),
        difference(WORDS, "stopwords", 0.01, metric=NDCG, refuted=0.05),
        at_least("nDCG@10: stopwords, refined - its single vectors alone",
                 lambda at: at["stopwords"][NDCG] - at["stopwords"][f"single {NDCG}"], 0.0),
        at_least("nDCG@10 of words: whole words - PCA", _gain(WORDS, PCA, f"words {NDCG}"), 0.0),
        at_least("nDCG@10: stopwords - frequent words removed",
                 _gain("stopwords", FREQUENT, NDCG), 0.0, refuted=-0.01),
        at_least("recall@100 of single vectors: two-way - fixed mix",
                 _gain(TWO, FIXED, f"single {RECALL}"), 0.0),
    ),
    needs=(at_least(f"{NDCG}: {TWO}", lambda at: at[TWO][NDCG], 0.5),),
    data=_describe,
    requires=("transformers", "safetensors", "bm25s", "snowballstemmer"),
)  # fmt: skip
