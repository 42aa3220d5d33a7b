"""For every test: no network, one thread, shapes and types checked at run time, warnings are errors, tiny models."""

from __future__ import annotations

import os
import socket
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
# not generation.engine: it takes whatever users hand over, and its own errors are tested
CHECKED = (
    "core",
    "parts",
    "models",
    "training",
    "generation.events",
    "generation.prefix_cache",
    "generation.sampling",
    "generation.scheduler",
    "recipes",
    "analysis",
)
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Under ``CI=true``, names the tests that were skipped and may not be."""
    for name, reason in forbidden_skips(terminalreporter):
        terminalreporter.write_line(
            f"SKIPPED, which tests/allowed_skips.txt does not allow: {name}: {reason}", red=True
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under ``CI=true``, fails a session that skipped what may not be skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and exitstatus == pytest.ExitCode.OK and forbidden_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def forbidden_skips(reporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    """(test, reason) of every skip that is not on the list; none outside CI."""
    if os.environ.get("CI") != "true":
        return []
    lines = (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    allowed = [[part.strip() for part in line.split("|", 1)] for line in lines if not line.startswith("#")]
    skips = [(report.nodeid, str(report.longrepr)) for report in reporter.stats.get("skipped", [])]
    return [(name, why) for name, why in skips if not any(name.startswith(f) and r in why for f, r in allowed)]


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
