"""The report is one file: it refers to nothing outside itself, and no text in it becomes markup."""

import base64
import json
import re
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest

from diptych.data.worlds import shapes
from diptych.evaluation.benchmarks.shapes import BENCHMARKS
from diptych.evaluation.figures import curves
from diptych.evaluation.harness import Result
from diptych.evaluation.page import (
    Asked,
    Figure,
    Gallery,
    Questions,
    Shown,
    Table,
    Text,
    Verdicts,
    escaped,
    write_markdown,
    write_report,
)
from diptych.evaluation.report import sections
from diptych.evaluation.scores import Outcome, Score, Verdict

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{title}&amp;'


class Markup(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data


def parse(path):
    page = Markup()
    page.feed(path.read_text("utf-8"))
    return page


def self_contained(path):
    html = path.read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(|<link|<script|<iframe", html)
    page = parse(path)
    pictures = [link for link in page.links if not link.startswith("#")]
    assert pictures and all(link.startswith("data:image/png;base64,") for link in pictures)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids), "a link leads nowhere"
    assert not [names for _, names in page.tags if any(n.startswith("on") for n in names)]
    return page


def picture(i=0):
    return shapes.render(shapes.random_scene(np.random.default_rng(i)), 64)


def test_hostile_text_stays_text(tmp_path):
    every = [
        Text(HOSTILE, HOSTILE + "\n\nsecond", HOSTILE),
        Table(HOSTILE, (HOSTILE, "b"), ((HOSTILE, Score(0.5, 0.4, 0.6, 10)), (HOSTILE, HOSTILE)), HOSTILE),
        Figure(HOSTILE, picture(), HOSTILE),
        Gallery(HOSTILE, (Shown((picture(), picture(1)), HOSTILE, False, HOSTILE), Shown((picture(),), "x", True))),
        Questions(HOSTILE, (Asked(picture(), HOSTILE, HOSTILE, HOSTILE, False), Asked(None, "q", "", "a")), HOSTILE),
    ]
    path = write_report(tmp_path / "deep" / "r.html", every, HOSTILE, HOSTILE)
    page = self_contained(path)
    assert page.text.count(HOSTILE) > 15  # shown as written
    plain = write_report(tmp_path / "p.html", [Text("t", "x"), Figure("f", picture())])
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in parse(plain).tags} <= {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "div",
        "b",
        "i",
        "small",
        "figcaption",
        "span",
        "strong",
        "pre",
        "wbr",
    }
    assert 'name="viewport"' in path.read_text() and "prefers-color-scheme: dark" in path.read_text()


def test_wrong_tables_and_sections_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 cells, the table has 1 columns"):
        write_report(tmp_path / "r.html", [Table("t", ("a",), (("x", "y"),))])
    with pytest.raises(ValueError, match="no section"):
        write_report(tmp_path / "r.html", ["text"])
    with pytest.raises(ValueError, match="at least one result"):
        sections({})


items = cache(lambda name: BENCHMARKS[name].items(0, 64))


def result(rate, seed=0):
    """A result as ``evaluate`` makes it, of a model that is right with this probability."""
    rng, outcomes = np.random.default_rng(seed), []
    for name in ("geneval-mini", "vqa-mini", "caption-mini", "edit-mini"):
        for item in items(name)[::7]:
            ok = bool(rng.random() < rate)
            verdict = Verdict(ok, "" if ok else "found a green cross instead", {"instruction": ok, "preserved": True})
            if BENCHMARKS[name].task == "draw":
                outcomes.append(Outcome(item, verdict, picture=picture(len(outcomes))))
            else:
                outcomes.append(Outcome(item, verdict, text=item.reference["answer"] if ok else "four"))
    item = items("vqa-mini")[1]
    outcomes.append(Outcome(item, Verdict(False, "failed: too long"), error="too long"))
    scores = {}
    for name in ("geneval-mini", "vqa-mini", "caption-mini", "edit-mini"):
        scores |= BENCHMARKS[name].scores([o for o in outcomes if o.item.benchmark == name])
    baselines = {"geneval-mini@strict/overall": {"chance": 0.067, "truth": 1.0}}
    card = {"model": "fake", "seed": 0, "limit": None, "settings": {"num_inference_steps": 25, "guidance_scale": 3.0}}
    return Result(scores, baselines, card, 1, tuple(outcomes))


def test_the_usual_page_shows_everything(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(600):
        text, image = 2 / (1 + i / 30) + 0.2 + rng.normal(0, 0.02), 1 / (1 + i / 90) + rng.normal(0, 0.03) + 0.1
        losses = {"loss": text + image, "loss/text": text, "loss/image": image}
        rows.append({"step": i, **losses, "tokens_per_second": 9000 + rng.normal(0, 300)})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = {"untrained": result(0.02), "trained": result(0.6, 1)}
    made = sections(results, tmp_path / "metrics.jsonl", "diptych evaluate runs/tiny mini --seed 0 --json")
    path = write_report(tmp_path / "report.html", made, "diptych tiny", "What ten minutes of two CPU cores teach.")
    page = self_contained(path)
    for text in (
        "geneval-mini@strict/overall",
        "untrained",
        "chance 0.07 · truth 1.00",
        "color_attr",
        "✗",
        "--seed 0",
        "guidance_scale",
        "failed: too long",
        "found a green cross instead",
        "counted as wrong",
    ):
        assert text in page.text, text
    assert curves(rows) in [base64.b64decode(link[22:]) for link in page.links if link.startswith("data:")]


MARKUP = (
    "<script>alert(1)</script>",
    "a | b",
    "`code`",
    "[text](https://evil.example)",
    "![x](x.png)",
    "**bold** _it_",
    "https://evil.example/x",
    "www.evil.example",
    "me@evil.example",
    "# head",
    "- item",
    "1. item",
    "a\n\n# b",
    "&lt;b&gt;",
    "\\|",
    "~~gone~~",
    "$x$",
    "<https://evil.example>",
    "[ref]: https://evil.example",
    "> quote",
    "---",
)


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_shows_every_text_as_it_is_written(text, tmp_path):
    """Names, notes, replies and titles: nothing in them becomes markup, ends a cell or opens a tag."""
    every = [
        Table(text, (text, "b"), ((text, Score(0.5, 0.4, 0.6, 10)), (text, text)), text),
        Gallery(text, (Shown((picture(),), text, False, text),), text),
        Questions(text, (Asked(None, text, text, text, False),), text),
    ]
    lines = write_markdown(tmp_path / "r.md", every, text).read_text().splitlines()
    raw = "\n".join(lines[1:])  # below our own mark
    assert not re.search(r"<[a-z!/]", raw) and not re.search(r"(?<!\\)[`\[\]*_~$]", raw)
    assert not re.search(r"(?i)(https?|mailto):|www\.|(?<!\\)@\w+\.", raw), "an address would become a link"
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3}
    titles = [line for line in lines if re.match(r"#+ ", line)]
    assert len(titles) == 2 and lines[2] == titles[0] == f"# {escaped(text)}"
    shown = re.sub(r"\\(.)", r"\1", escaped(text))
    assert shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == " ".join(text.split())
    assert not [line for line in lines if re.match(r"(-|\d+\.|>|---)", line)], "a note would become a list or a rule"


def test_hostile_verdicts_and_pictures_stay_text(tmp_path):
    rows = ((HOSTILE, True, False, 0.0, HOSTILE), ("b", False, True, 1.0, HOSTILE))
    shown = Gallery("g", (Shown((picture(),), HOSTILE, False, HOSTILE, HOSTILE),))
    page = self_contained(write_report(tmp_path / "r.html", [shown, Verdicts(HOSTILE, rows)]))
    assert page.text.count(HOSTILE) >= 6 and "2 items, 1 right" in page.text


@pytest.mark.parametrize("write, name", [(write_report, "report.html"), (write_markdown, "report.md")])
def test_only_our_own_reports_are_overwritten(write, name, tmp_path):
    file = tmp_path / name
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"{name} was not written by diptych.*--force"):
        write(file, [Text("t", "x")])
    assert file.read_text() == "mine" and [f.name for f in tmp_path.iterdir()] == [name]
    write(file, [Text("an older one", "x"), Table("an older one", ("a",), (("b",),))], force=True)
    write(file, [Text("a newer one", "x"), Table("a newer one", ("a",), (("b",),))])  # ours: no force is needed
    assert "a newer one" in file.read_text() and "an older one" not in file.read_text()
    with pytest.raises(ValueError, match="is a folder"):
        write(tmp_path, [Text("t", "x")], force=True)
