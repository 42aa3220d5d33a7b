"""Questions from the user's own files: multiple choice, yes or no, MME, short answers. Public benchmarks run through
the harnesses that the field trusts (``interop.py``); these readers are for what is not in them.

A file is a TSV as VLMEvalKit has it (index, image in base64 or image_path, question, A B C D ..., hint, answer,
category), or JSON or jsonl with the same keys, among which these are one: question, text, prompt · answer, label,
answers · image, image_path · index, id, question_id, key; or LLaVA's "conversations" of one question and its answer.
Image paths are relative to the file.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diptych.core.sample import Image, Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import replies
from diptych.evaluation.scores import (
    Benchmark,
    Item,
    Outcome,
    Score,
    Verdict,
    by_category,
    each,
    grades,
    macro,
    ratio,
    share,
)

LETTERS = "ABCDEFGHI"
ROUND = 1_000_000  # indices of one question's rotations agree modulo this (MMBench)
ASK = {
    "mcq": "Answer with the letter of the right option only.",
    "yesno": "Answer with yes or no only.",
    "short": "Answer with a single word or phrase.",
}


@dataclass(frozen=True)
class Row:
    """A question of somebody's file."""

    id: str
    images: tuple[str, ...]  # paths or "data:" addresses
    question: str
    options: Mapping[str, str]
    answers: tuple[str, ...]
    category: str


def read_rows(file: Path) -> list[Row]:
    """The questions of a TSV, JSON or jsonl file. Raises ``ValueError`` naming the line and what is wrong."""
    if file.suffix == ".tsv":
        raw = files.table(file)
    elif file.suffix == ".json":
        raw = files.load(file)
    else:
        raw = files.rows(file)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{file} has no rows")
    if wrong := next((r for r in raw if not isinstance(r, dict)), None):
        raise ValueError(f"{file} holds {wrong!r}, which is no row")
    stored = {str(r.get("index", "")): r["image"] for r in raw if len(str(r.get("image") or "")) > 64}
    return [_row(r, f"{file} row {n}", file.parent, stored) for n, r in enumerate(raw, 1)]


def _row(raw: Mapping, where: str, root: Path, stored: Mapping[str, Any]) -> Row:
    if "conversations" in raw:
        turns = [files.field(turn, ("value",), where) for turn in files.field(raw, ("conversations",), where, list)]
        if len(turns) != 2:
            raise ValueError(f"{where} has {len(turns)} turns; one question and its answer are read")
        raw = {**raw, "question": turns[0], "answer": turns[1]}
    options = {k: str(raw[k]) for k in LETTERS if str(raw.get(k) if raw.get(k) is not None else "").strip() not in ("", "nan")}  # fmt: skip  # noqa: E501
    question = str(files.field(raw, ("question", "text", "prompt"), where))
    hint = str(raw.get("hint") or "").strip()
    if hint and hint != "nan":
        question = f"{hint}\n{question}"
    true = files.field(raw, ("answer", "label", "answers", "gt_answer"), where, object)
    shown = raw.get("image") or raw.get("image_path") or ""
    return Row(
        str(files.field(raw, ("index", "id", "question_id", "key"), where)),
        tuple(_image(i, where, root) for i in _listed(stored.get(str(shown), shown))),  # rotations name whose they show
        question.replace("<image>", "").strip(),
        options,
        tuple(str(a) for a in _listed(true)),
        str(raw.get("category") or raw.get("type") or "all"),
    )


def _listed(value: Any) -> list:
    """The value as a list; a text that is one ("['a', 'b']") is read."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    return list(value) if isinstance(value, (list, tuple)) else [value] if value != "" else []


def _image(value: Any, where: str, root: Path) -> str:
    text = str(value)
    if text.startswith("data:"):
        return text
    if len(text) > 1024 or not (root / text).is_file():
        if len(text) <= 64:
            raise ValueError(f"{where}: there is no picture {str(root / text)!r}")
        files.decoded(text[:64], f"{where}: the picture")
        return "data:image/unknown;base64," + text
    return str(root / text)


def _item(name: str, row: Row, id: str, text: str, reference: dict, cluster: str) -> Item:
    key = f"{name}/{row.category}/{id}"
    pictures = [Image(i) for i in row.images]
    seen = [hashlib.sha256(i.encode()).hexdigest()[:12] if i.startswith("data:") else Path(i).name for i in row.images]
    return Item(
        key, name, row.category, text, Sample(key, (user(*pictures, text),)), 0, cluster, reference | {"images": seen}
    )


# --- multiple choice --------------------------------------------------------------------------------------------------


def _choices(name: str, rows: list[Row], circular: bool) -> list[Item]:
    items = []
    indices = {r.id for r in rows}
    turned = {str(int(i) % ROUND) for i in indices if i.isdigit() and int(i) >= ROUND}  # whose rotations are there
    for row in rows:
        if len(row.options) < 2 or len(row.answers) != 1 or row.answers[0] not in row.options:
            raise ValueError(f"row {row.id}: answer {row.answers} is not one of the options {dict(row.options)}")
        base = str(int(row.id) % ROUND) if row.id.isdigit() else row.id
        rotated = base != row.id and base in indices
        if rotated and not circular:
            continue
        turns = range(1) if not circular or rotated or base in turned else range(len(row.options))
        keys, texts = list(row.options), list(row.options.values())
        for turn in turns:
            options = dict(zip(keys, texts[turn:] + texts[:turn], strict=True))
            true = row.options[row.answers[0]]
            letter = keys[(keys.index(row.answers[0]) - turn) % len(keys)]
            lines = "\n".join(f"{k}. {v}" for k, v in options.items())
            text = f"{row.question}\n{lines}\n{ASK['mcq']}"
            reference = {"answer": f"{letter}. {true}", "letter": letter, "options": options}
            id = row.id if turn == 0 else f"{row.id}-{turn}"
            items.append(_item(name, row, id, text, reference, f"{row.category}/{base}"))
    return items


def judge_choice(item: Item, text: str) -> Verdict:
    """Right for the letter that the reply clearly chooses."""
    said = replies.choice(text, item.reference["options"])
    ok = said == item.reference["letter"]
    return Verdict(ok, "" if ok else "no option in the reply" if said is None else f"it says {said}")


def _choice_scores(stamp: str, circular: bool, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    def score(of: Sequence[Outcome]) -> Score:
        if not circular:
            return share(of)
        right: dict[str, bool] = {}
        for o in of:
            right[o.item.cluster] = right.get(o.item.cluster, True) and o.verdict.ok
        return macro({"": ([float(v) for v in right.values()], list(right))})

    return {f"{stamp}/overall": score(outcomes)} | {
        f"{stamp}/{k}": score(of) for k, of in by_category(outcomes).items() if k != "all"
    }


# --- yes or no --------------------------------------------------------------------------------------------------------


def _questions(name: str, rows: list[Row], ask: str, truth: Callable[[Row], dict]) -> list[Item]:
    items = []
    for row in rows:
        if not row.answers:
            raise ValueError(f"row {row.id} has no answer")
        text = f"{row.question}\n{ASK[ask]}" if not row.question.endswith(ASK[ask]) else row.question
        cluster = hashlib.sha256("".join(row.images).encode()).hexdigest()[:12] if row.images else row.id
        items.append(_item(name, row, row.id, text, truth(row), cluster))
    return items


def _true_or_false(row: Row) -> dict:
    said = replies.yes_no(row.answers[0])
    if said is None:
        raise ValueError(f"row {row.id}: the answer is {row.answers[0]!r}, neither yes nor no")
    return {"answer": "yes" if said else "no"}


def judge_yes_no(item: Item, text: str) -> Verdict:
    """Right only for a clear yes or no; what was said is a part of the verdict."""
    said, true = replies.yes_no(text), item.reference["answer"] == "yes"
    parts = {"yes": float(said is True), "clear": float(said is not None)}
    return Verdict(said is true, "" if said is true else "neither yes nor no" if said is None else "", parts)


def yes_no_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Accuracy, precision, recall and F1 of "yes", and the share of replies that say yes; each of all and by category.

    A reply that is neither counts as wrong: as a "no" for recall, and never as a "yes"."""
    scores = {}
    groups = {"": list(outcomes)}
    if len(found := by_category(outcomes)) > 1:
        groups |= found
    for category, of in groups.items():
        at = f"{stamp}/{category}/" if category else f"{stamp}/"
        where = [o.item.cluster for o in of]
        yes = [o.verdict.parts.get("yes", 0.0) for o in of]
        true = [float(o.item.reference["answer"] == "yes") for o in of]
        hit = [y * t for y, t in zip(yes, true, strict=True)]
        scores[f"{at}accuracy"] = macro({"": ([float(o.verdict.ok) for o in of], where)})
        scores[f"{at}f1"] = ratio([2 * h for h in hit], [y + t for y, t in zip(yes, true, strict=True)], where)
        scores[f"{at}precision"], scores[f"{at}recall"] = ratio(hit, yes, where), ratio(hit, true, where)
        scores[f"{at}yes-ratio"] = macro({"": (yes, where)})
    return scores


def _mme_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Each subtask: accuracy + accuracy+ (both questions of a picture right), of 200; sums of ten and of four."""
    units: dict[str, tuple[list[float], list[str]]] = {}
    for category, of in by_category(outcomes).items():
        pictures: dict[str, list[bool]] = {}
        for o in of:
            pictures.setdefault(o.item.cluster, []).append(o.verdict.ok)
        if wrong := [k for k, v in pictures.items() if len(v) != 2]:
            raise ValueError(f"MME asks two questions of a picture; {category} has {len(wrong)} with another number")
        units[category] = ([(sum(v) / 2 + all(v)) / 2 for v in pictures.values()], list(pictures))
    scores = {}
    for name, tasks in (("perception", aggregate.PERCEPTION), ("cognition", aggregate.COGNITION)):
        if set(tasks) <= set(units):
            scores[f"{stamp}/{name}"] = macro({k: units[k] for k in tasks}, graded=True).times(200 * len(tasks))
    if len(scores) == 2:
        every = {k: units[k] for k in (*aggregate.PERCEPTION, *aggregate.COGNITION)}
        scores = {f"{stamp}/sum": macro(every, graded=True).times(200 * len(every))} | scores
    return scores | {f"{stamp}/{k}": macro({k: unit}, graded=True).times(200) for k, unit in units.items()}


# --- short answers ----------------------------------------------------------------------------------------------------


def _contains(reply: str, item: Item) -> float:
    return replies.contains(reply, item.reference["answers"], "HME100k" not in item.category)


_SHORT: dict[str, tuple[str, Callable[[str, Item], float]]] = {
    "vqa": ("vqa-accuracy", lambda reply, item: replies.vqa_accuracy(reply, item.reference["answers"])),
    "anls": ("anls", lambda reply, item: replies.anls(reply, item.reference["answers"])),
    "relaxed": ("relaxed", lambda reply, item: replies.relaxed(reply, item.reference["answers"])),
    "contains": ("contains", _contains),
}


def _judge_short(grade: Callable[[str, Item], float], item: Item, text: str) -> Verdict:
    value = grade(text, item)
    right = value >= 0.5
    return Verdict(right, "" if right else f"it is {item.reference['answer']}", {}, value)


def _short_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    groups = {k: of for k, of in by_category(outcomes).items() if k != "all"}
    return {f"{stamp}/overall": grades(outcomes)} | {f"{stamp}/{k}": grades(of) for k, of in groups.items()}


def _truths(row: Row) -> dict:
    return {"answer": row.answers[0], "answers": list(row.answers)}


# --- the table --------------------------------------------------------------------------------------------------------


def benchmark(kind: str, file: Path | None, tools: Tools) -> Benchmark:
    """The benchmark of a user's file; its score names begin with the file's."""
    assert file is not None
    rows, stem = read_rows(file), file.stem
    if kind in ("mcq", "mcq-circular"):
        circular = kind == "mcq-circular"
        protocol = "circular" if circular else "vanilla"
        name, stamp = f"{stem}-{protocol}", f"{stem}@{protocol}"
        items = _choices(name, rows, circular)
        return Benchmark(
            name, "answer", lambda seed, size: items, each(judge_choice), partial(_choice_scores, stamp, circular),
            whole=circular,
        )  # fmt: skip
    if kind in ("yesno", "mme"):
        name, stamp = f"{stem}-{kind}", f"{stem}@lone-word"
        items = _questions(name, rows, "yesno", _true_or_false)
        scores = partial(yes_no_scores if kind == "yesno" else _mme_scores, stamp)
        return Benchmark(name, "answer", lambda seed, size: items, each(judge_yes_no), scores, whole=kind == "mme")
    protocol, grade = _SHORT[kind]
    name = f"{stem}-{kind}"
    items = _questions(name, rows, "short", _truths)
    return Benchmark(
        name, "answer", lambda seed, size: items, each(partial(_judge_short, grade)),
        partial(_short_scores, f"{stem}@{protocol}"),
    )  # fmt: skip
