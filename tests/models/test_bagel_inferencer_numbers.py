"""BAGEL's requests, think mode, size rules, seeds and training packs against complete runs of the published inferencer
(tests/numbers/bagel-inferencer/README.md). The comparison is ``tests/parity/bagel_inferencer.py``."""

from pathlib import Path

import pytest

from tests.parity import bagel_inferencer
from tests.parity.compare import Folder

FOLDER = Path(__file__).parents[1] / "numbers" / "bagel-inferencer"


@pytest.fixture(scope="module")
def folder() -> Folder:
    return Folder(FOLDER, bagel_inferencer.WEIGHTS)


@pytest.mark.parametrize("stage", bagel_inferencer.STAGES)
def test_stage(folder, stage):
    before = len(folder.rows)
    bagel_inferencer.STAGES[stage](folder)
    assert len(folder.rows) > before and not folder.failures()


def test_every_number_is_compared(folder):
    assert folder.rows, "run the whole file: this test counts what the stages have compared"
    assert [n for n in folder.unused() if not n.startswith("runs.taylorseer.")] == []
