"""Two evaluations compared, several processes as one, and the command line over both."""

import json
import sys

import pytest

from diptych import cli
from diptych.evaluation.compare import compare
from diptych.evaluation.harness import evaluate
from diptych.evaluation.scores import sign_flip
from tests.evaluation.test_harness import Fake
from tests.training.test_parallel import processes

NAMES = ("vqa-mini", "edit-mini")


def test_paired_differences(tmp_path):
    for name, engine in (("noise", Fake(truth=False)), ("truth", Fake())):
        evaluate(engine, NAMES, limit=5, folder=tmp_path / name, progress=False)
    found = compare(tmp_path / "noise", tmp_path / "truth")
    assert found["vqa-mini"].score.value == 1 and found["vqa-mini"].p < 0.01 and found["vqa-mini"].better == 30
    assert found["vqa-mini/colour"].a == 0 and found["vqa-mini/colour"].score.n == 5
    same = compare(tmp_path / "truth", tmp_path / "truth")
    assert all(d.score.value == 0 and d.p == 1 and d.better == d.worse == 0 for d in same.values())
    back = compare(tmp_path / "truth", tmp_path / "noise")["edit-mini"]
    assert back.score.value == -found["edit-mini"].score.value and back.worse == found["edit-mini"].better
    evaluate(Fake(), NAMES, limit=4, folder=tmp_path / "shorter", progress=False)
    with pytest.raises(ValueError, match="vqa-mini was asked with other prompts"):
        compare(tmp_path / "truth", tmp_path / "shorter")
    evaluate(Fake(), ("caption-mini",), limit=4, folder=tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="nothing in common"):
        compare(tmp_path / "truth", tmp_path / "other")
    evaluate(Fake(), ("edit-mini",), limit=1, folder=tmp_path / "made", progress=False, score=False)
    with pytest.raises(ValueError, match="is not scored yet: diptych evaluate score"):
        compare(tmp_path / "made", tmp_path / "made")
    evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path / "made", progress=False)
    assert "edit-mini" not in compare(tmp_path / "made", tmp_path / "made")  # only what both have scored


def test_flipped_signs():
    assert sign_flip([0] * 10, [1] * 10, [str(i) for i in range(10)]) < 0.01
    assert sign_flip([0] * 10, [1] * 10, ["one"] * 10) == 1  # one prompt proves nothing
    assert sign_flip([0, 1] * 5, [1, 0] * 5, [str(i) for i in range(10)]) > 0.5


def test_two_processes_equal_one(tmp_path, tiny_model):
    words = [tiny_model, "caption-mini", "edit-mini", "--limit", "2", "--batch-size", "2", "--device", "cpu", "--json"]
    assert cli.main(["evaluate", *map(str, words), "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "diptych", "evaluate", *map(str, words), "--out", str(tmp_path / "two")]
    (said, _), (quiet, _) = processes(2, command)
    assert json.loads(said)["scores"] and not quiet  # only rank 0 speaks
    for file in ("items.jsonl", "scores.jsonl", "summary.json", "card.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert not list((tmp_path / "two").glob("*.[01].jsonl"))
    rows = (tmp_path / "two/items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "two/items.jsonl").write_bytes(b"".join(rows[:4]))  # as if both had died in the middle
    (tmp_path / "two/items.1.jsonl").write_bytes(b"".join(rows[4:6]) + rows[6][:20])
    processes(2, command)
    assert (tmp_path / "two/items.jsonl").read_bytes() == (tmp_path / "one/items.jsonl").read_bytes()


def test_the_command_line(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = cli.main(["evaluate", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, _ = call("list", "--json")
    assert code == 0 and json.loads(out)["wise"]["file"] == "required"
    words = (tiny_model, "vqa-mini", "--limit", 1, "--device", "cpu", "--out", "a")
    code, out, _ = call(*words, "--no-score")
    assert code == 0 and "diptych evaluate score a" in out and not (tmp_path / "a/summary.json").exists()
    code, out, _ = call("score", "a", "--json")
    assert code == 0 and "vqa-mini@exact/overall" in json.loads(out)["scores"]
    assert call("compare", "a", "a")[0] == 0
    code, out, _ = call("compare", "a", "a", "--json")
    assert json.loads(out)["vqa-mini"]["difference"]["value"] == 0
    assert cli.main(["report", "a", "--out", "r.html", "--per-category", "2"]) == 0
    capsys.readouterr()
    page, tables = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    assert cli.main(["report", "a", "--out", "mine.html"]) == 2 and "--force" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and not (tmp_path / "mine.md").exists()
    assert cli.main(["report", "a", "--out", "mine.html", "--force"]) == 0 and (tmp_path / "mine.md").is_file()
    capsys.readouterr()
    assert "vqa-mini: every verdict" in page and "| vqa-mini@exact/overall |" in tables and "Sampling card" in tables
    for wrong, told in (
        (("compare", "a"), "Missing argument 'RUN_B'"),
        (("score",), "Missing argument 'RUN'"),
        (("read", "results.jsonl"), "KIND=FILE"),
        (("read", "geneval=gone.jsonl"), "there is no file"),
        (("http://127.0.0.1:9/v1", "vqa-mini"), "--remote-model"),
        (("folder:gone", "geneval-mini"), "there is no folder"),
        ((tiny_model, "wise", "--device", "cpu"), "wise needs your file"),
        ((tiny_model, "vqa-mini", "--judge-url", "http://x/v1", "--device", "cpu"), "--judge NAME"),
        (("distance", "a"), "Missing argument 'REAL'"),
    ):
        code, out, err = call(*wrong)
        assert code == 2 and told in err and not out, (wrong, err)
