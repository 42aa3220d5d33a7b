"""The library's own grades of short answers, each beside the official rule (``official.py``) that it relaxes."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.evaluation.judges import official
from diptych.evaluation.judges.replies import plain


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQA accuracy as ``official.vqa_accuracy``; with fewer than four annotators an answer counts if any gave it."""
    if len(answers) < 4:
        return float(official.evalai(reply) in [official.evalai(a) for a in answers])
    return official.vqa_accuracy(reply, answers)


def anls(reply: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """1 - edit distance / length to the nearest answer, 0 below the threshold (ANLS, arXiv 1907.00490), of lower-case
    texts with one space between words."""
    text = " ".join(reply.lower().split())
    best = 0.0
    for answer in answers:
        true = " ".join(answer.lower().split())
        best = max(best, 1 - edit_distance(text, true) / max(len(text), len(true), 1))
    return best if best >= threshold else 0.0


def number(text: str) -> float | None:
    """The number that a text is, percent signs, currency signs and thousands' commas aside."""
    bare = text.strip().rstrip(".").strip("$€£ ").replace(",", "")
    percent = bare.endswith("%")
    try:
        value = float(bare.removesuffix("%").strip())
    except ValueError:
        return None
    return value / 100 if percent else value


def relaxed(reply: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (arXiv 2203.10244): a number within 5 % of the answer, else the same text. Thousands
    separators, currency signs, a trailing full stop and 0 count as numbers are written."""
    for answer in answers:
        value, true = number(reply), number(answer)
        if value is not None and true is not None:
            if abs(value - true) <= tolerance * abs(true) if true else value == 0:
                return 1.0
        elif plain(reply) == plain(answer):
            return 1.0
    return 0.0


def contains(reply: str, answers: Sequence[str], formula: bool = False) -> float:
    """Whether a reply contains an answer that is not empty, as ``official.ocrbench`` has it otherwise."""
    return official.ocrbench(reply, [a for a in answers if a.strip()], formula)
