"""Reading metrics.jsonl: the one reader, while a run is writing and after something damaged it."""

from __future__ import annotations

import json

import pytest

from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.log import consumption, keep_until, read_metrics
from tests.support import tiny

ROW = {"stage": "all", "loss": 1.0, "seconds": 2.0, "data_wait": 0.5, "tokens_per_second": 30.0}


def write(folder, steps, tail=""):
    rows = [{"step": step, **ROW} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return rows


def test_the_rows_of_a_run_or_of_a_file(tmp_path):
    rows = write(tmp_path, (1, 2, 3))
    assert read_metrics(tmp_path) == read_metrics(str(tmp_path / "metrics.jsonl")) == rows


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "\x00\x00\x00", "  ", "17", "\n\n"])
def test_a_last_line_that_is_being_written_is_left_out(tail, tmp_path):
    rows = write(tmp_path, (1, 2), tail)
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("line", ['{"step": 2, "lo\n', "[]\n", "17\n", "\x00\x00\n", "\udcff\n"])
def test_any_other_damaged_line_is_named(line, tmp_path):
    rows = write(tmp_path, (1,))
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: damaged line"):
        read_metrics(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{place} is no run: it holds no metrics.jsonl"):
            read_metrics(place)


def test_a_resumed_run_cuts_the_steps_that_it_repeats(tmp_path):
    rows = write(tmp_path, (1, 2, 3, 4), '{"step": 5, "lo')
    keep_until(tmp_path / "metrics.jsonl", 2)
    assert read_metrics(tmp_path) == rows[:2] and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_consumption_counts_computing_alone(tmp_path):
    write(tmp_path, (1, 2, 3))
    assert consumption(tmp_path) == 60.0  # 60 tokens a step, one of its two seconds spent computing
    write(tmp_path, (1,))
    with pytest.raises(ValueError, match="fewer than two steps"):
        consumption(tmp_path)


def test_a_progress_line_in_a_log_file_is_one_line(tmp_path, capfd, monkeypatch):
    """Lines of a log that is no terminal can be searched: none is wrapped at its width."""
    monkeypatch.setenv("COLUMNS", "40")
    loop.train(tiny.recipe(steps=2), tmp_path / "run", stage_sources, show=True)
    shown = [line for line in capfd.readouterr().err.splitlines() if "tok/s" in line]
    assert shown and all(line.rstrip().split()[-2] == "ETA" for line in shown)
