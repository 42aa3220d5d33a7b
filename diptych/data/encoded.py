"""What frozen encoders make of pictures, computed once: ``precompute`` writes it, ``Encoded`` reads it.

A folder is one data set: webdataset shards and ``encoded.json``, which names the encoders by digests of their weights
and settings. A member group is a sample: its row (``.json``), what the encoders made of its pictures
(``.safetensors``, named ``<picture>.<encoder>``), and the pictures whose pixels the family still asks for
(``.<picture>.png``). Shard k holds rows k S .. (k + 1) S - 1 of the data set, so shards are made by any number of
processes and a killed run goes on.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.data import Dataset

from diptych.core.sample import Image, Sample, sample_to_json
from diptych.core.tensors import Tensor
from diptych.data.index import load as load_index
from diptych.data.index import write as index_files
from diptych.data.mixture import Source
from diptych.data.reading import read
from diptych.data.sources import Tar, find_files, scan_tar, webdataset
from diptych.data.workers import read_ahead
from diptych.machine.addresses import size_of
from diptych.machine.disk import atomic, check_folder, write_text

INDEX = "encoded.json"
PLACES = "rows.index"
WINDOW = 64  # samples in memory at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Family(Protocol):
    """What is asked of a model here: a ``Trainable`` has it."""

    @property
    def family(self) -> str:
        """The name of the family."""

    @property
    def encoders(self) -> Mapping[str, Any]:
        """The frozen encoders by name."""

    @property
    def device(self) -> torch.device:
        """The device that encoders run on."""

    def lay_out(self, sample: Sample) -> Any:
        """The sample as segments."""

    def encode(self, encoder: str, images: Tensor) -> Tensor:
        """The outputs of an encoder, (N, ...), for N inputs of one shape."""

    def digest(self, encoder: str) -> str:
        """A hash of the encoder's weights and settings; empty where the weights are unknown."""


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """A data set whose pictures carry what frozen encoders made of them (``Image.encoded``)."""

    name: str
    tar: Tar
    digests: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.tar)

    @property
    def shard_ends(self) -> np.ndarray:
        """The number of rows up to the end of each shard."""
        return self.tar.shard_ends

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no row {index}; it has {len(self)}")
        where = self.tar.where(index)
        encodings: dict[str, dict[str, Tensor]] = {}
        try:
            for name, tensor in load(self.tar.member(index, "safetensors")).items():
                picture, _, encoder = name.partition(".")
                encodings.setdefault(picture, {})[encoder] = tensor
        except SafetensorError as error:
            raise ValueError(f"{where}: member .safetensors is damaged: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

        def filled(image: Image) -> Image:
            picture, _, kept = str(image.image).partition(".")
            pixels = self.tar.picture(index, str(image.image)) if kept else None
            return replace(image, image=pixels, encoded=encodings.get(picture, {}))

        return self.tar.row(index).map_images(filled)


def there(folder: Path) -> bool:
    """Whether a folder holds an encoded data set."""
    return (folder / INDEX).is_file()


def encoded(name: str, folder: Path, origin: Mapping[str, Any]) -> Encoded:
    """The data set that ``precompute`` wrote into ``folder``. Raises ``ValueError`` when shards lack, and when its
    pictures were made otherwise than ``origin`` says."""
    index = _read(folder / INDEX)
    if index["origin"] != dict(origin):
        raise ValueError(f"{folder} was encoded from {index['origin']}, not from {dict(origin)}; encode it again")
    shards = [shard_name(k) for k in range(-(-index["rows"] // index["shard"]))]
    files = find_files(folder / "*.tar", (".tar",))
    if lacking := sorted(set(shards) - {file.name for file in files}):
        raise ValueError(
            f"{folder} lacks {len(lacking)} of {len(shards)} shards ({lacking[0]} ...); encode it to its end"
        )
    places = load_index(folder / PLACES, files, {}) if (folder / PLACES).is_file() else None
    return Encoded(name, webdataset(name, folder / "*.tar", index=places), index["digests"])


def write_index(folder: Path, processes: int = 1, progress: Callable[[int], None] = lambda files: None) -> int:
    """Writes where every row of an encoded data set is, which ``encoded`` then need not scan; returns the number of
    rows."""
    files = find_files(folder / "*.tar", (".tar",))
    return index_files(folder / PLACES, files, scan_tar, {}, processes=processes, progress=progress)


def refuse_stale(sources: Mapping[str, Any], digest: Callable[[str], str]) -> None:
    """Raises ``ValueError`` for a data set that another encoder made than the one that ``digest(name)`` describes (an
    empty one describes none)."""
    for name, source in sources.items():
        source = _inner(source)
        for encoder, stored in source.digests.items() if isinstance(source, Encoded) else ():
            if stored != (now := digest(encoder)) and now:
                raise ValueError(
                    f"data set {name!r} was encoded by another {encoder!r} (digest {stored}) than this model's (digest "
                    f"{now}): its weights or settings changed. Encode it again (diptych data precompute)"
                )


def encoders_of(sources: Mapping[str, Any]) -> set[str]:
    """The names of all encoders whose outputs some of the data sets hold."""
    inner = map(_inner, sources.values())
    return {encoder for s in inner if isinstance(s, Encoded) for encoder in s.digests}


def _inner(source: Any) -> Any:
    """What a source is made from, if it is made from another."""
    while not isinstance(source, Encoded) and hasattr(source, "source"):
        source = source.source
    return source


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Image):
    """A picture that records the inputs of the encoders that ``lay_out`` asks for, by encoder."""

    shown: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def through(self, encoder: str, see: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Records the encoder's input and returns it, with False: no encoding is stored."""
        self.shown[encoder] = see()
        return self.shown[encoder], False


class _Watch(Dataset):
    """Row -> (sample, {encoder: its input} for each picture), or the error that makes the row unreadable."""

    def __init__(self, source: Source, lay_out: Callable[[Sample], Any]) -> None:
        self.source, self.lay_out = source, lay_out

    def __getitem__(self, index: int) -> tuple[Sample, list[dict[str, Tensor]]] | str:
        try:
            sample = self.source[index]
        except (ValueError, OSError) as error:  # what sources raise for rows and pictures that cannot be read
            return str(error)
        watched = sample.map_images(
            lambda i: Watched(**{f.name: getattr(i, f.name) for f in fields(Image) if f.name != "encoded"})
        )
        self.lay_out(watched)
        return sample, [i.shown for i in watched.images()]  # type: ignore[attr-defined]


def precompute(
    source: Source,
    model: Family,
    folder: Path,
    *,
    origin: Mapping[str, Any],
    encoders: Sequence[str] | None = None,
    dtype: str | None = None,
    batch: int = 16,
    shard: int = 1000,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Encodes a data set into ``folder`` and returns what this process did: rows, pictures, bytes, skipped (by row).

    ``encoders``  which of the family's (default: all); a picture goes through those that its layout names
    ``dtype``     what floating outputs are kept in (default: as they come)
    ``batch``     pictures of one shape that are encoded together
    ``shard``     rows of a shard; shards that are there are kept
    ``origin``    what else decided the pictures, compared when the folder is read
    ``rank``      of ``world`` processes, which share the shards

    Raises ``ValueError`` for unknown encoders, for a folder that something else was encoded into, and for one that
    holds shards of others."""
    names = list(model.encoders) if encoders is None else list(encoders)
    if unknown := sorted(set(names) - set(model.encoders)):
        raise ValueError(f"unknown encoders {unknown}; {model.family} has: {', '.join(model.encoders) or 'none'}")
    if not names:
        raise ValueError(f"{model.family} has no frozen encoder whose outputs could be kept")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    index = {
        "name": source.name,
        "family": model.family,
        "origin": dict(origin),
        "rows": len(source),
        "shard": shard,
        "dtype": dtype,
        "digests": {name: model.digest(name) for name in names},
    }
    _claim(folder, index)
    done: dict[str, Any] = {"rows": 0, "pictures": 0, "bytes": 0, "skipped": {}}
    for k in range(rank, -(-len(source) // shard), world):
        rows = range(k * shard, min((k + 1) * shard, len(source)))
        if (folder / shard_name(k)).is_file():
            progress(len(rows))
            continue
        watched = _Watch(source, model.lay_out)
        with written(folder / shard_name(k)) as tar, read_ahead(watched, workers, sampler=rows) as seen:
            for at in range(rows.start, rows.stop, WINDOW):
                window, good = range(at, min(at + WINDOW, rows.stop)), {}
                for number in window:
                    if isinstance(error := next(seen), str):
                        done["skipped"][f"{source.name}/{number}"] = error
                    else:
                        good[number] = error
                encodings = _encode(model, {i: shown for i, (_, shown) in good.items()}, set(names), dtype, batch)
                for number, (sample, _) in good.items():
                    done["pictures"] += sum(map(bool, encodings[number]))
                    _add(tar, f"{number:09d}", sample, encodings[number], model.lay_out)
                done["rows"] += len(good)
                progress(len(window))
        done["bytes"] += size_of(folder / shard_name(k))
    return done


def _claim(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes the index of the folder. Raises ``ValueError`` where the folder has another one, and where it holds shards
    but no index: ``precompute`` did not write them, and would take them for its own."""
    check_folder(folder)
    shards = sorted(file.name for file in folder.glob("*.tar")) if folder.is_dir() else []
    if there(folder):
        other = _read(folder / INDEX)
        if changed := ", ".join(f"{k} was {other.get(k)} and is {v}" for k, v in index.items() if other.get(k) != v):
            raise ValueError(f"{folder} holds something else ({changed}); name another folder")
        return
    if shards:
        raise ValueError(
            f"{folder} holds {shards[0]}, which `diptych data precompute` did not write; name another folder"
        )
    write_text(folder / INDEX, json.dumps(index, indent=1))


@torch.inference_mode()
def _encode(
    model: Family, shown: Mapping[int, list[dict[str, Tensor]]], names: set[str], dtype: str | None, batch: int
) -> dict[int, list[dict[str, Tensor]]]:
    """row -> [encoder -> its output] for each picture; pictures of one shape go together."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for row, pictures in shown.items():
        for number, inputs in enumerate(pictures):
            for encoder in inputs.keys() & names:
                groups.setdefault((encoder, inputs[encoder].shape, inputs[encoder].dtype), []).append((row, number))
    encodings: dict[int, list[dict[str, Tensor]]] = {row: [{} for _ in pictures] for row, pictures in shown.items()}
    for (encoder, *_), places in sorted(groups.items(), key=str):
        for at in range(0, len(places), batch):
            some = places[at : at + batch]
            out = model.encode(encoder, torch.stack([shown[r][n][encoder] for r, n in some]).to(model.device)).cpu()
            for (row, number), tensor in zip(some, out, strict=True):
                kept = DTYPES[dtype] if dtype and tensor.is_floating_point() else tensor.dtype
                encodings[row][number][encoder] = tensor.to(kept).clone()
    return encodings


def _add(
    tar: tarfile.TarFile, key: str, sample: Sample, encoded: list[dict[str, Tensor]], lay_out: Callable[[Sample], Any]
) -> None:
    """Writes a sample; pixels go where laying out does without them."""
    encodings = iter(encoded)
    filled = [replace(image, encoded=next(encodings)) for image in sample.images()]
    bare = [replace(i, image=None, size=i.pixels.size) if i.encoded else i for i in filled]
    if not _lays_out(sample, bare, lay_out):
        for n, image in enumerate(filled):  # one by one
            if not _lays_out(sample, [*bare[:n], bare[n], *filled[n + 1 :]], lay_out):
                bare[n] = image
    tensors = {f"{n}.{encoder}": t for n, i in enumerate(filled) for encoder, t in i.encoded.items()}
    members = {"safetensors": save({k: t.contiguous() for k, t in tensors.items()})}
    named = []
    for n, image in enumerate(bare):
        named.append(replace(image, image=f"{n}.png" if image.image else str(n), encoded={}))
        if image.image:
            file = io.BytesIO()
            image.pixels.save(file, "PNG", compress_level=1)
            members[f"{n}.png"] = file.getvalue()
    numbered = iter(named)
    row = sample_to_json(sample.map_images(lambda _: next(numbered)))
    for extension, data in {"json": json.dumps(row).encode(), **members}.items():
        add_member(tar, f"{key}.{extension}", data)


def _lays_out(sample: Sample, images: list[Image], lay_out: Callable[[Sample], Any]) -> bool:
    numbered = iter(images)
    try:
        lay_out(sample.map_images(lambda _: next(numbered)))
    except ValueError:  # Image.pixels raises it where there are none
        return False
    return True


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of a shard; without times and owners, so that equal content is equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@contextmanager
def written(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file that appears whole or not at all."""
    with atomic(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        yield tar


def _read(path: Path) -> dict[str, Any]:
    """The index of an encoded data set. Raises ``ValueError`` for any other file."""
    try:
        index = json.loads(read(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(index, dict) or not {"origin", "rows", "shard", "digests"} <= index.keys():
        raise ValueError(f"{path} was not written by `diptych data precompute`; name another folder")
    return index


def shard_name(number: int) -> str:
    """The file name of a shard of an encoded data set."""
    return f"{number:06d}.tar"
