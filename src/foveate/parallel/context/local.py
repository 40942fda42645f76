"""N ranks in one process, each a thread: to test, to count and to try out without a launcher.

The schemes run on it as they run on processes, backward included (on a CPU autograd runs in the
thread that asks for it). On a GPU call a scheme's `backward` itself: there autograd's one thread
for each device would wait for itself.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from foveate.ops.errors import InputError
from foveate.parallel.context.links import LinkError, Links, Message, Pending, Traffic

T = TypeVar("T")


class _Post:
    """Letter boxes between all pairs of ranks."""

    def __init__(self, timeout: float) -> None:
        self.boxes: dict[tuple[int, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.timeout = timeout

    def box(self, *key: int) -> queue.Queue[Tensor]:
        with self.lock:
            return self.boxes[key]  # type: ignore[index]


class LocalLinks(Links):
    """One of the threads of `run_local`."""

    def __init__(self, post: _Post, rank: int, size: int) -> None:
        self.post, self.rank, self.size = post, rank, size
        self.traffic = Traffic()

    @override
    def _exchange(
        self, sends: list[Message], receives: list[Message], what: str, tag: int
    ) -> Pending:
        for rank, tensor in sends:
            self.post.box(self.rank, rank, tag).put(tensor.detach().clone())

        def finish() -> None:
            for rank, buffer in receives:
                box, waited = self.post.box(rank, self.rank, tag), 0.0
                while True:
                    try:
                        buffer.copy_(box.get(timeout=0.05).view_as(buffer))
                        break
                    except queue.Empty:
                        waited += 0.05
                        if self.post.stopped.is_set() or waited > self.post.timeout:
                            raise LinkError(
                                f"Rank {self.rank} of {self.size} waited for {what} of rank {rank} "
                                "in vain: that rank has stopped, or is too far behind."
                            ) from None

        return Pending(finish)


def run_local(ranks: int, work: Callable[[Links], T], timeout: float = 60.0) -> list[T]:
    """Run `work(links)` on N ranks of this process at once; what each returned, in rank order.

    Raises:
        InputError: ranks below 1.
        Exception: whatever a rank raised first; the others are stopped.
    """
    if ranks < 1:
        raise InputError(f"run_local(ranks={ranks}): expected at least 1.")
    post = _Post(timeout)
    found: list[T | None] = [None] * ranks
    errors: list[BaseException] = []
    grad = torch.is_grad_enabled()

    def one(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad):
                found[rank] = work(LocalLinks(post, rank, ranks))
        except BaseException as error:
            errors.append(error)
            post.stopped.set()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        first = [e for e in errors if not isinstance(e, LinkError)]
        raise (first or errors)[0]
    return found  # type: ignore[return-value]
