"""Every test of this folder runs once per family; the table is ``tests.support.tiny.FAMILIES``."""

from __future__ import annotations

import pytest

from diptych.generation.engine import Engine
from tests.support import tiny


@pytest.fixture(scope="session", params=list(tiny.FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(family):
    """A random model that tests share and must not change."""
    return tiny.shake(tiny.model(family)).requires_grad_(False)


@pytest.fixture
def fresh(family):
    """A random model of the test's own."""
    return tiny.shake(tiny.model(family))


@pytest.fixture
def engine(model) -> Engine:
    return Engine(model)
