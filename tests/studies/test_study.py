"""A study: arms from one start, a page with tables and a plot, and nothing done twice."""

from __future__ import annotations

import pytest
import torch

from diptych.evaluation.benchmarks.table import TABLE
from diptych.evaluation.figures import intervals
from diptych.generation.engine import Engine
from diptych.models import store
from diptych.studies import page, study, table
from diptych.studies.copying import copying
from diptych.studies.run import study as run_study
from tests.support import tiny


@pytest.fixture
def small(monkeypatch):
    arms = {arm: make for arm, make in list(table.STUDIES["sgt-proxies"].arms.items())[:2]}
    small = study.Study("A small table", arms, "none", measure=lambda _: {"loss": 0.5}, benchmarks=("vqa-mini",))
    monkeypatch.setitem(table.STUDIES, "small", small)
    plots = []
    monkeypatch.setattr(page, "intervals", lambda panels: plots.append(panels) or intervals(panels))
    return plots


def test_a_study_writes_its_page_and_goes_on(small, tmp_path, monkeypatch):
    settings = {"steps": 2, "limit": 2, "seeds": (0, 1)}
    written = run_study("small", tmp_path / "runs", tmp_path / "out", **settings)
    text = written.read_text()
    for row in ("| start |", "| none |", "| edges |", "vqa-mini", "| edges | 0.5 |", "small.png"):
        assert row in text
    assert (tmp_path / "out" / "small.png").stat().st_size > 1000
    assert list(small[0]) == ["vqa-mini", "loss"] and small[0]["loss"]["edges"].value == 0.5
    assert list(small[0]["loss"]) == list(small[0]["vqa-mini"])  # the start has a place, and no loss
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(study, "resume", None)
    assert run_study("small", tmp_path / "runs", tmp_path / "out", **settings).read_text() == text
    with pytest.raises(ValueError, match="begun with another steps"):
        run_study("small", tmp_path / "runs", tmp_path / "out", steps=3, limit=2, seeds=(0, 1))


def test_bad_studies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown study 'x'; choose from sgt-proxies"):
        run_study("x", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="different seeds"):
        run_study("sgt-ratio", tmp_path, tmp_path, seeds=(0, 0))


@pytest.mark.parametrize("name", table.STUDIES)
def test_every_arm_is_a_recipe_and_the_base_is_one_of_them(name):
    this = table.STUDIES[name]
    assert this.base in this.arms
    made = {arm: make(8) for arm, make in this.arms.items()}
    assert all(r.steps in (4, 8) for r in made.values()) and len({r.to_json() for r in made.values()}) == len(made)
    assert set(this.benchmarks) <= set(TABLE)
    start = this.model if isinstance(this.model, str) else "some/model" if this.model else ""
    for recipe in made.values():
        assert this.on(recipe, start).stages == recipe.stages


def test_arms_that_agree_in_the_first_stage_share_its_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(study, "train_or_resume", lambda recipe, run: ran.append((run, recipe)) or run / "release")
    six = table.STUDIES["iomm-recipes"]
    for arm, make in six.arms.items():
        study.train_stages(six.on(make(20), "reader"), tmp_path / arm, tmp_path / "stage-1")
    firsts, rests = ran[::2], ran[1::2]
    assert len({run for run, _ in firsts}) == 2 and len({run for run, _ in rests}) == 6
    assert all(r.init == dict.fromkeys(("mllm", "autoencoder"), "reader") and len(r.stages) == 1 for _, r in firsts)
    assert all(r.init == {"model": str(run / "release")} for (run, _), (_, r) in zip(firsts, rests))


def test_a_study_fails_where_a_frozen_weight_has_moved(tmp_path):
    model = tiny.model("iomm")
    store.save(model, tmp_path / "a")
    start = str(tmp_path / "a")
    with torch.no_grad():
        next(model.dit.parameters()).add_(1e-6)
    store.save(model, tmp_path / "b")
    with torch.no_grad():
        next(model.mllm.parameters()).add_(1e-6)
    store.save(model, tmp_path / "c")
    six, tuned = (table.STUDIES[name].arms for name in ("iomm-recipes", "iomm-tuning"))
    for recipe in (
        table.STUDIES["iomm-recipes"].on(six["pair to mix"](20), start),
        table.STUDIES["iomm-tuning"].on(tuned["mix"](20), start),
    ):
        study.check_frozen(recipe, start, tmp_path / "b")
        with pytest.raises(ValueError, match="changed mllm"):
            study.check_frozen(recipe, start, tmp_path / "c")


def test_copying_tells_a_copy_from_another_picture(monkeypatch):
    engine = Engine(tiny.shake(tiny.model("iomm")))

    class Drawn:
        def __init__(self, image):
            self.image = image

    def perfect(samples, seeds, size):
        return [Drawn(next(s.images()).pixels) for s in samples]

    drawn = copying(engine, 3, (0, 1))
    monkeypatch.setattr(engine, "draw", perfect)
    copied = copying(engine, 3, (0, 1))
    assert copied["psnr"] > 50 > drawn["psnr"] and copied["cosine"] == pytest.approx(1, abs=1e-5)
    assert copied["diversity"] == 0 < drawn["diversity"] and drawn["cosine"] < 0.999
