"""Checkpoints: every process writes its shards while training continues; a kill leaves the last complete one.

A checkpoint is written under a temporary name, gets checksums of all its files and is then renamed. Tensors go through
torch.distributed.checkpoint, which reads them back into any other sharding and number of processes.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from diptych.machine import disk
from diptych.machine.processes import together


class Saver:
    """Writes the checkpoints of a run into ``folder``, one at a time, and keeps the last ``keep``.

    With ``behind`` the tensors are copied to the host and written by a thread while training goes on. ``minutes`` is
    how long a process waits for the others."""

    def __init__(self, folder: Path, keep: int, behind: bool, minutes: float = 30.0) -> None:
        self.folder, self.keep, self.behind = folder, keep, behind
        self.alone = not dist.is_initialized()
        self.first = self.alone or dist.get_rank() == 0
        # a group of its own, because the training uses the other one meanwhile
        self.group = None if self.alone else dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        self.pool = ThreadPoolExecutor(1)
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if behind else None
        self.pending: Future | None = None

    def save(self, step: int, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Begins the checkpoint of ``step``; every process must call it. Raises the error of the one before."""
        together(self.wait)
        path = self.folder / f"step-{step:08d}"
        tmp = self.folder / f".{path.name}.tmp"
        together(lambda: self._clean(tmp) if self.first else None)
        state = self.stager.stage(dict(tensors)) if self.stager else dict(tensors)
        assert isinstance(state, dict)
        self.pending = self.pool.submit(self._write, path, tmp, state, dict(meta))
        if not self.behind:
            together(self.wait)
        return path

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written ended with an error; ``wait`` raises it."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises ``OSError`` where writing failed."""
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

    def _clean(self, tmp: Path) -> None:
        """Makes the temporary folder, after removing those of runs that were killed."""
        for stale in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(stale)
        tmp.mkdir()

    def _write(self, path: Path, tmp: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Writes this process's shards; process 0 then adds the checksums, renames the folder and removes old ones.
        Where that fails, process 0 removes what is temporary."""
        try:
            with _errors_of(f"checkpoint {path} cannot be written"):
                _quietly(dcp.save, state, checkpoint_id=tmp / "state", process_group=self.group, no_dist=self.alone)
            if self.first:
                self._finish(path, tmp, meta)
        finally:
            if self.first:
                shutil.rmtree(tmp, ignore_errors=True)

    def _finish(self, path: Path, tmp: Path, meta: dict[str, Any]) -> None:
        sums = _checksums(tmp) | {"meta.json": _checksum(meta)}
        (tmp / "meta.json").write_text(json.dumps(meta | {"checksums": sums}))
        disk.flush_all(tmp)
        if path.exists():  # a resumed run comes by the same step again
            shutil.rmtree(path)
        tmp.rename(path)
        disk.flush(self.folder)
        complete = available(self.folder)
        at = complete.index(path) + 1  # those after it are damaged: the run resumed before them
        for old in [*complete[: max(0, at - self.keep)], *complete[at:]]:
            shutil.rmtree(old)


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Turns torch's ``CheckpointException``, a ``BaseException``, into an ``OSError`` or ``ValueError`` that names the
    cause."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, ValueError):
            raise ValueError(f"{what}: {cause}") from error
        text = f"{what}: {type(cause).__name__} in process {rank}: {cause}"
        raise (OSError(number, text) if number else OSError(text)) from error


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
            checksums, written = _checksums(path) | {"meta.json": _checksum(meta)}, meta.get("checksums", {})
            written.setdefault("meta.json", checksums["meta.json"])  # of runs before 2026-11-22
            if bad := sorted(f for f in written.keys() | checksums.keys() if written.get(f) != checksums.get(f)):
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
    """Fills ``tensors`` in place from a checkpoint, every process its shards, and returns the mapping.

    Raises ``ValueError`` where the checkpoint holds anything but tensors, and ``OSError`` where it cannot be read."""
    state, reader = dict(tensors), Reader(folder / "state")
    reader.read_metadata()  # torch's load would hide why metadata are refused
    with _errors_of(f"checkpoint {folder} cannot be read"):
        _quietly(dcp.load, state, storage_reader=reader, no_dist=not dist.is_initialized())
    return state


# What the metadata of a checkpoint of tensors consists of. Reading it runs these constructors and nothing else.
METADATA_TYPES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses whatever is not in ``METADATA_TYPES`` or a dtype of torch, so that a pickle cannot call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_TYPES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise ValueError(f"it names {module}.{name}, which no checkpoint of tensors does")


class Reader(dcp.FileSystemReader):
    """Reads checkpoints without running code from them: torch's own reader unpickles ``.metadata`` as it is, and
    unpickles every value that ``.metadata`` calls bytes. Here ``.metadata`` may name tensors in the folder alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint. Raises ``ValueError`` where it is damaged or names other types."""
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            _check_metadata(metadata)
        except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, IndexError, KeyError) as error:
            raise ValueError(f"{file} is refused: {error}") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_metadata(metadata: Any) -> None:
    """Raises ``ValueError`` unless every entry is a tensor in a file of the folder itself."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it holds no metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} is no tensor")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != str(info.relative_path) or info.transform_descriptors:
            raise ValueError(f"it points to {str(info.relative_path)!r}, outside the checkpoint or transformed")


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
    stored = Reader(folder / "state").read_metadata().state_dict_metadata
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
