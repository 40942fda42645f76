"""Links over torch.distributed: a process group or a device mesh, NCCL or gloo."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.parallel.context.links import LinkError, Links, Message, Pending, Traffic


class GroupLinks(Links):
    """The ranks of a process group.

    Args:
        group: the group; None is all processes.
        timeout: how long to wait for another rank; None is the group's own.
        traffic: where to count; None is a new count.

    Raises:
        InputError: torch.distributed isn't set up, or this process isn't in the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "Context parallelism over processes needs torch.distributed: start the script with "
                "torchrun and call torch.distributed.init_process_group first."
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise InputError("This process is not in the group that was given.")
        self.timeout = timeout
        self.traffic = Traffic() if traffic is None else traffic
        self._all = dist.get_process_group_ranks(self.group)

    @override
    def _exchange(
        self, sends: list[Message], receives: list[Message], what: str, tag: int
    ) -> Pending:
        ops = [
            dist.P2POp(step, tensor, self._all[rank], self.group, tag)
            for step, some in ((dist.isend, sends), (dist.irecv, receives))
            for rank, tensor in some
        ]
        if not ops:
            return Pending()
        with _told(self, what):
            works = dist.batch_isend_irecv(ops)

        def finish(sent: object = ops) -> None:  # keeps what is under way alive
            with _told(self, what):
                for work in works:
                    self._wait(work)

        return Pending(finish)

    def _wait(self, work: Any) -> None:
        if self.timeout is None:
            work.wait()
        else:
            work.wait(self.timeout)

    @override
    def all_to_all(self, sends: Sequence[Tensor], sizes: Sequence[int], what: str) -> list[Tensor]:
        flat = [x.reshape(-1) for x in sends]
        for rank, x in enumerate(flat):
            if rank != self.rank:
                self.traffic.add(what, x.numel(), x.element_size())
        found = flat[0].new_empty(sum(sizes))
        with _told(self, what):
            self._wait(
                dist.all_to_all_single(
                    found, torch.cat(flat), list(sizes), [x.numel() for x in flat],
                    group=self.group, async_op=True,
                )
            )  # fmt: skip
        return list(found.split(list(sizes)))

    @override
    def all_gather(self, x: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        if len(set(sizes)) > 1:
            return super().all_gather(x, sizes, what)
        flat = x.reshape(-1).contiguous()
        self.traffic.add(what, flat.numel() * (self.size - 1), flat.element_size())
        found = flat.new_empty(self.size * flat.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _told(self, what):
            self._wait(gather(found, flat, group=self.group, async_op=True))
        return list(found.split(flat.numel() or 1)) if flat.numel() else [flat] * self.size


class MeshLinks(GroupLinks):
    """The ranks of a device mesh: of its one axis, or of two, the second one varying fastest.

    With two axes, exchanges within a row or a column go through the mesh's own groups.
    """

    def __init__(self, mesh: DeviceMesh, timeout: timedelta | None = None) -> None:
        if mesh.ndim > 2:
            raise InputError(
                f"A mesh of {mesh.ndim} axes: expected the one that the sequence lies on (such as "
                'mesh["cp"]), or two, ring by Ulysses.'
            )
        if mesh.ndim == 2 and mesh.mesh_dim_names is None:
            raise InputError(
                "A mesh of two axes needs names for them: init_device_mesh(..., "
                'mesh_dim_names=("ring", "ulysses")).'
            )
        flat = mesh if mesh.ndim == 1 else mesh._flatten()
        super().__init__(flat.get_group(), timeout)
        self.mesh = mesh
        self._rows: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if mesh.ndim == 2:
            row, column = divmod(self.rank, mesh.shape[1])
            across = tuple(range(row * mesh.shape[1], (row + 1) * mesh.shape[1]))
            down = tuple(range(column, self.size, mesh.shape[1]))
            self._rows = {across: mesh.get_group(1), down: mesh.get_group(0)}

    @override
    def sub(self, ranks: Sequence[int]) -> Links:
        group = self._rows.get(tuple(ranks))
        if group is None:
            return super().sub(ranks)
        return GroupLinks(group, self.timeout, self.traffic)


class _told:  # noqa: N801 - a context manager
    """Says who waited for what when another rank is gone."""

    def __init__(self, links: GroupLinks, what: str) -> None:
        self.links, self.what = links, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, LinkError):
            return
        links = self.links
        reason = " ".join(str(error).split())[:300]
        raise LinkError(
            f"Rank {links.rank} of {links.size} waited for {self.what} of another rank in vain. "
            "One of them has stopped (its own output says why) or is behind by more than the "
            f"timeout; start all ranks again. From torch.distributed: {reason}"
        ) from error


def links_of(where: Links | dist.ProcessGroup | DeviceMesh | None) -> Links:
    """The links of a process group, a device mesh, or links already.

    Raises:
        InputError: torch.distributed isn't set up, or it is something else.
    """
    if isinstance(where, Links):
        return where
    if isinstance(where, DeviceMesh):
        return MeshLinks(where)
    if where is not None and not isinstance(where, dist.ProcessGroup):
        raise InputError(
            f"Context parallelism takes a process group, a device mesh or None for all processes, "
            f"got {type(where).__name__}."
        )
    return GroupLinks(where)
