"""Worker processes that read ahead: how they start, and that they end with the work they were started for."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_byte
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

SOCKET_PATH = 107  # bytes of a Unix socket's path (108 with the final zero, sys/un.h)
GRACE = 3.0  # seconds that a worker gets to end before it is killed


@contextmanager
def read_ahead(dataset: Dataset, workers: int, **options: Any) -> Iterator[Iterator[Any]]:
    """Yields an iterator over a ``DataLoader`` of ``dataset``, its items as they are; 0 workers read in this process.

    Workers are forked and ignore SIGINT and SIGTERM, which belong to the trainer: sent to the whole job (Ctrl-C,
    ``scancel``), they must not end a worker whose position the trainer is about to save. They end when the block ends,
    at the latest when the interpreter exits, and are killed where they do not react within ``GRACE`` seconds.

    Raises ``ChildProcessError``, which is an ``OSError``, where a worker died during the block. Raises ``ValueError``
    where the path of the temporary folder is too long for the sockets through which workers hand over tensors."""
    ending = RawValue(c_byte, 0)
    if workers:
        _check_temporary(get_temp_dir())  # of this process, which forked workers share; it goes at this process's exit
    before = set(multiprocessing.active_children())
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_pickled if workers else _as_it_is,
        worker_init_fn=partial(_start, ending),
        generator=torch.Generator(),  # DataLoader draws a seed that nothing uses; not from the global state
        multiprocessing_context="fork" if workers else None,
        **options,
    )
    items = iter(loader)
    started = set(multiprocessing.active_children()) - before

    def end() -> None:
        ending.value = 1
        _end(started)

    atexit.register(end)  # runs before multiprocessing's own handler, which waits for daemons without a limit
    try:
        yield map(pickle.loads, items) if workers else items
    except (RuntimeError, OSError, EOFError) as error:  # DataLoader's handler of SIGCHLD raises anywhere in the block
        if dead := _dead(started):
            raise ChildProcessError(_cause_of_death(dead[0])) from error
        raise
    finally:
        atexit.unregister(end)
        end()


def _start(ending: c_byte, worker: int) -> None:
    """Runs first in a worker: one thread and a low priority, because the trainer's threads wait for the slowest of
    them; signals of the job are ignored until the trainer has said that it is ending."""
    torch.set_num_threads(1)
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


def _dead(workers: set[BaseProcess]) -> list[BaseProcess]:
    """The workers that ended with an error, or are about to: one that broke the pipe gets a second. Its sentinel closes
    before the system has its exit code, so it is joined."""
    with _reaping(workers):
        closed = wait([worker.sentinel for worker in workers], timeout=1.0)
        for worker in workers:
            if worker.sentinel in closed:
                worker.join(1.0)
        return [worker for worker in workers if worker.exitcode]


def _end(workers: set[BaseProcess]) -> None:
    """Ends and reaps worker processes."""
    with _reaping(workers):
        for worker in workers:
            worker.terminate()
        end = time.monotonic() + GRACE
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join(GRACE)


@contextmanager
def _reaping(workers: set[BaseProcess]) -> Iterator[None]:
    """Switches off DataLoader's SIGCHLD handler, which raises for a killed worker wherever the main thread is."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main and workers else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _cause_of_death(worker: BaseProcess) -> str:
    """What to tell about a worker that died."""
    code = worker.exitcode or 0
    cause = f"ended with exit code {code}"
    if code < 0:
        cause = f"was killed by signal {-code}"
        with suppress(ValueError):
            cause = f"was killed by {signal.Signals(-code).name}"
    memory = "; the machine may be out of memory: use fewer workers (--set workers=0)" if code == -9 else ""
    return f"a loader worker (process {worker.pid}) {cause}{memory}"


def _check_temporary(folder: str) -> None:
    """Raises ``ValueError`` where a socket in ``folder`` has a path that the system refuses."""
    length = len(os.fsencode(os.path.join(folder, "listener-xxxxxxxx")))
    if length > SOCKET_PATH:
        where = f"{length} bytes, of at most {SOCKET_PATH}: set TMPDIR to a shorter folder, or workers to 0"
        raise ValueError(f"the temporary folder {folder} is too long for the sockets of loader workers ({where})")


def _pickled(item: Any) -> bytes:
    """An item as it goes through the queue. An item that cannot be pickled raises here, in sight of ``DataLoader``; in
    the queue's own thread the error would be printed and the trainer would wait for ever."""
    return bytes(ForkingPickler.dumps(item))


def _as_it_is(item: Any) -> Any:
    return item
