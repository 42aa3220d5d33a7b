"""The parts of a report and how they are written as HTML and Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import PIL.Image

from diptych.evaluation.scores import Score

# --- sections ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines, and commands or other fixed text below."""

    title: str
    text: str = ""
    code: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of texts and ``Score``s under column names; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Score, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """One large picture, decoded or as PNG bytes."""

    title: str
    image: PIL.Image.Image | bytes
    caption: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture, or several in order (before, after), with its caption, verdict and the reason for it. ``id`` is what
    verdicts link to."""

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
    """A question about a picture, what was answered and what was expected."""

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
    """A folded list of every verdict: (item, whether it is shown on the page, right, grade, reason)."""

    title: str
    items: tuple[tuple[str, bool, bool, float, str], ...]


Section = Text | Table | Figure | Gallery | Questions | Verdicts


# --- HTML -------------------------------------------------------------------------------------------------------------

STYLE = """
:root { --paper: #f7f7f8; --card: #fff; --ink: #1d2026; --soft: #656b78; --line: #e1e3e8; --bar: #3b6fd4;
  --track: #e9ebf0; --right: #1b7f48; --wrong: #c53434; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e7e9ee; --soft: #9ba2b0;
  --line: #30343d; --bar: #4f7fdc; --track: #2a2e36; --right: #4cc583; --wrong: #f07474; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.1rem; margin: 0 0 10px; }
p { margin: 0 0 10px; } .lead { font-size: 1.05rem; color: var(--soft); margin-bottom: 24px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px;
  margin: 0 0 18px; }
.note { color: var(--soft); font-size: .87rem; margin: 10px 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td:first-child { font-family: ui-monospace, monospace; font-size: .82rem; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td.text { min-width: 9em; } tr.head td { font-weight: 700; }
.score { white-space: nowrap; } .score small { color: var(--soft); }
.bar { position: relative; height: 6px; min-width: 110px; background: var(--track); margin-top: 4px; }
.bar i, .bar b { position: absolute; top: 0; height: 6px; }
.bar b { background: var(--bar); }
.bar i { border: solid var(--ink); border-width: 0 1px; }
.bar i::after { content: ""; position: absolute; left: 0; right: 0; top: 2.5px; height: 1px; background: var(--ink); }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
.figure { text-align: center; } .figure img { max-width: 100%; border-radius: 8px; background: #fff; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 14px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.shown .frame { display: flex; gap: 3px; border: 3px solid var(--line); border-radius: 8px; overflow: hidden;
  background: var(--line); }
.shown .frame img { display: block; flex: 1 1 0; width: 100%; min-width: 0; image-rendering: pixelated; }
.shown.right .frame { border-color: var(--right); background: var(--right); }
.shown.wrong .frame { border-color: var(--wrong); background: var(--wrong); }
.shown figcaption { font-size: .85rem; line-height: 1.35; margin-top: 5px; }
.shown small, .asked small { color: var(--soft); display: block; }
.mark { font-weight: 700; } .right .mark { color: var(--right); } .wrong .mark { color: var(--wrong); }
.questions { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px; }
.asked { display: flex; gap: 12px; border: 1px solid var(--line); border-radius: 8px; padding: 8px; font-size: .9rem; }
.asked img { width: 88px; height: 88px; object-fit: contain; border-radius: 4px; image-rendering: pixelated;
  flex: none; border: 1px solid var(--line); }
.asked div { min-width: 0; overflow-wrap: anywhere; } .asked p { margin: 0 0 2px; }
a { color: inherit; } a.back { text-decoration: none; } summary { cursor: pointer; color: var(--soft); }
details table { margin-top: 10px; } details td { padding: 3px 14px 3px 0; }
:target { outline: 3px solid var(--bar); outline-offset: 3px; border-radius: 6px; }
pre { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  margin: 0; font-size: .85rem; }
@media (max-width: 640px) {
  main { padding: 16px 10px 40px; } section { padding: 14px; } h1 { font-size: 1.5rem; }
  td:first-child { white-space: normal; min-width: 9em; overflow-wrap: normal; } th, td { padding-right: 12px; }
  .score small { display: block; } .bar { min-width: 84px; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{summary}</p>
{body}
</main>
</body>
</html>
"""


def write_report(
    path: str | Path, sections: Sequence[Section], title: str = "Evaluation report", summary: str = ""
) -> Path:
    """The path of the one HTML file written; it refers to no other file and no address, and all text is escaped."""
    rendered = [(_render(section), section.title) for section in sections]
    body = "\n".join(f"<section>\n<h2>{escape(name)}</h2>\n{html}\n</section>" for html, name in rendered)
    page = PAGE.format(title=escape(title), style=STYLE, summary=escape(summary), body=body)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def write_markdown(path: str | Path, sections: Sequence[Section], title: str = "Evaluation report") -> Path:
    """The path of a Markdown file with the tables of the sections, and nothing of their pictures."""
    lines = [f"# {_cellular(title)}"]
    for section in sections:
        if isinstance(section, Table):
            lines += [
                "",
                f"## {_cellular(section.title)}",
                "",
                _row(section.columns),
                _row(["---"] * len(section.columns)),
            ]
            lines += [_row(map(_told, row)) for row in section.rows]
            lines += ["", section.note] if section.note else []
        elif isinstance(section, (Gallery, Questions)) and section.note:
            lines += ["", f"{_cellular(section.title)}: {section.note}"]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _told(cell: str | Score) -> str:
    return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}] n {cell.n}" if isinstance(cell, Score) else cell


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cellular, cells)) + " |"


def _cellular(text: str) -> str:
    """The text on one line, with nothing that ends a cell or opens a tag."""
    return str(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def _render(section: Section) -> str:
    match section:
        case Text():
            text = "".join(f"<p>{escape(p)}</p>" for p in section.text.split("\n\n") if p.strip())
            return text + (f"<pre>{escape(section.code)}</pre>" if section.code else "")
        case Table():
            return _table(section) + _note(section.note)
        case Figure():
            return f'<figure class="figure">{_img(section.image, section.title)}</figure>{_note(section.caption)}'
        case Gallery():
            pairs = " pairs" if any(len(shown.images) > 1 for shown in section.items) else ""
            items = "\n".join(map(_shown, section.items))
            return f'<div class="gallery{pairs}">\n{items}\n</div>{_note(section.note)}'
        case Questions():
            items = "\n".join(map(_question, section.items))
            return f'<div class="questions">\n{items}\n</div>{_note(section.note)}'
        case Verdicts():
            return _verdicts(section)
    raise ValueError(f"{section!r} is no section; choose from Text, Table, Figure, Gallery, Questions, Verdicts")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _table(table: Table) -> str:
    if wrong := next((row for row in table.rows if len(row) != len(table.columns)), None):
        raise ValueError(f"the row {wrong!r} has {len(wrong)} cells, the table has {len(table.columns)} columns")
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = ""
    for row in table.rows:
        first = str(row[0]).endswith("/overall") and any(isinstance(cell, Score) for cell in row)
        cells = "".join(_cell(cell) for cell in row)
        rows += f"<tr{' class=head' if first else ''}>{cells}</tr>\n"
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>'


def _cell(cell: str | Score) -> str:
    if not isinstance(cell, Score):
        return f'<td class="text">{escape(str(cell)).replace("/", "/<wbr>").replace("@", "<wbr>@")}</td>'
    top = next(t for t in (1, 10, 100, 200, 2000, 2800, max(cell.high, cell.value, 1)) if cell.value <= t)
    low, value, high = (100 * min(max(x / top, 0), 1) for x in (cell.low, cell.value, cell.high))
    return (
        f'<td class="score">{cell.value:.3f} <small>{cell.low:.2f}–{cell.high:.2f} · n {cell.n}</small>'
        f'<div class="bar"><b style="width:{value:.1f}%"></b>'
        f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i></div></td>'
    )


def _verdict(ok: bool | None) -> tuple[str, str]:
    """The class and the mark of a verdict: colour is never the only sign."""
    if ok is None:
        return "", ""
    return (" right", '<span class="mark">✓</span> ') if ok else (" wrong", '<span class="mark">✗</span> ')


def _verdicts(section: Verdicts) -> str:
    rows = ""
    for id, shown, ok, grade, reason in section.items:
        kind, mark = _verdict(ok)
        name = f'<a href="#{_anchor(id)}">{escape(id)}</a>' if shown else escape(id)
        at = f' id="{_anchor("verdict/" + id)}"' if shown else ""
        cells = f"<td>{name}</td><td>{mark}</td><td>{grade:.3g}</td>"
        rows += f'<tr{at} class="{kind.strip()}">{cells}<td class="text">{escape(reason)}</td></tr>\n'
    right = sum(ok for _, _, ok, _, _ in section.items)
    head = "<thead><tr><th>item</th><th></th><th>grade</th><th>reason, or reply</th></tr></thead>"
    table = f'<div class="wide"><table>{head}<tbody>\n{rows}</tbody></table></div>'
    return f"<details><summary>{len(section.items)} items, {right} right</summary>{table}</details>"


def _anchor(id: str) -> str:
    """The id as a link's target: letters, digits and marks that need no escaping."""
    return "i-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in id)


def _linked(id: str, inner: str) -> tuple[str, str]:
    """(attribute, the verdict's mark as a link to its row) of an item that has an id."""
    if not id:
        return "", inner
    back = f'<a class="back" href="#{_anchor("verdict/" + id)}">{inner.strip() or "·"}</a> '
    return f' id="{_anchor(id)}"', back


def _shown(shown: Shown) -> str:
    kind, mark = _verdict(shown.ok)
    at, mark = _linked(shown.id, mark)
    images = "".join(_img(image, shown.caption) for image in shown.images)
    note = f"<small>{escape(shown.note)}</small>" if shown.note else ""
    caption = f"<figcaption>{mark}{escape(shown.caption)}{note}</figcaption>"
    return f'<figure class="shown{kind}"{at}><div class="frame">{images}</div>{caption}</figure>'


def _question(asked: Asked) -> str:
    kind, mark = _verdict(asked.ok)
    at, mark = _linked(asked.id, mark)
    image = _img(asked.image, asked.question) if asked.image is not None else ""
    expected = "" if asked.ok else f"<small>expected: {escape(asked.expected)}</small>"
    text = f"<p>{escape(asked.question)}</p><p>{mark}<strong>{escape(asked.answer) or '(nothing)'}</strong></p>"
    return f'<div class="asked{kind}"{at}>{image}<div>{text}{expected}</div></div>'


def _img(image: PIL.Image.Image | bytes, alt: str) -> str:
    if isinstance(image, PIL.Image.Image):
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG", optimize=True)
        image = out.getvalue()
    data = base64.b64encode(image).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
