"""The gate before every speed: what is right passes, whatever is wrong in one place does not."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.bench import catalogue, patterns
from foveate.bench.correct import Judge, Verdict
from foveate.ops import attention


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def problem(request):
    """A case with empty rows, its tensors and its judge."""
    s = catalogue.settings((0, 90, 200), heads=2, tile=64)
    case = patterns.make("variable-blocks@0.2", s)
    q, k, v = (torch.randn(1, h, 200, 32).to(request.param) for h in (4, 2, 2))
    return case, (q, k, v), Judge.of(case, q, k, v, 64)


def right(case, name="reference"):
    layout = case.build(64)
    return lambda q, k, v: attention(q, k, v, layout=layout, backend=name)


@pytest.mark.parametrize("name", ["reference", "blocks"])
def test_right_backends_pass(problem, name):
    case, _, judge = problem
    forward, backward = judge.forward(right(case, name)), judge.backward(right(case, name))
    assert forward.passed, str(forward)
    assert backward.passed, str(backward)
    assert set(forward.errors) == {"out", "lse"}
    assert set(backward.errors) == {"dq", "dk", "dv", "dq of other rows"}


@pytest.mark.parametrize("name", ["full", "causal", "sliding", "shared-question"])
def test_torch_passes_on_what_it_computes(name):
    s = catalogue.settings((0, 40, 130), tile=64)
    case = patterns.make(name, s)
    q, k, v = torch.randn(3, 1, 2, 130, 16)
    seen = case.allowed(torch.arange(130))

    def call(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen), None

    judge = Judge.of(case, q, k, v, 64)
    assert judge.forward(call).passed
    assert judge.backward(call).passed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, lse: (out * 1.05, lse),
        lambda out, lse: (out, lse + 0.01),
        lambda out, lse: (out, lse / math.log(2)),
        lambda out, lse: (out.index_fill(2, torch.tensor([64]), 0.0), lse),
        lambda out, lse: (out.index_fill(2, torch.tensor([199]), float("nan")), lse),
        lambda out, lse: (out[:, [1, 0, 2, 3]], lse),
    ],
    ids=["scaled", "lse off", "lse in base 2", "a row at a tile's edge", "NaN", "heads swapped"],
)
def test_wrong_outputs_are_caught(problem, spoil):
    case, _, judge = problem
    call = right(case)
    found = judge.forward(lambda q, k, v: spoil(*call(q, k, v)))
    assert not found.passed
    assert "is off by" in str(found)


def test_one_key_too_many_is_caught(problem):
    case, _, judge = problem
    hidden = case.allowed(torch.arange(200))
    hidden = hidden | (torch.arange(200) == 100)
    found = judge.forward(
        lambda q, k, v: attention(q, k, v, hidden.repeat_interleave(2, 1), backend="reference")
    )
    assert not found.passed


class Skewed(torch.autograd.Function):
    """The identity, whose gradient is 5 % off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


@pytest.mark.parametrize("which", [0, 1, 2])
def test_wrong_gradients_are_caught_though_the_output_is_right(problem, which):
    case, _, judge = problem
    call = right(case)

    def wrong(*tensors):
        return call(*(Skewed.apply(x) if i == which else x for i, x in enumerate(tensors)))

    assert judge.forward(wrong).passed
    found = judge.backward(wrong)
    assert [name for name, (e, limit) in found.errors.items() if not e <= limit] == [
        ("dq", "dk", "dv")[which]
    ]


def test_an_empty_row_must_be_empty():
    allowed = torch.ones(130, 130, dtype=torch.bool)
    allowed[:3] = False
    q, k, v = torch.randn(3, 1, 1, 130, 16)
    judge = Judge(q, k, v, lambda rows: allowed[rows][None, None])
    good = judge.forward(lambda q, k, v: attention(q, k, v, allowed, backend="reference"))
    assert good.passed

    def uniform(q, k, v):
        out, lse = attention(q, k, v, allowed, backend="reference")
        out, lse = out.clone(), lse.clone()
        out[:, :, 0] = v.mean(2)
        return out, lse

    def finite(q, k, v):
        out, lse = attention(q, k, v, allowed, backend="reference")
        return out, lse.masked_fill(lse == -torch.inf, -1e30)

    assert 0 in judge.rows
    assert not judge.forward(uniform).passed
    assert not judge.forward(finite).passed


def test_a_gradient_that_leaks_to_other_rows_is_caught(problem):
    case, _, judge = problem
    call = right(case)

    def leaking(q, k, v):
        out, lse = call(q, k, v)
        return out + 1e-6 * (q - q.detach()).mean(), lse

    found = judge.backward(leaking)
    error, limit = found.errors["dq of other rows"]
    assert error > limit


def test_nothing_checked_is_not_passed_and_nan_is_null():
    assert not Verdict().passed
    wrong = Verdict({"out": (float("nan"), 1.0)})
    assert not wrong.passed
    assert wrong.as_dict() == {"out": {"error": None, "limit": 1.0}}


def test_few_rows_of_a_long_problem():
    q = torch.randn(1, 1, 70_000, 8)
    judge = Judge(q, q, q, None)
    assert len(judge.rows) <= 48
    assert {0, 69_999} <= set(judge.rows.tolist())
