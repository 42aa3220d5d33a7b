"""For every test: no network, one thread, shapes and types checked at run time, warnings are errors, tiny models."""

from __future__ import annotations

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
CHECKED = ("core", "parts", "models", "training", "generation", "recipes", "analysis")
jaxtyping.install_import_hook([f"diptych.{room}" for room in CHECKED], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing")


_connect = socket.socket.connect


def _local_only(self: socket.socket, address, *rest):
    """Lets processes of this machine talk; refuses everything else."""
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise RuntimeError(f"tests may not use the network: connection to {address}")
    return _connect(self, address, *rest)


socket.socket.connect = _local_only  # type: ignore[method-assign]


@pytest.fixture
def tmp_run(tmp_path):
    """A run folder that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A saved random model of the smallest size: what the command line and the engine can be tried on."""
    from diptych.models import store
    from tests.support.tiny import model, shake

    folder = tmp_path_factory.mktemp("models") / "random"
    store.save(shake(model("bagel")), folder)
    return folder
