"""What the benchmarks' numbers rest on: the comparison of two results, and the sizes that a GPU is measured with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.models import store

ROW = {"family": "bagel", "arm": "eager", "tokens/s": 100.0, "memory GiB": 2.0, "data wait": 0.001, "planned GiB": None}


@pytest.fixture
def result(tmp_path):
    def write(name, benchmark="scale", **changes):
        rows = [ROW | changes, ROW | {"arm": "compiled"}]
        (tmp_path / name).write_text("a table\n" + json.dumps({"benchmark": benchmark, "rows": rows}) + "\n")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"tokens/s": 93.0, "memory GiB": 2.1, "data wait": 0.004}, None),  # noise; a wait is a share of the time
        ({"tokens/s": 150.0, "memory GiB": 1.0}, None),
        ({"tokens/s": 80.0}, "family=bagel arm=eager planned GiB=None: tokens/s 100 -> 80 (-20.0%)"),
        ({"memory GiB": 2.5}, "memory GiB 2 -> 2.5"),
        ({"data wait": 0.3}, "data wait 0.001 -> 0.3"),
        ({"tokens/s": float("nan")}, "tokens/s 100 -> nan"),
        ({"arm": "other"}, "arm=eager planned GiB=None: is missing after"),
    ],
)
def test_regressions_beyond_noise_fail(changes, told, result, monkeypatch, capsys):
    from benchmarks import compare

    monkeypatch.setattr("sys.argv", ["compare.py", result("before"), result("after", **changes)])
    assert compare.main() == (told is not None)
    assert (told or "0 regressions beyond 10%") in capsys.readouterr().out


def test_the_best_of_several_counts_and_other_benchmarks_do_not_compare(result, monkeypatch, capsys):
    from benchmarks import compare

    slow, fast = result("slow", **{"tokens/s": 50.0}), result("fast")
    monkeypatch.setattr("sys.argv", ["compare.py", "--before", fast, "--after", slow, fast])
    assert compare.main() == 0
    monkeypatch.setattr("sys.argv", ["compare.py", fast, result("other", benchmark="draw")])
    assert compare.main() == 2 and "different benchmarks: draw, scale" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bagel", "cheers", "iomm", "synergen"])
def test_every_family_is_measured_at_about_300_million_parameters(family, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import scale

    made = store.create(family, scale.config(family, *scale.SIZES[family][-1]), device="meta")
    assert 250e6 < sum(p.numel() for p in made.parameters()) < 350e6
