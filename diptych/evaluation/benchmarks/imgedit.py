"""ImgEdit-Bench, basic suite (arXiv 2505.20275): edits of nine types, three marks of 1 to 5 by a judge.

An edit's grade is the mean of the three marks, rounded to two digits as the published script does; the overall score is
the mean of the nine types' means, which papers print and the script does not. The judge and its instructions are ours
unless the user brings others (``--rubrics`` with imgedit_TYPE.txt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import PIL.Image

from diptych.core.sample import Image, Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.drawing import UNREAD
from diptych.evaluation.benchmarks.edits import source_of, source_path, write_edits
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades, weighted

WHAT = {
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
KEPT = {
    "extract": "the thing cut out looks just as in the source",
    "style": "what is where, and who it is, can be recognised",
    "background": "the things in front are just as they were",
}
RUBRIC = """Two pictures are shown: first the source, then the source after an edit of the kind "{kind}". The
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
UNTOUCHED = "everything that the instruction does not touch is just as it was"
TYPES = {"motion_change": "action", "hybrid": "compose", "alter": "adjust"}  # names of other published revisions
SCALE = (1.0, 5.0)


def read_imgedit(file: Path) -> list[dict]:
    """ImgEdit's rows (key, type, instruction, image) of its JSON: {key: {"id": PATH, "prompt", "edit_type"}}. Paths are
    below the file's folder. Raises ``ValueError`` naming the entry."""
    raw = files.load(file)
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{file} is not an object of edits by key")
    rows = []
    for key, row in raw.items():
        where = f"{file} entry {key!r}"
        kind = files.field(row, ("edit_type",), where).lower()
        kind = TYPES.get(kind, kind)
        if kind not in aggregate.IMGEDIT:
            raise ValueError(f"{where}: the type is {row['edit_type']!r}; ImgEdit has {', '.join(aggregate.IMGEDIT)}")
        image = source_path(files.field(row, ("id", "image"), where), file.parent, where)
        text = files.field(row, ("prompt",), where)
        rows.append({"key": str(key), "type": kind, "instruction": text, "image": image})
    return rows


def rubrics_of(tools: Tools) -> dict[str, str]:
    """The judge's instructions for each type of edit."""
    ours = {k: RUBRIC.replace("{what}", v).replace("{kept}", KEPT.get(k, UNTOUCHED)) for k, v in WHAT.items()}
    return {k: tools.rubric(f"imgedit_{k}", ours[k]) for k in aggregate.IMGEDIT}


def imgedit_items(rows: Sequence[dict], seed: int, size: int) -> list[Item]:
    """One edit an entry, KEY.png in the official folder."""
    items = []
    for r in rows:
        key = f"imgedit/{r['type']}/{r['key']}"
        sample = Sample(key, (user(Image(r["image"], "condition"), r["instruction"]),))
        reference = {"key": r["key"], "type": r["type"]}
        items.append(
            Item(
                key,
                "imgedit",
                r["type"],
                r["instruction"],
                sample,
                seed_of(seed, key),
                key,
                reference,
                f"{r['key']}.png",
            )
        )
    return items


def judge_imgedit(judge: Judge, rubrics: Mapping[str, str], item: Item, image: PIL.Image.Image) -> Verdict:
    """The mean of three marks of source and edit."""
    kind = item.reference["type"]
    text = rubrics[kind].replace("{kind}", kind).replace("{instruction}", item.prompt)
    marks = judge.read(lambda r: replies.named_marks(r, 3, 1, 5), text, [source_of(item), image])
    if marks is None:
        return Verdict(False, UNREAD, {}, SCALE[0], True)
    value = round(sum(marks.values()) / 3, 2)
    return Verdict(value >= 3, ", ".join(f"{k} {v:g}" for k, v in marks.items()), marks, value)


def imgedit_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Each type, and the mean of the nine where all are there."""
    groups = by_category(outcomes)
    scores = {f"{stamp}/{k}": grades(group, SCALE) for k, group in groups.items()}
    if set(groups) == set(aggregate.IMGEDIT):
        scores = {f"{stamp}/overall": weighted(groups, dict.fromkeys(groups, 1 / len(groups)), SCALE)} | scores
    return scores


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """ImgEdit-Bench with the user's JSON."""
    assert file is not None
    judge, rows, rubrics = tools.need_judge(name), read_imgedit(file), rubrics_of(tools)
    return Benchmark(
        name,
        "draw",
        partial(imgedit_items, rows),
        judge.of(partial(judge_imgedit, judge, rubrics)),
        partial(imgedit_scores, f"imgedit@basic{tools.judged(name)}"),
        scorer=judge.stamp | {"rubric": rubrics},
        worst=SCALE[0],
        macro=True,
        layout=write_edits,
    )
