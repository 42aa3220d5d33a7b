"""The processes of one run: how many there are, which one this is, and collectives over all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diptych.machine.devices import pick_device

T = TypeVar("T")


@contextmanager
def processes(device: str | None = None, minutes: float = 30.0) -> Iterator[tuple[int, int]]:
    """Yields (rank, world) as torchrun sets them, with a process group where there is more than one process; on GPUs
    (the default where there are some) every process takes its own.

    A collective that waits for another process for more than ``minutes`` raises."""
    gpus = device.startswith("cuda") if device else torch.cuda.is_available()
    rank, world = launched()
    if world == 1:
        yield 0, 1
        return
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=minutes))
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


def launched() -> tuple[int, int]:
    """(rank, world) as torchrun sets them in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", with 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"shard {text!r} is not i/n with i from 0 to n - 1, such as 0/4")
    return int(match[1]), int(match[2])


def share(text: str | None) -> tuple[int, int]:
    """(i, n) of a share of offline work: as given ("i/n"), else as torchrun sets them. Raises ``ValueError`` where both
    do and differ."""
    if text is None:
        return launched()
    given = parse_shard(text)
    if launched()[1] > 1 and launched() != given:
        raise ValueError(f"--shard {text} contradicts torchrun, which runs share {launched()[0]}/{launched()[1]}")
    return given


def device_of_process(device: str) -> str:
    """``pick_device``, and among several processes that torchrun started the GPU of this one."""
    picked = pick_device(device)
    several = launched()[1] > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if picked == "cuda" and several else picked


def place() -> tuple[int, int]:
    """(rank, world) of the process group; (0, 1) where there is none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def processes_per_machine() -> int:
    """How many processes of the run are on this machine, as torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """The counts added over all processes."""
    if not dist.is_initialized():
        return dict(counts)
    values = torch.tensor(list(counts.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(counts, values.tolist(), strict=True))


def any_of(flag: bool) -> bool:
    """Whether the flag is raised in any process."""
    return total({"flag": float(flag)})["flag"] > 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def together(work: Callable[[], T]) -> T:
    """The result of ``work``, which every process calls; when it raises in one of them, all raise: that one its own
    error, the others an ``OSError`` that names it, a ``ConnectionError`` where the error is one."""
    if not dist.is_initialized():
        return work()
    try:
        result = work()
    except Exception as error:
        any_of(True)
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        gather((text, isinstance(error, ConnectionError)))
        raise
    if any_of(False):
        rank, (text, lost) = next((rank, row) for rank, row in enumerate(gather(("", False))) if row[0])
        raise (ConnectionError if lost else OSError)(f"process {rank} failed: {text}")
    return result
