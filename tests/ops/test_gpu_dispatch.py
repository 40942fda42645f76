"""What `auto` takes on a GPU, and what it says of the Triton engine where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from foveate.ops import attention, causal, explain, triton, window
from foveate.ops.backends import sdpa_gpu
from foveate.ops.backends.base import Inputs
from foveate.ops.backends.sdpa import passed_over
from foveate.ops.errors import BackendError
from foveate.ops.triton import config
from foveate.ops.triton.call import precision

Q = torch.randn(1, 4, 1024, 64)
MASKED = Inputs(Q, Q, Q, window(100, 0))
PLAIN = [Inputs(Q, Q, Q), Inputs(Q, Q, Q, causal())]


@pytest.mark.parametrize("inputs", PLAIN)
def test_flash_attention_is_taken_where_it_is_declared_faster(inputs, monkeypatch):
    assert sdpa_gpu.implementation() == "FA2"
    assert "FA2 isn't declared faster than triton" in passed_over(inputs, triton_can=True)[0]
    assert passed_over(inputs, triton_can=False) == []
    monkeypatch.setattr(sdpa_gpu, "implementation", lambda device: "FA3")
    assert passed_over(inputs, triton_can=True) == []
    assert passed_over(MASKED, triton_can=True)
    short = Inputs(*(x[:, :, :100] for x in (Q, Q, Q)))
    assert "FA3 isn't declared faster" in passed_over(short, triton_can=True)[0]


def test_what_flash_attention_declines_on_a_gpu():
    assert sdpa_gpu.reasons(Q.half(), plain=True) == []
    assert any("float32" in reason for reason in sdpa_gpu.reasons(Q, plain=True))
    assert any("dense and causal" in reason for reason in sdpa_gpu.reasons(Q.half(), plain=False))
    assert any("multiples of 8" in reason for reason in sdpa_gpu.reasons(Q[..., :60].half(), True))


@pytest.mark.skipif(triton.interpreted(), reason="the interpreter takes tensors of the CPU")
def test_triton_says_why_it_does_not_run():
    assert explain(Q, Q, Q).reasons["triton"] == ["device cpu (it runs on cuda)"]
    with pytest.raises(BackendError, match=r"device cpu \(it runs on cuda\)"):
        attention(Q, Q, Q, backend="triton")


def test_limits_are_told(monkeypatch):
    wide = torch.empty(1, 1, 8, 1200)
    found = triton.supports(wide, wide, wide, None, needs_grad=False)
    assert any("head size 1200 (it takes up to 1024)" in reason for reason in found)
    assert any("value head size 1200 (it takes up to 512)" in reason for reason in found)
    found = triton.supports(*(wide[..., :300],) * 3, None, needs_grad=True)
    assert any("with a gradient (it takes up to 256)" in reason for reason in found)
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert "triton is not installed" in triton.reason()


def test_triton_is_not_imported_before_a_kernel_runs():
    code = (
        "import sys, foveate, foveate.ops.triton.run_forward, foveate.ops.triton.run_backward\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_tf32_is_taken_only_where_torch_was_told_that_it_may():
    assert precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert precision(torch.float32) == "tf32"
        assert precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (64, (64, 0)),
        (96, (64, 32)),
        (80, (64, 16)),
        (576, (512, 64)),
        (100, (128, 0)),
        (40, (64, 0)),
        (5, (16, 0)),
    ],
)
def test_head_sizes_are_split_where_that_pads_less(dim, parts):
    assert config.split_dim(dim) == parts


@pytest.mark.parametrize(
    ("tile", "most", "found"),
    [
        (128, 64, (64, False)),
        (96, 128, (32, False)),
        (16, 64, (64, True)),
        (40, 64, (64, True)),
        (48, 16, (16, True)),
    ],
)
def test_steps_of_the_streamed_side(tile, most, found):
    assert config.streamed_block(tile, most) == found


@pytest.mark.parametrize(("rows", "block"), [(8, 16), (40, 64), (128, 128), (192, 64), (130, 64)])
def test_blocks_of_the_owned_side(rows, block):
    assert config.owned_block(rows, 128) == block


def test_tuned_configurations_are_kept_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    config._tuned.cache_clear()
    chosen = config.Config(64, 32, 4, 1)
    config.keep("forward 64", chosen)
    config.keep("decode 64", config.Config(16, 32, 4, 1))
    assert config._tuned()["forward 64"] == chosen
    assert len(config._tuned()) == 2
    config.cache_file().write_text("not JSON")
    config._tuned.cache_clear()
    assert config._tuned() == {}
    config._tuned.cache_clear()


def test_a_forced_configuration_is_for_its_kernel():
    chosen = config.Config(64, 32, 4, 1)
    with config.Forced(chosen, "decode"):
        assert config.config_for("decode", 64, 64, torch.half, torch.device("cpu")) == chosen
        assert config.config_for("forward", 64, 64, torch.half, torch.device("cpu")) != chosen


def test_cudnn_goes_before_flash_attention_2_on_hopper(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        assert sdpa_gpu.implementation(gpu) == "cuDNN"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert sdpa_gpu.implementation(gpu) == "FA2"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert sdpa_gpu.implementation(gpu) == "FA2"
    finally:
        torch.use_deterministic_algorithms(before)


def test_cudnn_takes_no_short_sequences(monkeypatch):
    monkeypatch.setattr(sdpa_gpu, "implementation", lambda device: "cuDNN")
    key = Q[:, :, :1]
    assert sdpa_gpu._by_cudnn(Q, Q)
    assert not sdpa_gpu._by_cudnn(Q, key)
    assert not sdpa_gpu._by_cudnn(key, Q)
    assert not sdpa_gpu._by_cudnn(Q[..., :32], Q[..., :32])
    assert passed_over(Inputs(Q, Q, Q), triton_can=True) == []
    assert "cuDNN isn't declared" in passed_over(Inputs(Q, key, key), triton_can=True)[0]


def test_torchs_kernels_are_given_what_they_can_read():
    even = torch.randn(1, 2, 8, 72).bfloat16()
    for x in (even[..., 8:], even.mT.contiguous().mT, even[..., 1:65], even[..., :64]):
        found = sdpa_gpu._aligned(x)
        assert torch.equal(found, x)
        assert found.stride(-1) == 1
        assert found.data_ptr() % 16 == 0
        assert all(n % 8 == 0 for n in found.stride()[:-1])
    assert sdpa_gpu._aligned(even[..., 8:]).data_ptr() == even[..., 8:].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.plain_empty
@pytest.mark.parametrize("mask", [None, causal()])
@pytest.mark.parametrize("dim", [64, 128])
def test_torchs_kernels_give_what_the_engine_gives(mask, dim):
    torch.use_deterministic_algorithms(False)
    q, k, v = (
        torch.randn(2, heads, 1024, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    grad = torch.randn_like(q)
    found = []
    for backend in ("sdpa", "triton"):
        out, lse = attention(q, k, v, mask=mask, backend=backend)
        grads = torch.autograd.grad((out, lse), (q, k, v), (grad, torch.ones_like(lse)))
        found.append((out, lse, *grads))
    for theirs, ours in zip(*found):
        torch.testing.assert_close(theirs.float(), ours.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (9, 0)])
def test_keys_of_8_bits_need_a_gpu_with_instructions_for_them(monkeypatch, capability):
    from types import SimpleNamespace

    from foveate.ops import triton

    def there(dtype):
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 1, 64, 64))

    for name, value in (("interpreted", False), ("reason", ""), ("_capability", capability)):
        monkeypatch.setattr(triton, name, lambda *_, value=value: value)
    narrow = there(torch.float8_e4m3fn)
    reasons = triton.supports(there(torch.bfloat16), narrow, narrow, None, False)
    assert bool(reasons) is (capability < (8, 9))
    assert triton.supports(*[there(torch.bfloat16)] * 3, None, False) == []
