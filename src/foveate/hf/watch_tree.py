"""The tree of each forward, made from its input ids where the layers' attention finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.hf.attend import Running
from foveate.hf.errors import ModelError
from foveate.parts.tree import Tree

TreeOf = Callable[[Tensor, Tensor], Tree]
"""Takes input ids (B, L) and which of them are real, bool (B, L)."""


def watch_tree(
    model: nn.Module, tree: Tree | TreeOf | None, running: Running
) -> list[RemovableHandle]:
    """Keep `running.tree` up to date; nothing to remove if there is no tree to make."""
    if tree is None or isinstance(tree, Tree):
        running.tree = tree
        return []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise ModelError(
                "use(tree=...): the tree is made from input ids, but the model was called without; "
                "give a Tree for inputs of another kind."
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask.bool()
        running.tree = tree(ids, real)

    return [model.register_forward_pre_hook(look, with_kwargs=True)]
