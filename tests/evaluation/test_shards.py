"""An evaluation in shards that share only the folder: a killed one goes on, and merged they equal one process."""

import json

import pytest

from diptych import cli
from diptych.evaluation.harness import Share, evaluate, rescore
from tests.evaluation.test_harness import Fake

NAMES = ("vqa-mini", "mini")


def test_shards_merged_are_the_whole(tmp_path):
    whole = evaluate(Fake(), NAMES, limit=4, folder=tmp_path / "whole", batch_size=3, progress=False)
    folder, settings = tmp_path / "shards", {"limit": 4, "batch_size": 3, "progress": False}
    for shard in range(3):
        if shard == 1:
            with pytest.raises(KeyboardInterrupt):
                evaluate(
                    Fake(crash_after=1), NAMES, limit=4, folder=Share(folder, shard, 3), batch_size=3, progress=False
                )
            assert (folder / "items.1.jsonl").read_text().count("\n") == 3
            with pytest.raises(ValueError, match="items of .* are not finished, first"):
                rescore(folder, progress=False)
        part = evaluate(Fake(), NAMES, folder=Share(folder, shard, 3), **settings)
        assert part.scores == {} and 0 < len(part.outcomes) < len(whole.outcomes)
    merged = rescore(folder, progress=False)
    assert merged.to_json()["scores"] == whole.to_json()["scores"]
    for stem in ("items", "scores"):
        rows, expected = (
            [json.loads(line) for line in (tmp_path / f / f"{stem}.jsonl").read_text().splitlines()]
            for f in ("shards", "whole")
        )
        assert rows == expected and not list(folder.glob(f"{stem}.*.jsonl"))


def test_shards_from_the_command_line(tmp_path, capsys):
    words = ["evaluate", "bagel/tiny", "vqa-mini", "--limit", "1", "--out", str(tmp_path / "e"), "--json"]
    for shard in ("0/2", "1/2"):
        assert cli.main([*words, "--shard", shard]) == 0
    counts = [json.loads(line)["items"] for line in capsys.readouterr().out.splitlines()]
    assert cli.main(["evaluate", "merge", str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == sum(counts)
    assert cli.main([*words[:5], "--shard", "0/2"]) == 2
    assert "--shard needs --out DIR" in capsys.readouterr().err
    assert cli.main([*words, "--shard", "2/2"]) == 2
    assert "shard '2/2' is not i/n" in capsys.readouterr().err
