"""Captions of pictures against reference captions: CIDEr-D (arXiv 1411.5726), as pycocoevalcap computes it.

The formula is pycocoevalcap's. The words are those of Stanford's PTBTokenizer, which it runs in Java, for the forms of
``tests/evaluation/golden/ptb.jsonl``; other rare forms may be cut otherwise, so the score is called ``@ours``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log, sqrt

import numpy as np

from diptych.evaluation.benchmarks.question_files import Question
from diptych.evaluation.scores import Item, Outcome, Score, Verdict, clustered

ORDERS = 4  # n-grams of one to four words
SIGMA = 6.0  # of the penalty for another length
SCALE = 10.0
_TITLES = (
    r"mr|mrs|ms|dr|st|jr|sr|vs|prof|inc|ltd|co|corp|gen|col|sgt|capt|rev|hon|mt|ave|blvd|etc|"
    r"jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|no(?=\.\s*\d)"
)
_WORD = re.compile(
    rf"https?://\S+|[\w.+\-]+@[\w\-]+\.[\w.]+|(?:[a-z]\.){{2,}}|(?:{_TITLES})\.(?=\s)|'n'|\d+/\d+|\d+(?:[.,:]\d+)*(?:'s\b)?|"
    r"c\+\+|[@#][^\W\d_]\w*|[^\W_](?:\w|[-/&'’](?=\w))*|[?!]{2,}|[$%&#@+*=~^£€]|[()\[\]{}]"
)
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "wanna": "wan na",
    "gotta": "got ta",
    "gimme": "gim me",
    "lemme": "lem me",
    "y'all": "y' all",
    "'tis": "'t is",
    "'twas": "'t was",
}
_SUFFIX = re.compile(r"^(.+?)(n't|'(?:s|re|ve|ll|d|m))$")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def words(text: str) -> list[str]:
    """The words of a caption in lower case, without punctuation, contractions in two as the Penn Treebank has them."""
    tokens: list[str] = []
    for word in _WORD.findall(text.lower().replace("’", "'")):
        if word in _SPLIT:
            tokens += _SPLIT[word].split()
        elif suffix := _SUFFIX.match(word):
            tokens += suffix.groups()
        else:
            tokens.append(_BRACKETS.get(word, word))
    return tokens


def _grams(text: str) -> list[Counter[tuple[str, ...]]]:
    """The counts of n-grams of one to four words."""
    cut = words(text)
    return [Counter(tuple(cut[i : i + n]) for i in range(len(cut) - n + 1)) for n in range(1, ORDERS + 1)]


class Cider:
    """CIDEr-D over a corpus: ``references`` maps a picture to its captions, whose n-grams give the weights."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self._references = {k: [_grams(c) for c in captions] for k, captions in references.items()}
        self._pictures: Counter[tuple[str, ...]] = Counter()
        for captions in self._references.values():
            self._pictures.update({gram for grams in captions for counts in grams for gram in counts})
        self._most = log(len(references)) if references else 0.0

    def _weigh(self, grams: Sequence[Counter]) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """TF-IDF of each n-gram by order, and the norm of each order."""
        weights = [{g: n * (self._most - log(max(1, self._pictures[g]))) for g, n in c.items()} for c in grams]
        return weights, [sqrt(sum(w * w for w in order.values())) for order in weights]

    def __call__(self, picture: str, caption: str) -> float:
        """The score of a picture's caption, in [0, 10]."""
        grams = _grams(caption)
        weights, norms = self._weigh(grams)
        total = np.zeros(ORDERS)
        for reference in self._references[picture]:
            true, true_norms = self._weigh(reference)
            apart = sum(grams[1].values()) - sum(reference[1].values())  # the official length counts pairs of words
            for n in range(ORDERS):
                shared = sum(min(w, true[n][g]) * true[n][g] for g, w in weights[n].items() if g in true[n])
                if norms[n] and true_norms[n]:
                    total[n] += shared / (norms[n] * true_norms[n]) * exp(-(apart**2) / (2 * SIGMA**2))
        return float(total.mean()) / len(self._references[picture]) * SCALE


def of_pictures(rows: Sequence[Question]) -> list[Question]:
    """One question a picture, with the captions of all its rows (COCO gives each caption a row)."""
    by_images: dict[tuple[str, ...], Question] = {}
    for row in rows:
        known = by_images.get(row.images)
        by_images[row.images] = row if known is None else replace(known, answers=known.answers + row.answers)
    return list(by_images.values())


def judge(item: Item, text: str) -> Verdict:
    """Not empty; how good a caption is depends on the corpus, so ``scores`` says it."""
    return Verdict(bool(text.strip()), "" if text.strip() else "no caption")


def scores(name: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """CIDEr-D of the captions, whose corpus is the references of these outcomes; an item without a caption scores 0."""
    cider = Cider({o.item.id: o.item.reference["answers"] for o in outcomes})
    values = [cider(o.item.id, o.text or "") / SCALE for o in outcomes]
    return {f"{name}@ours/CIDEr": clustered(values, [o.item.cluster for o in outcomes]).times(SCALE)}
