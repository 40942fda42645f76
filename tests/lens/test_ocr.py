"""Out-of-context reasoning: the oracles of the ocr spec."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.lens.ocr import FactRecall, margins, recalled
from foveate.lens.ocr_models import OneHead, balanced, fit_recall
from foveate.lens.ocr_svm import NORMS, constraints, in_answers, support_vectors
from foveate.ops.errors import InputError

DOUBLE = torch.float64
TASK = FactRecall(5, 4, 4)


def test_the_task_holds_out_implications_of_test_subjects_only():
    task = FactRecall(3, 2, 1, pairing=1)
    assert (task.subjects, task.relations, task.vocab) == (9, (9, 10), 17)
    assert task.facts.tolist() == [11, 12, 13]
    assert sorted(task.implications.tolist()) == [14, 15, 16]
    assert task.implications.tolist() != [14, 15, 16]
    told = {tuple(ids): a for ids, a in zip(task.seen.ids.tolist(), task.seen.answer.tolist())}
    held = {
        tuple(ids): a for ids, a in zip(task.held_out.ids.tolist(), task.held_out.answer.tolist())
    }
    assert (len(told), len(held)) == (9 + 6, 3)
    for subject in range(9):
        group, test = divmod(subject, 3)[0], subject % 3 == 2
        assert told[subject, 9] == 11 + group
        assert held.get((subject, 10), told.get((subject, 10))) == int(task.implications[group])
        assert ((subject, 10) in held) is test
        assert ((subject, 10) in told) is not test
    ended = FactRecall(3, 2, 1, end=True)
    assert ended.vocab == 18
    assert ended.seen.ids[:, 2].tolist() == [11] * 15
    assert ended.facts.tolist() == [12, 13, 14]


def formula(model: OneHead, ids: torch.Tensor, d: int) -> torch.Tensor:
    """f(X) = W_OV X^T X W_KQ x_T on one-hot rows, as it is written."""
    found = []
    for one in ids:
        x = torch.nn.functional.one_hot(one, d).to(DOUBLE)
        scores = x @ model.kq @ x[-1]
        found.append(model.ov() @ x.T @ (scores.softmax(0) if model.attention == "softmax" else
                                         scores))  # fmt: skip
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_model_is_its_formula(attention, rank):
    task = FactRecall(3, 2, 1, end=True)
    model = OneHead(task, rank, attention=attention, std=0.5, dtype=DOUBLE)
    ids = task.seen.ids
    torch.testing.assert_close(model(ids), formula(model, ids, task.vocab))
    plain = model.ov().T[ids[:, 0]] + model.ov().T[ids[:, 1]]  # subject and relation, no end
    share = 1.0 if attention == "linear" else 0.5
    torch.testing.assert_close(model(ids), share * plain)
    torch.nn.init.normal_(model.kq)
    torch.testing.assert_close(model(ids), formula(model, ids, task.vocab))


@torch.no_grad()
def test_oracle_1_every_merged_matrix_of_rank_d_h_is_a_product():
    model = OneHead(TASK, std=1.0, dtype=DOUBLE)
    u, s, vh = torch.linalg.svd(model.merged)
    model.merged.copy_((u[:, :7] * s[:7]) @ vh[:7])
    made = model.factorise(7)
    assert made.output.shape == made.value.shape == (TASK.vocab, 7)
    torch.testing.assert_close(made(TASK.seen.ids), model(TASK.seen.ids), atol=1e-10, rtol=0)
    assert not torch.allclose(model.factorise(6)(TASK.seen.ids), model(TASK.seen.ids), atol=1e-3)


def test_oracle_2_the_smallest_product_has_the_nuclear_norm():
    matrix = torch.randn(9, 9, dtype=DOUBLE)
    nuclear = float(torch.linalg.matrix_norm(matrix, "nuc"))

    def size(o, v):
        torch.testing.assert_close(o @ v.mT, matrix, atol=1e-10, rtol=0)
        return float(o.square().sum() + v.square().sum()) / 2

    output, value = balanced(matrix, 9)
    assert size(output, value) == pytest.approx(nuclear, abs=1e-10)
    for _ in range(20):
        g = torch.eye(9, dtype=DOUBLE) + 0.1 * torch.randn(9, 9, dtype=DOUBLE)
        assert size(output @ g, value @ g.inverse().mT) > nuclear + 1e-4


@pytest.mark.parametrize("sizes", [(5, 4, 4), (10, 2, 8)])
def test_oracle_3_a_merged_matrix_cant_tell_implications_apart(sizes):
    """From zero, after any step: the same number for every c and test subject."""
    task = FactRecall(*sizes)
    model = OneHead(task, std=0.0, dtype=DOUBLE)
    for steps in (1, 40, 400):
        fit_recall(model, task, steps=steps, lr=1.0)
        held = model(task.held_out.ids)[:, task.implications]
        with_r2 = model.merged[task.implications, task.relations[1]]
        rest = held - with_r2
        torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), atol=1e-12, rtol=0)
        found = recalled(model, task)
        assert found.among_loss >= math.log(sizes[0]) - 1e-12
        assert found.test_loss >= math.log(sizes[0])
    assert found.train_loss < 0.6


def test_oracle_3_the_product_tells_them_apart():
    losses = {}
    for name, rank, lr in (("product", TASK.vocab, 0.5), ("merged", None, 1.0)):
        model = OneHead(TASK, rank)
        fit_recall(model, TASK, steps=2500, lr=lr)
        losses[name] = recalled(model, TASK)
    assert losses["product"].accuracy == 1.0
    assert losses["product"].test_loss < 0.05
    assert losses["product"].ratio > 0.5
    assert losses["merged"].test_loss > math.log(5) - 0.02
    assert losses["merged"].accuracy <= 0.4
    assert losses["merged"].train_loss < 0.05


TABLE = {  # n, m_train, m_test: nuclear, Frobenius, margin of the nuclear machine; of the other
    (2, 1, 1): ((3.4142, 2.4495, 1.0), (3.6503, 2.2361, 0.0)),
    (3, 1, 1): ((5.7321, 3.3166, 1.0), (6.2042, 3.0, 0.0)),
    (3, 1, 3): ((7.1962, 3.8730, 0.5774), (7.5507, 3.6056, 0.0)),
    (3, 2, 1): ((6.6310, 3.8730, 1.0), (7.3279, 3.6056, 0.0)),
    (4, 1, 2): ((9.2426, 4.3589, 0.7071), (9.8394, 4.0, 0.0)),
}


@pytest.mark.parametrize("sizes", TABLE)
def test_oracle_4_the_machines_norms_and_margins(sizes):
    task = FactRecall(*sizes)
    for norm, (nuclear, frobenius, margin) in zip(NORMS, TABLE[sizes]):
        found = support_vectors(task, norm)
        assert found.nuclear == pytest.approx(nuclear, abs=2e-4)
        assert found.frobenius == pytest.approx(frobenius, abs=2e-4)
        assert found.margin(task) == pytest.approx(margin, abs=2e-4)
        assert found.value - found.bound <= 1e-6 * found.value
        slack = constraints(task, task.seen) @ found.matrix.flatten()
        assert float(slack.min()) >= 1 - 1e-9
    margin = min(1.0, math.sqrt(sizes[1] / sizes[2]))
    assert TABLE[sizes][0][2] == pytest.approx(margin, abs=1e-4)


def test_constraints_are_the_margins_of_the_model():
    task = FactRecall(3, 2, 1, pairing=2)
    model = OneHead(task, std=1.0, dtype=DOUBLE)
    a = constraints(task, task.held_out)
    found = (a @ in_answers(model.ov(), task).flatten()).view(len(task.held_out.ids), -1)
    want = margins(model(task.held_out.ids), task.held_out.answer, task)
    torch.testing.assert_close(found.amin(1), want)


def test_oracle_5_gradients_are_those_of_the_merged_matrix():
    model = OneHead(TASK, 6, std=0.5, dtype=DOUBLE)
    whole = model.merge()
    for one in (model, whole):
        torch.nn.functional.cross_entropy(one(TASK.seen.ids), TASK.seen.answer).backward()
    g = whole.merged.grad
    torch.testing.assert_close(model.output.grad, g @ model.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(model.value.grad, g.mT @ model.output, atol=1e-8, rtol=0)


def test_oracle_5_what_is_conserved_drifts_by_the_step_size():
    drifts = []
    for lr, steps in ((0.4, 200), (0.2, 400), (0.1, 800)):
        model = OneHead(TASK, 8, std=0.3, dtype=DOUBLE)
        before = model.output.mT @ model.output - model.value.mT @ model.value
        fit_recall(model, TASK, steps=steps, lr=lr)
        after = model.output.mT @ model.output - model.value.mT @ model.value
        drifts.append(float((after - before).detach().norm()))
    grown = float((model.output.mT @ model.output).detach().norm())
    assert drifts[0] < 0.05 * grown
    assert drifts[1] / drifts[0] == pytest.approx(0.5, abs=0.1)
    assert drifts[2] / drifts[1] == pytest.approx(0.5, abs=0.1)


@torch.no_grad()
def test_oracle_6_merging_after_training_is_exact():
    with torch.enable_grad():
        model = OneHead(TASK, TASK.vocab, dtype=DOUBLE)
        fit_recall(model, TASK, steps=300)
    merged = model.merge()
    assert merged.output is None
    torch.testing.assert_close(merged(TASK.seen.ids), model(TASK.seen.ids), atol=1e-6, rtol=0)
    assert recalled(merged, TASK).accuracy == recalled(model, TASK).accuracy


def test_a_penalty_on_the_nuclear_norm_restores_it_and_decay_doesnt():
    for more, right in (({"shrink": 1e-2}, 1.0), ({"weight_decay": 1e-3}, 0.2)):
        model = OneHead(TASK)
        fit_recall(model, TASK, steps=1500, lr=1.0, **more)
        assert recalled(model, TASK).accuracy == pytest.approx(right, abs=0.2)


def test_what_doesnt_fit_is_refused():
    for call, said in (
        (lambda: FactRecall(1), "answers"),
        (lambda: FactRecall(test=0), "test"),
        (lambda: OneHead(TASK, 4, std=0.0), "no gradient"),
        (lambda: OneHead(TASK, attention="relu"), "attention='relu'"),
        (lambda: fit_recall(OneHead(TASK, 4), TASK, shrink=0.1), "merged matrix"),
        (lambda: fit_recall(OneHead(TASK), TASK, optimizer="lbfgs"), "optimizer='lbfgs'"),
        (lambda: support_vectors(TASK, "max"), "norm='max'"),
        (lambda: support_vectors(FactRecall(3, 1, 3), steps=50), "after 50 steps"),
        (lambda: recalled(OneHead(FactRecall(3)), TASK), "make it for the task"),
    ):
        with pytest.raises(InputError, match=said):
            call()
