"""Resuming a run of somebody else runs no code of theirs: a forged checkpoint is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from diptych.training import checkpoint
from tests.support import tiny
from tests.training.test_loop import losses, metrics, train


class Call:
    """What unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "run"
    train(tiny.recipe(steps=2), folder)
    return folder


def forge(run, place, change):
    """A copy of the run whose metadata are changed, with new checksums, as a forger writes them."""
    forged = place / "run"
    shutil.copytree(run, forged)
    [last] = checkpoint.available(forged / "checkpoints")
    file = last / "state" / ".metadata"
    with file.open("rb") as stream:
        metadata = pickle.load(stream)
    file.write_bytes(pickle.dumps(change(metadata, last / "state")))
    meta = checkpoint.read_meta(last)
    meta["checksums"] = {
        f.relative_to(last).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in last.rglob("*")
        if f.is_file() and f.name != "meta.json"
    }
    meta["checksums"]["meta.json"] = checkpoint._checksum(meta)
    (last / "meta.json").write_text(json.dumps(meta))
    assert checkpoint.newest(forged / "checkpoints") == (last, [])
    return forged


def first_tensor(metadata):
    return next(name for name in metadata.state_dict_metadata if name.startswith("model."))


def instead(metadata, folder):
    return Call(Path.touch, folder.parents[2] / "ran")


def inside(metadata, folder):
    metadata.planner_data = Call(exec, f"open({str(folder.parents[2] / 'ran')!r}, 'w').close()")
    return metadata


def as_bytes(metadata, folder):
    """torch unpickles a value that the metadata call bytes, whatever it is to be loaded into."""
    name = first_tensor(metadata)
    data = io.BytesIO()
    torch.save(Call(Path.touch, folder.parents[2] / "ran"), data)
    (folder / "__9_0.distcp").write_bytes(data.getvalue())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    key = next(k for k in metadata.storage_data if k.fqn == name)
    info = metadata.storage_data.pop(key)
    info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(data.getvalue())
    metadata.storage_data[type(key)(name)] = info
    return metadata


def outside(metadata, folder):
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key].relative_path = "../../../secret"
    return metadata


def getattr_chain(metadata, folder):
    metadata.version = Call(getattr, "x", "upper")
    return metadata


@pytest.mark.parametrize("change", [instead, inside, as_bytes, outside, getattr_chain])
def test_a_forged_checkpoint_is_refused_and_runs_nothing(change, run, tmp_path):
    forged = forge(run, tmp_path, change)
    with pytest.raises(ValueError, match=r"\.metadata is refused"):
        train(tiny.recipe(steps=4), forged, resume=True)
    assert not (forged / "ran").exists()


@pytest.mark.parametrize("change", [instead, inside])
def test_the_forgeries_work_on_torchs_own_reader(change, run, tmp_path):
    forged = forge(run, tmp_path, change)
    [last] = checkpoint.available(forged / "checkpoints")
    with suppress(AttributeError):  # what the forged pickle returns is not metadata
        FileSystemReader(last / "state").read_metadata()
    assert (forged / "ran").exists()


def test_a_sound_checkpoint_is_read_as_ever(run, tmp_path):
    same = forge(run, tmp_path, lambda metadata, folder: metadata)
    train(tiny.recipe(steps=4), same, resume=True)
    assert len(losses(metrics(same))) == 4
