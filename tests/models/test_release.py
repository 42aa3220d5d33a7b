"""Writing model folders: files of the user survive, our own releases are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diptych.models import release, store
from tests.support import published, tiny

NAMES = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def model():
    return tiny.shake(tiny.model("bagel"))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder of the user, with a file and a folder in it."""
    folder = tmp_path / "precious"
    (folder / "sub").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "sub/data.csv").write_text("1,2")
    return folder


@pytest.mark.parametrize("format", ["diptych", "published", "hf"])
def test_a_folder_with_other_files_is_refused_and_force_keeps_them(format, precious, tmp_path):
    start = published.write("bagel", tmp_path / "start")
    (precious / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"files that diptych did not write \(config.json, sub, .*--force"):
        store.export(start, precious, format)
    assert (precious / "config.json").read_text() == "{}" and names(precious) == {"config.json", "sub", "thesis.txt"}
    assert store.export(start, precious, format, force=True) == precious
    assert (precious / "thesis.txt").read_text() == "years of work" and (precious / "sub/data.csv").is_file()
    if format != "hf":
        assert store.load(precious).family == "bagel"
    assert not [n for n in names(precious) if n.startswith(".")]
    with pytest.raises(ValueError, match="did not write"):  # one's own beside them: still no folder of ours alone
        store.export(start, precious, format)


def test_a_release_is_replaced_whole_and_a_note_in_it_is_not(model, tmp_path):
    folder = tmp_path / "m"
    store.save(model, folder)
    before = os.stat(folder).st_ino
    store.save(model, folder)
    assert names(folder) == NAMES and os.stat(folder).st_ino != before  # a new folder, renamed into its place
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"did not write \(notes.md\)"):
        store.save(model, folder)
    store.save(model, folder, force=True)
    assert names(folder) == NAMES | {"notes.md"}


def test_another_format_of_ours_is_replaced_and_a_written_readme_is_the_user_s(tmp_path):
    start = published.write("bagel", tmp_path / "start")
    store.export(start, tmp_path / "m", "published")
    store.export(start, tmp_path / "m", "hf")
    assert names(tmp_path / "m") == {"language", "vision", "README.md"}
    readme = tmp_path / "m/README.md"
    readme.write_text(readme.read_text() + "\nTrained for three weeks.\n")
    with pytest.raises(ValueError, match=r"\(README.md\)"):
        store.export(start, tmp_path / "m", "diptych")


def test_a_checkpoint_of_others_has_our_names_and_is_not_ours(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = published.write("bagel", tmp_path / "published")
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="did not write"):
        store.save(published.model("bagel"), folder, published=True)


@pytest.mark.parametrize("entries", [["config.json"], ["README.md"], ["tokenizer.json", "config.json"], ["language/"]])
def test_names_like_ours_prove_nothing(entries, model, tmp_path):
    for entry in entries:
        (tmp_path / "m" / entry).mkdir(parents=True) if entry.endswith("/") else None
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / entry).touch() if not entry.endswith("/") else None
    with pytest.raises(ValueError, match="did not write"):
        store.save(model, tmp_path / "m")


def test_the_working_directory_an_empty_folder_and_the_home(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    for _ in range(2):  # fresh, then over itself
        store.save(model, ".")
        assert names(tmp_path) == NAMES and os.stat(".").st_ino == before == os.stat(tmp_path).st_ino
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="notes"):
        store.save(model, "./")
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "letters").touch()
    with pytest.raises(ValueError, match="letters"):
        store.save(model, "~")
    assert store.save(model, "~/model/") == home / "model" and names(home / "model") == NAMES
    assert not (tmp_path / "~").exists()


def test_links_are_written_through_and_stay(model, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    (link := tmp_path / "models").symlink_to(disk)
    (new := tmp_path / "new").symlink_to(tmp_path / "not-yet")
    for _ in range(2):
        store.save(model, link)
        store.save(model, new)
    assert link.is_symlink() and new.is_symlink() and names(disk) == names(tmp_path / "not-yet") == NAMES
    (disk / "thesis.txt").touch()
    with pytest.raises(ValueError, match="thesis.txt"):
        store.save(model, link)
    assert names(tmp_path) == {"disk", "models", "new", "not-yet"}


def test_a_file_in_the_way_is_named(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/below"):
        with pytest.raises(ValueError, match="file is a file; a model is written into a folder"):
            store.save(model, tmp_path / target, force=True)
    (tmp_path / "m/model.safetensors").mkdir(parents=True)
    (tmp_path / "m/config.json").write_text("mine")
    with pytest.raises(ValueError, match="model.safetensors is in the way"):
        store.save(model, tmp_path / "m", force=True)
    assert (tmp_path / "m/config.json").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path / "m") == {"config.json", "model.safetensors"}


def test_a_failed_write_leaves_everything_as_it_was(precious, tmp_path):
    def fails(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise OSError("No space left on device")

    for target in (precious, tmp_path / "fresh"):
        with pytest.raises(OSError, match="No space left"):
            release.write_model(target, fails, force=True)
    assert names(precious) == {"sub", "thesis.txt"} and names(tmp_path) == {"precious"}


def test_folders_that_only_look_temporary_stay(model, tmp_path):
    for name in (".m.backup.tmp", ".m.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
    store.save(model, tmp_path / "m")
    store.save(model, tmp_path / "m")
    store.load(tmp_path / "m")
    assert (tmp_path / ".m.backup.tmp/thesis.txt").is_file() and (tmp_path / ".m.old/thesis.txt").is_file()


def test_a_model_from_before_the_mark_is_ours(model, tmp_path):
    from safetensors.torch import load_file, save_file

    store.save(model, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    store.save(model, tmp_path / "m")
    assert torch.equal(store.load(tmp_path / "m").latent_out.weight, model.latent_out.weight)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"b.ü": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    for i in range(12):
        release.write_tensors(tmp_path / f"{i}.safetensors", tensors)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(12)}) == 1
    from safetensors.torch import load_file

    back = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors) and len(back) == 2
