"""GEdit-Bench (arXiv 2504.17761): edits of pictures in eleven groups, English and Chinese, judged as VIEScore.

A judge gives marks of 0 to 10 for how the instruction was followed (SC, the lower of two) and how the picture looks
(PQ, the lower of two); a sample's overall mark is sqrt(SC * PQ), and a score is the mean over groups of their means.
The judge and its instructions are ours unless the user brings others (``--rubrics`` with gedit_sc.txt, gedit_pq.txt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path

import PIL.Image

from diptych.core.sample import Image, Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.drawing import UNREAD
from diptych.evaluation.benchmarks.edits import as_large, source_of, source_path, write_edits
from diptych.evaluation.benchmarks.question_files import read_parquet
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades, macro

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
    """GEdit's rows (key, task, language, instruction, image, intersection) of a jsonl, whose input_image is a path
    below its folder or a "data:" address, or of the published parquet. Raises ``ValueError`` naming the row."""
    raw = read_parquet(file) if file.suffix == ".parquet" else files.rows(file)
    rows = [_row(row, f"{file} row {n}", file.parent) for n, row in enumerate(raw, 1)]
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _row(row: Mapping, where: str, root: Path) -> dict:
    """A row of GEdit, checked."""
    task = files.field(row, ("task_type",), where)
    if task not in aggregate.GEDIT:
        raise ValueError(f"{where}: the task is {task!r}; GEdit has {', '.join(aggregate.GEDIT)}")
    language = files.field(row, ("instruction_language",), where)
    if language not in ("en", "cn"):
        raise ValueError(f"{where}: the language is {language!r}; choose from en, cn")
    return {
        "key": files.field(row, ("key",), where),
        "task": task,
        "language": language,
        "instruction": files.field(row, ("instruction",), where),
        "image": source_path(files.field(row, ("input_image_raw", "input_image", "image"), where), root, where),
        "intersection": files.field(row, ("Intersection_exist",), where, bool),
    }


def overall(sc: float, pq: float) -> float:
    """A sample's overall mark of 0 to 10."""
    return sqrt(sc * pq)


def gedit_items(rows: Sequence[dict], seed: int, size: int) -> list[Item]:
    """One edit a row, at fullset/TASK/LANGUAGE/KEY.png in the official folder."""
    items = []
    for r in rows:
        key = f"gedit/{r['task']}/{r['language']}/{r['key']}"
        sample = Sample(key, (user(Image(r["image"], "condition"), r["instruction"]),))
        place = f"fullset/{r['task']}/{r['language']}/{r['key']}.png"
        reference = {k: r[k] for k in ("key", "task", "language", "intersection")}
        items.append(Item(key, "gedit", r["task"], r["instruction"], sample, seed_of(seed, key), key, reference, place))
    return items


def judge_gedit(judge: Judge, followed: str, looks: str, item: Item, image: PIL.Image.Image) -> Verdict:
    """The overall mark of two judgements: of source and edit with the instruction, and of the edit alone."""
    source = source_of(item)
    edited = as_large(image, source)
    marks = []
    for rubric, shown in ((followed, [source, edited]), (looks, [edited])):
        text = rubric.replace("{instruction}", item.prompt)
        if (read := judge.read(lambda r: replies.marks(r, 0, 10), text, shown)) is None:
            return Verdict(False, UNREAD, {"SC": 0.0, "PQ": 0.0}, 0.0, True)
        marks.append(min(read))
    value = overall(*marks)
    reason = f"instruction and rest {marks[0]:g}, looks {marks[1]:g}"
    return Verdict(value >= 5, reason, {"SC": marks[0], "PQ": marks[1]}, value)


def gedit_scores(judged: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """O, SC and PQ of each language and subset, means of the groups' means; O also by group."""
    scores: dict[str, Score] = {}
    for language in ("en", "cn"):
        for subset in SUBSETS:
            some = [
                o
                for o in outcomes
                if o.item.reference["language"] == language and (subset == "full" or o.item.reference["intersection"])
            ]
            if not some:
                continue
            stamp, groups = f"gedit_{language}@{subset}{judged}", by_category(some)
            for mark in ("O", "SC", "PQ"):
                units = {k: ([_mark(o, mark) / 10 for o in g], [o.item.cluster for o in g]) for k, g in groups.items()}
                scores[f"{stamp}/{mark}"] = macro(units, graded=True).times(10)
            scores |= {f"{stamp}/O/{k}": grades(group, (0, 10)) for k, group in groups.items()}
    return scores


def _mark(outcome: Outcome, name: str) -> float:
    return outcome.verdict.grade if name == "O" else outcome.verdict.parts.get(name, 0.0)


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """GEdit-Bench with the user's jsonl or parquet."""
    assert file is not None
    judge, rows = tools.need_judge(name), read_gedit(file)
    followed, looks = tools.rubric("gedit_sc", SC), tools.rubric("gedit_pq", PQ)
    return Benchmark(
        name,
        "draw",
        partial(gedit_items, rows),
        judge.of(partial(judge_gedit, judge, followed, looks)),
        partial(gedit_scores, tools.judged(name)),
        scorer=judge.stamp | {"rubric": [followed, looks]},
        macro=True,
        layout=write_edits,
    )
