"""Reads question files: VLMEvalKit's TSV and the files that benchmarks publish, one ``Question`` a row.

A file is a table (.tsv, .csv, .parquet), jsonl, or JSON: a list of rows, an object of rows by id, or an object that
holds them under "questions", "data" or "annotations". ``NAMES`` lists the columns that are read. Options are columns
A to I, choice_a to choice_d, or a list ("options", "choices"); an answer is a letter, "(A)", an option's text, or the
place of an option in the list, from 0. Pictures are base64, or files below the file's own folder and nowhere else.
"""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diptych.core.sample import Image, Text
from diptych.data.sources import inside
from diptych.evaluation import files
from diptych.machine.extras import install

LETTERS = "ABCDEFGHI"
NAMES = {
    "question": ("question", "text", "prompt", "query", "Question"),
    "answer": ("answer", "label", "answers", "gt_answer", "captions", "caption", "Correct Answer"),
    "image": ("image", "image_path", "filename", "imgname", "file_name", "imageId", "data_id", "image_id"),
    "id": ("index", "id", "question_id", "questionId", "key", "idx", "Index"),
    "options": ("options", "choices", "Options"),
    "category": ("category", "type", "question_type_id", "task"),
}
FIELDS = ("source", "subcategory", "set_id", "figure_id", "visual_input", "dataset", "dataset_name", "split")
PICTURES = (".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class Question:
    """A question of somebody's file. ``text`` may hold markers ``<image 1>`` that say where a picture goes."""

    id: str
    images: tuple[str, ...]  # paths or "data:" addresses
    text: str
    options: Mapping[str, str]  # letter -> text; empty for open questions
    answers: tuple[str, ...]  # one letter where there are options
    category: str
    group: str = ""  # the level above the category (MMBench's l2-category)
    fields: Mapping[str, str] = field(default_factory=dict)  # what a benchmark's own score needs, of ``FIELDS``


def read_questions(file: Path, ask: str | None = None) -> list[Question]:
    """The questions of a file; ``ask`` is the question of rows that have none (captions). Raises ``ValueError`` naming
    the row and what is wrong with it."""
    rows = [r for r in _rows(file) if str(r.get("data_type", "image")) == "image"]  # SEED-Bench asks about videos too
    if not rows:
        raise ValueError(f"{file} has no rows")
    reader = _Reader(file, rows)
    rows = [{"question": ask, **r} for r in rows] if ask else rows
    return [reader.question(row, f"{file} row {n}", n) for n, row in enumerate(rows, 1)]


def parts(text: str, images: Sequence[str]) -> list[Image | Text]:
    """The pictures and the text of a message: each picture at its marker ``<image N>``, the others before the text."""
    pieces = re.split(r"<image\s*(\d+)>", text)
    marked = {int(n) for n in pieces[1::2] if 0 < int(n) <= len(images)}
    content: list[Image | Text] = [Image(image) for n, image in enumerate(images, 1) if n not in marked]
    for place, piece in enumerate(pieces):
        if place % 2 and int(piece) in marked:
            content.append(Image(images[int(piece) - 1]))
        elif place % 2:
            content.append(Text(f"<image {piece}>"))
        elif piece.strip():
            content.append(Text(piece.strip() if marked else piece))
    return content


def _rows(file: Path) -> list[dict]:
    """The raw rows of a file of any of the formats."""
    raw: Any
    if file.suffix in (".tsv", ".csv"):
        raw = files.table(file)
    elif file.suffix == ".parquet":
        raw = read_parquet(file)
    elif file.suffix == ".json":
        try:
            raw = files.load(file)
        except ValueError:  # POPE's .json holds one object a line
            raw = files.rows(file)
    else:
        raw = files.rows(file)
    if isinstance(raw, dict):
        listed = next((raw[k] for k in ("questions", "data", "annotations") if isinstance(raw.get(k), list)), None)
        raw = [{"id": k, **v} for k, v in raw.items() if isinstance(v, dict)] if listed is None else listed
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{file} has no rows")
    if (wrong := next((r for r in raw if not isinstance(r, dict)), None)) is not None:
        raise ValueError(f"{file} holds {wrong!r}, which is no row")
    return _joined(file, raw)


def read_parquet(file: Path) -> list[dict]:
    """The rows of a parquet file, its pictures {"bytes", "path"} as "data:" addresses. Raises ``ValueError`` without
    pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"parquet needs pyarrow: {install('data')}") from error
    rows: list[dict] = pyarrow.parquet.read_table(file).to_pylist()
    return [{k: _data(v) for k, v in row.items()} for row in rows]


def _data(value: Any) -> Any:
    """A picture of a parquet row as a "data:" address; anything else as it is."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return "data:image/unknown;base64," + base64.b64encode(value["bytes"]).decode()
    return value


def _joined(file: Path, rows: list[dict]) -> list[dict]:
    """VQAv2's questions with the answers of the annotation file beside them, and the reverse."""
    if all(any(k in rows[0] for k in NAMES[name]) for name in ("question", "answer")) or "question_id" not in rows[0]:
        return rows
    for other in sorted(file.parent.glob("*.json")):
        if other == file:
            continue
        raw = files.load(other)
        listed = next((raw[k] for k in ("questions", "annotations") if isinstance(raw, dict) and k in raw), None)
        known = {r["question_id"]: r for r in listed or () if isinstance(r, dict) and "question_id" in r}
        if all(r["question_id"] in known for r in rows):
            return [{**known[r["question_id"]], **r} for r in rows]
    return rows


@dataclass(frozen=True)
class _Reader:
    """Makes questions of the rows of one file."""

    file: Path
    rows: list[dict]

    @cached_property
    def stored(self) -> dict[str, Any]:
        """Pictures in base64 by the row's index: MMBench's rotations name the row whose picture they show."""
        return {str(r.get("index", "")): r["image"] for r in self.rows if len(str(r.get("image") or "")) > 64}

    @cached_property
    def by_place(self) -> bool:
        """Whether answers are places in the list of options (AI2D): all are whole numbers in range, and not all are
        also the text of an option."""
        texts = True
        for row in self.rows:
            options, answer = _listed(_first(row, "options", "")), str(_first(row, "answer", ""))
            if not options or not answer.isdigit() or int(answer) >= len(options):
                return False
            texts = texts and answer in map(str, options)
        return not texts

    @cached_property
    def places(self) -> dict[str, Path]:
        """Picture files below the folder by name, by name without suffix, and by the number of COCO's names."""
        files_by_name: dict[str, Path] = {}
        for path in sorted(self.file.parent.glob("**/*")):
            if path.suffix.lower() in PICTURES:
                number = re.search(r"(\d{12})$", path.stem)
                for name in (path.name, path.stem, *([str(int(number[1]))] if number else [])):
                    files_by_name.setdefault(name, path)
        return files_by_name

    def question(self, row: Mapping, where: str, number: int) -> Question:
        """The question of a row."""
        if "conversations" in row:
            row = {**row, **_conversation(row, where)}
        text = str(files.field(row, NAMES["question"], where))
        options = self._options(row)
        answers = [self._answer(a, where) for a in _listed(files.field(row, NAMES["answer"], where, object))]
        if not options and len(answers) == 1 and answers[0].strip("()") in tuple(LETTERS):
            text, options = _options_in(text)
        hint = str(row.get("hint") or "").strip()
        if hint and hint != "nan":
            text = f"{hint}\n{text}"
        id = _identity(row) or str(_first(row, "id", number))
        category = str(_first(row, "category", "all"))
        if subject := re.fullmatch(r"(?:dev|validation|test)_(.+)_\d+", id):  # MMMU
            category = subject[1]
        for each in (id, text, category, *options.values(), *answers):
            files.writable(each, where)
        return Question(
            id,
            tuple(self._images(row, where)),
            text.replace("<image>", "").strip(),
            options,
            (self._letter(answers, options),) if options else tuple(answers),
            category,
            str(row.get("l2-category") or ""),
            {k: str(row[k]) for k in FIELDS if row.get(k) is not None},
        )

    def _options(self, row: Mapping) -> dict[str, str]:
        """The options by letter, of columns or of a list."""
        lettered = {k: row.get(k, row.get(f"choice_{k.lower()}")) for k in LETTERS}
        options = {k: str(v) for k, v in lettered.items() if v is not None and str(v).strip() not in ("", "nan")}
        listed = _first(row, "options", "")
        if options or not listed:
            return options
        if isinstance(listed, Mapping):
            return {str(k): str(v) for k, v in listed.items()}
        if isinstance(listed, str) and (inline := re.findall(r"\(([a-z])\)\s*([^(]+)", listed)):  # MMVP
            return {k.upper(): v.strip() for k, v in inline}
        return dict(zip(LETTERS, map(str, _listed(listed)), strict=False))

    def _answer(self, raw: Any, where: str) -> str:
        """An answer's text; of an annotator's object its "answer" (VQAv2)."""
        if isinstance(raw, Mapping):
            return str(files.field(raw, ("answer", "text", "caption"), f"{where}: an answer"))
        return str(raw)

    def _letter(self, answers: Sequence[str], options: Mapping[str, str]) -> str:
        """The letter of the right option: the answer itself, "(a)", its place from 0, or its text. An answer that is
        none comes back as it is, and ``questions.py`` refuses it."""
        if len(answers) != 1:
            return ", ".join(answers)
        answer = answers[0].strip()
        if self.by_place:
            return list(options)[int(answer)]
        if (bare := answer.strip("() .").upper()) in options:
            return bare
        same = [k for k, v in options.items() if v.strip() == answer]
        return same[0] if len(same) == 1 else answer

    def _images(self, row: Mapping, where: str) -> Iterable[str]:
        """The row's pictures: image_1 to image_7 (MMMU), or one or more under a name of ``NAMES``."""
        numbered = [row[k] for k in (f"image_{n}" for n in range(1, 10)) if row.get(k)]
        shown: Any = _first(row, "image", "")
        if str(row.get("visual_input", "1")) == "0":  # HallusionBench asks some questions without a picture
            return []
        if not numbered and not shown and "Index" in row:  # MMVP numbers its pictures like its questions
            shown = f"{row['Index']}.jpg"
        given = numbered or _listed(self.stored.get(str(shown), shown))
        return [self._image(_data(value), where) for value in given]

    def _image(self, value: Any, where: str) -> str:
        """A "data:" address or the path of a picture below the file's folder."""
        text, root = str(value), self.file.parent
        if text.startswith("data:"):
            return text
        if len(text) > 1024:
            files.decoded(text[:64], f"{where}: the picture")
            return "data:image/unknown;base64," + text
        try:
            path = inside(root, text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if path.is_file():
            return str(root / text)
        if (known := self.places.get(text) or self.places.get(Path(text).name)) is not None:
            inside(root, str(known.relative_to(root)))  # a link may lead out
            return str(known)
        if len(text) <= 64:
            raise ValueError(f"{where}: there is no picture {str(root / text)!r}")
        files.decoded(text[:64], f"{where}: the picture")
        return "data:image/unknown;base64," + text


def _first(row: Mapping, name: str, default: Any) -> Any:
    """What the row has under the first name of a kind that it fills."""
    return next((row[k] for k in NAMES[name] if row.get(k) is not None and str(row[k]) not in ("", "nan")), default)


def _listed(value: Any) -> list:
    """The value as a list; a text that is one ("['a', 'b']") is read."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    return list(value) if isinstance(value, (list, tuple)) else [value] if value != "" else []


def _conversation(row: Mapping, where: str) -> dict[str, str]:
    """Question and answer of LLaVA's two turns."""
    turns = [files.field(turn, ("value",), where) for turn in files.field(row, ("conversations",), where, list)]
    if len(turns) != 2:
        raise ValueError(f"{where} has {len(turns)} turns; one question and its answer are read")
    return {"question": turns[0], "answer": turns[1]}


def _identity(row: Mapping) -> str:
    """The id of a HallusionBench row, which is five columns together; "" for other files."""
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return "_".join(str(row[k]) for k in keys) if all(row.get(k) is not None for k in keys) else ""


def _options_in(text: str) -> tuple[str, dict[str, str]]:
    """A text without the lines "A. red" … of its options, and the options (RealWorldQA); none where it has not two."""
    lines = list(re.finditer(r"(?m)^\s*\(?([A-I])[.):]\s+(.+?)\s*$", text))
    options = {m[1]: m[2] for m in lines}
    if len(options) < 2 or "".join(options) != LETTERS[: len(options)]:
        return text, {}
    return f"{text[: lines[0].start()].rstrip()}", options
