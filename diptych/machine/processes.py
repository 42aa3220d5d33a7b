"""The processes of one run: how many, which one this is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def processes(device: str | None = None) -> Iterator[tuple[int, int]]:
    """(rank, world) as torchrun says it, with a process group where there is more than one process; on GPUs (the
    default where there are some) every process takes its own."""
    gpus = device.startswith("cuda") if device else torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


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
    """Everybody's value, by rank."""
    if not dist.is_initialized():
        return [value]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out
