"""MLA, TPLA and GLA: the spec's oracles 1 to 10, by their numbers."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, HEADS, decoded, layer, rotated, softmax_attention, tokens
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import Context, causal, padding
from foveate.methods import make
from foveate.methods.full import Full
from foveate.methods.tpla import (
    TPLA,
    align,
    find_basis,
    fold_gain,
    hadamard,
    orthogonal_basis,
    rebase,
    to_tpla,
)
from foveate.ops.errors import InputError

R, DH, DR = 32, 12, 6
SIZES = f"latent={R}, rope_dim={DR}"
MLA = f"mla({SIZES})"
EXACT = {"atol": 1e-12, "rtol": 0}
OFF = TPLA(pd_sep=False)


def mla(text=MLA, dtype=torch.float64, gain=True, **options):
    made = layer(text, dtype, **options)
    if gain:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            made.projection.kv_norm.weight.copy_(0.5 + torch.rand(R, generator=generator))
    return made


def around(projection, heads=HEADS, **options):
    """A layer around a projection that was made already."""
    return foveate.Attention(DIM, heads, projection, **options).eval()


def run(made, x, phase="prefill"):
    return made(x, ctx=Context(mask=causal(), phase=phase)).y


def converted(source, x, recipe=OFF, **options):
    return around(to_tpla(source.projection, recipe, hidden=x, **options))


# -- MLA -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("query_rank", [None, 20])
def test_mla_by_definition(query_rank):
    """Steps 1 to 5 written out, every head by itself."""
    made, x = mla(f"mla({SIZES}, query_rank={query_rank}, value_dim=10)"), tokens()
    p = made.projection
    cq = x
    if query_rank:
        cq = functional.rms_norm(x @ p.q_down.weight.T, (20,), p.q_norm.weight, 1e-6)
    c = x @ p.kv_down.weight[:R].T
    chat = functional.rms_norm(c, (R,), p.kv_norm.weight, 1e-6)
    k_pe = rotated(x @ p.kv_down.weight[R:].T, interleaved=True)
    heads = []
    for q_up, kv_up in zip(p.q_up.weight.chunk(HEADS), p.kv_up.weight.chunk(HEADS)):
        q = cq @ q_up.T
        q = torch.cat((q[..., :DH], rotated(q[..., DH:], interleaved=True)), -1)
        k = torch.cat((chat @ kv_up[:DH].T, k_pe), -1)
        v = chat @ kv_up[DH:].T
        o = softmax_attention(q[:, None], k[:, None], v[:, None], (DH + DR) ** -0.5)
        heads.append(o[:, 0])
    expected = torch.cat(heads, -1) @ p.out.weight.T
    torch.testing.assert_close(made(x, mask=causal()).y, expected)


@pytest.mark.parametrize("query_rank", [None, 20])
def test_tpla_oracle_1_naive_equals_absorbed(query_rank):
    made, x = mla(f"mla({SIZES}, query_rank={query_rank})"), tokens()
    torch.testing.assert_close(run(made, x), run(made, x, "decode"), **EXACT)


def test_cache_of_mla_is_r_plus_dr_whatever_the_heads():
    for heads in (4, 8):
        made = layer(f"mla(latent=64, rope_dim=8, head_dim={DH})", num_heads=heads)
        assert made.new_cache().elements_per_token == 72
    with torch.device("meta"):
        v3 = foveate.Attention(
            7168, 128, "mla(latent=512, rope_dim=64, head_dim=128, query_rank=1536)"
        )
        tpla = foveate.Attention(
            7168, 128, "tpla(latent=512, rope_dim=64, head_dim=128, query_rank=1536)"
        )
    assert v3.new_cache().elements_per_token == 576
    assert tpla.projection.elements_per_device == 320
    assert v3.projection.scale == 192**-0.5


def test_long_context_models_scale_by_mscale_squared():
    p = layer(f"mla({SIZES}, mscale=1.3)").projection
    assert p.scale == pytest.approx(1.69 * (DH + DR) ** -0.5)


def test_tpla_oracle_10_interleaved_and_half_split_agree_after_permuting():
    one, x = mla(), tokens()
    two = mla(interleaved=False)
    order = torch.cat((torch.arange(0, DR, 2), torch.arange(1, DR, 2)))
    with torch.no_grad():
        two.projection.load_state_dict(one.projection.state_dict())
        two.projection.kv_down.weight[R:] = one.projection.kv_down.weight[R:][order]
        theirs = one.projection.q_up.weight.unflatten(0, (HEADS, -1))
        ours = two.projection.q_up.weight.unflatten(0, (HEADS, -1))
        ours[:, DH:] = theirs[:, DH:][:, order]
    torch.testing.assert_close(run(one, x), run(two, x), **EXACT)
    assert one.rope.interleaved
    assert not two.rope.interleaved


# -- reparametrisation -----------------------------------------------------------------------------
@pytest.mark.parametrize("transform", ["hadamard", "pca", "identity", "random"])
def test_tpla_oracle_2_any_orthogonal_basis_reproduces_mla(transform):
    made, x = mla(bias=True), tokens()
    if transform == "random":
        u = torch.linalg.qr(torch.randn(R, R, dtype=torch.float64)).Q
    else:
        u = orthogonal_basis(transform, R, torch.randn(100, R))
    turned = around(rebase(fold_gain(made.projection), u))
    for phase in ("prefill", "decode"):
        torch.testing.assert_close(run(turned, x, phase), run(made, x), **EXACT)


def test_tpla_oracle_2_a_gain_left_in_place_breaks_it():
    made, x = mla(), tokens()
    u = orthogonal_basis("hadamard", R)
    assert (run(around(rebase(made.projection, u)), x) - run(made, x)).abs().max() > 1e-3


def test_converting_leaves_the_mla_alone():
    made, x = mla(), tokens()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    to_tpla(made.projection, hidden=x)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])


# -- TPLA ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("transform", ["hadamard", "pca"])
def test_tpla_oracle_3_exact_norm_and_softmax_is_mla(transform, groups):
    made, x = mla(), tokens()
    recipe = TPLA(groups=groups, norm="exact", softmax="exact", pd_sep=False)
    sliced = converted(made, x, recipe, transform=transform, mu="one")
    torch.testing.assert_close(run(sliced, x, "decode"), run(made, x), **EXACT)


def test_tpla_oracle_3_one_group_is_mla():
    made, x = mla(), tokens()
    one = converted(made, x, TPLA(groups=1, pd_sep=False))
    assert one.projection.alpha.tolist() == one.projection.mu.tolist() == [1.0]
    torch.testing.assert_close(run(one, x, "decode"), run(made, x), **EXACT)


def test_tpla_oracle_4a_two_equal_halves():
    made, x = mla(gain=False), tokens()
    half = R // 2
    with torch.no_grad():
        down, up = made.projection.kv_down.weight, made.projection.kv_up.weight
        down[half:R] = down[:half]
        up[:, half:] = up[:, :half]
    sliced = converted(made, x, transform="identity")
    assert sliced.projection.alpha.tolist() == sliced.projection.mu.tolist() == [2.0, 2.0]
    torch.testing.assert_close(run(sliced, x, "decode"), run(made, x), **EXACT)


def test_tpla_oracle_4b_second_half_empty():
    made, x = mla(gain=False), tokens()
    with torch.no_grad():
        made.projection.kv_down.weight[R // 2 : R] = 0
    sliced = converted(made, x, transform="identity")
    sliced.projection.alpha.copy_(torch.ones(2))
    sliced.projection.mu.copy_(torch.ones(2))
    torch.testing.assert_close(run(sliced, x, "decode"), run(made, x), **EXACT)
    alone = sliced.projection.shard(1, 2)
    assert not run(around(alone), x, "decode").any()


def test_tpla_oracle_4b_by_pca():
    """An empty slice is found by PCA, whose shares are then 1 and 0, and does no harm."""
    made, x = mla(gain=False), tokens()
    with torch.no_grad():
        made.projection.kv_down.weight[: R // 2] = 0
    sliced = converted(made, x, transform="pca")
    torch.testing.assert_close(run(sliced, x, "decode"), run(made, x), atol=1e-9, rtol=0)


class Devices:
    """Steps 11 to 16 written out, one device for each slice; what they sum is counted."""

    def __init__(self, p, groups=2):
        self.p, self.width = p, R // groups
        self.slices = [slice(j * self.width, (j + 1) * self.width) for j in range(groups)]
        self.summed = []  # numbers of each all-reduce

    def reduce(self, parts):
        parts = list(parts)
        self.summed.append(parts[0].numel())
        return sum(parts)

    def run(self, x, norm="local", softmax="local", allowed=None):
        p = self.p
        q = p.q_up(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
        q_pe = rotated(q[..., DH:], interleaved=True)
        c, k_pe = p.kv_down(x).split((R, DR), -1)
        k_pe = rotated(k_pe, interleaved=True)[:, None]
        up = p.kv_up.weight.unflatten(0, (HEADS, -1))
        squares = [
            p.alpha[j] / 2 * c[..., at].square().mean(-1) for j, at in enumerate(self.slices)
        ]
        if norm == "exact":
            whole = self.reduce(c[..., at].square().sum(-1) for at in self.slices) / R
            squares = [whole] * len(self.slices)
        chat = [
            (c[..., at] / (square[..., None] + 1e-6).sqrt())[:, None]
            for at, square in zip(self.slices, squares)
        ]
        scores = [
            torch.einsum("bhld,hdr->bhlr", q[..., :DH], up[:, :DH, at]) @ own.mT
            for at, own in zip(self.slices, chat)
        ]
        if softmax == "exact":
            scores = [self.reduce(scores)] * len(self.slices)
        else:
            scores = [mu * s for mu, s in zip(p.mu, scores)]
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = seen if allowed is None else seen & allowed
        probs = [
            ((s + q_pe @ k_pe.mT) * (DH + DR) ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            for s in scores
        ]
        outs = (
            w @ own @ up[:, DH:, at].mT for w, own, at in zip(probs, chat, self.slices)
        )  # each supplies its slice of the value
        return self.reduce(o.transpose(1, 2).flatten(2) @ p.out.weight.T for o in outs)


VARIANTS = pytest.mark.parametrize(
    ("norm", "softmax"),
    [("local", "local"), ("local", "exact"), ("exact", "local"), ("exact", "exact")],
)


@VARIANTS
@pytest.mark.parametrize("transform", ["hadamard", "pca"])
def test_tpla_by_definition(transform, norm, softmax):
    """Both approximations, each by itself, and (oracle 3) neither: values sliced and summed."""
    made, x = mla(), tokens()
    recipe = TPLA(norm=norm, softmax=softmax, pd_sep=False)
    sliced = converted(made, x, recipe, transform=transform)
    expected = Devices(sliced.projection).run(x, norm, softmax)
    torch.testing.assert_close(run(sliced, x, "decode"), expected)
    if norm == softmax == "exact":
        torch.testing.assert_close(expected, run(made, x), **EXACT)


@VARIANTS
def test_numbers_that_devices_sum(norm, softmax):
    """One all-reduce of D for each token, as MLA's; exact norms and scores are paid on top."""
    made, x = mla(), tokens()
    p = converted(made, x, TPLA(norm=norm, softmax=softmax, pd_sep=False)).projection
    devices = Devices(p)
    devices.run(x, norm, softmax)
    assert sum(devices.summed) == x.shape[0] * x.shape[1] * p.summed_per_token(x.shape[1])
    mine = made.projection.summed_per_token(x.shape[1])
    assert mine == DIM
    assert (p.summed_per_token(1000) == mine) is (norm == softmax == "local")


def test_numbers_that_ranks_sum_are_those_of_mla():
    made, x = mla(), tokens()
    sliced = converted(made, x)
    for ranks in (2, 4):
        for whole in (made, sliced):
            part = around(whole.projection.shard(ranks - 1, ranks))
            summed = run(part, x, "decode").numel() // (x.shape[0] * x.shape[1])
            assert summed == whole.projection.summed_per_token(x.shape[1])


def test_tpla_oracle_5_prefill_is_exact():
    made, x = mla(), tokens()
    separate = converted(made, x, TPLA())
    torch.testing.assert_close(run(separate, x, "prefill"), run(made, x), **EXACT)
    torch.testing.assert_close(run(separate, x, "train"), run(made, x), **EXACT)


def test_tpla_oracle_5_the_first_decoded_key_has_the_only_norm_error():
    made, x = mla(), tokens(20)
    separate = converted(made, x, TPLA())
    _, cache = decoded(separate, x, 19)
    held = cache.entries["latent"]
    exact = separate.projection.entries(x, phase="prefill")["latent"]
    width = R // 2
    torch.testing.assert_close(held[:, :, :19, :width], exact[:, :, :19, :width], **EXACT)
    assert not torch.allclose(held[:, :, 19:, :width], exact[:, :, 19:, :width])
    # With exact norms nothing at all is different in the cache.
    separate.projection.local_norm = False
    _, cache = decoded(separate, x, 19)
    torch.testing.assert_close(cache.entries["latent"][..., :width], exact[..., :width], **EXACT)


def test_tpla_oracle_6_hadamard_worked_example():
    h = hadamard(4) / 2
    one = torch.tensor([100.0, 0, 0, 0], dtype=torch.float64) @ h
    two = torch.tensor([0, 0, 80.0, 0], dtype=torch.float64) @ h
    assert one.tolist() == [50.0] * 4
    assert two.tolist() == [40.0, 40.0, -40.0, -40.0]
    product = one * two
    assert (float(product[:2].sum()), float(product[2:].sum())) == (4000.0, -4000.0)
    assert float(product.sum()) == 0


@pytest.mark.parametrize("size", [1, 2, 64])
def test_hadamard_matrices(size):
    h = hadamard(size)
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))
    u = orthogonal_basis("hadamard", size)
    torch.testing.assert_close(u.T @ u, torch.eye(size, dtype=torch.float64))


def test_tpla_oracle_7_pca():
    latents = torch.randn(500, R) @ torch.randn(R, R)
    basis = find_basis("pca", R, 4, latents)
    assert (basis.shares.diff() <= 0).all()
    assert float(basis.shares.sum()) == pytest.approx(1)
    u = basis.matrix.float()
    torch.testing.assert_close(u.T @ u, torch.eye(R), atol=1e-5, rtol=0)
    turned = latents.double() @ basis.matrix
    moment = turned.T @ turned / 500
    assert (moment - moment.diag().diag()).abs().max() < 1e-9 * moment.max()
    torch.testing.assert_close(basis.alpha, 1 / basis.shares)
    assert basis.mu.tolist() == [1.0] * 4


@torch.no_grad()
def test_the_norms_condition_holds_on_average():
    """alpha_j |(c U)_j|^2 = |c U|^2 in the mean, for PCA; alpha = g for the others."""
    made, x = mla(), tokens(300)
    basis = converted(made, x).projection
    chat = basis.entries(x, phase="decode")["latent"]
    whole = to_tpla(made.projection, TPLA(), hidden=x).entries(x)["latent"]
    width = R // 2
    for j in range(2):
        energy = whole[:, j, :, :width].square().sum(-1).mean()
        assert float(basis.alpha[j] * energy) == pytest.approx(R, rel=1e-3)
    assert chat.shape == whole.shape
    assert converted(made, x, transform="hadamard").projection.alpha.tolist() == [2.0, 2.0]


def test_clamped_inverse_of_an_empty_slice():
    latents = torch.randn(50, R)
    latents[:, R // 2 :] = 0
    assert find_basis("pca", R, 2, latents, "inverse").mu[1] == 1e3


@torch.no_grad()
def test_fitted_mu_is_the_least_squares():
    made, x = mla(), tokens(60, 1)
    fitted = converted(made, x, transform="hadamard", mu="fit").projection
    p = fitted
    whole = fold_gain(made.projection)
    q = torch.einsum("bhld,hdr->bhlr", whole.query(x)[..., :DH], whole.key_up())
    s = q @ functional.rms_norm(whole.kv_down(x)[..., :R], (R,), eps=1e-6)[:, None].mT
    ours = p._absorbed(p.query(x)).unflatten(-1, (2, -1))
    chat = p.entries(x, phase="decode")["latent"][..., : R // 2]
    for j in range(2):
        s_j = ours[..., j, :] @ chat[:, j][:, None].mT
        expected = (s * s_j).sum() / (s_j * s_j).sum()
        assert float(p.mu[j]) == pytest.approx(float(expected), rel=1e-5)


# -- GLA -------------------------------------------------------------------------------------------
def test_tpla_oracle_8_a_gla_kernel_with_duplicated_heads_is_tpla():
    """TPLA(h heads, g) as GLA of g h heads: head block j is a copy of all heads."""
    made, x = mla(), tokens()
    sliced = converted(made, x, transform="hadamard")
    p = sliced.projection
    p.mu.fill_(1.0)
    text = f"tpla({SIZES}, head_dim={DH}, heads='blocks', pd_sep=False)"
    gla = layer(text, num_heads=2 * HEADS)
    with torch.no_grad():
        for name in ("q_up", "kv_up"):
            getattr(gla.projection, name).weight.copy_(getattr(p, name).weight.repeat(2, 1))
        gla.projection.kv_down.weight.copy_(p.kv_down.weight)
        gla.projection.out.weight.copy_(p.out.weight.repeat(1, 2))
        gla.projection.alpha.copy_(p.alpha)
    difference = run(gla, x, "decode") - run(sliced, x, "decode")
    assert difference.abs().max() < 1e-6


def test_gla_by_definition():
    made, x = mla(), tokens()
    gla = converted(made, x, TPLA(heads="blocks", pd_sep=False), transform="pca")
    p, width = gla.projection, R // 2
    held = p.entries(x, phase="decode")["latent"]
    q = p.q_up(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    up = p.kv_up.weight.unflatten(0, (HEADS, -1))
    heads = []
    for h in range(HEADS):
        j = h // 2
        at = slice(j * width, (j + 1) * width)
        chat = held[:, j, :, :width]
        k_pe = rotated(held[:, j, :, width:], interleaved=True)
        q_h = torch.cat(
            (q[:, h, :, :DH] @ up[h, :DH, at], rotated(q[:, h, :, DH:], interleaved=True)), -1
        )
        k = torch.cat((chat, k_pe), -1)
        z = softmax_attention(q_h[:, None], k[:, None], chat[:, None], (DH + DR) ** -0.5)[:, 0]
        heads.append(z @ up[h, DH:, at].T)
    torch.testing.assert_close(run(gla, x, "decode"), torch.cat(heads, -1) @ p.out.weight.T)


@pytest.mark.parametrize("heads", ["all", "blocks"])
@pytest.mark.parametrize("norm", ["local", "exact"])
def test_every_variant_decodes_as_it_runs(heads, norm):
    made, x = mla(), tokens()
    sliced = converted(made, x, TPLA(heads=heads, norm=norm, pd_sep=False)).float()
    whole = run(sliced, x.float())
    assert (decoded(sliced, x.float(), 11)[0] - whole).abs().max() < 1e-5


# -- several devices -------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", ["all", "blocks"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_tpla_oracle_9_the_same_result_for_any_number_of_devices(devices, heads):
    made, x = mla(out_bias=True), tokens()
    sliced = converted(made, x, TPLA(heads=heads, pd_sep=False))
    parts = [around(sliced.projection.shard(i, devices)) for i in range(devices)]
    total = sum(run(part, x, "decode") for part in parts)
    torch.testing.assert_close(total, run(sliced, x, "decode"), **EXACT)
    if devices > 1:
        widths = {part.new_cache().elements_per_token for part in parts}
        assert widths == {R // 2 + DR}


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("heads", ["all", "blocks"])
def test_tpla_oracle_9_exact_prefill_is_handed_over_to_the_devices(devices, heads):
    """Steps 19 and 20: every device keeps its slices of the exact prefill and decodes on them."""
    made, x = mla(out_bias=True), tokens(20)
    separate = converted(made, x, TPLA(heads=heads))
    expected, _ = decoded(separate, x, 15)
    prefill = separate.new_cache()
    with torch.no_grad():
        separate(x[:, :15], mask=causal(), cache=prefill)
    whole = separate.projection.for_decoding()
    assert separate.projection.pd_sep
    total = 0
    for rank in range(devices):
        part = around(whole.shard(rank, devices))
        cache = part.new_cache()
        mine = whole.groups_of(rank, devices)
        with torch.no_grad():
            cache.append({"latent": prefill.entries["latent"][:, mine]})
            steps = [part(x[:, t : t + 1], mask=causal(), cache=cache).y for t in range(15, 20)]
        assert cache.elements_per_token == R // 2 + DR
        total = total + torch.cat(steps, 1)
    torch.testing.assert_close(total, expected[:, 15:], **EXACT)


def test_tpla_oracle_9_a_padded_key_is_masked_on_every_device():
    made, x = mla(), tokens()
    sliced = converted(made, x)
    real = torch.tensor([37, 29])
    y = sliced(x, ctx=Context(mask=causal() & padding(real), phase="decode")).y
    allowed = (torch.arange(37) < real[:, None])[:, None, None]
    expected = Devices(sliced.projection).run(x, allowed=allowed)
    torch.testing.assert_close(y[0], expected[0])
    torch.testing.assert_close(y[1, :29], expected[1, :29])
    whole = run(sliced, x, "decode")
    torch.testing.assert_close(y[1, :29], whole[1, :29])
    pads = torch.tensor([0, 8])
    positions = torch.arange(37) - pads[:, None]
    left = Context(
        mask=causal() & padding(37 - pads), q_positions=positions, kv_positions=positions,
        phase="decode",
    )  # fmt: skip
    alone = run(sliced, x[1:, 8:], "decode")
    torch.testing.assert_close(sliced(x, ctx=left).y[1:, 8:], alone)


def test_tpla_oracle_9_causality():
    made, x = mla(), tokens()
    sliced = converted(made, x)
    other = x.clone()
    other[:, 20:] += 1
    before, after = run(sliced, x, "decode"), run(sliced, other, "decode")
    assert torch.equal(before[:, :20], after[:, :20])


def test_flops_of_decoding_grow_by_the_duplicated_rope():
    """Per cached token and device at TP 2, V3: MLA (h/2) 2 (2r + d_r), TPLA h 2 (r + d_r)."""
    sizes = "latent=512, rope_dim=64, head_dim=128"

    @torch.no_grad()
    def flops(text):
        p = foveate.Attention(DIM, 16, text).projection.shard(0, 2)
        x, known = tokens(10, 1, torch.float32), Context(phase="decode", backend="reference")
        qkv = p.absorb(p.query(x[:, -1:]), p.entries(x, phase="decode"))
        with FlopCounterMode(display=False) as counter:
            p.attend(Full(), qkv, known, None)
        return 8 * counter.get_total_flops() // 10  # V3 has 128 heads, eight times as many

    assert (flops(f"mla({sizes})"), flops(f"tpla({sizes}, pd_sep=False)")) == (139_264, 147_456)


def test_align_brings_a_tpla_nearer_to_its_mla():
    made, x = mla(dtype=torch.float32), tokens(64, dtype=torch.float32)
    sliced = converted(made, x, transform="hadamard").train()
    losses = align(
        lambda h: run(sliced, h, "train"),
        lambda h: run(made, h),
        sliced.parameters(),
        [x],
        epochs=12,
        lr=5e-3,
    )
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(InputError, match="at least one batch"):
        align(run, run, sliced.parameters(), [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpla(groups=5)", "divisor of the latent"),
        ("tpla(heads='some')", "is unknown"),
        ("tpla(heads='blocks', softmax='exact')", "no partial scores"),
        ("tpla(groups=3, heads='blocks')", "divisor of 4 heads"),
        ("mla(rope_dim=3)", "even number"),
        ("mla(latent=0)", "at least 1"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(InputError, match=said):
        foveate.Attention(DIM, HEADS, make(text))


def test_refused_conversions():
    made, x = mla(), tokens()
    p = made.projection
    with pytest.raises(InputError, match="PCA needs latents"):
        to_tpla(p)
    with pytest.raises(InputError, match="mu='fit' needs"):
        to_tpla(p, transform="hadamard", mu="fit")
    with pytest.raises(InputError, match="mu='ones' is unknown"):
        to_tpla(p, hidden=x, mu="ones")
    with pytest.raises(InputError, match="transform='pcb'"):
        to_tpla(p, transform="pcb", hidden=x)
    with pytest.raises(InputError, match="powers of two"):
        to_tpla(layer("mla(latent=24)").projection, transform="hadamard")
    with pytest.raises(InputError, match="divisor"):
        to_tpla(p, TPLA(groups=3), hidden=x)
    with pytest.raises(InputError, match="exact prefill"):
        to_tpla(p, hidden=x).shard(0, 2)
