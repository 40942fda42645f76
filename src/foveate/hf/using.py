"""`foveate.use`: run a transformers model through a pattern, and undo it exactly.

Two functions are registered with transformers under one name of ours, for attention and for masks
(with only the first, transformers silently makes no mask), while at least one model is in use; the
model's configs are pointed at that name. No forward is replaced, no module is changed: which module
runs what is held beside them, weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.hf.assignment import (
    FILE,
    Assignment,
    HeadGroup,
    assignment_of,
    by_heads,
    found_beside,
    is_path,
    plan_of,
)
from foveate.hf.attend import HELD, SEATS, Running, Seat
from foveate.hf.errors import InUseError, ModelError
from foveate.hf.eviction import policies, watch_cache
from foveate.hf.fit.artefacts import Shelf
from foveate.hf.modality import watch_modality
from foveate.hf.places import Site, sites
from foveate.hf.pointer import NAME, Pointer, register, release
from foveate.hf.rotary import ropes
from foveate.hf.watch_tree import TreeOf, watch_tree
from foveate.parts import Attention, Rope
from foveate.parts.tree import Tree


@dataclass
class _Held:
    """A config that points at us, what it pointed at before, and for how many uses."""

    config: Any
    pointer: Pointer
    count: int


def use(
    model: nn.Module,
    pattern: str | Path | Attention | Assignment | None = None,
    *,
    backend: str = "auto",
    cross: bool = False,
    stats: Callable[..., None] | None = None,
    fitted: str | Path | None = None,
    tree: Tree | TreeOf | None = None,
) -> Use:
    """Run a transformers model's attention through foveate, until undone.

        foveate.use(model, "sink-window")                    # stays until .undo()
        with foveate.use(model, "vertical-slash(verticals=500)"):
            model.generate(...)                              # undone on exit, also by an exception
        foveate.use(model, assignment).save_pretrained(folder)
        foveate.use(AutoModel.from_pretrained(folder))       # with the assignment saved there

    The pattern applies within whatever the model masks (causality, padding, its own sliding
    windows), in training, prefill and decoding, with dynamic and static caches. A pattern alone
    doesn't shrink the cache: `snapkv` and `h2o` do, by layer, in transformers' dynamic cache; and
    see `foveate.hf.streaming_cache`.

    Args:
        model: a transformers model; only its own attention modules are concerned.
        pattern: a method's key, with hyper-parameters as "key(field=value)"; an attention; an
            Assignment of patterns to layers and heads; a Path (or a text with a slash in it) of
            one that was saved, or of its folder; None for the `foveate.json` in the folder that
            the model was loaded from.
        backend: the core op's backend, "auto" for the fastest that can.
        cross: whether a single pattern is for cross-attention as well, which otherwise stays full.
        stats: called after each layer as `stats(layer=, layout=, build_seconds=,
            attend_seconds=)` by methods that are patterns.
        fitted: for methods that were fitted (`foveate fit`): the artefact, or a folder of them.
            Default: the folder that the model was loaded from, then the cache, by its weights.
        tree: for methods that follow one ("hsa"): over the tokens of every input, or what makes it
            from input ids (B, L) and which of them are real; see `foveate.hf.use_on_tree`.

    Raises:
        UnknownMethodError: no such pattern.
        AssignmentError: the assignment names layers or heads that the model doesn't have, or
            there is none where it was looked for.
        InUseError: the model, or a part of it, is in use already.
        ModelError: the model's attention can't be reached, or a method wasn't fitted on it yet.
        ArtefactError: what was fitted belongs to another model, or can't be read.
    """
    return Use(model, pattern, backend=backend, cross=cross, stats=stats, fitted=fitted, tree=tree)


class Use:
    """A model in use; `undo()` or the end of a `with` block puts everything back."""

    def __init__(
        self,
        model: nn.Module,
        pattern: str | Path | Attention | Assignment | None = None,
        *,
        backend: str = "auto",
        cross: bool = False,
        stats: Callable[..., None] | None = None,
        fitted: str | Path | None = None,
        tree: Tree | TreeOf | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"use(model, ...): expected a transformers model, got {type(model).__name__}. In a "
                "model of your own, compose foveate.Attention instead."
            )
        if pattern is None:
            pattern = found_beside(model)
        elif is_path(pattern):
            pattern = Assignment.load(pattern)  # type: ignore[arg-type]
        assert not isinstance(pattern, Path)
        self.pattern = pattern
        self.cross = cross
        self.sites: dict[str, Site] = {}
        self._model = weakref.ref(model)
        found = sites(model)
        self._shelf = Shelf(model, fitted)
        plan = by_heads(self._shelf.bind_all(plan_of(pattern, found, cross)), found)
        turning = _turning(model, plan)
        evicting = policies(model, plan, found)
        taken = [site.name for module, site in found.items() if module in SEATS]
        if taken:
            raise InUseError(
                f"{type(model).__name__} is in use already (its {taken[0]}); call .undo() on that "
                "use, or leave its with block, before the next one."
            )
        configs = list(_configs(model))
        for config in configs:
            if getattr(config, "output_attentions", False):
                raise ModelError(
                    "The model's config asks for attention weights (output_attentions=True), which "
                    "are never formed here; set it to False first."
                )
        # A use keeps nothing of its model alive, and ends with the last of its modules.
        self._modules = [weakref.ref(module) for module in found]
        self._configs = configs
        self._active = False
        running = Running(backend, stats)
        self._watches = watch_modality(model, running) + watch_tree(model, tree, running)
        try:
            self._watches += watch_cache(evicting, running.caches)
            self._point(model, found)
            for module, site in found.items():
                SEATS[module] = Seat(site, plan[module], running, turning.get(site.layer))
                self.sites[site.name] = site
                weakref.finalize(module, self._lost).atexit = False
        except BaseException:
            self.undo()
            raise

    def _point(self, model: PreTrainedModel, found: dict[nn.Module, Site]) -> None:
        """Register our name and point the model's configs at it."""
        register()
        self._active = True
        for config in self._configs:
            now = config._attn_implementation
            before = now.before if isinstance(now, Pointer) else now
            held = HELD.setdefault(id(config), _Held(config, Pointer(before), 0))
            held.count += 1
        model.set_attn_implementation(NAME)
        for config in self._configs:
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = HELD[id(config)].pointer
        for module, site in found.items():
            config = getattr(module, "config", None)
            if config is not None and config._attn_implementation != NAME:
                raise ModelError(
                    f"{type(model).__name__} doesn't let its attention be chosen: {site.name} "
                    f"stays with {config._attn_implementation!r}."
                )

    def undo(self) -> None:
        """Put the model back as it was; a second call does nothing.

        A config that somebody has pointed elsewhere since is left there.
        """
        if not self._active:
            return
        self._active = False
        for ref in self._modules:
            module = ref()
            if module is not None:
                SEATS.pop(module, None)
        for config in self._configs:
            held = HELD[id(config)]
            held.count -= 1
            if not held.count:
                del HELD[id(config)]
                if isinstance(config._attn_implementation, Pointer):
                    config._attn_implementation_internal = held.pointer.before
        self._modules, self._configs = [], []
        for watch in self._watches:
            watch.remove()
        release()

    def _lost(self) -> None:
        """A module is gone: without any left, the use is over."""
        if not any(ref() is not None for ref in self._modules):
            self.undo()

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the model and, as `foveate.json` beside it, which pattern its layers and heads run.

        `foveate.use(model)` finds it again on the model that `from_pretrained(folder)` loads, with
        what its methods were fitted to; to transformers alone the folder is an ordinary model's.

        Args:
            folder: where to; made if it doesn't exist.
            options: of transformers' own `save_pretrained`.

        Returns:
            The `foveate.json`.

        Raises:
            InputError: the pattern is an attention that isn't in the catalog.
            ModelError: the model is gone.
        """
        model = self._model()
        if model is None:
            raise ModelError("save_pretrained: the model of this use doesn't exist any more.")
        assignment = assignment_of(self.pattern, self.sites.values(), self.cross)
        model.save_pretrained(folder, **options)
        self._shelf.save_beside(Path(folder))
        return assignment.save(Path(folder) / FILE)

    @property
    def active(self) -> bool:
        """Whether the model still runs through this use."""
        return self._active and any(
            isinstance(config._attn_implementation, Pointer) for config in self._configs
        )

    def __enter__(self) -> Use:
        if not self.active:
            raise InUseError("This use was undone; call foveate.use again.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"Use({self.pattern!r}, {len(self.sites)} attention modules, {state})"


def _turning(
    model: PreTrainedModel, plan: dict[nn.Module, list[HeadGroup]]
) -> dict[int, Rope | None]:
    """The rotation of each layer's queries, if any method wants to know; they turn as keys do."""
    methods = [group.method for groups in plan.values() for group in groups]
    if not any(method.wants_query_rope for method in methods):
        return {}
    if not any(name.rpartition(".")[2] == "rotary_emb" for name, _ in model.named_modules()):
        return {}
    return ropes(model)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config of a model and of its parts, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop(0)
        if config is None or id(config) in seen or not hasattr(config, "_attn_implementation"):
            continue
        seen.add(id(config))
        yield config
        waiting.extend(getattr(config, name, None) for name in config.sub_configs)
