"""DPG-Bench (ELLA, arXiv 2403.05135): dense prompts, and a tree of yes-or-no questions about each picture.

A question counts only where those that it depends on are answered with yes. A picture's grade is the share of its
questions that count, a prompt's the mean of its pictures, and the score 100 times the mean over prompts. The published
``compute_dpg_bench.py`` takes its category scores from the answers before that inheritance, of each prompt's last
picture alone; so do these. The judge is anyone's, so no score here is the published one: ``dpg@ours[JUDGE]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL.Image

from diptych.evaluation import files
from diptych.evaluation.benchmarks.drawing import UNREAD, picture_item
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.remote import tiled
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, grades, ratio
from diptych.machine import disk

ASK = "{question}\nAnswer with yes or no only."
PICTURES = 4  # of each prompt, tiled two by two in the official folder


@dataclass(frozen=True)
class Proposition:
    """A question of a dense prompt. ``category`` is of level 1 ("attribute"), ``detail`` of level 2 ("attribute -
    color"), "" where the file has none."""

    id: int
    question: str
    parents: tuple[int, ...]
    category: str
    detail: str = ""


def read_dpg(file: Path) -> dict[str, tuple[str, list[Proposition]]]:
    """{item: (prompt, its questions in order)} of a ``dpg_bench.csv``. Raises ``ValueError`` naming the line."""
    prompts: dict[str, tuple[str, list[Proposition]]] = {}
    for n, row in enumerate(files.table(file), 2):
        where = f"{file} line {n}"
        if row.get("proposition_id") == "proposition_id":  # a second header line
            continue
        item, number = files.field(row, ("item_id",), where), files.field(row, ("proposition_id",), where, int)
        dependency = (row.get("dependency") or "0").split(",")
        if not all(p.strip().isdigit() for p in dependency):
            raise ValueError(f"{where}: dependency is {row['dependency']!r}, not proposition ids with commas")
        question = files.field(row, ("question_natural_language", "question"), where)
        parents = tuple(int(p) for p in dependency if int(p))
        prompts.setdefault(item, (files.field(row, ("text", "prompt"), where), []))[1].append(
            Proposition(number, question, parents, *_categories(row, where))
        )
    if not prompts:
        raise ValueError(f"{file} has no rows")
    return prompts


def _categories(row: Mapping, where: str) -> tuple[str, str]:
    """The categories of levels 1 and 2: of the tuple "entity - whole (cat)" as the official script has it, else of the
    columns category_broad and category_detailed."""
    if both := (row.get("tuple") or "").partition("(")[0].strip().lower():
        return both.partition("-")[0].strip(), both
    broad = files.field(row, ("category_broad", "category"), where).strip().lower()
    detailed = (row.get("category_detailed") or "").strip().lower()
    return broad, f"{broad} - {detailed}" if detailed else ""


def dependent(answers: Mapping[int, bool], propositions: Sequence[Proposition]) -> dict[int, bool]:
    """The answers with every one set to no whose parent is no, in the order of ids, so that a no is inherited."""
    out = dict(answers)
    for p in sorted(propositions, key=lambda p: p.id):
        if not all(out.get(parent, True) for parent in p.parents):
            out[p.id] = False
    return out


def dpg_items(rows: Mapping[str, tuple[str, list[Proposition]]], n: int, seed: int, size: int) -> list[Item]:
    """``n`` pictures of each prompt; four lie in one tiled file of the official folder."""
    items = []
    for picture in range(n):
        for key, (prompt, asked) in rows.items():
            place = {1: f"{key}.png", 4: f"{key}.png#{picture}"}.get(n, f"{key}-{picture}.png")
            questions = [[p.id, p.question, list(p.parents), p.category, p.detail] for p in asked]
            items.append(picture_item("dpg", "all", key, prompt, seed, {"questions": questions}, place, picture))
    return items


def _asked(item: Item) -> list[Proposition]:
    return [Proposition(i, q, tuple(parents), *names) for i, q, parents, *names in item.reference["questions"]]


def judge_dpg(judge: Judge, ask: str, item: Item, image: PIL.Image.Image) -> Verdict:
    """The share of a picture's questions that count. A reply that cannot be read is a no to its question alone; the
    verdict has failed where none can be read."""
    asked = _asked(item)
    read = {p.id: judge.read(replies.yes_no, ask.replace("{question}", p.question), [image]) for p in asked}
    answers = {id: bool(answer) for id, answer in read.items()}
    counts = dependent(answers, asked)
    parts: dict[str, float] = {}
    for p in asked:
        for name in filter(None, (p.category, p.detail)):
            parts[f"{name}/yes"] = parts.get(f"{name}/yes", 0.0) + answers[p.id]
    unread = [p.question for p in asked if read[p.id] is None]
    wrong = "; ".join(p.question for p in asked if not counts[p.id])
    reason = f"{UNREAD}: {'; '.join(unread)}" if unread else wrong and f"no: {wrong}"
    return Verdict(not wrong, reason, parts, sum(counts.values()) / len(asked), len(unread) == len(asked))


def dpg_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The overall score of all pictures, and the categories of both levels of each prompt's last picture."""
    scores = {f"{stamp}/overall": grades(outcomes).times(100)}
    last = list({o.item.cluster: o for o in sorted(outcomes, key=lambda o: int(o.item.id.rpartition("/")[2]))}.values())
    clusters = [o.item.cluster for o in last]
    for level in ("category", "detail"):
        names = [[getattr(p, level) for p in _asked(o.item)] for o in last]
        for name in sorted({n for some in names for n in some if n}):
            yes = [o.verdict.parts.get(f"{name}/yes", 0.0) for o in last]
            scores[f"{stamp}/{name}"] = ratio(yes, [some.count(name) for some in names], clusters).times(100)
    return scores


def write_grids(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """One picture of a prompt's pictures, two by two, named as the prompt's file. Prompts with a failure are left out,
    and named in ``failed.txt``."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.item.cluster, []).append(o)
    failed = [k for k, group in groups.items() if any(o.picture is None for o in group)]
    for k, group in groups.items():
        if k not in failed:
            files.save(tiled([o.image for o in group if o.image is not None]), folder / f"{k}.png")
    if failed:
        disk.write_text(folder / "failed.txt", "\n".join(failed) + "\n")


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """DPG-Bench with the user's ``dpg_bench.csv``."""
    assert file is not None
    judge, rows, n = tools.need_judge(name), read_dpg(file), tools.pictures or PICTURES
    ask, stamp = tools.rubric("dpg", ASK), f"dpg@ours{tools.judged('dpg')}"
    return Benchmark(
        "dpg",
        "draw",
        partial(dpg_items, rows, n),
        judge.of(partial(judge_dpg, judge, ask)),
        partial(dpg_scores, stamp),
        pictures_per_prompt=n,
        scorer=judge.stamp | {"ask": ask},
        layout=write_grids,
    )
