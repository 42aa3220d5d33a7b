"""One HTML file that shows what a model can do: scores, curves, pictures with verdicts, answers, and how to repeat it.

``write_report(path, sections)`` writes sections that anyone may compose; ``sections`` makes the usual ones from the
results of ``evaluate``. The file needs no other: pictures are inside it, and it runs no script.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import PIL.Image

from diptych.evaluate.harness import Result
from diptych.evaluate.scores import Outcome, Score

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
    """A picture, or several in order (before, after), with its caption, verdict and the reason for it."""

    images: tuple[PIL.Image.Image, ...]
    caption: str
    ok: bool | None = None
    note: str = ""


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


@dataclass(frozen=True)
class Questions:
    """Answered questions with their pictures."""

    title: str
    items: tuple[Asked, ...]
    note: str = ""


Section = Text | Table | Figure | Gallery | Questions


# --- sections from results --------------------------------------------------------------------------------------------


def sections(
    results: Mapping[str, Result], metrics: str | Path | None = None, commands: str = "", per_category: int = 6
) -> list[Section]:
    """The usual page: the score table of all models, then curves, drawings, answers, edits and the card of the last.

    ``results`` maps a column's name ("untrained", "trained") to its result; ``metrics`` is a training run's jsonl.
    Right and wrong outcomes are shown as they come, the first ``per_category`` of each category.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    name, last = list(results.items())[-1]
    found: list[Section] = [score_table(results)]
    if metrics is not None:
        from diptych.evaluate.figures import curves

        found.append(Figure("Training", curves(metrics), "Faint: every logged step. Bold: smoothed."))
    found += [*drawings(last, name, per_category), *answers(last, name, per_category), *edits(last, name, per_category)]
    found.append(card_table(last))
    if commands:
        found.append(Text("Reproduce", "", commands))
    return found


def score_table(results: Mapping[str, Result]) -> Table:
    """Scores as rows, models as columns, baselines last."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.scores))
    baselines = {name: row for result in results.values() for name, row in result.baselines.items()}
    rows = []
    for name in names:
        cells = [result.scores.get(name, "–") for result in results.values()]
        rows.append((name, *cells, " · ".join(f"{k} {v:.2f}" for k, v in baselines.get(name, {}).items())))
    note = "Bars show the value and its 95 % interval. Intervals of drawing scores resample whole prompts."
    failed = {name: result.failures for name, result in results.items() if result.failures}
    if failed:
        note += " Failed items, counted as wrong: " + ", ".join(f"{k} {v}" for k, v in failed.items()) + "."
    return Table("Scores", ("score", *results, "to compare with"), tuple(rows), note)


def drawings(result: Result, name: str, per_category: int = 6) -> list[Gallery]:
    """One gallery per tag of a drawing benchmark: the first prompts, right or wrong."""
    return [
        Gallery(f"{category} · {name}", tuple(Shown((o.image,), o.item.prompt, o.verdict.ok, o.verdict.reason)
                for o in of[:per_category] if o.image is not None), _tally(of))
        for category, of in _grouped(result, "geneval").items()
    ]  # fmt: skip


def answers(result: Result, name: str, per_category: int = 6) -> list[Questions]:
    """The first questions of each type, and the first captions."""
    found = []
    for benchmark, title in (("vqa", "Questions"), ("caption", "Captions")):
        groups = list(_grouped(result, benchmark).values())
        if groups:
            asked = [_asked(o) for of in groups for o in of[: per_category if benchmark == "vqa" else 2 * per_category]]
            found.append(Questions(f"{title} · {name}", tuple(asked), _tally([o for of in groups for o in of])))
    return found


def edits(result: Result, name: str, per_category: int = 6) -> list[Gallery]:
    """The first edits of each kind, before and after."""
    groups = _grouped(result, "edit")
    items = []
    for of in groups.values():
        for o in of[:per_category]:
            before = [image.pixels for image in o.item.sample.images()]
            if o.image is not None:
                items.append(Shown((*before, o.image), o.item.prompt, o.verdict.ok, o.verdict.reason))
    every = [o for of in groups.values() for o in of]
    return [Gallery(f"Edits · {name}", tuple(items), f"Before and after. {_tally(every)}")] if items else []


def card_table(result: Result) -> Table:
    """The sampling card: everything that moves a score and is not the model's doing."""
    rows = []
    for key, value in result.card.items():
        shown = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{key} {k}".strip(), v if isinstance(v, str) else json.dumps(v)) for k, v in shown]
    return Table("Sampling card", ("setting", "value"), tuple(rows))


def _grouped(result: Result, benchmark: str) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in result.outcomes:
        if outcome.item.benchmark.startswith(benchmark):
            groups.setdefault(outcome.item.category, []).append(outcome)
    return groups


def _asked(outcome: Outcome) -> Asked:
    image = next((i.pixels for i in outcome.item.sample.images()), None)
    said = outcome.text if outcome.error is None else f"failed: {outcome.error}"
    expected = str(outcome.item.reference["answer"])
    return Asked(image, outcome.item.prompt, said or "", expected, outcome.verdict.ok)


def _tally(outcomes: Sequence[Outcome]) -> str:
    failed = sum(o.error is not None for o in outcomes)
    right = sum(o.verdict.ok for o in outcomes)
    return f"{right} of {len(outcomes)} right{f', {failed} failed' if failed else ''}; the first are shown."


# --- HTML -------------------------------------------------------------------------------------------------------------

STYLE = """
:root { --paper: #f7f7f8; --card: #fff; --ink: #1d2026; --soft: #656b78; --line: #e1e3e8; --bar: #3b6fd4;
  --band: #3b6fd455; --track: #e9ebf0; --right: #1b7f48; --wrong: #c53434; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e7e9ee; --soft: #9ba2b0;
  --line: #30343d; --bar: #7ba4f5; --band: #7ba4f566; --track: #2a2e36; --right: #4cc583; --wrong: #f07474; } }
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
.bar { position: relative; height: 6px; min-width: 110px; background: var(--track); border-radius: 3px;
  margin-top: 3px; overflow: hidden; }
.bar i, .bar b { position: absolute; top: 0; height: 100%; }
.bar b { background: var(--bar); } .bar i { background: var(--band); }
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
    raise ValueError(f"{section!r} is no section; choose from Text, Table, Figure, Gallery, Questions")


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
    low, value, high = (100 * min(max(x, 0), 1) for x in (cell.low, cell.value, cell.high))
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


def _shown(shown: Shown) -> str:
    kind, mark = _verdict(shown.ok)
    images = "".join(_img(image, shown.caption) for image in shown.images)
    note = f"<small>{escape(shown.note)}</small>" if shown.note else ""
    caption = f"<figcaption>{mark}{escape(shown.caption)}{note}</figcaption>"
    return f'<figure class="shown{kind}"><div class="frame">{images}</div>{caption}</figure>'


def _question(asked: Asked) -> str:
    kind, mark = _verdict(asked.ok)
    image = _img(asked.image, asked.question) if asked.image is not None else ""
    expected = "" if asked.ok else f"<small>expected: {escape(asked.expected)}</small>"
    text = f"<p>{escape(asked.question)}</p><p>{mark}<strong>{escape(asked.answer) or '(nothing)'}</strong></p>"
    return f'<div class="asked{kind}">{image}<div>{text}{expected}</div></div>'


def _img(image: PIL.Image.Image | bytes, alt: str) -> str:
    if isinstance(image, PIL.Image.Image):
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG", optimize=True)
        image = out.getvalue()
    data = base64.b64encode(image).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
