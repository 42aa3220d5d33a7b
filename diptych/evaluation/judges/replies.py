"""What a reply says: letters, yes and no, numbers, short answers, marks. All parsing of replies is here.

A reply that says nothing clear gives ``None`` (or 0); nothing is guessed, and never at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence


def spoken(reply: str) -> str:
    """What a reply says aloud: what follows ``</think>``, and nothing where the thinking never ends."""
    said = reply.rpartition("</think>")[2]
    return "" if said.lstrip().startswith("<think>") else said


# --- multiple choice --------------------------------------------------------------------------------------------------


def choice(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply chooses; ``options`` maps letters to texts. In this order: the reply is a letter; it
    begins with one ("B. red", "(B) red"); it names one answer ("the answer is B"); it has one letter in brackets; it is
    one option's text, or holds the text of exactly one; one capital stands alone in it (but "A" and "I" are words)."""
    text = reply.strip()
    bare = text.strip(" \n\t.,:;!*`'\"()[]{}").upper()
    if bare in options:
        return bare
    letters = "".join(options)
    begins = r"(?:^|(?i:answer|option|choice)s?(?:\s+(?i:is|are))?[\s:]*)"
    if re.search(rf"{begins}\(?([{letters}])\)?\s*(?:[,/&]|and|or)\s*\(?(?!\1)[{letters}]\)?\s*(?:[.,;/&\n]|$)", text):
        return None  # "A, B", "the answer is (B) or (C)"
    if found := re.match(rf"[(\[*]*([{letters}])(?:[)\]*]+|[.:,)](?=\s|$)|\n)|(?i:\(([{letters}])\))", text):
        letter = (found[1] or found[2]).upper()
        return letter if set(re.findall(rf"[(\[]([{letters}])[)\]]", text)) <= {letter} else None
    for pattern in (
        rf"(?i:answer|option|choice)(?:\s+(?i:is|would\s+be))?\s*[:=]?\s*[(\[*\"']*([{letters}])\b(?!['\w])",
        rf"[(\[]([{letters}])[)\]]",
    ):
        if len(named := set(re.findall(pattern, text))) == 1:
            return named.pop()
        if named:
            return None
    low = plain(text)
    same = [k for k, v in options.items() if plain(v) == low and low]
    if len(same) == 1:
        return same[0]
    held = {k: plain(v) for k, v in options.items() if plain(v) and re.search(rf"\b{re.escape(plain(v))}\b", low)}
    # "dark red" also holds "red": a text inside another found one does not count
    held = {k: v for k, v in held.items() if not any(v != w and v in w for w in held.values())}
    if len(held) == 1:
        return next(iter(held))
    alone = set(re.findall(rf"(?a:\b)([{letters}])(?a:\b)", text))  # Chinese has no spaces
    return alone.pop() if len(alone) == 1 and not held and not alone & {"A", "I"} else None


def plain(text: str) -> str:
    """Lower case, one space between words, no quotes, no full stop at the end."""
    return re.sub(r"\s+", " ", text.lower().strip(" \n\t.\"'`*")).strip()


def yes_no(reply: str) -> bool | None:
    """Whether a reply says yes or no: exactly one of the two words must occur in it."""
    words = set(re.findall(r"[a-z]+", reply.lower())) & {"yes", "no"}
    return words == {"yes"} if len(words) == 1 else None


# --- short answers ----------------------------------------------------------------------------------------------------

_NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS |= {"none": "0"}
_SHORT = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
_CONTRACTIONS = {w.replace("'", ""): w for w in _SHORT if w.count("'") == 1} | {
    w[:i] + w[i + 1 :]: w for w in _SHORT if w.count("'") > 1 for i, c in enumerate(w) if c == "'"
}


def vqa_normal(text: str) -> str:
    """The text as EvalAI compares answers (TextVQA): neither punctuation nor articles, numbers to ten as digits,
    contractions with their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text).strip()
    out = text
    for mark in ';/[]"{}()=+\\_-><@`!':
        out = out.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_NUMBERS.get(w, w) for w in out.split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQA accuracy: over left-out annotators, the mean of min(1, how many others agree / 3). With fewer than four
    annotators the answer counts if any of them gave it."""
    said, given = vqa_normal(reply), [vqa_normal(a) for a in answers]
    if len(given) < 4:
        return float(said in given)
    matches = [g == said for g in given]
    return sum(min(1.0, (sum(matches) - m) / 3) for m in matches) / len(given)


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def anls(reply: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """1 - edit distance / length to the nearest answer, 0 below the threshold (ANLS, arXiv 1907.00490)."""
    said = " ".join(reply.lower().split())
    best = 0.0
    for answer in answers:
        true = " ".join(answer.lower().split())
        best = max(best, 1 - edit_distance(said, true) / max(len(said), len(true), 1))
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
    """ChartQA's relaxed accuracy (arXiv 2203.10244): a number within 5 % of the answer, else the same text."""
    for answer in answers:
        said, true = number(reply), number(answer)
        if said is not None and true is not None:
            if abs(said - true) <= tolerance * abs(true) if true else said == 0:
                return 1.0
        elif plain(reply) == plain(answer):
            return 1.0
    return 0.0


def contains(reply: str, answers: Sequence[str], spaces: bool = True) -> float:
    """Whether a reply contains an answer, in lower case; without ``spaces`` they do not count (OCRBench's formulas)."""

    def fold(text: str) -> str:
        text = text.lower().strip().replace("\n", " ")
        return text if spaces else text.replace(" ", "")

    return float(any(fold(a) and fold(a) in fold(reply) for a in answers))


# --- judges' marks ----------------------------------------------------------------------------------------------------


def marks(reply: str, low: float, high: float, count: int | None = None) -> list[float] | None:
    """The list of marks in a judge's reply: the value of "score" of the last JSON object in it (a list, or one
    number). None when there is none, a mark is outside [low, high], or there are not ``count`` of them."""
    found = None
    for text in re.findall(r"\{[^{}]*\}", reply):
        try:
            value = json.loads(text, strict=False).get("score")  # line breaks in the reasoning
        except (ValueError, AttributeError):
            continue
        value = [value] if isinstance(value, (int, float)) else value
        if isinstance(value, list) and value and all(type(v) in (int, float) for v in value):
            found = [float(v) for v in value]
    if not found or (count and len(found) != count) or not all(low <= v <= high for v in found):
        return None
    return found


def named_marks(reply: str, names: Sequence[str] | int, low: int, high: int) -> dict[str, float] | None:
    """The marks of lines "Name: digit", by name in lower case; ``names`` are those that must be there, or how many.
    None when they are not, or a mark is outside [low, high]."""
    pattern = r"^[\s\-*\d.)]*([A-Za-z][A-Za-z &/\-]*?)\**\s*[:：]\s*\**\s*(\d+)\s*(?:/\s*\d+)?\s*\**\s*\.?\s*$"
    lines = re.findall(pattern, reply, re.MULTILINE)
    found = {name.strip().lower(): float(mark) for name, mark in lines}
    wanted = len(found) == names if isinstance(names, int) else all(n.lower() in found for n in names)
    if not wanted or not all(low <= v <= high for v in found.values()):
        return None
    return found if isinstance(names, int) else {n.lower(): found[n.lower()] for n in names}
