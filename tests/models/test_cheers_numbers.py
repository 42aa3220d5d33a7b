"""Cheers against numbers that the published code computed (tests/numbers/cheers/README.md): the same model and inputs,
every stage within 1e-4 and every id and mask exactly. The comparison is ``tests/parity/cheers.py``."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity import check, cheers
from tests.parity.compare import Folder

FOLDER = Path(__file__).parents[1] / "numbers" / "cheers"
DONE: set[str] = set()


@pytest.fixture(scope="module")
def folder() -> Folder:
    return Folder(FOLDER, cheers.WEIGHTS)


def run(folder: Folder, stage: str) -> None:
    DONE.add(stage)
    cheers.STAGES[stage](folder)


@pytest.mark.parametrize("stage", cheers.STAGES)
def test_stage(folder, stage):
    before = len(folder.rows)
    run(folder, stage)
    assert len(folder.rows) > before and not folder.failures()


def test_every_number_is_compared(folder):
    for stage in cheers.STAGES.keys() - DONE:
        run(folder, stage)
    assert folder.unused() == []


def test_check_tells_what_is_wrong(tmp_path, capsys):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    state = load_file(copy / "t2i_plain.safetensors")
    state["v_cond"][1, 0, 3, 2, 1] += 1e-3
    state["t_schedule"][0] += 1e-3
    save_file(state, copy / "t2i_plain.safetensors")
    assert check.main(["cheers", str(copy), "--stage", "t2i_plain"]) == 1
    told = capsys.readouterr().out
    assert "FAIL t2i_plain.v_cond" in told and "FAIL t2i_plain.t_schedule" in told


@pytest.mark.parametrize(
    "quirk, stage, tensor",
    [
        ("repeated_positions", "velocity", "velocity.velocity"),
        ("endpoint_step", "t2i_plain", "t2i_plain.final_latent"),
        ("endpoint_step", "edit", "edit.t_schedule"),
    ],
)
def test_without_a_published_quirk_the_numbers_differ(quirk, stage, tensor, monkeypatch):
    """So each switch really does what its name says."""
    folder = Folder(FOLDER, cheers.WEIGHTS)
    monkeypatch.setattr(cheers, "QUIRKS", tuple(q for q in cheers.QUIRKS if q != quirk))
    cheers.STAGES[stage](folder)
    assert tensor in {r.name.partition(" ")[0] for r in folder.failures()}
