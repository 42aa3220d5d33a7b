"""Work that every process does: when it fails in one, all fail, with an error of the same kind of cause."""

from __future__ import annotations

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from diptych.machine.processes import together


def fail(rank: int, store: str) -> None:
    """One of two processes, of which process 0 fails."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    for error in (ConnectionError("the judge is gone"), ValueError("a reward is NaN"), None):

        def work(error: Exception | None = error) -> str:
            if error is not None and rank == 0:
                raise error
            return "done"

        try:
            outcome = together(work)
        except Exception as raised:
            assert error is not None
            if rank == 0:
                assert raised is error
            else:
                text = f"process 0 failed: {type(error).__name__}: {error}"
                assert str(raised) == text and isinstance(raised, OSError)
                assert isinstance(raised, ConnectionError) == isinstance(error, ConnectionError)
        else:
            assert error is None and outcome == "done"
    dist.destroy_process_group()


def test_an_error_of_one_process_is_an_error_of_all(tmp_path):
    multiprocessing.spawn(fail, (str(tmp_path / "store"),), nprocs=2)
