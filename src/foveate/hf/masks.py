"""The mask that transformers carries from the model's top to each attention layer.

transformers asks for a mask once per forward and hands the answer, unseen, to every layer. Ours
is a `LazyMask`: to the model a bool tensor (B, 1, Lq, Lkv) like the one it would get for SDPA, in
truth only the question, which the attention function reads. Code that looks inside (slices it, adds
it, prints it) gets the real thing, computed then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from foveate.hf.recognise import Rule, recognise


class InCacheOffset(int):
    """A key offset of a cache that renumbers what it keeps: its keys count from 0 again.

    `padding_known` tells whether the cache was told of left padding, without which it may have
    kept some in place of real tokens.
    """

    padding_known = True


@dataclass(frozen=True)
class Request:
    """What transformers asked of the mask maker.

    The keys are those of indices kv_offset ... kv_offset + kv_len - 1 of the sequence, the queries
    those of q_offset ... q_offset + q_len - 1; `present` is its 2-D padding mask, bool (B, >= 1),
    False or missing for what isn't there.
    """

    batch: int
    q_len: int
    kv_len: int
    q_offset: int
    kv_offset: int
    function: Callable[..., Any]
    present: Tensor | None
    use_vmap: bool
    device: torch.device

    @cached_property
    def rule(self) -> Rule | None:
        """What the mask function says, None if it isn't known."""
        return None if self.use_vmap else recognise(self.function)

    def dense(self) -> Tensor:
        """The mask element by element: bool (B, 1, q_len, kv_len), by transformers' own code."""
        mask = sdpa_mask(
            batch_size=self.batch,
            q_length=self.q_len,
            kv_length=self.kv_len,
            q_offset=self.q_offset,
            kv_offset=int(self.kv_offset),
            mask_function=self.function,
            attention_mask=self.present,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        return mask.expand(self.batch, -1, -1, -1)

    def to(self, device: torch.device) -> Request:
        """The same question asked on another device."""
        present = None if self.present is None else self.present.to(device)
        return replace(self, device=device, present=present)


class LazyMask(Tensor):
    """A bool tensor (B, 1, Lq, Lkv), True = attend, that is computed if somebody looks inside.

    `request` is what it stands for (None after a trip through a compiled graph), `contents` the
    tensor itself once somebody has looked: then that is what counts, as it may have been changed
    through a view.
    """

    request: Request | None
    contents: Tensor | None
    view: Any
    others: dict[tuple[int, int], LazyMask]

    @staticmethod
    def __new__(cls, request: Request) -> LazyMask:
        """A mask that answers `request`."""
        return _wrap(cls, request, None)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME and len(args) == 1 and isinstance(args[0], LazyMask):
            return args[0]._again(args[0].device)
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], LazyMask):
            if not set(kwargs) - {"device", "non_blocking"}:
                return args[0]._again(torch.device(kwargs["device"]))
            if kwargs.get("dtype", torch.bool) == torch.bool and "device" in kwargs:
                return args[0]._again(torch.device(kwargs["device"]))

        def real(x: Any) -> Any:
            if isinstance(x, LazyMask):
                return x.opened()
            return type(x)(map(real, x)) if isinstance(x, list | tuple) else x

        return func(*map(real, args), **{k: real(v) for k, v in kwargs.items()})

    def _again(self, device: torch.device) -> LazyMask:
        request, contents = self.request, self.contents
        if request is not None and device != request.device:
            request = request.to(device)
        return _wrap(
            LazyMask, request, None if contents is None else contents.to(device, copy=True)
        )

    def for_keys(self, kv_len: int, kv_offset: int) -> LazyMask:
        """The same question about other keys; asked again it is the same mask."""
        request = self.request
        assert request is not None
        if (kv_len, kv_offset) == (request.kv_len, request.kv_offset):
            return self
        if (kv_len, kv_offset) not in self.others:
            other = replace(request, kv_len=kv_len, kv_offset=kv_offset)
            self.others[kv_len, kv_offset] = _wrap(LazyMask, other, None)
        return self.others[kv_len, kv_offset]

    def opened(self) -> Tensor:
        """The mask as a plain tensor, which from now on is what counts."""
        if self.contents is None:
            assert self.request is not None
            self.contents = self.request.dense().contiguous()
        return self.contents

    def __repr__(self) -> str:  # type: ignore[override]
        known = "opened" if self.contents is not None else self.request
        return f"LazyMask({tuple(self.shape)}, {known})"

    # What torch.compile needs to pass it into a graph: there it is a plain tensor.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        self.opened()
        return ["contents"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: None, size: Any, stride: Any
    ) -> LazyMask:
        return _wrap(LazyMask, None, inner["contents"])


_SAME = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
)


def _wrap(cls: type[LazyMask], request: Request | None, dense: Tensor | None) -> LazyMask:
    if request is not None:
        shape, device = (request.batch, 1, request.q_len, request.kv_len), request.device
    else:
        assert dense is not None
        shape, device = tuple(dense.shape), dense.device  # type: ignore[assignment]
    mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
    mask.request, mask.contents, mask.view, mask.others = request, dense, None, {}
    return mask


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What foveate registers with transformers' AttentionMaskInterface.

    Takes the arguments of `transformers.masking_utils.sdpa_mask` and never answers None, so that no
    layer has to guess. While a graph is traced, the answer is the plain bool tensor.
    """
    if torch.compiler.is_compiling():
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
    if isinstance(device, str):
        device = torch.device(device)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device=device, dtype=torch.bool)
    return LazyMask(
        Request(
            batch_size,
            int(q_length),
            int(kv_length),
            int(q_offset),
            kv_offset if isinstance(kv_offset, InCacheOffset) else int(kv_offset),
            mask_function,
            attention_mask,
            use_vmap,
            device,
        )
    )
