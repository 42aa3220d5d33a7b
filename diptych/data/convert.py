"""Conversion of other projects' training data: LLaVA, ShareGPT4V, InternVL, BAGEL, OmniGen2 and Cheers.

A format is a function from a file to rows. A row is a sample whose pictures are paths (the files stay where they are)
or bytes (they are written to a new folder). Where the original trainer picks one of several captions at random, a hash
of the row's id picks it here."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from diptych.core.sample import (
    Image,
    Message,
    Part,
    Sample,
    Speaker,
    Text,
    assistant,
    check_text,
    sample_from_json,
    sample_to_json,
    user,
)
from diptych.data.mixture import bits
from diptych.data.parquet import pyarrow
from diptych.data.sources import find_files
from diptych.machine.disk import atomic, write_bytes

SPEAKERS: dict[str, Speaker] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class ConvertedRow(NamedTuple):
    """A sample, and the pictures that its file holds as bytes, by the names that the sample uses."""

    sample: Sample
    pictures: Mapping[str, bytes]


Made = ConvertedRow | str  # or why a row cannot be used


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a .json list or of a .jsonl file."""
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{file} must hold a list of rows")
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(rows))
        return
    with file.open("rb") as lines:  # as bytes: only a line feed ends a row, and one that is no text spoils no other
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    yield f"{file}:{number}", ValueError(f"not JSON: {error}")


def _turns(row: Any, marker: str, role: Callable[[str, str], Any]) -> tuple[Message, ...]:
    """The messages of ``conversations``, with the row's pictures at its markers (a regular expression), in order.

    ``role(marker, speaker)`` is what a picture is for. An answer is kept to the byte. Where the user's turns already
    place every picture, a marker in an answer is text. Around a marker one line break belongs to it, and a user's text
    has no white space at its ends, as in LLaVA's preprocessing. Raises ``ValueError`` for a row that cannot be used.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise ValueError("it has no 'conversations'")
    if row.get("video"):
        raise ValueError("it shows a video")
    given = row.get("image") or []
    if not isinstance(given, str | list):
        raise ValueError(f"'image' is {given!r}, not a path or a list of paths")
    pictures = [given] if isinstance(given, str) else given
    turns = [_turn(turn, number) for number, turn in enumerate(row["conversations"])]
    placed = sum(len(re.findall(marker, text)) for speaker, text in turns if speaker != "assistant")
    left, messages = iter(pictures), []
    for speaker, text in turns:
        literal = speaker == "assistant" and placed == len(pictures)
        parts: list[Part] = []
        for piece in [text] if literal else re.split(f"(\n?(?:{marker})\n?)", text):
            if not literal and (place := re.fullmatch(f"\n?({marker})\n?", piece)):
                if (picture := next(left, None)) is None:
                    raise ValueError(f"it has {len(pictures)} pictures and more places for them")
                if not isinstance(picture, str):
                    raise ValueError(f"a picture is {picture!r}, not a path")
                parts.append(Image(picture, role(place.group(1), speaker)))
            elif speaker == "assistant" and piece:
                parts.append(Text(check_text(piece), loss=True))
            elif piece.strip():
                parts.append(Text(check_text(piece.strip())))
        if not parts:
            raise ValueError(f"a turn of the {speaker} is empty")
        messages.append(Message(speaker, tuple(parts)))
    if unused := len(list(left)):
        raise ValueError(f"{unused} of its {len(pictures)} pictures have no place in the conversation")
    return tuple(messages)


def _turn(turn: Any, number: int) -> tuple[Speaker, str]:
    """(speaker, text) of a turn of ``conversations``. Raises ``ValueError``."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {turn!r}, not an object")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in SPEAKERS:
        raise ValueError(f"turn {number} is from {speaker!r}; known: {', '.join(SPEAKERS)}")
    if not isinstance(text, str):
        raise ValueError(f"the text of turn {number} is {text!r}")
    return SPEAKERS[speaker], text


def llava(file: Path) -> Iterator[Made]:
    """LLaVA's json or jsonl (also InternVL's, and BAGEL's ``vlm_sft``): ``image``, ``conversations``, ``<image>``."""
    yield from _each(file, lambda row: _turns(row, "<image>", lambda marker, speaker: "understand"))


def cheers(file: Path) -> Iterator[Made]:
    """Cheers' jsonl (arXiv 2603.12793, data loader of the published code). ``<im_start><image><im_end>`` marks a
    picture to read, ``<im_start><image_gen><im_end>`` one to generate. In a row with both, the former is the edit
    source."""

    def turns(row: Any) -> tuple[Message, ...]:
        draws = "<image_gen>" in json.dumps(row)
        if isinstance(row.get("image"), str):
            row = row | {"image": [name.strip() for name in re.split("[,;]", row["image"])]}
        return _turns(
            row,
            r"<im_start><image(?:_gen)?><im_end>",
            lambda marker, _: "target" if "_gen" in marker else "condition" if draws else "understand",
        )

    yield from _each(file, turns)


def omnigen2(file: Path) -> Iterator[Made]:
    """OmniGen2's jsonl: ``instruction``, ``output_image`` and, for edits and in-context pictures, ``input_images``."""

    def turns(row: Any) -> tuple[Message, ...]:
        if lacks := [k for k in ("instruction", "output_image") if not isinstance(row.get(k), str)]:
            raise ValueError(f"it lacks {', '.join(lacks)}")
        sources = row.get("input_images") or []
        sources = [sources] if isinstance(sources, str) else sources
        if not (isinstance(sources, list) and all(isinstance(source, str) for source in sources)):
            raise ValueError(f"'input_images' is {sources!r}, not a list of paths")
        asked = user(*(Image(s, "condition") for s in sources), row["instruction"])
        return asked, assistant(Image(row["output_image"], "target"))

    yield from _each(file, turns)


def _each(file: Path, turns: Callable[[Any], tuple[Message, ...]]) -> Iterator[Made]:
    for where, row in _json_rows(file):
        try:
            if isinstance(row, Exception):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"it is {row!r}, not an object")
            messages = turns(row)
            name = row.get("id")
            yield ConvertedRow(
                Sample(f"{file.stem}/{where.rpartition(':')[2] if name is None else name}", messages), {}
            )
        except ValueError as error:
            yield f"{where}: {error}"


def bagel_t2i(file: Path) -> Iterator[Made]:
    """BAGEL's ``t2i`` parquet: ``image`` bytes and ``captions``, JSON of captions by name. Every visit of a training
    draws one."""
    for where, cells in _parquet_rows(file, ("image", "captions")):
        try:
            captions, data = cells["captions"], _picture_bytes(cells["image"])
            captions = json.loads(captions) if isinstance(captions, str | bytes) else captions
            captions = list(captions.values()) if isinstance(captions, dict) else captions
            texts = [t for t in captions if isinstance(t, str)] if isinstance(captions, list) else []
            if not texts:
                raise ValueError("it has no captions")
            name = where.replace(":row ", "-")
            caption = texts[bits(name, "caption") % len(texts)]
            picture = f"{Path(name).name}.{_suffix(data)}"
            info = {"wordings": {"0": texts}} if len(texts) > 1 else {}
            sample = Sample(Path(name).name, (user(caption), assistant(Image(picture, "target"))), info)
            yield ConvertedRow(sample, {picture: data})
        except ValueError as error:
            yield f"{where}: {error}"


def bagel_edit(file: Path) -> Iterator[Made]:
    """BAGEL's ``unified_edit`` parquet: ``image_list`` (bytes) and ``instruction_list`` (wordings of each
    edit). A chain of edits, each of the previous picture; every visit of a training draws wordings and a part of it."""
    for where, cells in _parquet_rows(file, ("image_list", "instruction_list")):
        try:
            images = [_picture_bytes(held) for held in cells["image_list"] or ()]
            wordings = [[some] if isinstance(some, str) else some for some in cells["instruction_list"] or ()]
            if not all(isinstance(words, list) and words and isinstance(words[0], str) for words in wordings):
                raise ValueError("an edit has no instruction")
            if len(images) != len(wordings) + 1:
                raise ValueError(f"{len(images)} pictures do not fit {len(wordings)} instructions")
            name = Path(where.replace(":row ", "-")).name
            names = [f"{name}-{k}.{_suffix(data)}" for k, data in enumerate(images)]
            messages: list[Message] = []
            for k, words in enumerate(wordings):
                instruction = words[bits(name, "wording", k) % len(words)]
                source = (Image(names[0], "condition"),) if k == 0 else ()
                messages += [user(*source, instruction), assistant(Image(names[k + 1], "target"))]
            info = {"chain": True, "wordings": {str(2 * k): words for k, words in enumerate(wordings)}}
            yield ConvertedRow(Sample(name, tuple(messages), info), dict(zip(names, images, strict=True)))
        except ValueError as error:
            yield f"{where}: {error}"


def _parquet_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    pq, errors = pyarrow()
    try:
        with pq.ParquetFile(file) as opened:
            if lacks := [c for c in columns if c not in opened.schema_arrow.names]:
                raise ValueError(f"{file} lacks columns {lacks}; it has {', '.join(opened.schema_arrow.names)}")
            number = 0
            for batch in opened.iter_batches(64, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:row {number}", row
    except errors as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _picture_bytes(held: Any) -> bytes:
    """The bytes of a picture, as they are or in {bytes, path}. Raises ``ValueError``."""
    data = held.get("bytes") if isinstance(held, dict) else held
    if not isinstance(data, bytes):
        raise ValueError(f"a picture is {type(data).__name__}, not bytes")
    return data


def _suffix(data: bytes) -> str:
    heads = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
    return next((suffix for head, suffix in heads.items() if data.startswith(head)), "png")


def llava_onevision(file: Path) -> Iterator[Made]:
    """LLaVA-OneVision's parquet: ``id``, ``image`` (bytes) and ``conversations`` with ``<image>``."""
    for where, cells in _parquet_rows(file, ("id", "image", "conversations")):
        try:
            pictures = {}
            if cells["image"] is not None:
                data = _picture_bytes(cells["image"])
                pictures = {f"{Path(where.replace(':row ', '-')).name}.{_suffix(data)}": data}
            turns = _turns(cells | {"image": list(pictures)}, "<image>", lambda marker, speaker: "understand")
            yield ConvertedRow(Sample(f"{file.stem}/{cells['id']}", turns), pictures)
        except ValueError as error:
            yield f"{where}: {error}"


def internvl(file: Path) -> Iterator[Made]:
    """InternVL's meta file: data set -> ``annotation``, a jsonl file of LLaVA's rows, and ``root``, the folder of its
    pictures; both relative to the meta file. ``repeat_time`` belongs into the recipe's weights and is not applied."""
    try:
        sets = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(sets, dict):
        raise ValueError(f"{file} must map names of data sets to their settings")
    for name, settings in sets.items():
        if not (isinstance(settings, dict) and isinstance(settings.get("annotation"), str)):
            raise ValueError(f"{file}: data set {name!r} names no annotation file")
        annotation, root = file.parent / settings["annotation"], str(settings.get("root") or "")
        if not annotation.is_file():
            raise ValueError(f"{file}: data set {name!r}: {annotation} does not exist")
        for row in llava(annotation):
            if isinstance(row, str):
                yield row
                continue
            inside = row.sample.map_images(lambda i, root=root: replace(i, image=str(Path(root) / str(i.image))))
            yield ConvertedRow(replace(inside, id=f"{name}/{row.sample.id.rpartition('/')[2]}"), {})


FORMATS: dict[str, tuple[Callable[[Path], Iterator[Made]], tuple[str, ...]]] = {
    "llava": (llava, (".json", ".jsonl")),
    "sharegpt4v": (llava, (".json", ".jsonl")),
    "llava-onevision": (llava_onevision, (".parquet",)),
    "internvl": (internvl, (".json",)),
    "bagel-t2i": (bagel_t2i, (".parquet",)),
    "bagel-edit": (bagel_edit, (".parquet",)),
    "bagel-sft": (llava, (".jsonl",)),
    "omnigen2": (omnigen2, (".jsonl",)),
    "cheers": (cheers, (".jsonl",)),
}


@dataclass
class Converted:
    """Counts of rows and pictures that ``convert`` wrote, and the reasons of rows that it skipped."""

    rows: int = 0
    pictures: int = 0
    skipped: list[str] = field(default_factory=list)


def convert(
    format: str,
    source: Path,
    out: Path,
    images: Path | None = None,
    force: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Converted:
    """Converts the rows of a file, a folder or a pattern to the jsonl file ``out``. Rows that cannot be used are
    skipped and listed with file, line and reason. A repeated id gets a number (LLaVA repeats ids). Process ``rank`` of
    ``world`` converts every ``world``-th file.

    Pictures held as bytes are written to the folder ``OUT-images`` (``out`` without .jsonl); paths become relative to
    ``images``, the image folder of the future catalog. An existing file is overwritten only with ``force``.
    Raises ``ValueError`` for unknown formats, unreadable files, and files in the way."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
    read, suffixes = FORMATS[format]
    if out.exists() and not force:
        raise ValueError(f"{out} is there; --force overwrites it")
    done, folder, seen = Converted(), out.with_name(f"{out.stem}-images"), Counter[str]()
    with atomic(out) as part, part.open("w", encoding="utf-8") as file:
        for path in find_files(source, suffixes)[rank::world]:
            for row in read(path):
                if isinstance(row, str):
                    done.skipped.append(row)
                    continue
                try:
                    sample = row.sample.map_images(lambda i: _relative(i, images)) if images else row.sample
                    seen[name := sample.id] += 1
                    cells = sample_to_json(replace(sample, id=name if seen[name] == 1 else f"{name}#{seen[name]}"))
                    sample_from_json(cells)  # raises where a catalog would refuse it
                    line = json.dumps(cells, ensure_ascii=False).encode()
                except ValueError as error:
                    done.skipped.append(f"{path}: {row.sample.id}: {error}")
                    continue
                for name, data in row.pictures.items():
                    _write_picture(folder / name, data, force)
                file.write(line.decode() + "\n")
                done.rows += 1
                done.pictures += sum(1 for _ in sample.images())
    return done


def _write_picture(path: Path, data: bytes, force: bool) -> None:
    """Writes a picture of a row. Raises ``ValueError`` where another file of that name is there."""
    if path.exists() and not force and path.read_bytes() != data:
        raise ValueError(f"{path} is there with other content; --force overwrites it")
    write_bytes(path, data)


def _relative(image: Image, root: Path) -> Image:
    path = Path(str(image.image))
    if not path.is_absolute():
        return image
    if not path.is_relative_to(root.absolute()):
        raise ValueError(f"picture {str(path)!r} lies outside {str(root)!r}")
    return Image(path.relative_to(root.absolute()).as_posix(), image.role, image.size, image.nearest)
