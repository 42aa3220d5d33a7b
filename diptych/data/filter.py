"""Which rows of a data set to train on: rules for each row, then duplicates among the rows that are left.

``measure`` reads rows in blocks of ``BLOCK`` and keeps what it computes of each in ``facts/``; processes share the
blocks, and a killed one goes on. Pictures are decoded only where a rule needs their pixels; damage behind a file's head
is found then, else by the training. ``select`` reads all blocks and writes the list of kept rows, never copies:

::

    filter.json   the rules, the data set, how many rows each rule drops
    facts/        what was computed of each row
    kept.npy      the numbers of the kept rows, ascending (int64)
    kept.txt      their ids, one a line

A catalog entry with ``keep: FOLDER`` reads the kept rows only."""

from __future__ import annotations

import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from diptych.core.sample import Sample, Text
from diptych.data.decoding import image_size, open_picture
from diptych.data.reading import read
from diptych.data.sources import RowSource, decode
from diptych.machine import disk
from diptych.machine.extras import install

BLOCK = 10_000  # rows whose facts are written together
BATCH = 64  # pictures that an encoder gets at once
SETTINGS, KEPT, IDS = "filter.json", "kept.npy", "kept.txt"
Features = Callable[[Iterator[PIL.Image.Image]], np.ndarray]  # (n, d) of n pictures
Judge = Callable[[Sample], "bool | str"]


@dataclass(frozen=True)
class Rules:
    """What a row must satisfy; a rule that is not set drops nothing.

    ``min_side``    every picture's shorter side in pixels is at least this
    ``max_aspect``  no picture is longer than so many times its shorter side
    ``languages``   the language of all text of the row together, as ISO 639-1 codes (py3langid)
    ``exact``       of rows with the same picture files only the first stays
    ``distance``    of rows whose pictures' difference hashes differ in at most so many of 64 bits only the first stays
    ``similarity``  of rows whose pictures' features have at least this cosine only the first stays
    ``function``    FILE.py:NAME of a function of the sample that returns whether to keep it, or why not
    """

    min_side: int = 0
    max_aspect: float = 0.0
    languages: tuple[str, ...] = ()
    exact: bool = False
    distance: int | None = None
    similarity: float | None = None
    function: str | None = None

    def __post_init__(self) -> None:
        if self.max_aspect and self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}; the longer side over the shorter is at least 1")
        if self.distance is not None and not 0 <= self.distance < 16:
            raise ValueError(f"distance is {self.distance}; choose 0 to 15 of the 64 bits")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}; a cosine in (0, 1] is needed")
        if all(getattr(self, f.name) in (0, (), None) for f in fields(self)):
            raise ValueError("no rule is set; the filter would keep every row")


def load_function(text: str) -> Judge:
    """The function FILE.py:NAME. Raises ``ValueError`` where there is none."""
    file, _, name = text.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise ValueError(f"{text!r} is not FILE.py:NAME of a file that exists")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


def language_of(text: str) -> str:
    """The likeliest language of a text, as an ISO 639-1 code."""
    try:
        import py3langid
    except ImportError as error:
        raise ValueError(f"languages of captions need py3langid: {install('data')}") from error
    return str(py3langid.classify(text)[0])


def difference_hash(image: PIL.Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is darker than its right neighbour, of the picture at 9 x 8 greys
    (Krawetz, "Kind of Like That", 2013)."""
    grey = np.asarray(image.convert("L").resize((9, 8), PIL.Image.Resampling.LANCZOS))
    return int(np.packbits(grey[:, :-1] < grey[:, 1:]).view(">u8")[0])


# ---- facts of each row ----------------------------------------------------------------------------------------------


def measure(
    source: RowSource,
    rules: Rules,
    folder: Path,
    *,
    features: Features | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Computes the facts of the blocks of process ``rank`` of ``world``; blocks that are there are kept. Raises
    ``ValueError`` for a folder that was made with other rules or of another data set."""
    if (rules.similarity is None) != (features is None):
        raise ValueError("similarity and an encoder go together: give both or none")
    _claim(folder, source, rules)
    judge = load_function(rules.function) if rules.function else None
    for block in range(rank, -(-len(source) // BLOCK), world):
        rows = range(block * BLOCK, min((block + 1) * BLOCK, len(source)))
        file = folder / "facts" / f"{block:06d}.npz"
        if not file.is_file():
            facts = _facts(source, rows, rules, judge, features, progress)
            data = io.BytesIO()
            np.savez_compressed(data, **facts)  # type: ignore[arg-type]  # an array may not be called allow_pickle
            disk.write_bytes(file, data.getvalue())
        else:
            progress(len(rows))


def _claim(folder: Path, source: RowSource, rules: Rules) -> None:
    settings = json.loads(json.dumps({"data_set": source.name, "rows": len(source), "rules": asdict(rules)}))
    file = folder / SETTINGS
    if file.is_file():
        there = {key: value for key, value in read_settings(folder).items() if key in settings}
        if there != settings:
            raise ValueError(f"{folder} was made for {there}, not for {settings}; name another folder")
        return
    disk.check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that `diptych data filter` did not write; name another folder")
    disk.write_text(file, json.dumps(settings, indent=1))


def read_settings(folder: Path) -> dict[str, Any]:
    """The rules, the data set and the counts of a filter. Raises ``ValueError`` for a folder that holds none."""
    try:
        settings = json.loads(read(folder / SETTINGS))
        if not {"data_set", "rows", "rules"} <= settings.keys():
            raise ValueError("it lacks the rules")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / SETTINGS} was not written by `diptych data filter`: {error}") from error
    return settings


def _facts(
    source: RowSource,
    rows: range,
    rules: Rules,
    judge: Judge | None,
    features: Features | None,
    progress: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Reason (empty: kept so far), id, digest, hash and features of each row."""
    reasons, ids = list[str](), list[str]()
    exact, similar = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
    vectors, waiting = list[np.ndarray](), list[PIL.Image.Image]()
    decoded = rules.distance is not None or bool(judge or features)
    for number, row in enumerate(rows):
        picture = None
        try:
            sample = source.row(row)
            data = {str(image.image): source.data(row, str(image.image)) for image in sample.images()}
            sizes = [image_size(file, name) for name, file in data.items()]
            if decoded:
                sample = decode(sample, source.where(row), partial(_picture, data))
        except ConnectionError:
            raise
        except (ValueError, OSError) as error:  # a training would skip it
            reasons.append(f"unreadable: {str(error)[:200]}")
            ids.append("")
        else:
            reasons.append(_reason(sample, sizes, rules, judge))
            ids.append(sample.id)
            if rules.exact and data:
                exact[number] = int.from_bytes(blake2b(b"".join(data.values()), digest_size=8).digest(), "big")
            picture = [image.pixels for image in sample.images()][-1] if decoded and data else None
            if rules.distance is not None and picture:
                similar[number] = difference_hash(picture)
        if features:
            waiting.append(picture or PIL.Image.new("RGB", (8, 8)))  # features of a row that is dropped: not compared
            if len(waiting) == BATCH or number == len(rows) - 1:
                values = features(iter(waiting))
                vectors.append((values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)).astype(np.float16))
                waiting.clear()
        progress(1)
    facts = {"reasons": np.array(reasons), "ids": np.array(ids), "exact": exact, "similar": similar}
    return facts | ({"features": np.concatenate(vectors)} if vectors else {})


def _picture(data: Mapping[str, bytes], name: str) -> PIL.Image.Image:
    return open_picture(data[name], name)


def _reason(sample: Sample, sizes: list[tuple[int, int]], rules: Rules, judge: Judge | None) -> str:
    """Why a row is dropped, beginning with the rule's name; empty where it is kept."""
    for shorter, longer in map(sorted, sizes):
        if shorter < rules.min_side:
            return f"min_side: {shorter} pixels"
        if rules.max_aspect and longer > rules.max_aspect * shorter:
            return f"max_aspect: {longer / shorter:.2f}"
    if rules.languages:
        text = " ".join(p.text for m in sample.messages for p in m.parts if isinstance(p, Text))
        if text.strip() and (language := language_of(text)) not in rules.languages:
            return f"languages: {language}"
    if judge and (verdict := judge(sample)) is not True:
        return f"function: {verdict or 'dropped'}"
    return ""


# ---- the kept rows --------------------------------------------------------------------------------------------------


def select(folder: Path) -> dict[str, Any]:
    """Drops duplicates among the rows that the rules keep, writes the list of kept rows and returns the counts. Raises
    ``ValueError`` where blocks lack."""
    settings = read_settings(folder)
    rules, blocks = Rules(**settings["rules"]), -(-settings["rows"] // BLOCK)
    files = [folder / "facts" / f"{block:06d}.npz" for block in range(blocks)]
    if lacking := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {len(lacking)} of {blocks} blocks, first {lacking[0]}; run their shares")
    loaded = [np.load(io.BytesIO(read(file))) for file in files]
    reasons = np.concatenate([facts["reasons"] for facts in loaded])
    kept, dropped = np.flatnonzero(reasons == ""), Counter(str(r).partition(":")[0] for r in reasons if r)
    if rules.exact:
        exact = np.concatenate([facts["exact"] for facts in loaded])[kept]
        kept, dropped["exact"] = _without(kept, _repeats(exact))
    if rules.distance is not None:
        similar = np.concatenate([facts["similar"] for facts in loaded])[kept]
        kept, dropped["distance"] = _without(kept, _close_hashes(similar, rules.distance))
    if rules.similarity is not None:
        vectors = torch.from_numpy(np.concatenate([facts["features"] for facts in loaded])[kept]).float()
        kept, dropped["similarity"] = _without(kept, _close_vectors(vectors, rules.similarity))
    ids = np.concatenate([facts["ids"] for facts in loaded])[kept]
    data = io.BytesIO()
    np.save(data, kept.astype(np.int64))
    disk.write_bytes(folder / KEPT, data.getvalue())
    disk.write_text(folder / IDS, "".join(f"{name}\n" for name in ids))
    counts = {"kept": len(kept), "dropped": {rule: n for rule, n in dropped.items() if n}}
    disk.write_text(folder / SETTINGS, json.dumps(settings | counts, indent=1))
    return settings | counts


def _without(kept: np.ndarray, repeated: np.ndarray) -> tuple[np.ndarray, int]:
    return kept[~repeated], int(repeated.sum())


def _repeats(values: np.ndarray) -> np.ndarray:
    """Where a value stands that stood before; 0 stands for none."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated & (values != 0)


def _close_hashes(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Where a 64-bit hash stands that differs in at most ``distance`` bits from a kept one before it. Two such hashes
    are equal in at least one of ``distance`` + 1 parts, so only hashes that share a part are compared."""
    repeated = _repeats(hashes)
    bounds = np.linspace(0, 64, distance + 2).astype(int).tolist()
    seen: list[dict[int, list[int]]] = [{} for _ in range(distance + 1)]
    for place in np.flatnonzero(~repeated):
        value = int(hashes[place])
        parts = [value >> low & ((1 << high - low) - 1) for low, high in zip(bounds, bounds[1:])]
        others = {other for table, part in zip(seen, parts) for other in table.get(part, ())}
        if value and any((value ^ other).bit_count() <= distance for other in others):
            repeated[place] = True
            continue
        for table, part in zip(seen, parts):
            table.setdefault(part, []).append(value)
    return repeated


def _close_vectors(vectors: torch.Tensor, similarity: float, block: int = 1024) -> np.ndarray:
    """Where a unit vector stands whose cosine with a kept one before it is at least ``similarity``. All pairs are
    compared."""
    repeated = torch.zeros(len(vectors), dtype=torch.bool)
    for start in range(0, len(vectors), block):
        some = vectors[start : start + block]
        for first in range(0, start, block):
            before = vectors[first : first + block][~repeated[first : first + block]]
            repeated[start : start + block] |= (some @ before.T >= similarity).any(1)
        close = some @ some.T >= similarity
        for place in range(len(some)):
            earlier = close[place, :place] & ~repeated[start : start + place]
            repeated[start + place] |= bool(earlier.any())
    return repeated.numpy()


def kept_rows(folder: Path, rows: int) -> np.ndarray:
    """The numbers of the kept rows of a data set of ``rows`` rows, mapped into memory. Raises ``ValueError`` where the
    list is missing or was made of other rows."""
    from diptych.machine.addresses import local_copy

    if not (folder / KEPT).is_file():
        raise ValueError(f"keep: {folder} holds no {KEPT}; write it with `diptych data filter`")
    settings = read_settings(folder)
    if settings["rows"] != rows:
        counts = f"{settings['rows']} rows, and the data set has {rows}"
        raise ValueError(f"keep: {folder} was made of {counts}; filter again")
    kept = np.load(local_copy(folder / KEPT), mmap_mode="r")
    if not len(kept):
        raise ValueError(f"keep: {folder} keeps no row")
    return kept
