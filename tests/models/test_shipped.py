"""Every model that ships draws what it is told, answers what it is asked, and is small."""

from __future__ import annotations

import pytest

from diptych import cli
from diptych.core.sample import Sample, user
from diptych.data.worlds import shapes, shapes_judge
from diptych.evaluation.harness import evaluate
from diptych.generation.engine import Engine
from diptych.models import store, table

SHIPPED = {name: table.SHIPPED / size.folder for name, size in table.SIZES.items() if size.folder}
UNIFIED = [n for n, at in SHIPPED.items() if at.is_dir() and table.SIZES[n].family != "autoencoder"]


@pytest.fixture(scope="module", params=UNIFIED)
def engine(request):
    return Engine(store.load(request.param), request.param)


def test_it_draws_its_own_words_and_not_anothers(engine):
    asked = [p for tag in ("single_object", "colors", "two_object") for p in shapes.prompts(tag, 6)]
    drawn = [d.image for d in engine.draw([Sample(p.text, (user(p.text),)) for p in asked], list(range(len(asked))))]
    own = sum(shapes_judge.check(image, p).ok for image, p in zip(drawn, asked)) / len(asked)
    other = sum(shapes_judge.check(image, p).ok for image, p in zip(drawn, asked[5:] + asked[:5])) / len(asked)
    assert own > 0.6 and other < 0.2


def test_it_answers(engine):
    assert evaluate(engine, ["vqa-mini"], limit=8, progress=False).scores["vqa-mini@exact/overall"].value > 0.75


@pytest.mark.parametrize("name", UNIFIED)
def test_the_command_line_draws_edits_and_asks(name, tmp_path, capsys):
    drawn, edited = tmp_path / "a.png", tmp_path / "b.png"
    assert cli.main(["generate", name, "a red circle", "--guidance", "2", "--out", str(drawn)]) == 0
    assert cli.main(["edit", name, str(drawn), "make the circle blue", "--out", str(edited)]) == 0
    assert cli.main(["ask", name, str(drawn), "what colour is the circle?"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(drawn), str(edited), "red"]


@pytest.mark.parametrize("name", [n for n, at in SHIPPED.items() if at.is_dir()])
def test_it_is_small(name):
    assert sum(file.stat().st_size for file in SHIPPED[name].iterdir()) <= 12e6
