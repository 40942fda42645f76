"""Costs of foveate's own language models, whose configs name projections by their keys."""

from __future__ import annotations

from foveate.cost.fields import Given
from foveate.cost.layer import FeedForward, Layer, Mixing, Model, grouped, mfa, mla
from foveate.ops.errors import InputError


def own_model(config: Given) -> Model:
    """The model of a `FoveateConfig`.

    Raises:
        InputError: a mixer, or a projection, attention or router whose costs aren't known.
    """
    count = config.number("num_hidden_layers")
    if any(_listed(config, "mixer", count)):
        raise InputError(f"{config.name}: layers with a mixer are not known to foveate cost.")
    sparse = set(config.get("moe_layers") or ())
    dense = config.number("intermediate_size", -(-config.number("hidden_size") // 3) * 8)
    matrices = 2 if config.get("feedforward") == "gelu" else 3
    moe = FeedForward(
        config.number("shared_expert_intermediate_size", 0),
        config.number("moe_intermediate_size", 0),
        config.number("num_experts", 0),
        config.number("num_experts_per_tok", 1),
    )
    for i, router in enumerate(_listed(config, "router", count)):
        if i in sparse and str(router).partition("(")[0].strip() != "top-k":
            raise InputError(
                f"{config.name}: router {router!r} is not known to foveate cost; expected 'top-k'."
            )
    projections = _listed(config, "projection", count)
    attentions = _listed(config, "attention", count)
    layers = tuple(
        Layer((_mixing(config, str(projections[i]), str(attentions[i])),),
              moe if i in sparse else FeedForward(dense, matrices=matrices))
        for i in range(count)
    )  # fmt: skip
    return Model(
        config.name,
        config.number("hidden_size"),
        layers,
        config.number("vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
    )


def _listed(config: Given, name: str, count: int) -> list[object]:
    defaults = {"projection": "mha", "attention": "full", "mixer": None, "router": "top-k"}
    value = config.get(name, defaults[name])
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _mixing(config: Given, projection: str, attention: str) -> Mixing:
    from foveate.methods import make

    dim, heads = config.number("hidden_size"), config.number("num_attention_heads")
    width = config.number("head_dim", dim // heads)
    recipe, pattern = make(projection), make(attention)
    key = projection.partition("(")[0].strip()
    kind = attention.partition("(")[0].strip()
    if kind not in ("full", "sink-window"):
        raise InputError(
            f"{config.name}: attention {attention!r} is not known to foveate cost; expected full "
            "or sink-window."
        )
    window = None if kind == "full" else pattern.sinks + pattern.window
    if key in ("mfa", "mfa-kr"):
        c = recipe.head_dim or width
        found = mfa(dim, heads, c, recipe.query_rank or c, reuse=key == "mfa-kr")
    elif key == "mla":
        d = recipe.head_dim or width
        found = mla(
            dim, heads, recipe.query_rank, recipe.latent or 4 * d, recipe.rope_dim, d,
            recipe.value_dim,
        )  # fmt: skip
    elif key in ("mha", "gqa", "mqa"):
        kv = {"mha": heads, "mqa": 1}.get(key) or recipe.kv_heads
        return grouped(dim, heads, kv, width, window=window)
    else:
        raise InputError(
            f"{config.name}: projection {projection!r} is not known to foveate cost; expected mha, "
            "gqa, mqa, mla, mfa or mfa-kr."
        )
    if window is not None:
        raise InputError(f"{config.name}: {key} with a window is not known to foveate cost.")
    return found
