"""The layer of bi-level routing, its paddings and pooled keys, against loops over regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from foveate.methods.biformer import grid_regions
from foveate.nn import BiLevelRoutingAttention, GridAttention
from foveate.ops.errors import InputError

DIM, HEADS = 24, 3


def layer(**more) -> BiLevelRoutingAttention:
    made = BiLevelRoutingAttention(DIM, HEADS, **({"regions": 7, "topk": 3} | more)).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def by_hand(m: BiLevelRoutingAttention, x: Tensor, topk: int = 3, regions: int = 7) -> Tensor:
    """The spec's steps, region by region, with gathered copies of keys and values."""
    height, width = x.shape[1:3]
    rows, cols = -(-height // regions), -(-width // regions)
    if m.pad == "reference":
        x = functional.pad(x, (0, 0, 0, cols * regions - width, 0, rows * regions - height))
    q, k, v = (x @ m.qkv.qkv.weight.T + m.qkv.qkv.bias).split((m.qk_dim, m.qk_dim, DIM), -1)
    image = v
    if m.pad == "refactored":
        rows, cols = height // regions, width // regions
        more = (0, 0, 0, -width % cols, 0, -height % rows)
        q, k, v = (functional.pad(t, more) for t in (q, k, v))
    full_h, full_w = q.shape[1:3]
    y = torch.zeros(len(x), full_h, full_w, DIM, dtype=x.dtype)
    down, across = -(-full_h // rows), -(-full_w // cols)
    boxes = [
        (slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
        for i in range(down)
        for j in range(across)
    ]
    for b in range(len(x)):
        means = []
        for t in (q, k):
            found = []
            for box in boxes:
                inside = t[b][box]
                if m.pad == "refactored":  # pads aren't counted
                    inside = t[b, :height, :width][box]
                found.append(inside.flatten(0, 1).mean(0))
            means.append(torch.stack(found))
        scores = means[0] @ means[1].T
        for r, box in enumerate(boxes):
            order = sorted(range(len(boxes)), key=lambda t: -float(scores[r, t].detach()))[:topk]
            keys, values = (
                torch.cat([t[b][boxes[o]].flatten(0, 1) for o in order]) for t in (k, v)
            )
            query = q[b][box].flatten(0, 1)
            parts = []
            for h in range(HEADS):
                one, two, three = (t.chunk(HEADS, -1)[h] for t in (query, keys, values))
                parts.append((m.scale * one @ two.T).softmax(-1) @ three)
            y[b][box] = torch.cat(parts, -1).view(y[b][box].shape)
    y = y[:, : image.shape[1], : image.shape[2]]
    lepe = functional.conv2d(
        image.permute(0, 3, 1, 2), m.lepe.weight, m.lepe.bias, padding=2, groups=DIM
    )
    y = (y + lepe.permute(0, 2, 3, 1)) @ m.wo.weight.T + m.wo.bias
    return y[:, :height, :width]


@pytest.mark.parametrize(
    ("pad", "size"),
    [
        ("masked", (14, 21)),
        ("reference", (14, 21)),
        ("refactored", (14, 21)),
        ("reference", (30, 30)),
        ("refactored", (30, 30)),
        ("reference", (9, 16)),
    ],
)
def test_the_layer_is_the_sheets_steps(pad, size):
    m = layer(pad=pad)
    x = torch.randn(2, *size, DIM, dtype=torch.float64)
    torch.testing.assert_close(m(x), by_hand(m, x), atol=1e-12, rtol=1e-12)


def test_paddings_agree_where_regions_fit_and_only_there():
    x = torch.randn(1, 14, 14, DIM, dtype=torch.float64)
    other = torch.randn(1, 30, 30, DIM, dtype=torch.float64)
    made = {pad: layer(pad=pad) for pad in ("masked", "reference", "refactored")}
    state = made["masked"].state_dict()
    outs = []
    for m in made.values():
        m.load_state_dict(state)
        outs.append((m(x), m(other)))
    for same, differs in outs[1:]:
        torch.testing.assert_close(same, outs[0][0], atol=1e-12, rtol=0)
        assert not torch.allclose(differs, outs[0][1], atol=1e-3)


def test_images_of_a_batch_may_differ_in_size():
    """Against the same layer on the smaller image alone, regions cut as in the larger one."""
    m = layer(regions=3, topk=2)
    x = torch.randn(2, 9, 9, DIM, dtype=torch.float64)
    real = torch.ones(2, 9, 9, dtype=torch.bool)
    real[1, 6:] = False
    y = m(x, real)
    torch.testing.assert_close(y[:1], m(x[:1]))
    other = x.clone()
    other[1, 6:] += 1
    torch.testing.assert_close(m(other, real)[1, :6], y[1, :6])
    # 6 x 9 tokens in 2 x 3 regions of the same size: an image whose third row of regions is empty
    alone = layer(regions=3, topk=2)
    alone.load_state_dict(m.state_dict())
    alone.partition = lambda h, w, device="cpu": grid_regions((h, w), (2, 3), device=device)
    torch.testing.assert_close(y[1:, :6], alone(x[1:, :6]), atol=1e-12, rtol=0)
    with pytest.raises(InputError, match="goes with pad='masked'"):
        layer(pad="reference")(x, real)


def test_padding_may_hold_anything():
    m = layer(regions=3, topk=2)
    x = torch.randn(2, 9, 9, DIM, dtype=torch.float64)
    real = torch.ones(2, 9, 9, dtype=torch.bool)
    real[1, 6:] = real[1, :, 7:] = False
    y = m(x, real)
    broken = x.masked_fill(~real[..., None], float("nan"))
    torch.testing.assert_close(m(broken, real), y)
    torch.testing.assert_close(y[~real], m.wo.bias.expand(y[~real].shape))
    with pytest.raises(InputError, match="real is bool"):
        m(x, real.double())


def test_multiply_adds_where_regions_do_not_fit():
    x = torch.zeros(2, 30, 30, DIM, dtype=torch.float64)
    for pad, regions, size, tokens in (
        ("masked", 49, 25, 900), ("reference", 49, 25, 35 * 35), ("refactored", 64, 16, 32 * 32),
    ):  # fmt: skip
        m = layer(pad=pad)
        assert m.mixing_macs(x) == 2 * (regions**2 * DIM + tokens * 3 * size * 2 * DIM)
    every = layer(topk=49)  # no more than there are
    assert every.mixing_macs(x) == 2 * (49**2 * DIM + 900 * 900 * 2 * DIM)


@pytest.mark.parametrize("learned", [False, True])
def test_regions_are_chosen_in_fp32_under_autocast(learned):
    """Means that bf16 can't tell apart."""
    more = {"soft": True, "differentiable": True, "learned": True} if learned else {}
    m = layer(regions=2, **more).float()
    qr, kr = torch.zeros(2, 1, HEADS, 4, DIM // HEADS).unbind(0)
    qr[..., 0], kr[..., 0] = 1.0, torch.tensor([1.0, 1.001, 1.002, 1.003])
    if learned:
        torch.nn.init.eye_(m.router.emb.weight)
        torch.nn.init.zeros_(m.router.emb.bias)
    seen = []
    real = m._affinity
    m._affinity = lambda *_: seen.append(real(qr, kr)) or seen[-1].expand(1, -1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m(torch.randn(1, 4, 4, DIM))
    assert seen[0].dtype == torch.float32
    assert seen[0][0, 0].argmax() == 3


@pytest.mark.parametrize("pool", ["average", "max"])
def test_keys_pooled_within_their_regions(pool):
    """With all regions chosen: dense attention to the pooled image."""
    m = layer(regions=3, topk=9, kv_per_region=2, kv_pool=pool, lepe=0)
    x = torch.randn(2, 12, 18, DIM, dtype=torch.float64)
    q, k, v = m.qkv(x)
    shrink = functional.avg_pool2d if pool == "average" else functional.max_pool2d
    k, v = (shrink(t.permute(0, 3, 1, 2), (2, 3)).flatten(2).mT for t in (k, v))
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k, v))
    want = m.wo(((m.scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(m(x).flatten(1, 2), want, atol=1e-12, rtol=1e-12)
    some = layer(regions=3, topk=2, kv_per_region=2, kv_pool=pool)
    assert some(x).isfinite().all()
    assert some.mixing_macs(x) == 2 * (81 * DIM + 12 * 18 * 2 * 4 * 2 * DIM)
    with pytest.raises(InputError, match="equal regions"):
        some(x[:, :11])


def test_soft_and_learned_routing_is_trained():
    x = torch.randn(2, 8, 8, DIM, dtype=torch.float64)
    hard = layer(regions=4)
    soft = layer(regions=4, soft=True, differentiable=True, learned=True)
    for m in (hard, soft):
        m(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert soft.router.emb.weight.grad.abs().sum() > 0
    # and its gradient is the slope where no choice changes
    weight = soft.router.emb.weight
    way = torch.randn_like(weight)
    soft.zero_grad()
    soft(x).square().sum().backward()
    told = float((weight.grad * way).sum())
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * 1e-6 * way)
            losses.append(float(soft(x).square().sum()))
            weight.sub_(sign * 1e-6 * way)
    assert told == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


def test_scales():
    assert layer().scale == DIM**-0.5
    assert layer(scale="head").scale == (DIM // HEADS) ** -0.5
    assert layer(qk_dim=48).scale == 48**-0.5
    assert layer(scale=0.0).scale == 0.0


def test_widths_may_differ():
    m = layer(qk_dim=48, out=False, lepe=3, regions=2)
    x = torch.randn(1, 4, 4, DIM, dtype=torch.float64)
    assert m(x).shape == x.shape
    assert m.qkv.qkv.weight.shape == (48 * 2 + DIM, DIM)


@pytest.mark.parametrize("on", ["input", "value"])
def test_the_last_stage_attends_to_all(on):
    m = GridAttention(DIM, 8, lepe_on=on).double()
    x = torch.randn(2, 4, 5, DIM, dtype=torch.float64)
    q, k, v = (x.flatten(1, 2) @ m.qkv.weight.T).chunk(3, -1)
    image = x if on == "input" else v.unflatten(1, (4, 5))
    lepe = functional.conv2d(
        image.permute(0, 3, 1, 2), m.lepe.weight, m.lepe.bias, padding=2, groups=DIM
    )
    q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in (q, k, v))
    out = ((q @ k.mT * 3**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    want = (out + lepe.flatten(2).mT) @ m.proj.weight.T + m.proj.bias
    torch.testing.assert_close(m(x).flatten(1, 2), want, atol=1e-12, rtol=1e-12)


def test_what_is_refused():
    for more, words in (
        ({"pad": "zero"}, "expected one of masked"),
        ({"lepe": 4}, "expected an odd side"),
        ({"qk_dim": 25}, "no multiple of num_heads"),
        ({"learned": True}, "needs differentiable=True"),
        ({"scale": "full"}, "expected one of reference, head"),
        ({"kv_pool": "sum"}, "expected one of average, max"),
    ):
        with pytest.raises(InputError, match=words):
            layer(**more)
    with pytest.raises(InputError, match=r"expected x \(B, H, W, 24\)"):
        layer()(torch.randn(2, 49, DIM, dtype=torch.float64))
    with pytest.raises(InputError, match="fewer than 7 regions"):
        layer(pad="refactored")(torch.randn(1, 5, 9, DIM, dtype=torch.float64))


def test_compiled_it_is_cut_once():
    """Routing runs as it is: what it lists depends on values."""
    m = layer(regions=2, topk=2).eval()
    x = torch.randn(1, 4, 4, DIM, dtype=torch.float64)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(m, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(x), m(x))
    assert len(graphs) == 2
