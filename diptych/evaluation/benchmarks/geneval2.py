"""GenEval 2 (github.com/facebookresearch/GenEval2): soft TIFA, a judge's probability of the right answer to each of a
prompt's questions; a picture's grade is their arithmetic mean (AM) or geometric mean (GM).

The published script reads the whole softmax of one model; a judge behind an OpenAI-compatible server gives its 20
likeliest first tokens, and is asked in our words unless the user brings others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from math import exp, prod
from pathlib import Path

import PIL.Image

from diptych.evaluation import files
from diptych.evaluation.benchmarks.drawing import picture_item, write_flat
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import official
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades, macro
from diptych.machine import disk

ASK = "{question}\nAnswer with one word only."
LIKELIEST = 20  # first tokens


def probability(first: Sequence[tuple[str, float]], answer: str) -> float:
    """How likely a judge's reply begins with the answer: the mass of the first tokens that are it, numbers as words or
    digits, or the beginning of an answer of several words or tokens."""
    true = official.evalai(answer)
    total = 0.0
    for token, logprob in first:
        word = official.evalai(token)
        if word and (word == true or (len(word) > 1 and true.startswith(word))):
            total += exp(logprob)
    return min(1.0, total)


def read_geneval2(file: Path) -> list[dict]:
    """Its rows (prompt, vqa_list of [question, answer], and where the file has them skills, atom_count). Raises
    ``ValueError`` naming the line."""
    rows = files.rows(file)
    for n, row in enumerate(rows, 1):
        where = f"{file} line {n}"
        files.field(row, ("prompt",), where)
        asked = files.field(row, ("vqa_list",), where, list)
        if not asked or not all(isinstance(p, list) and len(p) == 2 for p in asked):
            raise ValueError(f"{where}: vqa_list must be a list of [question, answer], not {asked!r}")
        skills = row.get("skills")
        if skills is not None and (not isinstance(skills, list) or len(skills) != len(asked)):
            raise ValueError(f"{where}: skills must name one of each of the {len(asked)} questions, not {skills!r}")
    return rows


def geneval2_items(rows: Sequence[dict], seed: int, size: int) -> list[Item]:
    """One picture a prompt, numbered from 0."""
    items = []
    for i, row in enumerate(rows):
        reference = {k: row[k] for k in ("vqa_list", "skills", "atom_count") if row.get(k) is not None}
        category = str(row.get("category", "all"))
        items.append(picture_item("geneval2", category, f"{i:05d}", row["prompt"], seed, reference, f"{i:05d}.png"))
    return items


def judge_geneval2(judge: Judge, ask: str, item: Item, image: PIL.Image.Image) -> Verdict:
    """The arithmetic mean of the probabilities; the parts are the geometric mean and each question's probability."""
    asked = item.reference["vqa_list"]
    likely = [
        probability(judge.ask(ask.replace("{question}", q), [image], logprobs=LIKELIEST, max_tokens=4).first, a)
        for q, a in asked
    ]
    wrong = [q for (q, _), p in zip(asked, likely, strict=True) if p < 0.5]
    parts = {"gm": prod(likely) ** (1 / len(likely))} | {str(i): p for i, p in enumerate(likely)}
    return Verdict(not wrong, "; ".join(wrong), parts, sum(likely) / len(likely))


def geneval2_scores(judged: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Both means of all; AM also by category, by skill over the questions of that skill, and by the number of atoms."""
    am, gm = (f"geneval2@soft-tifa-{mean}{judged}" for mean in ("am", "gm"))
    scores = {f"{am}/overall": grades(outcomes).times(100)}
    scores |= {f"{am}/{k}": grades(group).times(100) for k, group in by_category(outcomes).items() if k != "all"}
    skills: dict[str, tuple[list[float], list[str]]] = {}
    atoms: dict[str, list[Outcome]] = {}
    for o in outcomes:
        for i, skill in enumerate(o.item.reference.get("skills", ())):
            values, clusters = skills.setdefault(str(skill), ([], []))
            values.append(o.verdict.parts.get(str(i), 0.0))
            clusters.append(o.item.cluster)
        if "atom_count" in o.item.reference:
            atoms.setdefault(str(o.item.reference["atom_count"]), []).append(o)
    scores |= {f"{am}/skill/{k}": macro({k: unit}, graded=True).times(100) for k, unit in sorted(skills.items())}
    scores |= {f"{am}/atoms/{k}": grades(group).times(100) for k, group in sorted(atoms.items())}
    whole = {"": ([o.verdict.parts.get("gm", 0.0) for o in outcomes], [o.item.cluster for o in outcomes])}
    return scores | {f"{gm}/overall": macro(whole, graded=True).times(100)}


def write_images(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The flat folder, and ``images.json`` of prompt and file as the published script reads it."""
    write_flat(folder, outcomes)
    places = {o.item.prompt: o.item.place for o in outcomes if o.picture}
    disk.write_text(folder / "images.json", json.dumps(places))


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """GenEval 2 with the user's jsonl."""
    assert file is not None
    judge, rows = tools.need_judge(name), read_geneval2(file)
    ask, judged = tools.rubric(name, ASK), tools.judged(name)
    return Benchmark(
        name,
        "draw",
        partial(geneval2_items, rows),
        judge.of(partial(judge_geneval2, judge, ask)),
        partial(geneval2_scores, judged),
        scorer=judge.stamp | {"ask": ask},
        layout=write_images,
    )
