"""The check behind every speed: right outputs pass, wrong ones don't."""

import copy
from dataclasses import replace

import pytest
import torch

from foveate.compare import verify
from foveate.compare.measure import Machine, Recorder
from foveate.methods import make
from foveate.ops import AttentionOutput, Layout, causal
from foveate.parts import Attention

METHODS = ("full", "sink-window(window=30)", "a-shape(sinks=8, local=30)",
           "vertical-slash(verticals=20, slashes=50)", "block-sparse(blocks=2)",
           "hyperattention(block_size=16, sample_size=16, min_seq_len=32)")  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def samples_of(model, method, batch=2):
    ids = torch.randint(0, 256, (batch, 200))
    done = Machine(model, "causal-lm").run(ids, method, inspect=True, keep=frozenset({0, 1}))
    return done.log.samples


@pytest.mark.parametrize("name", METHODS)
def test_every_method_passes_in_batches(model, name):
    method = make(name)
    samples = samples_of(model, method)
    assert [s.layer for s in samples] == [0, 1]
    error, problems = verify.worst_error(samples, method)
    assert 0 < error < 1e-5
    assert not problems
    assert verify.verdict(method, torch.float32, error, problems, {})[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("damage", ["head", "scale", "nan"])
def test_a_wrong_output_fails(model, name, damage):
    method = make(name)
    samples = samples_of(model, method)
    out = samples[1].out = samples[1].out.clone()
    if damage == "head":
        out[:, -1] = out[:, -1].roll(1, 1)
    elif damage == "scale":
        out *= 1.001
    else:
        out[0, 0, 0, 0] = float("nan")
    error, problems = verify.worst_error(samples, method)
    passed, said = verify.verdict(method, torch.float32, error, problems, {})
    assert not passed
    assert "off by" in said


def test_a_layout_that_leaves_the_mask_fails(model):
    method = make("sink-window(window=30)")
    samples = samples_of(model, method, batch=1)
    samples[0].layout = Layout.from_dense(torch.ones(200, 200, dtype=torch.bool))
    error, problems = verify.worst_error(samples, method)
    passed, said = verify.verdict(method, torch.float32, 0.0, problems, {})
    assert not passed
    assert "leaves the model's mask" in said


def test_an_exact_method_must_give_denses_logits():
    full, window = make("full"), make("sink-window")
    near = {"max_logit": 20.0, "max_difference": 1e-4}
    far = {"max_logit": 20.0, "max_difference": 1e-1}
    assert verify.verdict(full, torch.float32, 1e-7, [], near)[0]
    assert not verify.verdict(full, torch.float32, 1e-7, [], far)[0]
    assert not verify.verdict(
        full, torch.float32, 1e-7, [], near | {"max_difference": float("nan")}
    )[0]
    assert verify.verdict(window, torch.float32, 1e-7, [], far)[0]


def test_a_group_of_a_layout_is_that_group():
    table = torch.rand(2, 3, 100, 130) < 0.2
    layout = Layout.from_dense(table, 16)
    for batch in range(2):
        for head in range(3):
            own = verify.group_of(layout, batch, head)
            assert own.groups == (1, 1)
            assert torch.equal(own.dense()[0, 0], table[batch, head])
            assert own.pairs == int(table[batch, head].sum())
    shared = causal().layout(70, 70)
    assert torch.equal(verify.group_of(shared, 1, 5).dense(), shared.dense())


class Halved(Attention):
    """Not a pattern: no layout; computes half of full attention."""

    def __init__(self, slip=0.0):
        self.slip = slip

    def __call__(self, q, k, v, ctx=None):
        out = make("full")(q, k, v, replace(ctx, stats=None))
        wide = q.dtype == torch.float64
        return AttentionOutput(out.out * (0.5 if wide else 0.5 + self.slip), out.lse)


def test_a_method_without_layout_is_recomputed(model):
    for slip, passes in ((0.0, True), (0.01, False)):
        method = Halved(slip)
        error, problems = verify.worst_error(samples_of(model, method), method)
        assert verify.verdict(method, torch.float32, error, problems, {})[0] is passes


def test_recording_changes_nothing_and_counts_exactly(model):
    from foveate.compare.measure import Log
    from foveate.parts import Context

    q, k, v = (torch.randn(1, h, 100, 16) for h in (4, 2, 2))
    method, log = make("sink-window(sinks=3, window=10)"), Log()
    ctx = Context(mask=causal())
    got = Recorder(method, log, False)(q, k, v, copy.copy(ctx))
    assert torch.equal(got.out, method(q, k, v, ctx).out)
    i = torch.arange(100)
    near = (i[:, None] - i < 10) | (i < 3)
    assert log.pairs[0] == int((near & (i <= i[:, None])).sum())
    assert log.mask_pairs[0] == 100 * 101 // 2
    assert log.area[0] <= log.mask_area[0]
