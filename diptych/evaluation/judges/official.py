"""How official scorers read and grade replies. Every function gives the value that the named program gives.

``tests/evaluation/golden`` holds tables of (reply, answer, official value) that were computed with those programs:
lmms-eval 0.7.3 (which carries the authors' own code for most of them) and pycocoevalcap 1.2. docs/evaluation.md says
where the library's own reading differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

# --- yes or no --------------------------------------------------------------------------------------------------------


def mme(reply: str) -> bool | None:
    """MME's ``calculation.py`` as lmms-eval has it: the whole reply, a lone y or n, or the first four characters."""
    text = reply.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": True, "n": False}.get(text)
    return True if "yes" in text[:4] else False if "no" in text[:4] else None


def pope(reply: str) -> bool | None:
    """lmms-eval's POPE: the whole reply must be the word."""
    return {"yes": True, "no": False}.get(reply.lower().strip())


def pope_authors(reply: str) -> bool:
    """The POPE authors' ``evaluate.py`` (github.com/RUCAIBox/POPE): no where the first sentence holds the words "No",
    "no" or "not", else yes."""
    words = reply.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


# --- multiple choice --------------------------------------------------------------------------------------------------

_WRAPS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def mmbench(reply: str, options: Mapping[str, str], letters: str = "ABCDE") -> str | None:
    """MMBench's matching of a reply with options, before any language model is asked (``can_infer`` of lmms-eval's
    ``mmbench_evals.py`` and of VLMEvalKit): one word of it is a letter, alone or with punctuation; else it holds the
    text of exactly one option. "A" does not count as a word of more than three words."""
    words = reply.split()
    alone = [c for c in letters if c in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, after in _WRAPS:
        mentioned = [c for c in letters if before + c + after in words]
        if len(mentioned) == 1:
            return mentioned[0]
    held = [k for k, v in options.items() if v.lower() in reply.lower()]
    return held[0] if len(held) == 1 else None


def mmmu_choice(reply: str, options: Mapping[str, str]) -> str | None:
    """MMMU's ``parse_multi_choice_response``: a letter in brackets, else one before a space, else one before a full
    stop, else the text of an option in a reply of more than five words; the last of several. None where the official
    parser draws an option at random."""
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        reply = reply.strip(mark)
    text = f" {reply} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if mentioned := [k for k in options if form.format(k) in text]:
            return max(mentioned, key=lambda k: text.rfind(place.format(k)))
    if len(text.split()) > 5:
        low = text.lower()
        if mentioned := [k for k, v in options.items() if v.lower() in low]:
            return max(mentioned, key=lambda k: low.rfind(options[k].lower()))
    return None


def first_letter(reply: str) -> str:
    """SEED-Bench of lmms-eval: the first character of the reply, in upper case."""
    return reply.strip()[:1].upper()


def cv_bench(reply: str) -> str:
    """CV-Bench of lmms-eval: the first letter of the reply, after brackets and spaces, in upper case; "" if none."""
    match = re.match(r"[(\s]*([A-Z])", reply.strip(), re.IGNORECASE)
    return match[1].upper() if match else ""


def mmvp(reply: str) -> str:
    """MMVP of lmms-eval: the first A or B that is the reply, begins it, follows "answer is" or "option", or ends a
    word; "" if none."""
    text = reply.strip()
    patterns = (r"^\(?([AB])\)?\.?\s*$", r"^\(?([AB])\)?[.\s]", r"answer\s+is\s+\(?([AB])", r"option\s+\(?([AB])")
    for pattern in (*patterns, r"\(?([AB])\)?(?:\s|$)"):
        if match := re.search(pattern, text, re.IGNORECASE):
            return match[1].upper()
    return text[:1].upper() if text[:1].upper() in ("A", "B") else ""


def realworldqa(reply: str, answer: str) -> float:
    """RealWorldQA of lmms-eval for questions without options: the same text, but for case and full stops at the end."""
    return float(reply.lower().strip().rstrip(".") == answer.strip().lower())


# --- MMMU's open questions --------------------------------------------------------------------------------------------

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)  # thousands with commas; scientific; plain


def mmmu_open(reply: str, answers: Sequence[str]) -> float:
    """MMMU's ``parse_open_response`` and ``eval_open``: a number of the reply equals an answer to two decimals, or a
    key phrase holds an answer's text. Key phrases are what follows "is ", "answer ", "so " … in each line, in the last
    line also "="."""
    lines = re.split(r"\.\s(?=[A-Z])|\n", reply.strip().strip(".").lower())
    phrases = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = _shortest(tails)
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            phrases.append(shortest)
    phrases = phrases or [reply.strip().strip(".").lower()]
    numbers = [n for phrase in phrases for pattern in _NUMBER for n in re.findall(pattern, phrase)]
    candidates = [value for text in (*phrases, *numbers) for value in _mmmu_normal(text)]
    true = [value for answer in answers for value in _mmmu_normal(answer)]
    texts = [t for t in true if isinstance(t, str)]
    return float(any(any(t in s for t in texts) if isinstance(s, str) else s in true for s in candidates))


def _shortest(tails: Sequence[str]) -> str:
    """The shortest of the tails in the official order, where an empty one is replaced by whatever comes next."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _mmmu_normal(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; of one character, with a space before or after."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        low = text.lower()
        return [" " + low, low + " "] if len(low) == 1 else [low]


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
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has it this way round
del _CONTRACTIONS["somebodyd"]


def evalai(text: str) -> str:
    """The text as EvalAI compares answers (TextVQA): neither punctuation nor articles, numbers to ten as digits,
    contractions with their apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqav2(text)


def vqav2(text: str) -> str:
    """The text as VQAv2's evaluation compares answers: as ``evalai``, but commas and question marks are punctuation,
    and a comma between digits removes all punctuation without a space."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    joined = re.search(r"(?<=\d),+(?=\d)", text) is not None
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        out = out.replace(mark, "" if joined or mark + " " in text or " " + mark in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # the official call passes a flag as the count
    words = [w for w in (_NUMBERS.get(w, w) for w in out.lower().split()) if w not in ("a", "an", "the")]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words)


def vqa_accuracy(reply: str, answers: Sequence[str], normal: Callable[[str], str] = evalai) -> float:
    """VQA accuracy (arXiv 1505.00468): over left-out annotators, the mean of min(1, how many others agree / 3)."""
    answer, given = normal(reply), [normal(a) for a in answers]
    matches = [g == answer for g in given]
    return sum(min(1.0, (sum(matches) - m) / 3) for m in matches) / len(given)


def anls(reply: str, answers: Sequence[str]) -> float:
    """ANLS of lmms-eval and Qwen-VL: the edit distance of texts in lower case with one space between words, divided by
    the longer length of the *raw* texts; 1 minus that of the nearest answer, 0 below 0.5."""
    from diptych.evaluation.judges.short_answers import edit_distance

    text = " ".join(reply.lower().split())
    near = []
    for answer in answers:
        length = max(len(answer.upper()), len(reply.upper()))
        near.append(edit_distance(" ".join(answer.lower().split()), text) / length if length else 0.0)
    value = 1 - min(near)
    return value if value >= 0.5 else 0.0


def relaxed(reply: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): what Python reads as a number, or as one before a
    percent sign, within 5 % of an answer that is not 0; else the same text but for case."""
    return float(any(_relaxed(reply, answer) for answer in answers))


def _relaxed(reply: str, answer: str) -> bool:
    value, true = _plain_number(reply), _plain_number(answer)
    if value is not None and true:
        return abs(value - true) / abs(true) <= 0.05
    return reply.lower() == answer.lower()


def _plain_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


FORMULA = "Handwritten Mathematical Expression Recognition"
_WIDE = {0xFF01 + i: 0x21 + i for i in range(0x5E)} | {0x3000: 0x20}


def ocrbench(reply: str, answers: Sequence[str], formula: bool = False) -> float:
    """OCRBench (arXiv 2305.07895): the reply contains an answer, in lower case and with full-width characters as ASCII;
    for a ``formula`` (HME100k) white space is ignored and case is kept."""

    def fold(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(_WIDE).lower().strip().replace("\n", " ")

    return float(any(fold(a) in fold(reply) for a in answers))
