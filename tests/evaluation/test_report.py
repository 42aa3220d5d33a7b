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
from diptych.evaluation.page import Asked, Figure, Gallery, Questions, Shown, Table, Text, write_report
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
        "table", "thead", "tbody", "tr", "th", "td", "div", "b", "i", "small", "figcaption", "span", "strong", "pre",
        "wbr",
    }  # fmt: skip
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
    for text in ("geneval-mini@strict/overall", "untrained", "chance 0.07 · truth 1.00", "color_attr", "✗", "--seed 0",
                 "guidance_scale", "failed: too long", "found a green cross instead", "counted as wrong"):  # fmt: skip
        assert text in page.text, text
    assert curves(rows) in [base64.b64decode(link[22:]) for link in page.links if link.startswith("data:")]
