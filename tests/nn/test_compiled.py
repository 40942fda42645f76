"""The layer under torch.compile and under torch's checkpoints: the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from projections import layer, tokens
from torch.utils.checkpoint import checkpoint

from foveate import catalog, causal

KEYS = [row.key for row in catalog.rows() if row.kind == "projection"]
EVERY = pytest.mark.parametrize(
    "key", [*KEYS, "tpla(pd_sep=False)", "sqa(global_tokens=2)", "moh(router='query')"]
)


def results(made, x, run):
    """y, and the gradients of x and of all parameters, losses included."""
    x = x.clone().requires_grad_()
    out = run(x)
    losses = [value for name, value in out.aux.items() if name.endswith("_loss")]
    total = out.y.square().sum() + sum(losses)
    return out.y, *torch.autograd.grad(total, [x, *made.parameters()])


def same(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@EVERY
def test_compiled_in_one_graph(key):
    """Training, forward and backward, without a break; one graph for several lengths."""
    made = layer(key).train()
    torch.compiler.reset()
    run = torch.compile(
        lambda x: made(x, mask=causal()), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (37, 50):
        x = tokens(length)
        same(results(made, x, run), results(made, x, lambda x: made(x, mask=causal())))


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(key, reentrant):
    made, x = layer(key).train(), tokens().requires_grad_()
    runs = []
    made.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients(y):
        made.zero_grad()
        x.grad = None
        y.square().sum().backward()
        return [p.grad for p in (x, *made.parameters()) if p.grad is not None]

    plain = gradients(made(x, mask=causal()).y)
    runs.clear()
    again = gradients(checkpoint(lambda x: made(x, mask=causal()).y, x, use_reentrant=reentrant))
    assert len(runs) == 2
    same(again, plain)
