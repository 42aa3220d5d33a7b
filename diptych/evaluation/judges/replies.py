"""What a reply says: the option it chooses, yes or no, and a judge's marks. The library's own reading of replies.

A reply that says nothing clear gives ``None``; nothing is guessed or drawn at random. Every letter is read alike, so
"A" and "I" are options and not words wherever "B" is one. How official scorers read replies is in ``official.py``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def spoken(reply: str) -> str:
    """The reply without its thoughts: what follows ``</think>``, and nothing where the thinking never ends."""
    answer = reply.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer


# --- the answer in a reply --------------------------------------------------------------------------------------------

_TAGS = r"answer|final_answer|final|choice|option|solution"
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|bf|rm|emph)\s*\{([^{}]*)\}")
_QUOTED = re.compile(r"(?<!\w)[\"'“”‘’「」『』]([A-Za-z])[\"'“”‘’「」『』](?!\w)")
_KEYS = ("final_answer", "final answer", "answer", "choice", "option", "letter", "prediction")


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, outermost ones in order and each followed by those nested in it."""
    decoder, at = json.JSONDecoder(strict=False), 0  # judges put line breaks into strings
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
        except RecursionError:
            return
        else:
            yield from _nested(value)


def _nested(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a JSON value, an outer one before those inside it."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nested(inner)


def marked(reply: str) -> str | None:
    r"""What a reply marks as its answer: the last of ``\boxed{...}``, ``<answer>...</answer>`` and a JSON object's
    "answer"; None where it marks nothing."""
    answers: list[tuple[int, str]] = []
    for match in list(re.finditer(r"\\?\bboxed\s*\{|\\fbox\s*\{", reply))[-1:]:
        depth = end = 0
        for end in range(match.end() - 1, len(reply)):
            depth += {"{": 1, "}": -1}.get(reply[end], 0)
            if not depth:
                break
        answers.append((match.start(), reply[match.end() : end if not depth else len(reply)]))
    for match in re.finditer(rf"<({_TAGS})>(.*?)(?:</\1>|$)", reply, re.DOTALL | re.IGNORECASE):
        answers.append((match.start(), match[2]))
    for match in re.finditer(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|$)", reply, re.DOTALL):
        answers.append((match.start(), match[1]))
    if answers:
        return max(answers)[1]
    for row in reversed(list(objects(reply))):
        values = {str(k).lower(): v for k, v in row.items() if isinstance(v, (str, int, float))}
        if key := next((k for k in _KEYS if k in values), None):
            return str(values[key])
    return None


def unmarked(text: str) -> str:
    """The text without Markdown and LaTeX, with full-width characters as ASCII and no quotes around a letter."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    for _ in range(3):
        text = _MARKUP.sub(r"\1", text)
    text = re.sub(r"\\[()\[\]]|\$|\*+|`+|~~|\\,", "", text)
    text = re.sub(r"(?<!\w)_{1,2}(\S.*?\S|\S)_{1,2}(?!\w)", r"\1", text)
    text = re.sub(r"</?(?:b|i|u|em|strong|p|br|span|div)\s*/?>", " ", text, flags=re.IGNORECASE)
    return _QUOTED.sub(r"\1", text).strip()


def plain(text: str) -> str:
    """Lower case, one space between words, no quotes, no full stop at the end."""
    return re.sub(r"\s+", " ", text.lower().strip(" \n\t.。\"'`*")).strip()


# --- multiple choice --------------------------------------------------------------------------------------------------

_LABEL = (  # what announces an answer
    r"(?:answers?|ans|solution|conclusion|verdict|prediction|selection|response|pick|guess|"
    r"(?:correct|right|best|final|chosen|true|suitable|appropriate|likely|matching|only)\s+(?:\w+\s+)?"
    r"(?:option|choice|letter|one|statement)|antwort|lösung|réponse|respuesta|risposta|resposta|ответ|(?:the|correct)\s+letter|correct(?=\s*:))"
)
_IS = (
    r"(?:\s*(?:to\s+(?:the|this|your)\s+question|here|choice|option|letter|for\s+(?:this|the)\s+question))?"
    r"(?:\s*(?:[:：=]|->|→|=>|[-–—](?=[\s(A-Z]))|\s+(?:is|was|are|would\s+be|should\s+be|must\s+be|will\s+be|could\s+be|"
    r"has\s+to\s+be|ist|est|es|è|é|lautet|seems\s+to\s+be|appears\s+to\s+be|looks\s+like)|'s)?"
    r"(?:\s*[:：]|\s+(?:clearly|definitely|probably|likely|most\s+likely|therefore|thus|simply|indeed|certainly|"
    r"obviously|surely|undoubtedly|actually|still|now|both|either|maybe|perhaps))*"
)
_CHOOSES = (
    r"(?:(?:choose|chose|pick|picked|select|selected|choosing|selecting|say|believe|think|guess|vote\s+for|"
    r"opt\s+for|go\s+(?:with|for)|going\s+(?:with|for)|settle\s+on|prefer|conclude|confirm)"
    r"(?:\s*:|\s+that)?(?:\s+(?:it|this|that|the\s+answer)\s*(?:is|'s|would\s+be|should\s+be|must\s+be))?|"
    r"(?:it|this|that|which|answer)(?:\s+is|'s|\s+(?:must|should|would|will|could|has\s+to|can\s+only)\s+be|"
    r"\s+(?:seems|appears)\s+to\s+be|\s+looks\s+like)"
    r"(?:\s+(?:clearly|definitely|probably|likely|most\s+likely|obviously|certainly|surely|indeed|actually))?|"
    r"(?:must|should|would|has\s+to)\s+be|(?:corresponds?|points?|leads?\s+(?:me|us)?)\s+to|matches|"
    r"(?:^|(?<=[.,;!?\n]))\s*(?:so|thus|therefore|hence|probably|likely|most\s+likely|definitely|clearly|obviously|"
    r"maybe|perhaps|certainly|surely|finally|in\s+conclusion|in\s+summary|overall|sorry|actually|rather|instead|"
    r"correction)[,:]?|\bbut(?:\s+rather)?|\#{3,}|∴|⇒|=>|→)"
)
_CJK = (
    r"(?:(?:正确|最终|最佳|最終|正しい|我的|参考)?(?:的)?(?:答案|選項|选项|选择|選擇|答え|解答|回答|正解|정답|답변|답)"
    r"(?:应该|應該|應|应|就|便)?(?:是|为|為|选|選|は|が|은|는|:|：)*|(?:故|应|應|因此|所以|我|应该|就|便|则|可)?(?:选|選|择)(?:择|擇)?"
    r"(?:项|項)?(?:是|为|為|:|：)?)"
)
_NOUN = r"(?:(?:the\s+)?(?:option|choice|letter|answer|number|variante?|opción|opção|вариант)\s*[:：]?\s*)?"
_AFTER = (  # words that follow a letter and never an article
    r"because|since|as|due|given|based|which|that|is|was|in|from|for|with|by|but|not|although|though|while|where|when|"
    r"if|so|then|the|this|it|there|we|i|he|she|they|on|at|to|who|whose|seems|appears|would|must|should|can|fits|"
    r"matches|here|again|instead|rather|only|too|and|or|nor|over|than"
)
_RIGHT = (
    r"(?:correct|right|true|the\s+(?:\w+\s+)?(?:answer|option|choice|one|letter|solution)|my\s+(?:\w+\s+)?(?:answer|choice|pick)|"
    r"best|the\s+(?:best|most)|most\s+\w+|accurate|appropriate|it\b|what\b)"
)
_WRONG = r"(?:wrong|incorrect|false|not|n't|never|ruled|eliminated|excluded|impossible|unlikely|out\b|no\s+longer)"
_WITHDRAWN = re.compile(
    r"\b(?:no|nope|wait|hmm+|oops|sorry|correction|actually|scratch\s+that|on\s+second\s+thoughts?|let\s+me\s+"
    r"(?:re\w+|correct|check|think|look)|i\s+(?:take\s+that\s+back|made\s+a\s+mistake|was\s+wrong|misread|misspoke)|"
    r"my\s+mistake)\b|不对|不對|等等|更正|いや",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:that|this|it|which|answer)(?:\s+(?:is|was|can|may|must|seems|cannot)|'s)\s*(?:be\s+)?"
    r"(?:wrong|incorrect|not\s+(?:right|correct|true)|a\s+mistake|mistaken)|n't\s+(?:right|correct)\b|不对|不對",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:can\s?not|can't|could\s+not|couldn't|unable\s+to|not\s+able\s+to|impossible\s+to|difficult\s+to|hard\s+to)\s+"
    r"(?:\w+\s+){0,2}(?:determine|answer|tell|see|say|identify|decide|choose|select|pick|help|assist|know|be\s+sure|view|"
    r"provide|conclude|be\s+(?:determined|answered|seen))|\b(?:do\s+not|don't|did\s+not|didn't)\s+know\b|"
    r"\b(?:not|n't)\s+(?:really\s+|quite\s+|entirely\s+)?(?:sure|certain)\b|\bno\s+idea\b|\bunsure\b|\bas\s+an\s+ai\b|"
    r"\b(?:none|neither|nothing)\s+of\s+(?:the|these|them|those)\b|\bno\s+(?:correct|right|valid|suitable)\s+"
    r"(?:answer|option|choice)|\binsufficient\s+information|\bnot\s+enough\s+information|无法|無法|不知道|不确定|不確定|わかりません|"
    r"분からない|모르",
    re.IGNORECASE,
)


def choice(reply: str, options: Mapping[str, str]) -> str | None:
    r"""The letter that a reply chooses; ``options`` maps capital letters to texts. The last answer counts.

    In this order: what the reply marks (``\boxed{B}``, ``<answer>B</answer>``, {"answer": "B"}); a reply that is one
    letter or one option; the last sentence that announces an answer ("The answer is B", "B is correct", "答案是B");
    the last line and then the first, where it is a letter or begins with one; the only letter in brackets; the only
    option whose text occurs. Options that the reply repeats, letters that it rejects or withdraws, and refusals do not
    count; two letters at once are no answer."""
    if (inner := marked(spoken(reply))) is not None:
        return _chosen(unmarked(inner), options)
    return _chosen(unmarked(spoken(reply)), options)


def _chosen(text: str, options: Mapping[str, str]) -> str | None:
    """``choice`` of a text without markup."""
    if (letter := _whole(text, options)) is not None:
        return letter
    text = _without_lists(text, options)
    if (letter := _whole(text, options)) is not None:
        return letter
    reader = _Letters(options)
    cuts = [m.end() for m in _WITHDRAWN.finditer(text) if m.start()]
    for cut in reversed(cuts):  # what follows a withdrawal is the answer where it holds one
        tail = text[cut:].strip(" ,.;:!-–—…")
        announced, letter = reader.announced(tail)
        letter = letter if announced else reader.at_the_edge(tail)
        if letter is not None:
            return letter
        if announced or _TAKEN_BACK.search(text[cut:]):
            return None
    announced, letter = reader.announced(text)
    if announced:
        return letter
    if _REFUSAL.search(text):
        return None
    if _TAKEN_BACK.search(text):
        return None
    if reader.several(text):
        return None
    return reader.at_the_edge(text) or reader.bracketed(text) or reader.named(text) or reader.by_text(text)


def _whole(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text is, or whose option it is."""
    bare = text.strip(" \n\t.,:;!'\"()[]{}<>#_~。、，：）（【】").upper()
    if bare in options:
        return bare
    for k, v in options.items():  # "D. I cannot tell", where that is the option
        if plain(v) and re.fullmatch(
            rf"[(\[]?{k}[)\].:]*\s*{re.escape(plain(unmarked(v)))}", plain(text), re.IGNORECASE
        ):
            return k
    same = [k for k, v in options.items() if plain(unmarked(v)) == plain(text) and plain(text)]
    return same[0] if len(same) == 1 else None


def _without_lists(text: str, options: Mapping[str, str]) -> str:
    """The text without the options that it repeats: two or more in a row, in their order."""
    spans = []
    for letter, option in options.items():
        if words := re.escape(unmarked(option)):
            label = rf"(?:option\s+)?[(\[]?{letter}(?:[)\]][.:]?|[.:、,]|\s[-–—]|(?=\s))"
            entry = rf"(?<![A-Za-z0-9]){label}\s*{words}(?![A-Za-z0-9])"
            spans += [(m.start(), m.end(), letter) for m in re.finditer(entry, text, re.IGNORECASE)]
    runs: list[list[tuple[int, int, str]]] = []
    for span in sorted(spans):
        last = runs[-1][-1] if runs else None
        joined = last and re.fullmatch(r"[\s.,;|/\-*•·]*", text[last[1] : span[0]]) and last[2] < span[2]
        if joined and last and span[0] >= last[1]:
            runs[-1].append(span)
        elif not last or span[0] >= last[1]:
            runs.append([span])
    for run in reversed(runs):
        if len(run) > 1:
            text = f"{text[: run[0][0]]}\n{text[run[-1][1] :]}"
    text = re.sub(r"(?im)^[^\n]*\b(?:options|choices)\b(?:\s+(?:are|were|include))?\s*:?\s*$", "", text)
    return text.strip()


class _Letters:
    """Finds letters of given options in a text: announced, at its edges, in brackets, or by the option's text."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self.options = options
        letters = "".join(options)
        anyone = f"{letters}{letters.lower()}"
        one = rf"[(\[]?[{letters}](?![A-Za-z0-9'])[)\]]?"
        later = rf"(?:\s*(?:[,/&、]|and\b|or\b|和|或|及)\s*(?:or\b\s*|and\b\s*)?(?:option\s+)?{one})"
        several = rf"{one}{later}{{1,9}}(?=\s*(?:[.,;/&\n)]|$|are\b|both\b|都))"
        self._several = re.compile(several)
        restated = "|".join(f"{k}(?=[\\s:]+{re.escape(plain(unmarked(v)))})" for k, v in options.items() if plain(v))
        ended = r"(?=\s*(?:[.,;:!?)\]}>\"'，。；：）、！]|\n|$)|\s*[-–—(\[](?:\s|\w)|[^\x00-\x7f])"
        follows = rf"(?:{ended}|(?=\s+(?:{_AFTER})\b)|(?=\s+[A-Z][a-z]+\b))"
        opened = r"\s*[(\[{<\"'「【]*\s*"
        small = rf"([{letters.lower()}])(?:{ended}(?!\s*[,]\s*\w+\s+\w)|(?=\s+(?:because|since|as)\b))"
        target = rf"(?:([{letters}])(?![A-Za-z0-9'/]){follows}|(?i:({restated or '(?!)'}))|{small})"
        bracketed = rf"[(\[【「]\s*([{anyone}])\s*[)\]】」]"
        lead = rf"(?i:\b{_LABEL}{_IS}\s*|\b{_CHOOSES}\s*|(?<!\w){_CHOOSES}\s*)(?i:{_NOUN})"
        self._says = re.compile(rf"(?:{lead}|{_CJK}\s*)(?:{bracketed}|{opened}{target})", re.MULTILINE)
        lone = rf"(?<![A-Za-z0-9'/\-])[(\[]?([{letters}])[)\]]?(?![A-Za-z0-9'/])"
        self._is_right = re.compile(
            rf"{lone}(?:[.:]\s*[^.\n]{{1,60}}?)?(?i:\s+(?:is|was|seems|looks|appears|would\s+be|must\s+be|should\s+be)"
            rf"(?:\s+(?:clearly|definitely|probably|likely|indeed|therefore|obviously|thus|certainly))*\s+{_RIGHT}"
            r"|\s*(?:是|为)?(?:正确|正確|对的|對的|答案|正解)|\s*が正解|\s+(?:fits|matches)\b)"
        )
        group = rf"{one}(?:\s*(?:[,/&、和或]|and\b|or\b|nor\b)\s*{one}){{0,9}}"
        self._denied = [
            re.compile(
                rf"(?i:\b(?:not|isn't|n't|rather\s+than|instead\s+of|rul(?:e|es|ed|ing)\s+out|eliminat\w+|exclud\w+|"
                rf"discard\w*|reject\w*|except|unlike|neither|over|不是|不选|非)\s*(?:be\s+|option\s+|choice\s+|options\s+|"
                rf"choose\s+|pick\s+)?)({group})"
            ),
            re.compile(
                rf"(?<![A-Za-z0-9'/\-])({group})(?:[.:]\s*[^.\n]{{1,60}}?)?(?i:\s*"
                rf"(?:is|are|was|were|seems?|looks?|can(?=not|'t|\s+be)|could|does|do|would|must|may)?\s*(?:be\s+)?"
                rf"(?:both\s+|clearly\s+|definitely\s+|also\s+)?{_WRONG}|\s*(?:是)?(?:错|不对|不正确|錯))"
            ),
        ]
        self._edge = re.compile(
            rf"(?:[(\[]([{anyone}])[)\]]|([{letters}])(?:[)\]]|[.:,、，。：;](?=\s|$|[^\x00-\x7f])|\n|$|"
            rf"\s[-–—]+\s|\s+(?=(?:because|since|as|due|given|based|which|with)\b|[(\[])))"
        )

    def _denials(self, text: str) -> list[tuple[int, int]]:
        """Where the text rejects letters; "B, A is wrong" rejects one, "B and A are wrong" two."""
        spans = [m.span(1) for m in self._denied[0].finditer(text)]
        for m in self._denied[1].finditer(text):
            plural = re.match(r"\s*(?:are|were|both|都)", text[m.end(1) :])
            last = max(m.start(1), m.end(1) - 2)
            spans.append((m.start(1) if plural else last, m.end(1)))
        return spans

    def announced(self, text: str) -> tuple[bool, str | None]:
        """(whether the text announces an answer, the last one announced); None for several letters at once."""
        denied = self._denials(text)
        answers: list[tuple[int, str | None]] = []
        for pattern in (self._says, self._is_right):
            for m in pattern.finditer(text):
                group = next(i for i in range(1, len(m.groups()) + 1) if m[i])
                start = m.start(group)
                if any(a <= start < b for a, b in denied):
                    continue
                open_at = start - 1 if start and text[start - 1] in "([" else start
                answers.append((start, None if self._several.match(text, open_at) else m[group].upper()))
        if not answers:
            return False, None
        return True, max(answers, key=lambda pair: pair[0])[1]

    def several(self, text: str) -> bool:
        """Whether the text begins with several letters that it does not reject: "A, B", "(A) or (C)"."""
        return bool(self._several.match(text)) and not any(a <= 1 for a, _ in self._denials(text))

    def at_the_edge(self, text: str) -> str | None:
        """The letter that is the last line or the first, or begins it."""
        lines = [line.strip(" \t#>-•") for line in text.splitlines() if line.strip(" \t#>-•")]
        denied = {c for a, b in self._denials(text) for c in re.findall(r"[A-Z]", text[a:b])}
        if lines and (letter := _whole(re.split(r"(?<=[.!?;。])\s+", lines[-1])[-1], self.options)) not in {
            None,
            *denied,
        }:
            return letter
        for line in (*lines[-1:], *lines[:1]):
            if (letter := _whole(line, self.options)) and letter not in denied:
                return letter
            if self.several(line):
                return None
            m = self._edge.match(line) or self._own_text(line)
            letter = next((g.upper() for g in m.groups() if g), None) if m else None
            if letter and letter not in denied:
                others = set(re.findall(rf"[(\[]([{''.join(self.options)}])[)\]]", line)) - {letter} - denied
                return None if others else letter
        return None

    def _own_text(self, line: str) -> re.Match[str] | None:
        """A letter at the beginning of a line that its own option's text follows: "B dark red"."""
        for k, v in self.options.items():
            if plain(v) and (m := re.match(rf"({k})\s+{re.escape(unmarked(v))}(?![A-Za-z0-9])", line, re.IGNORECASE)):
                return m
        return None

    def bracketed(self, text: str) -> str | None:
        """The only letter in brackets."""
        denied = self._denials(text)
        letters = {
            m[1]
            for m in re.finditer(rf"[(\[]([{''.join(self.options)}])[)\]]", text)
            if not any(a <= m.start(1) < b for a, b in denied)
        }
        return letters.pop() if len(letters) == 1 else None

    def named(self, text: str) -> str | None:
        """The only letter that is called an option: "option B", "choice C"."""
        denied = self._denials(text)
        letters = "".join(self.options)
        options = {
            m[1]
            for m in re.finditer(rf"(?i:option|choice|letter|选项|選項)\s*([{letters}])(?![A-Za-z0-9'])", text)
            if not any(a <= m.start(1) < b for a, b in denied)
        }
        return options.pop() if len(options) == 1 else None

    def by_text(self, text: str) -> str | None:
        """The only option whose text occurs, not negated and not inside a longer option's text that occurs."""
        low, held = plain(text), {}
        for k, v in self.options.items():
            words = plain(unmarked(v))
            if not words:
                continue
            before = r"(?<![a-z0-9.])" if words[0].isascii() and words[0].isalnum() else ""
            after = r"(?![a-z0-9]|\.\d)" if words[-1].isascii() and words[-1].isalnum() else ""
            places = list(re.finditer(before + re.escape(words) + after, low))
            if any(not re.search(r"(?:\bnot|n't|\bno|不是)\s*(?:an?\s+|the\s+)?$", low[: m.start()]) for m in places):
                held[k] = words
        held = {k: v for k, v in held.items() if not any(v != w and v in w for w in held.values())}
        return next(iter(held)) if len(held) == 1 else None


# --- yes or no --------------------------------------------------------------------------------------------------------

_SAID = {
    True: ("是", "是的", "对", "對", "有", "正确", "はい", "예", "네", "sí", "oui", "ja", "да"),
    False: ("否", "不", "不是", "没有", "沒有", "不对", "いいえ", "아니요", "non", "nein", "нет"),
}  # of whole replies


def yes_no(reply: str) -> bool | None:
    """Whether a reply says yes or no: one of the two words occurs in it, or the last sentence that announces an answer
    holds one of them."""
    text = spoken(reply)
    text = unmarked(inner if (inner := marked(text)) is not None else text).lower()
    whole = text.strip(" .,!。！\n\t")
    for value, forms in _SAID.items():
        if whole in forms:
            return value
    words = set(re.findall(r"[a-z]+", text)) & {"yes", "no"}
    if len(words) == 1:
        return words == {"yes"}
    announced = re.findall(rf"\b{_LABEL}{_IS}\s*(yes|no)\b(?!\s+(?:or|and)\b)", text)
    return announced[-1] == "yes" if announced else None


# --- judges' marks ----------------------------------------------------------------------------------------------------


def marks(reply: str, low: float, high: float, count: int | None = None) -> list[float] | None:
    """The list of marks in a judge's reply: the value of "score" of the last JSON object in it (a list, or one
    number). None when there is none, a mark is outside [low, high], or there are not ``count`` of them."""
    values: list[float] = []
    for row in objects(reply):
        value = row.get("score")
        value = value if isinstance(value, list) else [value]
        if value and all(type(v) in (int, float) for v in value):
            values = [float(v) for v in value]
    if not values or (count and len(values) != count) or not all(low <= v <= high for v in values):
        return None
    return values


def named_marks(reply: str, names: Sequence[str] | int, low: int, high: int) -> dict[str, float] | None:
    """The marks of lines "Name: digit" or of a JSON object {"Name": digit}, by name in lower case; ``names`` are those
    that must be there, or how many. None when they are not, or a mark is outside [low, high]."""
    values: dict[str, float] = {}
    for row in objects(reply):
        rated = {str(k).strip().lower(): float(v) for k, v in row.items() if type(v) in (int, float)}
        values = rated or values
    if not values:
        pattern = r"^[ \t\-*\d.)]*([A-Za-z][A-Za-z &/\-]*?)\**\s*[:：]\s*\**\s*(\d+)\s*(?:/\s*\d+)?\s*\**\s*\.?\s*$"
        values = {name.strip().lower(): float(mark) for name, mark in re.findall(pattern, reply, re.MULTILINE)}
    wanted = len(values) == names if isinstance(names, int) else all(n.lower() in values for n in names)
    if not wanted or not all(low <= v <= high for v in values.values()):
        return None
    return values if isinstance(names, int) else {n.lower(): values[n.lower()] for n in names}
