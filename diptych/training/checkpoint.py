"""Saving and resuming: every process writes its shards, behind the training's back; a kill leaves the last good one.

A checkpoint is written under a temporary name, gets checksums of all its files and is then renamed. Tensors go through
torch.distributed.checkpoint, which reads them back into any other sharding and number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class Saver:
    """Writes the checkpoints of a run into ``folder``, one at a time, and keeps the last ``keep``.

    With ``behind`` the tensors are copied to the host and written by a thread while training goes on."""

    def __init__(self, folder: Path, keep: int, behind: bool) -> None:
        self.folder, self.keep, self.behind = folder, keep, behind
        self.alone = not dist.is_initialized()
        self.first = self.alone or dist.get_rank() == 0
        self.group = None if self.alone else dist.new_group(backend="gloo")  # the training's own is in use meanwhile
        self.pool = ThreadPoolExecutor(1)
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if behind else None
        self.pending: Future | None = None

    def save(self, step: int, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Begins the checkpoint of ``step``; every process must call it. Raises what the one before ended with."""
        self.wait()
        path = self.folder / f"step-{step:08d}"
        tmp = self.folder / f".{path.name}.tmp"
        if self.first:
            for stale in self.folder.glob(".step-*.tmp"):  # of a run that was killed
                shutil.rmtree(stale)
            tmp.mkdir()
        if not self.alone:
            dist.barrier()
        state = self.stager.stage(dict(tensors)) if self.stager else dict(tensors)
        assert isinstance(state, dict)
        self.pending = self.pool.submit(self._write, path, tmp, state, dict(meta))
        if not self.behind:
            self.wait()
        return path

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and gives the thread back."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()
            if self.stager:
                self.stager.close()

    def _write(self, path: Path, tmp: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
        _quietly(dcp.save, state, checkpoint_id=tmp / "state", process_group=self.group, no_dist=self.alone)
        if not self.first:
            return
        sums = _checksums(tmp) | {"meta.json": _checksum(meta)}
        (tmp / "meta.json").write_text(json.dumps(meta | {"checksums": sums}))
        if path.exists():  # a resumed run comes by the same step again
            shutil.rmtree(path)
        tmp.rename(path)
        there = available(self.folder)
        at = there.index(path) + 1  # behind it only damaged ones, which the run went on before
        for old in [*there[: max(0, at - self.keep)], *there[at:]]:
            shutil.rmtree(old)


def _checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file below a checkpoint but its meta.json."""
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "meta.json"):
        with file.open("rb") as stream:
            out[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def _checksum(meta: Mapping[str, Any]) -> str:
    """sha256 of what meta.json says beside the checksums."""
    rest = {k: v for k, v in meta.items() if k != "checksums"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def available(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith("step-") and (p / "meta.json").is_file())


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with those after it.

    None where a run has no checkpoint yet. Raises ``ValueError`` when it has some and all are damaged."""
    wrong: list[str] = []
    for path in reversed(available(folder)):
        try:
            meta = read_meta(path)
            found, written = _checksums(path) | {"meta.json": _checksum(meta)}, meta.get("checksums", {})
            written.setdefault("meta.json", found["meta.json"])  # of runs before 2026-11-22
            if bad := sorted(f for f in written.keys() | found.keys() if written.get(f) != found.get(f)):
                raise ValueError(f"checkpoint {path} is damaged: {', '.join(bad)} is not what was written")
            return path, wrong
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("no checkpoint can be used; " + "; ".join(wrong))
    return None, wrong


def read_meta(folder: Path) -> dict[str, Any]:
    """The JSON half of a checkpoint. Raises ``ValueError`` when it cannot be read."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:  # bytes that are no text are a ValueError too
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"checkpoint {folder} is damaged: meta.json holds no object")
    return meta


def load(folder: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Fills ``tensors`` in place from a checkpoint, every process its shards, and returns the mapping."""
    state = dict(tensors)
    _quietly(dcp.load, state, checkpoint_id=folder / "state", no_dist=not dist.is_initialized())
    return state


def optimizer_state(optimizers: list[torch.optim.Optimizer], names: Mapping[int, str]) -> dict[str, Tensor]:
    """Optimizer state as tensors named ``<optimizer>.<parameter>.<slot>``."""
    out = {}
    for optimizer in optimizers:
        for p, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                out[f"{type(optimizer).__name__}.{names[id(p)]}.{slot}"] = tensor
    return out


def restore_optimizer(
    optimizers: list[torch.optim.Optimizer], names: Mapping[int, str], folder: Path, prefix: str
) -> None:
    """Gives every optimizer the state that ``optimizer_state`` wrote under ``prefix``, sharded as its parameters."""
    stored = dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    live = {
        f"{prefix}{type(o).__name__}.{names[id(p)]}": (o, p)
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
    }
    wanted: dict[str, Tensor] = {}
    for key, m in stored.items():
        owner = live.get(key.rpartition(".")[0])
        if owner and isinstance(m, TensorStorageMetadata):
            wanted[key] = _slot(owner[1], m)
    if wanted:
        for key, value in load(folder, wanted).items():
            name, _, slot = key.rpartition(".")
            optimizer, p = live[name]
            optimizer.state[p][slot] = value


def _slot(p: nn.Parameter, stored: TensorStorageMetadata) -> Tensor:
    """An empty tensor for a slot: like the parameter where it has its shape, else small and whole."""
    dtype = stored.properties.dtype
    if stored.size == p.shape:
        return torch.empty_like(p, dtype=dtype)
    return torch.empty(stored.size, dtype=dtype, device=p.device)


def _quietly(call, *args, **kwargs) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # DCP warns that there is no process group
        warnings.filterwarnings("ignore", category=FutureWarning)
        call(*args, **kwargs)
