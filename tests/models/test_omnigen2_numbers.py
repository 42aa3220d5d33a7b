"""OmniGen2 against numbers that the published code computed (tests/numbers/omnigen2/README.md): the same folder and
inputs, every stage within 2e-4, norms of gradients within 1e-3, and every id, size and position exactly. The comparison
is ``tests/parity/omnigen2.py``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.models import store
from diptych.models.published.key_map import mapped_names
from diptych.models.published.omnigen2 import PUBLISHED
from diptych.models.table import config
from tests.parity import check, omnigen2
from tests.parity.compare import Folder

FOLDER = Path(__file__).parents[1] / "numbers" / "omnigen2"
DONE: set[str] = set()


@pytest.fixture(scope="module")
def folder() -> Folder:
    return Folder(FOLDER, omnigen2.WEIGHTS)


def run(folder: Folder, stage: str) -> None:
    DONE.add(stage)
    omnigen2.STAGES[stage](folder)


@pytest.mark.parametrize("stage", omnigen2.STAGES)
def test_stage(folder, stage):
    before = len(folder.rows)
    run(folder, stage)
    assert len(folder.rows) > before and not folder.failures()


def test_every_number_is_compared(folder):
    for stage in omnigen2.STAGES.keys() - DONE:
        run(folder, stage)
    assert folder.unused() == []


def test_check_tells_what_is_wrong(tmp_path, capsys):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    state = load_file(copy / "scheduler.safetensors")
    state["dpm.6.x"][4] += 1e-2
    save_file(state, copy / "scheduler.safetensors")
    assert check.main(["omnigen2", str(copy), "--stage", "scheduler"]) == 1
    assert "FAIL scheduler.dpm.6.x" in capsys.readouterr().out


def test_the_released_sizes_have_the_released_tensors():
    """Names and shapes of all 1,650 tensors, and the parameters of the three parts, on the meta device."""
    model = store.create("omnigen2", config("omnigen2/3b-4b"), device="meta")
    parts = {"transformer": model.dit, "mllm": model.mllm, "vae": model.autoencoder}
    counts = {"transformer": 3_967_161_400, "mllm": 3_754_622_976, "vae": 83_819_683}
    assert {n: sum(p.numel() for p in part.parameters()) for n, part in parts.items()} == counts
    released = json.loads((FOLDER / "release_shapes.json").read_text())
    from diptych.models.published.key_map import export

    for stem, rules in PUBLISHED.weights.items():
        own = {n: model.state_dict()[n] for n in mapped_names(rules(model.config), model.state_dict())}
        shapes = {n: list(t.shape) for n, t in export(rules(model.config), own).items()}
        assert shapes == {n: list(shape) for n, shape in released[stem.split("/")[0]].items()}


def test_a_written_folder_is_the_one_that_was_read(tmp_path):
    store.save(store.load(FOLDER / "folder"), tmp_path / "again", published=True)
    files = sorted(f.relative_to(FOLDER / "folder") for f in (FOLDER / "folder").rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*") if f.is_file())
    for file in files:
        theirs, ours = FOLDER / "folder" / file, tmp_path / "again" / file
        if file.suffix == ".safetensors":
            a, b = load_file(theirs), load_file(ours)
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        else:
            assert theirs.read_bytes() == ours.read_bytes(), file


def test_both_generations_of_reader_names_and_sgts_folder_are_read(tmp_path):
    plain = store.load(FOLDER / "folder").state_dict()

    def same(model) -> bool:
        return all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())

    late = shutil.copytree(FOLDER / "folder", tmp_path / "late")
    reader = load_file(late / "mllm" / "model.safetensors")
    renamed = {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else f"model.{n}": t
        for n, t in reader.items()
    }
    save_file(renamed, late / "mllm" / "model.safetensors", metadata={"format": "pt"})
    assert same(store.load(late))
    over = tmp_path / "over" / "transformer"
    (over / "transformer").mkdir(parents=True)
    (over / "text_encoder").mkdir()
    weights = load_file(FOLDER / "folder" / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["x_embedder.bias"] = weights["x_embedder.bias"] + 1
    save_file(weights, over / "transformer" / "diffusion_pytorch_model.safetensors")
    short = {n.replace("model.", "language_model.", 1) if n.startswith("model.") else n: t for n, t in reader.items()}
    save_file(short, over / "text_encoder" / "model.safetensors")
    tuned = store.load(tmp_path / "over", base=FOLDER / "folder").state_dict()
    assert torch.equal(tuned["dit.enter.bias"], plain["dit.enter.bias"] + 1)
    assert all(torch.equal(v, plain[k]) for k, v in tuned.items() if k != "dit.enter.bias")


def test_a_bad_folder_is_one_clear_line(tmp_path):
    def broken(name: str, change) -> Path:
        copy = shutil.copytree(FOLDER / "folder", tmp_path / name)
        change(copy)
        return copy

    def row(copy: Path, file: str, **values) -> None:
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    cases = {
        "processor": (lambda c: shutil.rmtree(c / "processor"), r"lacks processor/tokenizer\.json"),
        "layers": (
            lambda c: row(c, "transformer/config.json", num_layers=3),
            "num_layers is 3, but the weights have 2",
        ),
        "width": (
            lambda c: row(c, "transformer/config.json", axes_dim_rope=[2, 4, 6]),
            "transformer/config.json: axes",
        ),
        "words": (
            lambda c: row(c, "transformer/config.json", hidden_size="40"),
            "hidden_size must be a number, not '40'",
        ),
        "vae": (lambda c: row(c, "vae/config.json", use_quant_conv=True), "use_quant_conv must be False, not True"),
        "reader": (
            lambda c: row(c, "mllm/config.json", model_type="qwen2_vl"),
            "model_type 'qwen2_vl' is not supported",
        ),
        "extra": (lambda c: _add(c), "unknown stray"),
    }
    for name, (change, told) in cases.items():
        with pytest.raises(ValueError, match=told):
            store.load(broken(name, change))


def _add(copy: Path) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"stray": torch.zeros(1)}, file)
