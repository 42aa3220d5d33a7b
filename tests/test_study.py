"""A study: arms from one start, a page with tables and a plot, and nothing done twice."""

from __future__ import annotations

import pytest

from diptych import study
from diptych.evaluate import harness
from diptych.recipes import sgt


@pytest.fixture
def small(monkeypatch):
    arms = {arm: study._sgt(proxy=proxy) for arm, proxy in list(sgt.ARMS.items())[:2]}
    monkeypatch.setitem(study.STUDIES, "small", study.Study("A small table", arms, "none"))
    monkeypatch.setattr(study, "BENCHMARKS", ("vqa-mini",))


def test_a_study_writes_its_page_and_goes_on(small, tmp_path, monkeypatch):
    settings = {"steps": 2, "limit": 2, "seeds": (0, 1)}
    page = study.study("small", tmp_path / "runs", tmp_path / "out", **settings)
    text = page.read_text()
    for row in ("| start |", "| none |", "| edges |", "vqa-mini", "small.png"):
        assert row in text
    assert (tmp_path / "out" / "small.png").stat().st_size > 1000
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "resume", None)
    assert study.study("small", tmp_path / "runs", tmp_path / "out", **settings).read_text() == text
    with pytest.raises(ValueError, match="begun with another steps"):
        study.study("small", tmp_path / "runs", tmp_path / "out", steps=3, limit=2, seeds=(0, 1))


def test_bad_studies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown study 'x'; choose from sgt-proxies"):
        study.study("x", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="different seeds"):
        study.study("sgt-ratio", tmp_path, tmp_path, seeds=(0, 0))


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_arm_is_a_recipe_and_the_base_is_one_of_them(name):
    this = study.STUDIES[name]
    assert this.base in this.arms
    model = this.model if isinstance(this.model, str) else "runs/start/run/release"
    made = {arm: make(8, model) for arm, make in this.arms.items()}
    assert all(r.steps in (4, 8) for r in made.values())
    assert len({(str(r.stages), str(r.model)) for r in made.values()}) == len(made)
    assert set(this.benchmarks) <= set(harness.BENCHMARKS)
