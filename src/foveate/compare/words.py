"""Words for the report: what methods reserve, how figures are taken, the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate import catalog
from foveate.compare.plan import FOLLOWED, Entry
from foveate.runs.memory import how

if TYPE_CHECKING:
    from foveate.compare.run import Result


def threads(count: int) -> str:
    """A number of threads in words."""
    return f"{count} CPU thread{'s' * (count != 1)}"


def entries(result: Result) -> list[tuple[Entry, str]]:
    """Each method with what it does and what it always keeps."""
    found = []
    for entry in result.plan.entries:
        row = catalog.get(entry.key)
        given = ", ".join(f"{name}={value!r}" for name, value in entry.parameters.items())
        text = f"{row.title}. Always keeps: {entry.reserved}."
        found.append((entry, text + (f" In full: {given}." if given else "")))
    return found


def summary_lines(result: Result) -> list[str]:
    """The run in a few lines, for table.md."""
    run = result.plan.fingerprint
    lines = [
        f"Model: {run['model']} ({run['dtype']}), text: {run['text']}.",
        f"Machine: {result.environment.get('gpu', result.environment['processor'])}, "
        f"{threads(run['threads'])}, batch {run['batch']}, {run['passes']} paired passes.",
    ]
    return lines + [f"`{e.name}` always keeps: {e.reserved}." for e in result.plan.entries]


def dense_name(result: Result) -> str:
    """Which attention of transformers' dense is: sdpa, or eager for models that have no sdpa."""
    names = [record["values"].get("baseline") for record in result.raw]
    return next((name for name in names if name), "sdpa")


def how_taken(result: Result) -> list[str]:
    """The protocol, sentence by sentence."""
    job, run = result.job, result.plan.fingerprint
    lines = [
        f"Dense is transformers' own {dense_name(result)} attention in the same model, process "
        "and run. In each round dense and the methods next to it (at most two, one before and one "
        "after) read the same prompts one right after the other; the order turns round from pass "
        "to pass. Only the ratio within a round counts.",
        f"There are {run['passes']} passes per method and length, each on another window of "
        f"the text, spread over all of it, {run['batch']} prompt{'s' * (run['batch'] > 1)} at a "
        "time. A short pass of each warms up before; every pass is timed, none is left out.",
    ]
    if job.info.kind == "causal-lm":
        lines.append(
            "A pass is one forward over the whole prompt with the cache being filled and logits "
            "for the last token, as generation begins."
        )
        if job.depths:
            lines.append(
                "Each prompt is real text in which one sentence names a five-digit pass key, at "
                f"{', '.join(f'{d:g}' for d in job.depths)} of its length, and ends by asking for "
                f"it. {run['decode_tokens']} greedy tokens follow; the key is found if they "
                "contain it. Perplexity, KL and agreement are over the real text's tokens of the "
                "very same passes, the sentence and the question left out."
            )
        if any(entry.evicts for entry in result.plan.entries):
            lines.append(
                "Methods that drop keys from the cache prefill as dense does. Their perplexity, KL "
                f"and agreement are those of the last {FOLLOWED} tokens of each text, read one by "
                "one after the cache was cut."
            )
        if run["decode_tokens"]:
            lines.append(
                "Decoding goes on from each pass's cache, dense and method in turn, a few tokens "
                "at a time; the figure is the median token's."
            )
    elif job.info.kind == "audio-encoder":
        lines.append(
            "The sound is synthetic, made by a fixed rule: no recording is shipped. Give a WAV "
            "file with --text for your own."
            if job.options.text is None
            else "Windows of 30 s of the WAV file are heard."
        )
    lines += [
        "Speeds are shown only if the outputs passed their check in the same run: for the first, "
        "the middle and the last layer, some heads and rows are recomputed in float64 from this "
        "text's own queries, keys and values, with foveate's reference and the layout element by "
        "element; the layout must stay within the model's mask. A method that claims to be exact "
        "must besides give dense's logits.",
        "Ideal: dense's attention time times the share of tiles (64 by 64 elements) that the "
        "method visits, the rest of the model unchanged. The layouts' own building time is "
        "outside the ideal, and has a column of its own; it's inside every speed.",
    ]
    measured = how(job.device)
    lines.append(
        f"Peak memory is {measured}; the smallest over the passes."
        if measured
        else "Peak memory can't be measured on this system."
    )
    loads = [v["values"].get("load") for v in result.raw if v["values"].get("load") is not None]
    if loads:
        lines.append(
            f"While it ran, the machine's load was {min(loads):g} to {max(loads):g} processes "
            f"(1-minute mean) on {result.environment['cores']} cores."
        )
    return lines


def environment_lines(result: Result) -> list[tuple[str, Any]]:
    """Names and values of the environment, the model and the text."""
    run, where, info = result.plan.fingerprint, result.environment, result.job.info
    lines: list[tuple[str, Any]] = [("model", info.name)]
    if info.parameters:
        lines.append(("parameters", f"{info.parameters:,}"))
    if info.licence:
        lines.append(("licence of the model", info.licence))
    lines += [
        ("weights", f"sha256 {run['weights'][:16]}…, {run['dtype']}"),
        ("text", f"{run['text']}, sha256 {run['text_sha256'][:16]}…"),
        (
            "processor",
            f"{where['processor']}, {where['cores']} cores, {threads(run['threads'])} used",
        ),
    ]
    if "gpu" in where:
        lines.append(("GPU", f"{where['gpu']}, CUDA {where['cuda']}"))
    lines += [
        ("system", where["system"]),
        ("versions", ", ".join(
            f"{name} {where[name]}" for name in ("foveate", "torch", "transformers", "python")
        )),
        ("code", f"{where['code']} (digest of what measures)"),
    ]  # fmt: skip
    return lines
