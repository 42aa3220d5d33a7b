"""BAGEL against numbers that the published code computed (tests/numbers/bagel/README.md): the same model and inputs,
every stage within 1e-4 and every id, position and mask exactly. The comparison is ``tests/parity/bagel.py``."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import bagel, check
from tests.parity.compare import Folder

FOLDER = Path(__file__).parents[1] / "numbers" / "bagel"
DONE: set[str] = set()


@pytest.fixture(scope="module")
def folder() -> Folder:
    return Folder(FOLDER, bagel.WEIGHTS)


def run(folder: Folder, stage: str) -> None:
    DONE.add(stage)
    bagel.STAGES[stage](folder)


@pytest.mark.parametrize("stage", bagel.STAGES)
def test_stage(folder, stage):
    before = len(folder.rows)
    run(folder, stage)
    assert len(folder.rows) > before and not folder.failures()


def test_every_number_is_compared(folder):
    """All but those of the autoencoder, which is left out here."""
    for stage in bagel.STAGES.keys() - DONE:
        run(folder, stage)
    autoencoder = ("components.vae.", "training.in.padded_images", "training.in.vae_eps")
    autoencoder += ("editing.in.vae_eps", "generation.out.plain.decoded")
    assert [n for n in folder.unused() if not n.startswith(autoencoder)] == []


def test_check_tells_what_is_wrong(tmp_path, capsys):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    asked = ["bagel", str(copy), "--stage", "understanding"]
    assert check.main(asked) == 0
    told = capsys.readouterr().out
    assert " 0 beyond tolerance" in told and "understanding.out.step_logits" in told
    assert "training.out.lm_head" in told.partition("not used:")[2]

    state = load_file(copy / "understanding.safetensors")
    state["out.step_logits"][2, 3] += 1e-3
    state["in.text.packed_text_ids"][0] += 1
    state["out.cache_after_text.k.0"][0] = torch.nan
    save_file(state, copy / "understanding.safetensors")
    assert check.main(asked) == 1
    told = capsys.readouterr().out
    for name in ("out.step_logits", "in.text.packed_text_ids", "out.cache_after_text.k.0"):
        assert f"FAIL understanding.{name}" in told
    with pytest.raises(SystemExit):
        check.main(["bagel", str(tmp_path)])
