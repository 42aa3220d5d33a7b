"""The sections of a report, and the HTML and Markdown files that are made of them.

The HTML comes from ``templates/report.html.jinja``, where every text is escaped. Only files that this module wrote are
overwritten; any other file at that path needs ``force``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import jinja2
import PIL.Image

from diptych.evaluation.scores import Score
from diptych.machine import disk
from diptych.parts.images import data_uri

# --- sections ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines, with preformatted text such as commands below."""

    title: str
    text: str = ""
    code: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs that are not empty."""
        return [p for p in self.text.split("\n\n") if p.strip()]


@dataclass(frozen=True)
class Table:
    """Rows of texts and ``Score``s under column names; the first column names the row. Raises ``ValueError`` for a row
    with another number of cells than there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Score, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        if wrong := next((row for row in self.rows if len(row) != len(self.columns)), None):
            raise ValueError(f"the row {wrong!r} has {len(wrong)} cells, the table has {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """One large picture, decoded or as PNG bytes."""

    title: str
    image: PIL.Image.Image | bytes
    caption: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture, or several in order (before, after), with its caption, its verdict and the reason. Verdicts link to
    ``id``."""

    images: tuple[PIL.Image.Image, ...]
    caption: str
    ok: bool | None = None
    note: str = ""
    id: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    title: str
    items: tuple[Shown, ...]
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """A question about a picture, the answer and the expected answer."""

    image: PIL.Image.Image | None
    question: str
    answer: str
    expected: str
    ok: bool | None = None
    id: str = ""


@dataclass(frozen=True)
class Questions:
    """Answered questions with their pictures."""

    title: str
    items: tuple[Asked, ...]
    note: str = ""


@dataclass(frozen=True)
class Verdicts:
    """A collapsed list of every verdict: (item, whether the item is shown on the page, right, grade, reason)."""

    title: str
    items: tuple[tuple[str, bool, bool, float, str], ...]


Section = Text | Table | Figure | Gallery | Questions | Verdicts


MARK = '<meta name="generator" content="diptych">'
MARKDOWN_MARK = "<!-- written by diptych -->"


# --- HTML -------------------------------------------------------------------------------------------------------------


def write_report(
    path: str | Path,
    sections: Sequence[Section],
    title: str = "Evaluation report",
    summary: str = "",
    *,
    force: bool = False,
) -> Path:
    """Writes the sections as one HTML file and returns its path. The file needs no other file and no network.

    Raises ``ValueError`` for an unknown section, and for a file at ``path`` that is not a report (``force`` overwrites
    it)."""
    for section in sections:
        if not isinstance(section, get_args(Section)):
            names = ", ".join(kind.__name__ for kind in get_args(Section))
            raise ValueError(f"{section!r} is no section; choose from {names}")
    page = _templates().get_template("report.html.jinja").render(title=title, summary=summary, sections=sections)
    return _write(path, page, MARK, force)


def check_replaceable(path: str | Path, *, force: bool = False) -> None:
    """Raises ``ValueError`` where ``write_report`` would refuse to overwrite the file at ``path``."""
    _check(Path(path), MARK, force)


def _write(path: str | Path, text: str, mark: str, force: bool) -> Path:
    """Writes a file in one step, where there is none or one that starts with the mark in its first lines."""
    _check(Path(path), mark, force)
    disk.write_text(Path(path), text)
    return Path(path)


def _check(path: Path, mark: str, force: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    if not force and path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(1000):
                raise ValueError(
                    f"{path} was not written by diptych; choose another name, or overwrite it with --force"
                )


@cache
def _templates() -> jinja2.Environment:
    """The templates with their filters; whatever a template prints is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": data_uri, "anchor": _anchor, "bar": _bar, "breakable": _breakable}
    environment.tests |= {"score": lambda cell: isinstance(cell, Score)}
    environment.globals |= {"kind": lambda section: type(section).__name__}
    return environment


def _anchor(id: str) -> str:
    """The id as a link's target: letters, digits and marks that need no escaping."""
    return "i-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in id)


def _bar(score: Score) -> dict[str, float]:
    """Value and interval of a score as percentages of its scale, the first of the usual ones that holds it."""
    scales = (1, 10, 100, 200, 2000, 2800, max(score.high, score.value, 1))
    top = next(t for t in scales if score.value <= t)
    low, value, high = (100 * min(max(x / top, 0), 1) for x in (score.low, score.value, score.high))
    return {"low": low, "value": value, "width": high - low}


def _breakable(name: str) -> list[str]:
    """The pieces of a score's name between which a line may break: after a slash, before an at sign."""
    return re.split(r"(?<=/)|(?=@)", str(name))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def write_markdown(
    path: str | Path, sections: Sequence[Section], title: str = "Evaluation report", *, force: bool = False
) -> Path:
    """Writes the tables of the sections as Markdown and returns its path; pictures are left out. All text is escaped.

    Raises ``ValueError`` for a file at ``path`` that is not such a report (``force`` overwrites it)."""
    lines = [MARKDOWN_MARK, "", f"# {escaped(title)}"]
    for section in sections:
        if isinstance(section, Table):
            lines += [
                "",
                f"## {escaped(section.title)}",
                "",
                _row(section.columns),
                _row(["---"] * len(section.columns)),
            ]
            lines += [_row(map(_text, row)) for row in section.rows]
            lines += ["", escaped(section.note)] if section.note else []
        elif isinstance(section, (Gallery, Questions)) and section.note:
            lines += ["", f"{escaped(section.title)}: {escaped(section.note)}"]
    return _write(path, "\n".join(lines) + "\n", MARKDOWN_MARK, force)


def _text(cell: str | Score) -> str:
    return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}] n {cell.n}" if isinstance(cell, Score) else cell


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c if c == "---" else escaped(c) for c in cells) + " |"


def escaped(text: str) -> str:
    """The text on one line of Markdown, read as it is written: no markup, no tag, no cell, no link."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()|~$!])", r"\\\1", line)
    line = re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):", r"\1\\:", line)  # addresses become links without any markup
    line = re.sub(r"(?i)\b(www)\.", r"\1\\.", line)
    line = re.sub(r"@(?=[\w-]+\.)", r"\\@", line)
    return re.sub(r"^([#+=-]|\d+(?=[.)]))", lambda m: f"\\{m[1]}" if not m[1].isdigit() else f"{m[1]}\\", line)
