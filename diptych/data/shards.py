"""Writing webdataset shards of any source, and measuring what a loader makes of data."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.layout import Layout
from diptych.core.sample import Image, Sample, sample_to_json
from diptych.data.encoded import add_member, shard_name, written
from diptych.data.loader import Loader
from diptych.data.mixture import Source, permuted


def shard(
    source: Source,
    folder: Path,
    *,
    rows: int = 1000,
    seed: int | None = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Writes a data set as webdataset shards of so many rows, in an order drawn from ``seed`` (None: as it comes), and
    returns rows, pictures, shards and what was skipped (by row). Shards that are there are kept.

    Pictures keep the bytes they have (those that cannot be decoded are skipped with their row); what is made on the fly
    becomes PNG. A catalog reads the folder with
    ``{format: webdataset, path: FOLDER/*.tar}``; ``webdataset`` and other readers of its layout read it too."""
    total = len(source)
    told: dict[str, Any] = {"rows": 0, "pictures": 0, "shards": -(-total // rows), "skipped": {}}
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(told["shards"]):
        places = range(k * rows, min((k + 1) * rows, total))
        progress(len(places))
        if (folder / shard_name(k)).is_file():
            continue
        with written(folder / shard_name(k)) as tar:
            for place in places:
                index = place if seed is None else permuted(place, total, seed, "shards", source.name)
                try:
                    row, pictures = _row(source, index)
                except (ValueError, OSError) as error:
                    told["skipped"][f"{source.name}/{index}"] = str(error)
                    continue
                key = f"{index:09d}"
                add_member(tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
                for extension, data in pictures.items():
                    add_member(tar, f"{key}.{extension}", data)
                told["rows"] += 1
                told["pictures"] += len(pictures)
    return told


def _row(source: Any, index: int) -> tuple[dict, dict[str, bytes]]:
    """The JSON row of a sample whose pictures are named by extension, and the pictures."""
    stored = hasattr(source, "data")
    decoded: Sample = source[index]  # raises for what a training would skip
    sample = source.row(index) if stored else decoded
    pictures: dict[str, bytes] = {}

    def named(image: Image) -> Image:
        number = len(pictures)
        if stored:
            data = source.data(index, str(image.image))
            suffix = str(image.image).rpartition(".")[2].lower() or "png"
        else:
            file, suffix = io.BytesIO(), "png"
            image.pixels.save(file, "PNG")
            data = file.getvalue()
        pictures[f"{number}.{suffix}"] = data
        return replace(image, image=f"{number}.{suffix}")

    return sample_to_json(sample.map_images(named)), pictures


# ---- what is in it --------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """What the samples of a data set are, laid out by a model."""

    rows: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # row -> why
    tokens: list[int] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)  # tokens by kind of segment
    supervised: int = 0
    shapes: Counter = field(default_factory=Counter)  # pictures by what the model is shown of them

    def to_json(self) -> dict[str, Any]:
        """Counts, and quantiles of the lengths."""
        q = {f"p{p}": float(np.percentile(self.tokens, p)) for p in (5, 50, 95)} if self.tokens else {}
        return {
            "rows": self.rows, "bad": len(self.skipped), "skipped": self.skipped,
            "tokens": sum(self.tokens), "longest": max(self.tokens, default=0), **q,
            "kinds": {str(k): n for k, n in self.kinds.most_common()}, "supervised": self.supervised,
            "shapes": {shape: n for shape, n in self.shapes.most_common()},
        }  # fmt: skip


def stats(sources: Mapping[str, Source], lay_out: Callable[[Sample], Layout], limit: int = 1000) -> dict[str, Lengths]:
    """Lengths, kinds of tokens and shapes of pictures of the first ``limit`` rows of every data set."""
    out = {}
    for name, source in sources.items():
        found = out[name] = Lengths()
        for index in range(min(limit, len(source))):
            try:
                laid = lay_out(source[index])
            except (ValueError, OSError) as error:
                found.skipped[f"{name}/{index}"] = str(error)
                continue
            found.rows += 1
            found.tokens.append(len(laid))
            for s in laid.segments:
                found.kinds[s.kind] += len(s)
                found.supervised += s.supervised + (s.open if s.drawn else 0)
                if s.image is not None:
                    shape = s.image.shape
                    found.shapes[f"{shape[-1]}x{shape[-2]} {'encoded' if s.encoded else s.kind}"] += 1
    return out


# ---- how fast it comes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """What a loader delivers, per second of waiting for it, and how full its rows are."""

    rows: int
    seconds: float
    tokens_per_second: float
    samples_per_second: float
    pictures_per_second: float
    fill: float
    skipped: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def speed(loader: Loader, rows: int, warm: int = 2) -> Speed:
    """The speed of a loader over ``rows`` rows, after ``warm`` that are not counted."""
    endless: Iterator = iter(loader)
    for _ in range(warm):
        next(endless)
    start = time.perf_counter()
    got = list(islice(endless, rows))
    seconds = time.perf_counter() - start
    told = [r.stats for r in got]
    return Speed(
        rows,
        seconds,
        sum(t.tokens for t in told) / seconds,
        sum(sum(t.samples.values()) for t in told) / seconds,
        sum(t.pictures for t in told) / seconds,
        sum(t.fill for t in told) / rows,
        len(loader.skipped),
    )
