"""Questions from the user's own files: multiple choice, yes or no, MME, HallusionBench, short answers, captions.

Every score name says by whose rule replies are read: ``STEM-KIND@official/...`` by the published scorer's
(``judges/official.py``), ``STEM-KIND@ours/...`` by the library's own reading (``judges/replies.py``). Both come from
the same replies. Which files are read: ``question_files.py``; what each rule is: docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diptych.core.sample import Sample, user
from diptych.evaluation.benchmarks import aggregate, captions
from diptych.evaluation.benchmarks.question_files import Question, parts, read_questions
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import official, replies, short_answers
from diptych.evaluation.scores import (
    Benchmark,
    Item,
    Judge,
    Outcome,
    Score,
    Verdict,
    by_category,
    each,
    macro,
    ratio,
)

ROUND = 1_000_000  # indices of one question's rotations agree modulo this (MMBench)
ASK = {
    "mcq": "Answer with the letter of the right option only.",
    "yesno": "Answer with yes or no only.",
    "short": "Answer with a single word or phrase.",
    "caption": "Describe the picture in one sentence.",
}
Grade = Callable[[str, Item], float]  # of a reply, in [0, 1]
Reading = Callable[[str], bool | None]  # yes, no or neither


def item_of(name: str, row: Question, id: str, text: str, reference: dict, cluster: str) -> Item:
    """A question as an item; ``reference`` gains names or hashes of the pictures shown."""
    key = f"{name}/{row.category}/{id}"
    shown = [hashlib.sha256(i.encode()).hexdigest()[:12] if i.startswith("data:") else Path(i).name for i in row.images]
    reference = reference | {"images": shown} | ({"group": row.group} if row.group else {})
    sample = Sample(key, (user(*parts(text, row.images)),))
    return Item(key, name, row.category, text, sample, 0, cluster, reference)


def graded(rules: Mapping[str, Grade], item: Item, text: str) -> Verdict:
    """A reply's grade by each rule, as the verdict's parts; the verdict is that of the first rule."""
    grades = {rule: grade(text, item) for rule, grade in rules.items()}
    value = next(iter(grades.values()))
    return Verdict(value >= 0.5, "" if value >= 0.5 else f"it is {item.reference['answer']}", grades, value)


def judged(rules: Mapping[str, Grade]) -> Judge:
    """A benchmark's judge by these rules."""
    return each(partial(graded, rules))


def groups_of(outcomes: Sequence[Outcome]) -> dict[str, Sequence[Outcome]]:
    """Outcomes by the part of a score's name: "overall", each category, and "l2/NAME" of each group above them."""
    groups: dict[str, Sequence[Outcome]] = {"overall": outcomes}
    groups |= {k: some for k, some in by_category(outcomes).items() if k != "all"}
    for name in dict.fromkeys(o.item.reference.get("group", "") for o in outcomes):
        if name:
            groups[f"l2/{name}"] = [o for o in outcomes if o.item.reference.get("group") == name]
    return groups


def mean_grade(outcomes: Sequence[Outcome], rule: str) -> Score:
    """The mean grade by a rule, with the bootstrap over what shares a picture."""
    values = [o.verdict.parts.get(rule, 0.0) for o in outcomes]
    return macro({"": (values, [o.item.cluster for o in outcomes])}, graded=any(0 < v < 1 for v in values))


def rule_scores(name: str, rules: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The mean grade by each rule, of all and by category."""
    groups = groups_of(outcomes).items()
    return {f"{name}@{rule}/{k}": mean_grade(some, rule) for rule in rules for k, some in groups}


# --- multiple choice --------------------------------------------------------------------------------------------------


def _option_items(name: str, rows: Sequence[Question], circular: bool) -> list[Item]:
    """One item a question, or one for each rotation of its options; questions without options are asked once."""
    wrong = [r for r in rows if r.options and (len(r.options) < 2 or r.answers[0] not in r.options)]
    if wrong:
        first = f"row {wrong[0].id}: answer {wrong[0].answers} is not one of the options {dict(wrong[0].options)}"
        raise ValueError(f"{first} ({len(wrong)} of {len(rows)} rows)")
    indices = {r.id for r in rows}
    turned = {str(int(i) % ROUND) for i in indices if i.isdigit() and int(i) >= ROUND}  # whose rotations are there
    items = []
    for row in rows:
        if not row.options:
            items.append(_open_item(name, row))
            continue
        base = str(int(row.id) % ROUND) if row.id.isdigit() else row.id
        rotated = base != row.id and base in indices
        if rotated and not circular:
            continue
        for turn in range(1) if not circular or rotated or base in turned else range(len(row.options)):
            items.append(_turned(name, row, turn, base))
    return items


def _turned(name: str, row: Question, turn: int, base: str) -> Item:
    """A question with its options moved up by ``turn`` places."""
    keys, texts = list(row.options), list(row.options.values())
    options = dict(zip(keys, texts[turn:] + texts[:turn], strict=True))
    letter = keys[(keys.index(row.answers[0]) - turn) % len(keys)]
    lines = "\n".join(f"{k}. {v}" for k, v in options.items())
    reference = {"answer": f"{letter}. {options[letter]}", "letter": letter, "options": options} | (
        {"source": row.fields["source"]} if "source" in row.fields else {}
    )
    id = row.id if turn == 0 else f"{row.id}-{turn}"
    return item_of(name, row, id, f"{row.text}\n{lines}\n{ASK['mcq']}", reference, f"{row.category}/{base}")


def _open_item(name: str, row: Question) -> Item:
    """A question without options among multiple choice (MMMU, RealWorldQA)."""
    if not row.answers:
        raise ValueError(f"row {row.id} has neither options nor an answer")
    text = f"{row.text}\n{ASK['short']}"
    return item_of(name, row, row.id, text, _truths(row), f"{row.category}/{row.id}")


def _truths(row: Question) -> dict:
    return {"answer": row.answers[0], "answers": list(row.answers)}


def _choosing(choose: Callable[[str, Mapping[str, str]], str | None], without: Grade) -> Grade:
    """A grade by the letter that a reply chooses; ``without`` grades questions that have no options."""

    def grade(reply: str, item: Item) -> float:
        if "letter" not in item.reference:
            return without(reply, item)
        return float(choose(reply, item.reference["options"]) == item.reference["letter"])

    return grade


def _any_answer(grade: Callable[[str, str], float]) -> Grade:
    return lambda reply, item: max(grade(reply, answer) for answer in item.reference["answers"])


def _answers(grade: Callable[[str, Sequence[str]], float]) -> Grade:
    return lambda reply, item: grade(reply, item.reference["answers"])


_OURS = _choosing(replies.choice, _answers(short_answers.relaxed))
CHOICES: dict[str, dict[str, Grade]] = {
    "vanilla": {"ours": _OURS, "official": _choosing(official.mmbench, _any_answer(official.realworldqa))},
    "mmmu": {"ours": _OURS, "official": _choosing(official.mmmu_choice, _answers(official.mmmu_open))},
    "seed": {"ours": _OURS, "official": _choosing(lambda reply, options: official.first_letter(reply), lambda *_: 0.0)},
    "cvbench": {"ours": _OURS, "official": _choosing(lambda reply, options: official.cv_bench(reply), lambda *_: 0.0)},
    "mmvp": {"ours": _OURS, "official": _choosing(lambda reply, options: official.mmvp(reply), lambda *_: 0.0)},
}
CHOICES["circular"] = CHOICES["vanilla"]


def judge_choice(item: Item, text: str) -> Verdict:
    """Right for the letter that the reply clearly chooses."""
    letter = replies.choice(text, item.reference["options"])
    ok = letter == item.reference["letter"]
    return Verdict(ok, "" if ok else "no option in the reply" if letter is None else f"it says {letter}")


def all_right(outcomes: Sequence[Outcome], rule: str, key: Callable[[Outcome], str]) -> Score:
    """The share of groups of outcomes that are right in every one, by a rule."""
    right: dict[str, bool] = {}
    for o in outcomes:
        right[key(o)] = right.get(key(o), True) and o.verdict.parts.get(rule, 0.0) >= 0.5
    return macro({"": ([float(v) for v in right.values()], list(right))})


def _circular_scores(name: str, rules: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """CircularEval (MMBench, arXiv 2307.06281): a question is right in every rotation."""
    groups = groups_of(outcomes).items()
    return {
        f"{name}@{rule}/{k}": all_right(some, rule, lambda o: o.item.cluster) for rule in rules for k, some in groups
    }


def _mmvp_scores(name: str, rules: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """MMVP (arXiv 2401.06209): pairs of consecutive questions that are both right, and accuracy."""
    scores = {}
    for rule in rules:
        scores[f"{name}@{rule}/pairs"] = all_right(outcomes, rule, lambda o: o.item.reference["pair"])
        scores[f"{name}@{rule}/accuracy"] = mean_grade(outcomes, rule)
    return scores


def _paired(items: list[Item]) -> list[Item]:
    """MMVP's items with the number of their pair: questions 1 and 2, 3 and 4 …. Raises ``ValueError`` for others."""
    paired = []
    for item in items:
        id = item.id.rpartition("/")[2]
        if not id.isdigit():
            raise ValueError(f"MMVP numbers its questions from 1; {id!r} is no number")
        pair = str((int(id) - 1) // 2)
        reference = {**item.reference, "pair": pair}
        paired.append(Item(item.id, item.benchmark, "all", item.prompt, item.sample, 0, pair, reference))
    if len(paired) % 2:
        raise ValueError(f"MMVP asks pairs of questions; there are {len(paired)}")
    return paired


def _cvbench_scores(name: str, rules: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """CV-Bench (arXiv 2406.16860): ADE20K and COCO, evenly, are half of the score, Omni3D the other half."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.item.reference.get("source", ""), []).append(o)
    scores = {}
    for rule in rules:
        units = {
            k: ([o.verdict.parts.get(rule, 0.0) for o in some], [o.item.cluster for o in some])
            for k, some in groups.items()
        }
        if set(units) == set(aggregate.CV_BENCH):
            weights = [aggregate.CV_BENCH[k] for k in units]
            scores[f"{name}@{rule}/overall"] = macro(units, weights=weights)
        scores |= {f"{name}@{rule}/{k}": macro({k: unit}) for k, unit in units.items()}
    return scores


# --- yes or no --------------------------------------------------------------------------------------------------------

YES_NO: dict[str, dict[str, Reading]] = {
    "yesno": {"ours": replies.yes_no, "official": official.pope, "authors": official.pope_authors},
    "mme": {"ours": replies.yes_no, "official": official.mme},
    "hallusion": {"ours": replies.yes_no},
}


def _question_items(name: str, rows: Sequence[Question], ask: str, truth: Callable[[Question], dict]) -> list[Item]:
    """One item a question; those of one picture are a cluster."""
    items = []
    for row in rows:
        if not row.answers:
            raise ValueError(f"row {row.id} has no answer")
        text = f"{row.text}\n{ASK[ask]}" if not row.text.endswith(ASK[ask]) else row.text
        cluster = hashlib.sha256("".join(row.images).encode()).hexdigest()[:12] if row.images else row.id
        items.append(item_of(name, row, row.id, text, truth(row), cluster))
    return items


def _true_or_false(row: Question) -> dict:
    """The right answer of a yes-or-no question; 1 and 0 count (HallusionBench). Raises ``ValueError`` for others."""
    answer = {"1": True, "0": False}.get(row.answers[0].strip())
    answer = replies.yes_no(row.answers[0]) if answer is None else answer
    if answer is None:
        raise ValueError(f"row {row.id}: the answer is {row.answers[0]!r}, neither yes nor no")
    return {"answer": "yes" if answer else "no", **row.fields}


def read_yes_no(readings: Mapping[str, Reading], item: Item, text: str) -> Verdict:
    """Right for a clear yes or no by the first reading. ``RULE`` and ``RULE yes`` of the parts are whether it is right
    and whether it says yes by each reading."""
    answers = {rule: reading(text) for rule, reading in readings.items()}
    true = item.reference["answer"] == "yes"
    grades = {rule: float(answer is true) for rule, answer in answers.items()}
    grades |= {f"{rule} yes": float(answer is True) for rule, answer in answers.items()}
    first = next(iter(answers.values()))
    return Verdict(first is true, "" if first is true else "neither yes nor no" if first is None else "", grades)


def judge_yes_no(item: Item, text: str) -> Verdict:
    """Right for a clear yes or no, by the library's own reading."""
    return read_yes_no({"ours": replies.yes_no}, item, text)


def yes_no_scores(stamps: Mapping[str, str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Accuracy, precision, recall and F1 of "yes", and the share of replies that say yes; each of all and by category.
    ``stamps`` maps a rule to the beginning of its scores' names.

    A reply that is neither counts as wrong: as a "no" for recall, and never as a "yes"."""
    scores = {}
    groups = {"": list(outcomes)}
    if len(categories := by_category(outcomes)) > 1:
        groups |= categories
    for (rule, stamp), (category, some) in ((r, g) for r in stamps.items() for g in groups.items()):
        at = f"{stamp}/{category}/" if category else f"{stamp}/"
        clusters = [o.item.cluster for o in some]
        yes = [o.verdict.parts.get(f"{rule} yes", 0.0) for o in some]
        true = [float(o.item.reference["answer"] == "yes") for o in some]
        hit = [y * t for y, t in zip(yes, true, strict=True)]
        scores[f"{at}accuracy"] = macro({"": ([o.verdict.parts.get(rule, 0.0) for o in some], clusters)})
        scores[f"{at}f1"] = ratio([2 * h for h in hit], [y + t for y, t in zip(yes, true, strict=True)], clusters)
        scores[f"{at}precision"], scores[f"{at}recall"] = ratio(hit, yes, clusters), ratio(hit, true, clusters)
        scores[f"{at}yes-ratio"] = macro({"": (yes, clusters)})
    return scores


def _mme_scores(stamps: Mapping[str, str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Each subtask: accuracy + accuracy+ (both questions of a picture right), of 200; sums of ten and of four."""
    scores: dict[str, Score] = {}
    for rule, stamp in stamps.items():
        units: dict[str, tuple[list[float], list[str]]] = {}
        for category, some in by_category(outcomes).items():
            pictures: dict[str, list[bool]] = {}
            for o in some:
                pictures.setdefault(o.item.cluster, []).append(o.verdict.parts.get(rule, 0.0) == 1)
            if wrong := [k for k, v in pictures.items() if len(v) != 2]:
                raise ValueError(
                    f"MME asks two questions of a picture; {category} has {len(wrong)} with another number"
                )
            units[category] = ([(sum(v) / 2 + all(v)) / 2 for v in pictures.values()], list(pictures))
        sums = {"perception": aggregate.PERCEPTION, "cognition": aggregate.COGNITION}
        sums |= {"sum": (*aggregate.PERCEPTION, *aggregate.COGNITION)}
        for name, tasks in sums.items():
            if set(tasks) <= set(units):
                total = macro({k: units[k] for k in tasks}, graded=True).times(200 * len(tasks))
                scores[f"{stamp}/{name}"] = total
        scores |= {f"{stamp}/{k}": macro({k: unit}, graded=True).times(200) for k, unit in units.items()}
    return scores


def _hallusion_scores(stamps: Mapping[str, str], outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """HallusionBench (arXiv 2310.14566): aAcc over questions, fAcc over figures whose questions are all right, qAcc
    over questions that are right with every figure. Questions without a figure have no part in fAcc."""

    def name(*fields: str) -> Callable[[Outcome], str]:
        return lambda o: "_".join([o.item.category] + [str(o.item.reference[f]) for f in fields])

    scores = {}
    figures = [o for o in outcomes if not (o.item.category == "VS" and o.item.reference["figure_id"] == "0")]
    for rule, stamp in stamps.items():
        scores[f"{stamp}/aAcc"] = mean_grade(outcomes, rule)
        if figures:
            scores[f"{stamp}/fAcc"] = all_right(figures, rule, name("subcategory", "set_id", "figure_id"))
        scores[f"{stamp}/qAcc"] = all_right(outcomes, rule, name("subcategory", "set_id", "question"))
    return scores


def _hallusion_truth(row: Question) -> dict:
    """HallusionBench's answer and where the question belongs. Raises ``ValueError`` for a row that does not say."""
    reference = _true_or_false(row)
    if missing := [k for k in ("subcategory", "set_id", "figure_id") if k not in row.fields]:
        raise ValueError(f"row {row.id} has no {', '.join(missing)}; HallusionBench's JSON has them")
    return reference | {"question": row.id.rpartition("_")[2]}


# --- short answers ----------------------------------------------------------------------------------------------------


def _is_formula(item: Item) -> bool:
    return official.FORMULA in item.category or "HME100k" in (item.category, item.reference.get("dataset", ""))


def _contains(contains: Callable[[str, Sequence[str], bool], float]) -> Grade:
    return lambda reply, item: contains(reply, item.reference["answers"], _is_formula(item))


SHORT: dict[str, dict[str, Grade]] = {
    "vqa": {"ours": _answers(short_answers.vqa_accuracy), "official": _answers(official.vqa_accuracy)},
    "vqav2": {"official": _answers(partial(official.vqa_accuracy, normal=official.vqav2))},
    "anls": {"ours": _answers(short_answers.anls), "official": _answers(official.anls)},
    "relaxed": {"ours": _answers(short_answers.relaxed), "official": _answers(official.relaxed)},
    "contains": {"ours": _contains(short_answers.contains), "official": _contains(official.ocrbench)},
}


def _short_truth(row: Question) -> dict:
    dataset = row.fields.get("dataset_name") or row.fields.get("dataset")
    return _truths(row) | ({"dataset": dataset} if dataset else {})


# --- the table --------------------------------------------------------------------------------------------------------


def benchmark(kind: str, file: Path | None, tools: Tools) -> Benchmark:
    """The benchmark of a user's file; its name and score names begin with the file's."""
    assert file is not None
    rows = read_questions(file, ASK["caption"] if kind == "captions" else None)
    kind = {"mcq": "vanilla", "mcq-circular": "circular"}.get(kind, kind)
    name = f"{file.stem}-{kind}"
    scores: Callable[..., Any]
    if kind in CHOICES:
        rules, items = CHOICES[kind], _option_items(name, rows, kind == "circular")
        items = _paired(items) if kind == "mmvp" else items
        scores = {"circular": _circular_scores, "mmvp": _mmvp_scores, "cvbench": _cvbench_scores}.get(kind, rule_scores)
        whole = kind in ("circular", "mmvp")
        return Benchmark(
            name, "answer", lambda seed, size: items, judged(rules), partial(scores, name, list(rules)), whole=whole
        )
    if kind in YES_NO:
        readings = YES_NO[kind]
        items = _question_items(name, rows, "yesno", _hallusion_truth if kind == "hallusion" else _true_or_false)
        scores = {"mme": _mme_scores, "hallusion": _hallusion_scores}.get(kind, yes_no_scores)
        stamps = {rule: f"{name}@{rule}" for rule in readings}
        judge = each(partial(read_yes_no, readings))
        return Benchmark(
            name, "answer", lambda seed, size: items, judge, partial(scores, stamps), whole=kind in ("mme", "hallusion")
        )
    if kind == "captions":
        items = _question_items(name, captions.of_pictures(rows), "caption", _truths)
        return Benchmark(
            name,
            "answer",
            lambda seed, size: items,
            each(captions.judge),
            partial(captions.scores, name),
            max_new_tokens=64,
        )
    items = _question_items(name, rows, "short", _short_truth)
    rules = SHORT[kind]
    return Benchmark(name, "answer", lambda seed, size: items, judged(rules), partial(rule_scores, name, list(rules)))
