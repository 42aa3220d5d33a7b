"""Rows that a visit of a training varies: wordings, captions and parts of chains of edits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.data.loader import LoaderConfig, Stream
from diptych.data.mixture import Mixture
from diptych.data.variants import edit_chains, prompted, varied
from tests.support import tiny


def chain(pictures: int = 4) -> Sample:
    """A chain of edits whose texts name their step."""
    messages = []
    for k in range(pictures - 1):
        shown = (Image(tiny.picture(0), "condition"),) if k == 0 else ()
        messages += [user(*shown, f"step {k}"), assistant(Image(tiny.picture(k + 1), "target"))]
    words = {str(2 * k): [f"step {k}", f"walk {k}"] for k in range(pictures - 1)}
    return Sample("c", tuple(messages), {"chain": True, "wordings": words})


def texts(sample: Sample) -> list[str]:
    return [p.text for m in sample.messages for p in m.parts if isinstance(p, Text)]


def test_parts_of_a_chain_are_drawn_as_often_as_they_should_be():
    """With the right pictures: a source, and each target after it."""
    n, pictures = 4000, [tiny.picture(k).tobytes() for k in range(4)]
    seen = Counter()
    for visit in range(n):
        part = varied(chain(), 0, visit)
        shown = [pictures.index(i.pixels.tobytes()) for i in part.images()]
        roles = [i.role for i in part.images()]
        assert roles == ["condition"] + ["target"] * (len(shown) - 1)
        seen[tuple(shown), tuple(t.replace("walk", "step") for t in texts(part))] += 1
    wanted = {}
    for part, p in edit_chains(4):
        shown = (part.pairs[0][0], *(target for _, target in part.pairs))
        key = shown, tuple(part.text([f"step {k}" for k in range(3)]))
        wanted[key] = wanted.get(key, 0.0) + p
    assert seen.keys() == wanted.keys()
    for key, p in wanted.items():
        assert seen[key] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5), key


def test_a_caption_is_drawn_anew_on_every_visit():
    row = Sample("t", (user("a"), assistant(Image(tiny.picture(0), "target"))), {"wordings": {"0": ["a", "b", "c"]}})
    drawn = Counter(texts(varied(row, visit))[0] for visit in range(600))
    assert set(drawn) == {"a", "b", "c"} and min(drawn.values()) > 150
    assert varied(row, 3) == varied(row, 3)
    assert varied(replace(row, info={}), 1) == replace(row, info={})
    with pytest.raises(ValueError, match="info.wordings: '7' must be a message's number"):
        varied(replace(row, info={"wordings": {"7": ["x"]}}), 1)


def test_the_loader_varies_rows_and_drops_segments_by_their_own_draws():
    """Per-segment dropout of BAGEL: each text of a chain is dropped as often as it should be."""
    model = tiny.model("bagel")
    plan = LoaderConfig({"c": 1.0}, 4096, 32, dropout={"text*": 0.3}, reading={"c": "edits"}, ahead=1)
    dropped, laid = Counter(), []

    def lay_out(sample, drop):
        dropped.update(drop)
        laid.append(sample)
        return model.lay_out(sample, drop)

    whole = replace(chain(3), info={})
    stream = Stream(Mixture({"c": [whole]}, {"c": 1.0}, 0), plan, {"c": [whole]}, lay_out, model.routes, None, 1)
    for _ in range(40):
        stream.row()
    n = len(laid)
    assert all(i.reading == "edits" for sample in laid for i in sample.images())
    for k in (0, 1):
        assert dropped[f"text:{k}"] / n == pytest.approx(0.3, abs=4 * (0.21 / n) ** 0.5)


def test_prompts_word_requests():
    draws = Sample("d", (user("a cat"), assistant(Image(tiny.picture(0), "target"))))
    asks = Sample("c", (user(Image(tiny.picture(0))), assistant("a cat")))
    assert texts(prompted(draws, "Generate an image of: {}")) == ["Generate an image of: a cat"]
    assert texts(prompted(asks, "Provide a caption")) == ["Provide a caption", "a cat"]
    worded = prompted(asks, "Provide a caption")
    assert prompted(worded, "Another question") == worded  # a row with a question of its own keeps it


def test_a_row_has_at_most_so_many_samples():
    model = tiny.model("bagel")
    rows = {"c": [tiny.draw()]}
    plan = LoaderConfig({"c": 1.0}, 4096, 32, samples=3)
    stream = Stream(Mixture(rows, {"c": 1.0}, 0), plan, rows, model.lay_out, model.routes, None, 1)
    assert [sum(stream.row()[1].samples.values()) for _ in range(3)] == [3, 3, 3]
