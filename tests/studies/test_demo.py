"""The demonstration keeps its budget, writes a short page about the model just trained, also when it is interrupted."""

from __future__ import annotations

import time

import pytest

from diptych.studies import demo as module
from diptych.studies.demo import demo
from diptych.training.log import read_metrics
from diptych.training.loop import Interrupted


@pytest.fixture
def quick(monkeypatch):
    """One benchmark and two prompts: the demonstration itself takes seconds."""
    monkeypatch.setattr(module, "BENCHMARKS", ("caption-mini",))
    monkeypatch.setattr(module, "PROMPTS", module.PROMPTS[:2])
    monkeypatch.setattr(module, "EDITS", 1)


def test_a_demo_of_seconds_keeps_its_budget_and_shows_the_model_just_trained(quick, tmp_path, capsys):
    began = time.monotonic()
    out = demo(minutes=0.15, out=tmp_path / "page.html", run=tmp_path / "run", limit=1)
    spent = time.monotonic() - began
    rows = read_metrics(tmp_path / "run" / "train")
    trained = sum(row["seconds"] for row in rows)
    assert trained < 9, "training alone ends within the minutes"
    text, printed = out.read_text(), capsys.readouterr().out
    for part in (
        "From left: trained here, shipped.",
        "Answered by the model trained here",
        "Training",
        f"for {len(rows)} step",
    ):
        assert part.replace("/", "/<wbr>").replace("@", "<wbr>@") in text or part in text, part
    assert text.count("<section>") in (5, 6) and text.count("<img") < 30, "a page that can be read in minutes"
    for picture in ("trained-here/drawn.png", "trained-here/edited.png", "shipped/drawn.png"):
        assert (tmp_path / "run" / picture).is_file()
    assert f"diptych chat {tmp_path / 'run' / 'train'}" in printed.replace("\n", "")
    print(f"{spent:.1f} s in all, {trained:.1f} s of training")


def test_an_interrupted_demo_writes_its_page_about_the_model_as_it_is(quick, tmp_path, monkeypatch):
    def stopped(recipe, run, **more):
        release = real(recipe.with_steps(2), run, **more)
        assert release.is_dir()
        raise Interrupted(run / "checkpoints" / "step-00000002", 2)

    real = module.train
    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(Interrupted):
        demo(steps=50, out=tmp_path / "page.html", run=tmp_path / "run", limit=1)
    text = (tmp_path / "page.html").read_text()
    assert "caption-mini<wbr>@strict/<wbr>overall" in text, "the shipped model is scored: there is no budget"
    assert "Interrupted. " in text and "From left: trained here, shipped." in text and "for 2 steps" in text


def test_ctrl_c_before_the_training_still_writes_a_page(quick, tmp_path, monkeypatch):
    def stopped(*rest, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        demo(steps=50, out=tmp_path / "page.html", run=tmp_path / "run", limit=1)
    text = (tmp_path / "page.html").read_text()
    assert "not trained here yet" in text and "From left: shipped." in text


def test_files_of_others_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", None)  # nothing is loaded
    (tmp_path / "report.html").write_text("<p>mine</p>")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "drawn.png").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html was not written by diptych.*--force"):
        demo(out=tmp_path / "report.html", run=tmp_path / "new")
    with pytest.raises(ValueError, match="run holds files already"):
        demo(out=tmp_path / "other.html", run=tmp_path / "run")
    with pytest.raises(ValueError, match="minutes must be more than 0"):
        demo(minutes=0, out=tmp_path / "other.html", run=tmp_path / "new")
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>" and (tmp_path / "run" / "drawn.png").is_file()
