"""Edits that a vision-language judge scores: GEdit-Bench (arXiv 2504.17761) and ImgEdit-Bench (arXiv 2505.20275).

Layouts, scales and aggregation are theirs. What the judge is told is in our words unless the user brings the official
texts (``--rubrics FOLDER`` with gedit_sc.txt, gedit_pq.txt, imgedit_TYPE.txt), and the score says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.core.sample import Image, Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.judged_drawing import UNREAD
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades, macro, weighted

# --- GEdit ------------------------------------------------------------------------------------------------------------

SC = """Two pictures are shown: first the source, then the source after an edit. The instruction was:
{instruction}

Give two marks from 0 to 10.
The first: how well was the instruction followed? 0 not at all, 10 perfectly.
The second: how well was everything preserved that the instruction does not touch? 0 another scene, 10 just as it was.

Reply with one line of JSON and nothing else: {"score": [FIRST, SECOND], "reasoning": "WHY, briefly"}"""
PQ = """The picture was made by a machine. Give two marks from 0 to 10.
The first: how natural does it look (distances, shadows, light, sense)? 0 not at all, 10 like a real picture.
The second: how free of artifacts is it (distortions, seams, blur, odd parts)? 0 full of them, 10 none.

Reply with one line of JSON and nothing else: {"score": [FIRST, SECOND], "reasoning": "WHY, briefly"}"""
SUBSETS = ("full", "intersection")


def read_gedit(file: Path) -> list[dict]:
    """GEdit's rows (key, task, language, instruction, image, intersection) of a jsonl, whose input_image is a path or
    "data:" address, or of the published parquet. Raises ``ValueError`` naming the row."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError('parquet needs pyarrow: pip install "diptych[data]"') from error
        raw = pyarrow.parquet.read_table(file).to_pylist()
    else:
        raw = files.rows(file)
    rows = []
    for n, row in enumerate(raw, 1):
        where = f"{file} row {n}"
        image = files.field(row, ("input_image_raw", "input_image", "image"), where, object)
        if isinstance(image, dict):
            import base64

            data = files.field(image, ("bytes",), f"{where}: the image", bytes)
            image = "data:image/unknown;base64," + base64.b64encode(data).decode()
        task = files.field(row, ("task_type",), where)
        if task not in aggregate.GEDIT:
            raise ValueError(f"{where}: the task is {task!r}; GEdit has {', '.join(aggregate.GEDIT)}")
        language = files.field(row, ("instruction_language",), where)
        if language not in ("en", "cn"):
            raise ValueError(f"{where}: the language is {language!r}; choose from en, cn")
        rows.append(
            {
                "key": files.field(row, ("key",), where),
                "task": task,
                "language": language,
                "instruction": files.field(row, ("instruction",), where),
                "image": str(image) if str(image).startswith("data:") else str(file.parent / str(image)),
                "intersection": files.field(row, ("Intersection_exist",), where, bool),
            }
        )
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def overall(sc: float, pq: float) -> float:
    """A sample's overall mark of 0 to 10."""
    return sqrt(sc * pq)


def _gedit(file: Path, tools: Tools) -> Benchmark:
    judge, rows = tools.need_judge("gedit"), read_gedit(file)
    followed, looks, judged = tools.rubric("gedit_sc", SC), tools.rubric("gedit_pq", PQ), tools.judged("gedit")

    def items(seed: int, size: int) -> list[Item]:
        found = []
        for r in rows:
            key = f"gedit/{r['task']}/{r['language']}/{r['key']}"
            sample = Sample(key, (user(Image(r["image"], "condition"), r["instruction"]),))
            place = f"fullset/{r['task']}/{r['language']}/{r['key']}.png"
            reference = {k: r[k] for k in ("key", "task", "language", "intersection")}
            found.append(
                Item(key, "gedit", r["task"], r["instruction"], sample, seed_of(seed, key), key, reference, place)
            )
        return found

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        source = _source(item)
        edited = _as_large(image, source)
        marks = []
        for text, shown in ((followed, [source, edited]), (looks, [edited])):
            asked = text.replace("{instruction}", item.prompt)
            if (found := judge.read(lambda r: replies.marks(r, 0, 10), asked, shown)) is None:
                return Verdict(False, UNREAD, {"SC": 0.0, "PQ": 0.0}, 0.0, True)
            marks.append(min(found))
        value = overall(*marks)
        told = f"instruction and rest {marks[0]:g}, looks {marks[1]:g}"
        return Verdict(value >= 5, told, {"SC": marks[0], "PQ": marks[1]}, value)

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for language in ("en", "cn"):
            for subset in SUBSETS:
                of = [
                    o
                    for o in outcomes
                    if o.item.reference["language"] == language
                    and (subset == "full" or o.item.reference["intersection"])
                ]
                if not of:
                    continue
                stamp, groups = f"gedit_{language}@{subset}{judged}", by_category(of)
                for part in ("O", "SC", "PQ"):
                    units = {
                        k: (
                            [(o.verdict.grade if part == "O" else o.verdict.parts.get(part, 0.0)) / 10 for o in some],
                            [o.item.cluster for o in some],
                        )
                        for k, some in groups.items()
                    }
                    found[f"{stamp}/{part}"] = macro(units, graded=True).times(10)
                found |= {f"{stamp}/O/{k}": grades(some, (0, 10)) for k, some in groups.items()}
        return found

    rubric = {"rubric": [followed, looks]}
    return Benchmark("gedit", "draw", items, judge.of(work), scores, scorer=judge.stamp | rubric, macro=True, layout=write_edits)  # fmt: skip  # noqa: E501


# --- ImgEdit ----------------------------------------------------------------------------------------------------------

_WHAT = {
    "add": "the thing added is the one asked for, in the place and with the looks asked for",
    "adjust": "the attribute named is changed as asked, on the thing named",
    "extract": "exactly the thing named is cut out, whole, and nothing else is left",
    "replace": "the thing named is replaced by the one asked for",
    "remove": "the thing named is gone, with its shadows and reflections",
    "background": "the background is the one asked for",
    "style": "the whole picture has the style asked for",
    "compose": "each of the several changes asked for is done",
    "action": "the person or animal does what was asked, and is the same one",
}
_KEPT = {
    "extract": "the thing cut out looks just as in the source",
    "style": "what is where, and who it is, can be recognised",
    "background": "the things in front are just as they were",
}
IMGEDIT_RUBRIC = """Two pictures are shown: first the source, then the source after an edit of the kind "{kind}". The
instruction was:
{instruction}

Give three marks from 1 (worst) to 5 (best). No later mark may be above the first.
Compliance: {what}.
Quality: the edit fits in seamlessly (edges, light, perspective) and nothing is distorted.
Preservation: {kept}.

Reply with exactly three lines:
Compliance: MARK
Quality: MARK
Preservation: MARK"""
_TYPES = {"remove": "remove", "motion_change": "action", "action": "action", "hybrid": "compose"}


def read_imgedit(file: Path) -> list[dict]:
    """ImgEdit's rows (key, type, instruction, image) of its JSON: {key: {"id": PATH, "prompt", "edit_type"}}. Paths are
    relative to the file. Raises ``ValueError`` naming the entry."""
    raw = files.load(file)
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{file} is not an object of edits by key")
    rows = []
    for key, row in raw.items():
        where = f"{file} entry {key!r}"
        kind = files.field(row, ("edit_type",), where).lower()
        kind = _TYPES.get(kind, kind)
        if kind not in aggregate.IMGEDIT:
            raise ValueError(f"{where}: the type is {row['edit_type']!r}; ImgEdit has {', '.join(aggregate.IMGEDIT)}")
        image = str(file.parent / files.field(row, ("id", "image"), where))
        text = files.field(row, ("prompt",), where)
        rows.append({"key": str(key), "type": kind, "instruction": text, "image": image})
    return rows


def _imgedit(file: Path, tools: Tools) -> Benchmark:
    judge, rows = tools.need_judge("imgedit"), read_imgedit(file)
    stamp, scale = f"imgedit@basic{tools.judged('imgedit')}", (1.0, 5.0)
    kept = "everything that the instruction does not touch is just as it was"
    ours = {k: IMGEDIT_RUBRIC.replace("{what}", v).replace("{kept}", _KEPT.get(k, kept)) for k, v in _WHAT.items()}
    rubrics = {k: tools.rubric(f"imgedit_{k}", ours[k]) for k in aggregate.IMGEDIT}

    def items(seed: int, size: int) -> list[Item]:
        found = []
        for r in rows:
            key = f"imgedit/{r['type']}/{r['key']}"
            sample = Sample(key, (user(Image(r["image"], "condition"), r["instruction"]),))
            found.append(Item(key, "imgedit", r["type"], r["instruction"], sample, seed_of(seed, key), key,
                              {"key": r["key"], "type": r["type"]}, f"{r['key']}.png"))  # fmt: skip
        return found

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        kind = item.reference["type"]
        text = rubrics[kind].replace("{kind}", kind).replace("{instruction}", item.prompt)
        marks = judge.read(lambda r: replies.named_marks(r, 3, 1, 5), text, [_source(item), image])
        if marks is None:
            return Verdict(False, UNREAD, {}, scale[0], True)
        value = round(sum(marks.values()) / 3, 2)
        return Verdict(value >= 3, ", ".join(f"{k} {v:g}" for k, v in marks.items()), marks, value)

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        groups = by_category(outcomes)
        found = {f"{stamp}/{k}": grades(of, scale) for k, of in groups.items()}
        if set(groups) == set(aggregate.IMGEDIT):
            found = {f"{stamp}/overall": weighted(groups, dict.fromkeys(groups, 1 / len(groups)), scale)} | found
        return found

    return Benchmark(
        "imgedit", "draw", items, judge.of(work), scores, scorer=judge.stamp | {"rubric": rubrics}, worst=scale[0],
        macro=True, layout=write_edits,
    )  # fmt: skip


def _source(item: Item) -> PIL.Image.Image:
    return files.picture(next(item.sample.images()).image)


def _as_large(image: PIL.Image.Image, source: PIL.Image.Image) -> PIL.Image.Image:
    return image if image.size == source.size else image.resize(source.size, PIL.Image.Resampling.BICUBIC)


def write_edits(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Every edited picture at its place, at the size of its source, and for GEdit the source beside it."""
    for o in outcomes:
        image, path = o.image, folder / o.item.place
        if image is None:
            continue
        source = _source(o.item)
        if o.item.benchmark == "gedit":
            files.save(source, path.with_name(f"{path.stem}_SRCIMG.png"))
            image = _as_large(image, source)
        files.save(image, path)


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """The benchmark of that name with the user's file."""
    assert file is not None
    made: Any = {"gedit": _gedit, "imgedit": _imgedit}
    return made[name](file, tools)
