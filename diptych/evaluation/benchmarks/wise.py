"""WISE (arXiv 2503.07265): prompts that need knowledge, judged against an explanation. Two protocols of one name:

``wise``           the paper's: three marks of 0 to 2, categories by prompt id, weights by their prompts
``wise-verified``  the revised set: one mark of 0 or 1, weights 0.4 for culture and 0.12 for the other five
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.drawing import UNREAD, picture_item, write_flat
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades, weighted

LEGACY = """A picture was drawn for this prompt: "{prompt}"
What it should show, and why: {explanation}

Give three marks, each 0, 1 or 2, and be strict.
Consistency: does the picture show what the explanation says it should? 0 not at all, 1 in part, 2 fully.
Realism: is it physically plausible and accurate in its details? 0 no, 1 with flaws, 2 yes.
Aesthetic Quality: 0 poor, 1 fair, 2 good.

Reply with exactly three lines:
Consistency: MARK
Realism: MARK
Aesthetic Quality: MARK"""
BINARY = """A picture was drawn for this prompt: "{prompt}"
What it should show, and why: {explanation}

Does the picture show what the explanation says it should? Reply with exactly one line, 1 for yes and 0 for no:
Score: MARK"""
MARKS = {False: ("Consistency", "Realism", "Aesthetic Quality"), True: ("Score",)}  # by whether it is verified
MERGED = "merge.json"  # a published folder holds all prompts again in this file
REWRITTEN = "_rewrite"  # and rewritten prompts of the same ids in files of these names


def read_wise(path: Path) -> list[dict]:
    """The rows (id, prompt, explanation, category) of WISE's JSON, of a file or a published folder: its ``merge.json``,
    else its parts, without the ``*_rewrite.json`` of other prompts. Raises ``ValueError`` naming the row, and for two
    prompts of one id."""
    chosen = [path]
    if path.is_dir():
        every = sorted(f for f in path.glob("*.json") if not f.stem.endswith(REWRITTEN))
        chosen = [f for f in every if f.name == MERGED] or every
    rows: dict[int, dict] = {}
    for file in chosen:
        raw = files.load(file)
        if not isinstance(raw, list):
            raise ValueError(f"{file} is not a list of prompts")
        for n, row in enumerate(raw, 1):
            read = _row(row, f"{file} row {n}")
            if rows.setdefault(read["id"], read) != read:
                raise ValueError(f"{file} row {n}: another prompt of the id {read['id']} is in {path}")
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return sorted(rows.values(), key=lambda row: row["id"])


def _row(row: Any, where: str) -> dict:
    return {
        "id": files.field(row, ("prompt_id",), where, int),
        "prompt": files.field(row, ("Prompt", "prompt"), where),
        "explanation": files.field(row, ("Explanation", "explanation"), where),
        "category": f"{row.get('Category', '')} {row.get('Subcategory', '')}".lower(),
    }


def wise_category(row: Mapping, verified: bool) -> str:
    """One of the six categories: by id, as the legacy script has it; the verified set has culture by id and says the
    rest. Raises ``ValueError`` for a prompt of none."""
    if not verified:
        for name, last in aggregate.WISE_IDS.items():
            if 1 <= row["id"] <= last:
                return name
    elif 1 <= row["id"] <= aggregate.WISE_IDS["culture"]:
        return "culture"
    else:
        names = {"time": "time", "spac": "space", "biol": "biology", "physic": "physics", "chemi": "chemistry"}
        categories = {name for part, name in names.items() if part in row["category"]}
        if len(categories) == 1:
            return categories.pop()
    raise ValueError(f"WISE prompt {row['id']} ({row['category']!r}) is of no category of {', '.join(aggregate.WISE)}")


def wise_items(name: str, rows: Sequence[dict], verified: bool, seed: int, size: int) -> list[Item]:
    """One picture a prompt, ID.png in the official folder."""
    return [
        picture_item(name, wise_category(r, verified), str(r["id"]), r["prompt"], seed, r, f"{r['id']}.png")
        for r in rows
    ]


def judge_wise(judge: Judge, rubric: str, verified: bool, item: Item, image: PIL.Image.Image) -> Verdict:
    """WiScore of three marks, or the one mark. A reply without them is asked for again, and then fails."""
    text = rubric.replace("{prompt}", item.prompt).replace("{explanation}", item.reference["explanation"])
    marks = judge.read(lambda r: replies.named_marks(r, MARKS[verified], 0, 1 if verified else 2), text, [image])
    if marks is None:
        return Verdict(False, UNREAD, failed=True, value=0.0)
    value = marks["score"] if verified else aggregate.wiscore(*marks.values())
    return Verdict(value >= 0.5, ", ".join(f"{k} {v:g}" for k, v in marks.items()), marks, value)


def wise_scores(stamp: str, weights: Mapping[str, float], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Each category, and their weighted mean where all six are there."""
    groups = by_category(outcomes)
    scores = {f"{stamp}/{k}": grades(group) for k, group in groups.items()}
    return ({f"{stamp}/overall": weighted(groups, weights)} if set(groups) == set(weights) else {}) | scores


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """WISE with the user's file or folder; ``wise-verified`` is the revised protocol."""
    assert file is not None
    verified = name == "wise-verified"
    judge, rows = tools.need_judge(name), read_wise(file)
    rubric = tools.rubric(name, BINARY if verified else LEGACY)
    stamp = f"wise@{'verified' if verified else 'legacy'}{tools.judged(name)}"
    weights = aggregate.VERIFIED if verified else aggregate.WISE
    return Benchmark(
        name,
        "draw",
        partial(wise_items, name, rows, verified),
        judge.of(partial(judge_wise, judge, rubric, verified)),
        partial(wise_scores, stamp, weights),
        scorer=judge.stamp | {"rubric": rubric},
        macro=True,
        layout=write_flat,
    )
