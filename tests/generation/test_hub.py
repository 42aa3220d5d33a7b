"""Models saved, uploaded and loaded by the hub's names, against a hub that is a folder."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import diptych
from diptych.evaluation import model_card


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: repositories are folders, a revision is a sub-folder."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message, revision):
            shutil.copytree(folder_path, root / repo_id / (revision or "main"), dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repository, revision=None, allow_patterns=None):
        if not (folder := root / repository / (revision or "main")).is_dir():
            raise OSError(f"no {repository} at {revision or 'main'}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


def test_a_pushed_model_is_loaded_by_its_name(hub, tiny_model):
    engine = diptych.load(tiny_model)
    assert engine.push_to_hub("me/model", "## Notes", revision="v2").endswith("/me/model/commit/1")
    card = (hub / "me/model/v2/README.md").read_text()
    assert 'diptych.load("me/model")' in card and "## Notes" in card and card.startswith("---\nlibrary_name: diptych\n")
    again = diptych.Engine.from_pretrained("me/model", revision="v2", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert again.dtype == torch.bfloat16 and again.name == "me/model"
    for a, b in zip(engine.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a.to(b.dtype), b)  # the autoencoder stays float32
    with pytest.raises(ValueError, match="no me/model at main"):
        diptych.load("me/model")


def test_saving_never_costs_a_file_of_others(tiny_model, tmp_path):
    engine = diptych.load(tiny_model)
    folder = engine.save_pretrained(tmp_path / "model")
    assert engine.save_pretrained(folder) == folder and diptych.load(folder).model.config == engine.model.config
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt"):
        engine.save_pretrained(folder)
    assert (folder / "thesis.txt").is_file()


def test_moving_a_model_forgets_the_contexts_of_the_old_device(tiny_model):
    engine = diptych.load(tiny_model)
    engine.ask(torch.zeros(3, 32, 32), "what is it?", max_new_tokens=1)
    assert engine.prefixes.entries and engine.to("cpu") is engine and not engine.prefixes.entries
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        engine.to("gpu")


def test_scores_of_an_evaluation_fill_the_card(tiny_model, tmp_path):
    result = diptych.evaluate(diptych.load(tiny_model), ["vqa-mini"], folder=tmp_path / "e", limit=2, progress=False)
    card = model_card.scores(tmp_path / "e")
    assert all(f"| {name} | {score.value:.3f} |" in card for name, score in result.scores.items())
    assert "seed 0, num_inference_steps" in card
    assert all(f"<td>{name}</td>" in result._repr_html_() for name in result.scores) and len(repr(result)) < 200
