"""Attention and experts apart: the same tokens, three micro-batches in flight, nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import afd
import pytest
import torch
from torch import distributed

from foveate.models import FoveateConfig, FoveateForCausalLM
from foveate.ops.errors import InputError
from foveate.parallel.disaggregate import (
    Plan,
    RankLostError,
    Request,
    chrome_trace,
    serve_alone,
)
from foveate.parallel.disaggregate import watch as watch_module
from foveate.parallel.disaggregate.__main__ import main, own_gpu, unfinished
from foveate.parallel.disaggregate.batch import MicroBatch
from foveate.parallel.disaggregate.experts import FFNPart, route
from foveate.parallel.disaggregate.message import FP8_MOST, quantised, restored
from foveate.parallel.disaggregate.watch import SETTLE, Watch
from foveate.parallel.spawn import Ranks, RanksError, run
from foveate.parts.kv_cache import token_field

PLANS = {
    2: [
        Plan(rows=3),
        Plan(rows=3, micro_batches=1),
        Plan(rows=3, micro_batches=2, dispatch="fp8"),
    ],
    3: [Plan(ffn=2, rows=3), Plan(attention=2, rows=3, micro_batches=2), Plan(tp=2, rows=4)],
    4: [Plan(attention=2, ffn=2, rows=3), Plan(attention=2, tp=2, rows=4, micro_batches=2)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_process_gives_each_request_what_it_gets_alone(dtype):
    model, requests = afd.tiny_step3(dtype), afd.some_requests()
    for plan in (Plan(rows=3), Plan(rows=2, micro_batches=1)):
        out = serve_alone(model, requests, plan, keep_logits=True)
        kinds = {p.kind for p in out.passes}
        assert kinds == {"decode", "prompt"} | ({"idle"} if plan.micro_batches > 1 else set())
        for request in requests:
            tokens, logits = afd.one_by_one(model, request)
            assert out.tokens[request.id] == tokens
            atol = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(out.logits[request.id], logits, atol=atol, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_oracle_8_processes_give_the_tokens_of_one(size):
    model, requests = afd.tiny_step3(), afd.some_requests()
    names = [f"rank-{i}" for i in range(size)]
    results = run(afd.plans_of, names, (PLANS[size],), timeout=90)
    whole = sum(p.numel() for p in model.parameters())
    router = model.model.blocks[1].feedforward.router.weight.numel()
    for i, plan in enumerate(PLANS[size]):
        ranks = [found[i] for found in results.values()]
        assert [rank["name"] for rank in ranks] == list(plan.names)
        tokens = {k: v for rank in ranks for k, v in rank["tokens"].items()}
        logits = {k: v for rank in ranks for k, v in rank["logits"].items()}
        alone = serve_alone(model, requests, plan, keep_logits=True)
        assert tokens == alone.tokens
        for name, found in alone.logits.items():
            if size == 2:  # the same micro-batches, the same order of sums
                assert torch.equal(logits[name], found), name
            else:
                torch.testing.assert_close(logits[name], found, atol=1e-5, rtol=0)
        # Experts are held once by the FFN side together, and by no attention rank.
        attending = [rank["parameters"] for rank in ranks if rank["name"].startswith("attention")]
        computing = [rank["parameters"] for rank in ranks if rank["name"].startswith("ffn")]
        assert sum(computing) + attending[0] == whole
        assert max(computing) - min(computing) < whole / 2
        assert attending[0] > 2 * router
        last = plan is PLANS[size][-1]  # which released what it didn't need
        for rank in ranks if last else ():
            attends = rank["name"].startswith("attention")
            assert rank["left"] == (rank["parameters"] if attends else 2 * router)
        for request in requests if plan.dispatch == "plain" else ():
            assert tokens[request.id] == afd.one_by_one(model, request)[0]
    _check_trace(results["rank-0"][0]["events"], PLANS[size][0])


def _check_trace(events, plan):
    assert list(events) == list(plan.names)
    made = chrome_trace(events)["traceEvents"]
    assert {e["args"]["name"] for e in made if e["name"] == "process_name"} == set(plan.names)
    for rank, found in events.items():
        stages = [e for e in found if e["name"] == ("ffn" if "ffn" in rank else "attention")]
        assert {e["tid"] for e in stages} == {f"micro-batch {m}" for m in range(3)}
        assert {e["args"]["layer"] for e in stages} == {0, 1, 2, 3}
        stages.sort(key=lambda e: e["ts"])  # a rank does one thing at a time
        for one, other in zip(stages, stages[1:], strict=False):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3
    # What the FFN side got was sent before.
    travels = [e for e in events["ffn-0"] if e["name"] == "forth"]
    assert travels
    assert all(e["dur"] > 0 for e in travels)


def test_three_micro_batches_fill_the_pipeline():
    """On stages made equal; TPOT = layers max(b t_A, b t_F, b c_AF, b c_FA, the way round)."""
    seconds, layers = 0.02, 2
    way_round = seconds + seconds + seconds / 2 + seconds / 2
    formula = {b: layers * max(b * seconds, b * seconds / 2, way_round) for b in (1, 3)}
    measured = dict.fromkeys(formula, float("inf"))
    # No pass can be quicker than its stages; what else runs on the machine makes some slower, so
    # the quickest counts, and a busy machine gets a second and a third try.
    for _ in range(3):
        found = run(afd.paced, ["a", "f"], (seconds, layers), timeout=60)["a"]
        measured = {b: min(measured[b], *times) for b, times in found.items()}
        if all(measured[b] < 1.1 * formula[b] for b in formula):
            break
    for b in (1, 3):
        assert measured[b] == pytest.approx(formula[b], rel=0.1), f"b = {b}"
    throughput = {b: b / measured[b] for b in (1, 3)}
    assert throughput[3] >= 1.5 * throughput[1]


PATIENCE = 2.0
LOST = {
    # ffn-0.0 then waits in a collective, both attention ranks for either of them.
    "ffn-0.1": (Plan(attention=2, tp=2, rows=2, patience=PATIENCE), signal.SIGKILL),
    # Both FFN ranks then wait for it, and attention-0 for them.
    "attention-1": (Plan(attention=2, ffn=2, rows=2, patience=PATIENCE), signal.SIGSTOP),
}


@pytest.mark.parametrize("victim", LOST)
def test_a_lost_rank_is_named_in_time_and_outputs_are_kept(victim):
    plan, sign = LOST[victim]
    with Ranks(afd.until_lost, plan.names, (plan,), timeout=60, grace=6) as ranks:
        ranks.store.wait(["told/short-0", "told/short-1"])
        begun = time.time()
        os.kill(ranks.processes[victim].pid, sign)
        others = [name for name in plan.names if name != victim]
        ranks.store.wait([f"ended/{name}" for name in others])
        if sign == signal.SIGSTOP:
            ranks.kill(victim)
        with pytest.raises(RanksError) as caught:
            ranks.wait()
        ended = max(float(ranks.store.get(f"ended/{name}")) for name in others)
    stated = SETTLE if sign == signal.SIGKILL else PATIENCE + SETTLE
    assert ended - begun < stated + 1.5  # a second and a half for a busy machine
    assert list(caught.value.errors) == [victim]
    told = {}
    for name in others:
        result = caught.value.results[name]
        assert result["rank"] == victim
        word = "died" if sign == signal.SIGKILL else "stalled"
        assert word in result["text"]
        assert result["finished"] == result["told"]
        told |= result["told"]
    assert len(told["short-0"]) == 3
    assert ("short-1" in told) == (victim != "attention-1")


def _watching(name: str, store: distributed.Store, patience: float = 0.2) -> Watch:
    return Watch(store, name, patience)


def _until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def _fail(text: str):
    raise RuntimeError(text)


def test_who_waits_for_another_is_innocent(monkeypatch):
    monkeypatch.setattr(watch_module, "SETTLE", 0.3)

    def lost(store, name, peer, *, late):
        def vain():
            time.sleep(0.25 if late else 0)
            _fail("gone")

        with pytest.raises(RankLostError) as caught:
            _watching(name, store).call(vain, peer)
        return caught.value.rank, caught.value.reason

    with ThreadPoolExecutor(2) as both:  # a waits for f, which waits for b, which says nothing
        store = distributed.HashStore()
        a = both.submit(lost, store, "a", "f", late=False)
        f = both.submit(lost, store, "f", "b", late=True)
        assert a.result() == f.result() == ("b", "stalled: nothing came from it for 0.2 s")
    store = distributed.HashStore()  # f says that it waits, long before it dies by itself

    def said():
        return store.check(["watch/waits/f"])

    def dies_waiting():
        _until(said)
        return lost(store, "a", "f", late=False)

    with _watching("f", store) as watch:
        assert watch.call(dies_waiting, "b") == ("f", "died: its connections closed")
    store = distributed.HashStore()  # it waited long, and goes on: nothing is said of it any more
    with _watching("f", store) as watch:
        watch.call(lambda: _until(said), "b")
        _until(lambda: not said())
    store = distributed.HashStore()
    _watching("f", store).confess(ValueError("no such expert\nand more"))
    assert lost(store, "a", "f", late=False) == ("f", "failed: ValueError: no such expert")


def test_fp8_dispatch_is_within_its_step():
    rows = torch.randn(50, 33) * torch.logspace(-4, 4, 50)[:, None]
    tokens, scales = quantised(rows)
    assert tokens.dtype == torch.float8_e4m3fn
    back = restored(tokens, scales, torch.float32)
    # 3 bits of mantissa: half a step is 2^-4 of a number, or of the least normal number, 2^-6.
    step = torch.maximum(rows.abs(), 2.0**-6 * scales[:, None]) * 2.0**-4
    assert ((back - rows).abs() <= step * (1 + 1e-6)).all()
    peaks = rows.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, peaks), rows.gather(1, peaks))
    assert (tokens.float().abs().amax(1) == FP8_MOST).all()
    model, requests = afd.tiny_step3(), afd.some_requests()
    plain = serve_alone(model, requests, Plan(), keep_logits=True)
    fp8 = serve_alone(model, requests, Plan(dispatch="fp8"), keep_logits=True)
    first = [torch.stack([o.logits[r.id][0] for r in requests]) for o in (plain, fp8)]
    error = (first[0] - first[1]).norm() / first[0].norm()
    assert 0 < error < 2.0**-4


@pytest.mark.parametrize(("ffn", "tp"), [(1, 1), (2, 1), (1, 3), (3, 2), (7, 1)])
def test_parts_of_experts_sum_to_the_layer(ffn, tp):
    alone = ffn == tp == 1  # nothing is summed in another order, whatever the precision
    dtype = torch.bfloat16 if alone else torch.float64
    model = afd.tiny_step3(dtype)
    plan = Plan(ffn=ffn, tp=tp, rows=6)
    rows = torch.randn(11, 32, dtype=dtype)
    for block in model.model.blocks[:2]:  # dense, experts
        layer = block.feedforward
        router = getattr(layer, "router", None)
        routes = route(router, rows)
        whole = layer(rows[None])[0][0] if router is not None else layer(rows)
        total = sum(FFNPart(layer, plan, i)(rows, routes) for i in range(plan.ffn_ranks))
        assert total.dtype == dtype
        torch.testing.assert_close(total, whole, atol=0 if alone else 1e-12, rtol=0)


def test_a_micro_batch_keeps_no_padding_that_nobody_needs():
    """Caches hold what rows have read, the shorter behind padding, which goes with the longest."""
    batch = MicroBatch([[token_field("k", 1, 1)]], 8, torch.device("cpu"))

    def passed():
        step = batch.next()
        step.caches[0].append({"k": step.ids[:, None, :, None].float()})
        rows = len(step.ids)
        return batch.took(step, torch.eye(100)[[50] * rows], None, False)

    def held():
        return batch.caches[0].entries["k"][:, 0, :, 0].tolist()

    batch.join(Request("long", (1, 2, 3, 4, 5), 3))
    batch.join(Request("short", (6, 7), 9))
    passed(), passed()
    assert held() == [[1, 2, 3, 4, 5], [0, 0, 0, 6, 7]]
    passed()
    assert held() == [[1, 2, 3, 4, 5, 50], [0, 0, 0, 6, 7, 50]]
    (gone,) = passed()
    assert gone.request.id == "long"
    assert held() == [[6, 7, 50, 50]]
    assert batch.bytes() == 4 * 4
    batch.join(Request("next", (8, 9, 10, 11, 12), 2))
    passed()
    assert held() == [[0, 6, 7, 50, 50], [8, 9, 10, 11, 12]]


def test_an_end_token_ends_a_sequence_early():
    model, requests = afd.tiny_step3(), afd.some_requests()
    free = serve_alone(model, requests, Plan()).tokens
    end = free["r6"][2]
    cut = serve_alone(model, requests, Plan(), end=end).tokens
    for name, tokens in free.items():
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert cut[name] == tokens[:stop]
    assert len(cut["r6"]) <= 3


@pytest.mark.parametrize(
    "projection", ["mla", "gqa(kv_heads=2)", "mfa-kr(head_dim=8)", "tpla(groups=2)"]
)
def test_other_attentions_join_and_leave_too(projection):
    torch.manual_seed(0)
    config = FoveateConfig(vocab_size=afd.VOCAB, hidden_size=32, num_hidden_layers=2,
                           num_attention_heads=4, projection=projection,
                           initializer_range=0.2)  # fmt: skip
    model, requests = FoveateForCausalLM(config).double().eval(), afd.some_requests()
    out = serve_alone(model, requests, Plan(rows=4))
    for request in requests:
        cached = []
        cache, ids = model.new_cache(), torch.tensor([request.ids])
        with torch.no_grad():
            for _ in range(request.new):
                ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                cached.append(int(ids))
        assert out.tokens[request.id] == cached


def test_what_cannot_be_taken_apart_is_refused():
    def model(**given):
        return FoveateForCausalLM(FoveateConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1,
                                                num_attention_heads=2, **given)).eval()  # fmt: skip

    some = [Request("a", (1,), 1)]
    for given, text in (
        ({"feedforward": "gelu"}, "GELU"),
        ({"mixer": "deconstructed-mlp"}, "mixer"),
        ({"attention": "flowformer"}, "state of its own"),
        ({"registers": 1}, "register tokens"),
    ):
        with pytest.raises(InputError, match=text):
            serve_alone(model(**given), some)
    with pytest.raises(InputError, match="training mode"):
        serve_alone(model().train(), some)
    plain = model()
    with pytest.raises(InputError, match="outside of the vocabulary"):
        serve_alone(plain, [Request("a", (8,), 1)])
    with pytest.raises(InputError, match="different ids"):
        serve_alone(plain, some * 2)
    learned = model(position="learned", max_position_embeddings=5)
    told = []
    fits = [Request("a", (1, 2), 4)]
    with pytest.raises(InputError, match="positions that this model has learned"):
        serve_alone(learned, [*fits, Request("b", (1, 2), 5)], told=lambda *one: told.append(one))
    assert not told  # before any work
    assert len(serve_alone(learned, fits).tokens["a"]) == 4
    for wrong in ({"rows": 0}, {"rows": 3, "tp": 2}, {"dispatch": "fp4"}, {"patience": 0}):
        with pytest.raises(InputError):
            Plan(**wrong)
    with pytest.raises(InputError):
        Request("a", (), 1)


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "ids": [1], "new": 2}\n{"id": "b"}\n')
    for given, text in (
        (["--rows", "3", "--tp", "2"], "expected a multiple of tp=2"),
        (["--requests", str(bad)], "line 2: expected"),
        (["--model", str(tmp_path)], "expected a folder with a saved foveate model"),
        ([], "torchrun --nproc-per-node 2"),
    ):
        assert main([*given, "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err


def test_each_machine_of_several_counts_its_own_gpus(monkeypatch):
    for name, value in {
        "RANK": 11,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": 3,
        "LOCAL_WORLD_SIZE": 8,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert own_gpu() == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert own_gpu() is None


def test_what_an_earlier_run_finished_is_left_out(tmp_path):
    asked = [Request(name, (1,), 2) for name in ("a", "b", "c", "d")]
    assert unfinished(asked, tmp_path / "nowhere") == asked
    (tmp_path / "attention-0.jsonl").write_text('{"id": "a", "tokens": [1, 2]}\n{"id": "b", "tok')
    (tmp_path / "attention-1.jsonl").write_text('{"id": "d", "tokens": [3]}\n\n7\n')
    assert [request.id for request in unfinished(asked, tmp_path)] == ["b", "c"]


@pytest.mark.slow
def test_torchrun_starts_it_and_a_killed_rank_is_named(tmp_path):
    requests = [{"id": f"r{i}", "ids": [i + 1], "new": 3} for i in range(3)]
    more = {"id": "more", "ids": [4], "new": 3}
    lines = {"short": requests, "long": [*requests, {"id": "long", "ids": [9], "new": 100_000}],
             "again": [*requests, more]}  # fmt: skip
    source = Path(watch_module.__file__).parents[3]
    found = {}
    for name, told in lines.items():
        asked, out = tmp_path / f"{name}.jsonl", tmp_path / ("long" if name == "again" else name)
        asked.write_text("".join(json.dumps(one) + "\n" for one in told))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", "0", "--standalone", "-m", "foveate.parallel.disaggregate"]
        command += ["--requests", str(asked), "--out", str(out)]
        command += ["--resume"] if name == "again" else []
        path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        try:
            ids = dict(job.stdout.readline().split(": process ") for _ in range(2))
            if name == "long":
                while not (out / "attention-0.jsonl").is_file() or len(
                    (out / "attention-0.jsonl").read_text().splitlines()
                ) < len(requests):
                    assert job.poll() is None
                    time.sleep(0.05)
                os.kill(int(ids["ffn-0"]), signal.SIGKILL)
            text, errors = job.communicate(timeout=60)
        finally:
            job.kill()
        found[name] = job.returncode, text, errors
        done = [json.loads(line) for line in (out / "attention-0.jsonl").read_text().splitlines()
                if line]  # fmt: skip
        names = ["more"] if name == "again" else []
        assert sorted(one["id"] for one in done) == [*names, "r0", "r1", "r2"]
        assert all(len(one["tokens"]) == 3 for one in done)
    code, text, errors = found["short"]
    assert code == 0, errors
    assert "attention-0: " in text
    assert "3 sequences, 9 tokens" in text
    assert json.loads((tmp_path / "short" / "trace.json").read_text())["traceEvents"]
    code, text, errors = found["again"]
    assert code == 0, errors
    assert "1 sequences, 3 tokens" in text
    code, _, errors = found["long"]
    assert code != 0
    assert "ffn-0 died: its connections closed. 3 finished outputs of here are kept." in errors
