"""One round: dense and the methods next to it read the same prompts, decode in turn, are scored."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foveate.compare import audio, picture, quality, verify
from foveate.compare.dense import baseline
from foveate.compare.measure import Machine, Pass, Sample, cache_bytes
from foveate.compare.needle import Prompts, found
from foveate.compare.plan import FOLLOWED, Cell, Round
from foveate.compare.validate import Job
from foveate.hf.fit.artefacts import Shelf
from foveate.ops.errors import FoveateError, InputError
from foveate.runs.machine import load_average

BLOCK = 4
WARM_UP = 1024


class Bench:
    """Runs rounds on a loaded model.

    Args:
        job: the checked input.
        model: transformers' model on its device.
    """

    def __init__(self, job: Job, model: Any) -> None:
        self.job = job
        self.machine = Machine(model, job.info.kind)
        self.layers = int(model.config.get_text_config().num_hidden_layers)
        shelf = Shelf(model)
        self._methods = {entry.name: shelf.bind(entry.key, entry.method()) for entry in job.entries}
        self._warm: set[tuple[str, int]] = set()
        self._head_checked = False

    def warm_up(self, names: list[str], length: int) -> None:
        """Let dense run once at each length, and the named methods (on a CPU a short pass).

        Raises:
            InputError: one of them can't run on this model.
        """
        for name in ["", *names]:
            # On a CPU dense warms the memory for all, at every length.
            whole = not name or self.machine.synchronise or self.job.prompts is None
            short = length if whole else min(length, WARM_UP)
            if (name, short) in self._warm:
                continue
            self._warm.add((name, short))
            inputs, _ = self._inputs(length, 0)
            inputs = inputs if self.job.prompts is None else inputs[:, :short]
            method = self._methods.get(name)
            try:
                self._warm_up(inputs, method)
            except FoveateError as error:
                who = name or "dense"
                raise InputError(f"{who} can't run on {self.job.info.name}: {error}") from error

    def _warm_up(self, inputs: Tensor, method: Any | None) -> None:
        done = self.machine.run(inputs, method, inspect=False)
        if done.logits is None:
            return
        if not self._head_checked:
            quality.check_head(self.machine.model, done.hidden, done.logits)
            self._head_checked = True
        if self.job.options.decode_tokens:
            self.machine.decode(method, done.logits.argmax(-1), done.cache, 2)

    def run(self, round_: Round) -> list[tuple[Cell, dict[str, Any]]]:
        """Measure a round; the cells with the values of their records, in the order they ran."""
        self.warm_up([cell.entry.name for cell in round_.cells], round_.length)
        inputs, prompts = self._inputs(round_.length, round_.number)
        passes: dict[Cell, Pass] = {}
        if round_.before is not None:
            passes[round_.before] = self._pass(inputs, round_.before)
        dense = self._pass(inputs, None)
        if round_.after is not None:
            passes[round_.after] = self._pass(inputs, round_.after)
        decoded = self._decode(round_, dense, passes)
        finished = []
        for cell in round_.cells:
            done = passes.pop(cell)
            done.cache = None
            values = self._values(cell, dense, done, inputs, prompts)
            values["dense_came"] = "after" if cell is round_.before else "before"
            values |= self._answers(decoded.get(cell), prompts)
            finished.append((cell, clean(values)))
        return finished

    def _inputs(self, length: int, number: int) -> tuple[Tensor, Prompts | None]:
        batch = self.job.options.batch
        if self.job.prompts is None:
            return audio.features(self.job.options.text, number * batch, batch).to(
                self.job.dtype
            ), None
        prompts = self.job.prompts.batch(length, number * batch, batch)
        return prompts.ids, prompts

    def _pass(self, inputs: Tensor, cell: Cell | None) -> Pass:
        method = None if cell is None else self._methods[cell.entry.name]
        keep = (
            verify.layers_to_check(self.layers)
            if cell is not None and cell.number == 0
            else frozenset()
        )
        if not self.machine.synchronise:
            return self.machine.run(inputs, method, inspect=True, keep=keep)
        done = self.machine.run(inputs, method, inspect=False)
        looked = self.machine.run(inputs, method, inspect=True, keep=keep)
        done.attention_seconds, done.build_seconds = looked.attention_seconds, looked.build_seconds
        done.log = looked.log
        return done

    def _values(
        self, cell: Cell, dense: Pass, done: Pass, inputs: Tensor, prompts: Prompts | None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {
            "load": load_average(),
            "baseline": baseline(self.machine.model),
        }
        for name, of in (("dense_", dense), ("", done)):
            values[name + "seconds"] = of.seconds
            values[name + "attention_seconds"] = of.attention_seconds
            values[name + "peak_bytes"] = of.peak_bytes
            values[name + "cache_bytes"] = of.cache_bytes
        values["build_seconds"] = done.build_seconds
        log = done.log
        assert log is not None
        if log.pairs:
            for name in ("pairs", "area", "mask_pairs", "mask_area"):
                table = getattr(log, name)
                values[name] = sum(table.values()) / len(table)
        if prompts is None or done.logits is None:
            values["states"] = quality.compare_states(dense.hidden, done.hidden)
        else:
            hidden, scored = done.hidden, prompts.scored
            if cell.entry.evicts:
                hidden, scored = self._followed(cell, inputs, scored)
            values["quality"] = quality.score(
                self.machine.model, dense.hidden, hidden, prompts.ids, scored
            )
        if cell.number == 0:
            method = self._methods[cell.entry.name]
            error, problems = verify.worst_error(log.samples, method)
            values["check"] = {"error": error, "problems": problems[:3]}
            prefill = [s for s in log.samples if s.q.shape[2] > 1]
            values["picture"] = picture.choose(prefill or log.samples)
        log.samples.clear()
        return values

    def _followed(self, cell: Cell, inputs: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """For a method that drops keys: hidden states of decoding a text's end, and what counts.

        Its prefill is dense: only tokens behind the first cut of the cache tell what that costs.
        """
        count = min(FOLLOWED, inputs.shape[1] // 2)
        hidden = self.machine.follow(self._methods[cell.entry.name], inputs, count)
        behind = scored.clone()
        behind[:, : inputs.shape[1] - count + 1] = False
        return hidden, behind

    def _decode(
        self, round_: Round, dense: Pass, passes: dict[Cell, Pass]
    ) -> dict[Cell, dict[str, Any]]:
        """Decode dense and each method in turn, a few tokens at a time."""
        steps = self.job.options.decode_tokens
        dense.cache_bytes = cache_bytes(dense.cache)
        for done in passes.values():
            done.cache_bytes = cache_bytes(done.cache)
        if not steps or dense.logits is None:
            return {}
        results: dict[Cell, dict[str, Any]] = {}
        dense_tokens = [dense.logits.argmax(-1)]
        for cell in round_.cells:
            done = passes[cell]
            assert done.logits is not None
            method = self._methods[cell.entry.name]
            tokens = [done.logits.argmax(-1)]
            times: dict[str, list[float]] = {"dense": [], "method": []}
            for start in range(0, steps, BLOCK):
                count = min(BLOCK, steps - start)
                turns = ["dense", "method"] if cell is round_.after else ["method", "dense"]
                for turn in turns:
                    of, line = (dense, dense_tokens) if turn == "dense" else (done, tokens)
                    made, seconds = self.machine.decode(
                        None if turn == "dense" else method,
                        line[-1].to(self.machine.device),
                        of.cache,
                        count,
                    )
                    # The first token after a change of attention pays for the change.
                    times[turn] += seconds[1:] if count > 1 else seconds
                    line += made.unbind(1)
            samples: list[Sample] = []
            if cell.number == 0:
                samples = self.machine.decode_samples(
                    method,
                    tokens[-1].to(self.machine.device),
                    done.cache,
                    verify.layers_to_check(self.layers),
                )
            assert done.log is not None
            done.log.samples += samples
            results[cell] = {
                "decode_seconds": median(times["method"]),
                "dense_decode_seconds": median(times["dense"]),
                "tokens": tokens,
                "dense_tokens": dense_tokens[: steps + 1],
            }
        return results

    def _answers(self, decoded: dict[str, Any] | None, prompts: Prompts | None) -> dict[str, Any]:
        if decoded is None:
            return {}
        values = {name: decoded[name] for name in ("decode_seconds", "dense_decode_seconds")}
        if prompts is None or not prompts.keys:
            return values
        needle: dict[str, Any] = {"keys": list(prompts.keys), "depths": list(prompts.depths)}
        for name in ("", "dense_"):
            lines = torch.stack([t.cpu() for t in decoded[name + "tokens"]], 1)
            answers = [self.job.tokenizer.decode(line.tolist()) for line in lines]
            needle[name + "answers"] = answers
            needle[name + "found"] = [found(a, k) for a, k in zip(answers, prompts.keys)]
        return values | {"needle": needle}


def clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
