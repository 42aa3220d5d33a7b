"""Evaluation: the truth scores one, noise scores nothing, a crash changes no byte, intervals cover what they say."""

import json
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.data.contact_sheet import enlarge, grid
from diptych.data.worlds import embedded, emoji, emoji_scenes, emoji_sources, shapes, shapes_sources
from diptych.evaluation.benchmarks import shapes as mini
from diptych.evaluation.benchmarks.shapes import BENCHMARKS
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.figures import curves
from diptych.evaluation.harness import Evaluable, evaluate
from diptych.evaluation.scores import clustered, macro, paired, wilson
from diptych.parts.flow import FlowSettings


@dataclass
class Said:
    text: str
    ids: tuple
    finish_reason: str
    parameters: dict


@dataclass
class Drawn:
    image: PIL.Image.Image
    prompt: str
    seed: int
    parameters: dict


@cache
def _items():
    every = resolve(("mini", "compose-mini", "geneval-dev"), Tools())[0]
    return {item.id: item for benchmark in every for item in benchmark.items(0, 64)}


class Net(torch.nn.Module):
    family, settings = "fake", FlowSettings(num_inference_steps=3)

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))


class Fake:
    """Does what ``Evaluable`` does by looking at the references: ``truth`` follows them, else noise and nonsense."""

    def __init__(self, truth=True, refuse=(), crash_after=None, weight=1.0, size=64):
        self.model, self.name = Net(weight), "fake"
        self.truth, self.refuse, self.crash_after, self.calls, self.size = truth, refuse, crash_after, 0, size
        self.items = _items()

    def _called(self, samples):
        self.calls += 1
        if self.crash_after is not None and self.calls > self.crash_after:
            raise KeyboardInterrupt
        assert all(s.messages[-1].role == "user" for s in samples)
        if bad := [s.id for s in samples if s.id in self.refuse or "all" in self.refuse]:
            raise ValueError(f"cannot lay out {bad[0]}")

    def answers(self, samples, max_new_tokens=48, temperature=0.0, seed=0, batch_size=32):
        self._called(samples)
        answers = [str(self.items[s.id].reference["answer"]) if self.truth else "eh" for s in samples]
        return [Said(a.capitalize() + ".", (), "stop", {"temperature": temperature}) for a in answers]

    def draw(self, samples, seeds, size=None, settings=None, batch_size=32):
        self._called(samples)
        return [Drawn(self._picture(s, k), "", k, {"settings": settings}) for s, k in zip(samples, seeds, strict=True)]

    def _picture(self, sample, seed):
        rng, reference = np.random.default_rng(seed), self.items[sample.id].reference
        if not self.truth:
            return PIL.Image.fromarray(rng.integers(0, 256, (self.size, self.size, 3), np.uint8))
        if "source" in reference:
            name, size, seed, i = reference["source"]
            return list(embedded.source(name, "test", size, seed)[i].images())[-1].pixels
        if "ids" in reference:
            prompt = emoji_scenes.EmojiPrompt.from_json(reference)
            return emoji_scenes.render_scene(emoji_scenes.scene_for(rng, prompt), self.size)
        if reference.get("type") == "compose":
            pair = [emoji.find(id) for id in reference["emoji"]]
            return emoji_sources.composed(pair, reference["relation"], self.size)
        if "after" in reference:
            return shapes.render(shapes_sources.Edit.from_json(reference).after, self.size)
        return shapes.render(shapes.scene_for(rng, shapes.Prompt.from_json(reference)), self.size)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mini, "GUESSES", 20)


def test_the_truth_scores_one_and_noise_scores_nothing(tmp_path):
    names = ("mini", "compose-mini")
    truth = evaluate(Fake(), names, limit=3, folder=tmp_path / "a", progress=False)
    noise = evaluate(Fake(truth=False), names, limit=3, progress=False)
    assert isinstance(Fake(), Evaluable) and truth.scores.keys() == noise.scores.keys()
    for name, score in truth.scores.items():
        if name.endswith("/yes-ratio"):
            continue  # is no share of what is right
        assert score.value > 0.9 and score.low <= score.value <= score.high, name
        assert score.low < 1, "a few right items are no certainty"
        removed = name.endswith("/instruction")  # noise, too, no longer shows what was to be removed
        partial = removed or name.startswith("seg-mini") or "similarity" in name  # noise is a little like anything
        assert noise.scores[name].value < (0.5 if partial else 0.05) and noise.scores[name].high > 0, name
    assert truth.failures == noise.failures == 0
    for name in (
        "geneval-mini@strict/overall",
        "geneval-mini@strict/held_out/position",
        "vqa-mini@exact/colour",
        "caption-mini@strict/overall",
        "edit-mini@strict/preserved",
        "compose-mini@nearest/new",
    ):
        assert name in truth.scores
    assert truth.scores["geneval-mini@strict/counting"].n == 3
    assert truth.baselines["geneval-mini@strict/overall"]["truth"] > 0.95
    assert truth.baselines["geneval-mini@strict/overall"]["chance"] < 0.2
    assert 0 < truth.baselines["vqa-mini@exact/overall"]["majority"] < 0.8
    assert truth.baselines["edit-mini@strict/overall"] == {"copy": 0.0, "truth": 1.0}

    row = json.loads(json.dumps(truth.to_json()))
    assert set(row) == {"scores", "baselines", "failures", "items", "card", "scorers"}
    assert all(set(s) == {"value", "low", "high", "n"} for s in row["scores"].values())
    assert json.loads((tmp_path / "a/summary.json").read_text()) == row
    assert row["card"]["settings"]["num_inference_steps"] == 3 and row["card"]["size"]["vqa-mini"] == [64, 64]
    lines = [json.loads(line) for line in (tmp_path / "a/items.jsonl").read_text().splitlines()]
    assert len(lines) == row["items"] == len(truth.outcomes) == len({line["id"] for line in lines})
    assert all((tmp_path / "a" / line["file"]).is_file() for line in lines if "file" in line)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    names, kwargs = ("edit-mini", "caption-mini"), dict(limit=4, batch_size=5, progress=False)
    evaluate(Fake(), names, folder=tmp_path / "whole", **kwargs)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fake(crash_after=3), names, folder=tmp_path / "cut", **kwargs)
    items = tmp_path / "cut/items.jsonl"
    assert len(items.read_bytes().splitlines()) == 15
    items.write_bytes(items.read_bytes() + b'{"id": "edit-mini/re')
    again = Fake()
    evaluate(again, names, folder=tmp_path / "cut", **kwargs)
    assert again.calls == 2  # one batch of edits, one of captions
    for file in ("items.jsonl", "scores.jsonl", "summary.json", "card.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    done = Fake(crash_after=0)
    evaluate(done, names, folder=tmp_path / "cut", **kwargs)
    assert done.calls == 0

    scores = tmp_path / "cut/scores.jsonl"  # scoring was cut short
    scores.write_bytes(scores.read_bytes()[:-9])
    next((tmp_path / "cut/pictures").rglob("*.png")).unlink()  # a picture got lost: drawn again
    evaluate(again, names, folder=tmp_path / "cut", **kwargs)
    assert scores.read_bytes() == (tmp_path / "whole/scores.jsonl").read_bytes() and again.calls == 3
    whole = items.read_text()
    for wrong, told in (("rubbish", r"items\.jsonl line 1 is not JSON"), ('{"text": "x"}', r"items\.jsonl.* no 'id'")):
        items.write_text(f"{wrong}\n{whole}")
        with pytest.raises(ValueError, match=told):
            evaluate(again, names, folder=tmp_path / "cut", **kwargs)
    (tmp_path / "cut/card.json").write_text("{")
    with pytest.raises(ValueError, match=r"card\.json is not JSON"):
        evaluate(again, names, folder=tmp_path / "cut", **kwargs)


def test_settings_are_not_mixed_in_one_folder(tmp_path):
    def run(engine, names=("edit-mini",), **changes):
        return evaluate(engine, names, folder=tmp_path, progress=False, **{"limit": 2, **changes})

    run(Fake())
    other = replace(Net.settings, guidance_scale=9.0)
    for changes, field in (
        (dict(engine=Fake(weight=2.0)), "weights"),
        (dict(engine=Fake(), seed=1), "seed = 0, not 1"),
        (dict(engine=Fake(), limit=None), "limit = 2, not None"),
        (dict(engine=Fake(), settings=other), "settings.guidance_scale = 4.0, not 9.0"),
    ):
        with pytest.raises(ValueError, match=field):
            run(**changes)
    both = run(Fake(), ("vqa-mini",))  # another benchmark under the same settings may join
    assert set(both.card["prompts"]) == {"edit-mini", "vqa-mini"}
    (tmp_path / "card.json").unlink()
    with pytest.raises(ValueError, match=r"without its card\.json"):
        run(Fake())


def test_failures_are_counted_as_wrong():
    first = BENCHMARKS["vqa-mini"].items(0, 64)[4]
    result = evaluate(Fake(refuse=(first.id,)), ("vqa-mini",), limit=2, progress=False)
    assert result.failures == 1 and result.scores["vqa-mini@exact/overall"].value == pytest.approx(11 / 12)
    [bad] = [o for o in result.outcomes if o.error]
    assert bad.item.id == first.id and bad.text is None and "cannot lay out" in bad.verdict.reason
    with pytest.raises(ValueError, match="cannot lay out"):  # refusing everything is a wrong setting, not a score
        evaluate(Fake(refuse=("all",)), ("vqa-mini",), limit=1, progress=False)


@pytest.mark.parametrize(
    "wrong, text",
    [
        (dict(benchmarks=("genevel",)), "unknown benchmark 'genevel'; choose from mini, world, geneval-mini"),
        (dict(benchmarks=()), "no benchmark"),
        (dict(limit=0), "limit is 0"),
        (dict(batch_size=0), "batch_size is 0"),
    ],
)
def test_wrong_arguments_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        evaluate(Fake(), progress=False, **wrong)


def test_items_are_what_they_claim():
    geneval, dev = (BENCHMARKS[n].items(0, 64) for n in ("geneval-mini", "geneval-dev"))
    assert len(geneval) == 8 * 24 * 4 and len(dev) == 6 * 24 * 4
    assert len({i.seed for i in geneval + dev}) == len(geneval) + len(dev)

    def of(items, tag):
        return {i.prompt for i in items if i.category == tag}

    assert not {i.prompt for i in geneval} & {i.prompt for i in dev}
    assert all(len(of(dev, tag)) == 24 for tag in shapes.TAGS)
    assert len(of(geneval, "color_attr")) == 24
    for item in geneval:
        needs = shapes.Prompt.from_json(item.reference).needs
        if item.category.startswith("held_out"):
            a, b = ((n.colour, n.shape) for n in needs)
            assert shapes.held_out(a, b)
    counts = {n: len(BENCHMARKS[n].items(0, 64)) for n in ("vqa-mini", "caption-mini", "edit-mini")}
    assert counts == {"vqa-mini": 300, "caption-mini": 150, "edit-mini": 60}
    assert all(m.role == "user" for i in BENCHMARKS["edit-mini"].items(0, 64) for m in i.sample.messages)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_wilson_is_the_textbook_interval():
    score = wilson(8, 10)
    assert (score.value, round(score.low, 4), round(score.high, 4)) == (0.8, 0.4902, 0.9433)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1 and wilson(10, 10).low < 0.75
    with pytest.raises(ValueError, match="at least one item"):
        wilson(0, 0)


def test_intervals_cover_correlated_pictures_and_stay_put():
    """24 prompts of 4 pictures, each prompt with its own chance of success: 95 % of intervals hold the true mean."""
    rng = np.random.default_rng(0)
    clusters = [str(i // 4) for i in range(96)]
    inside, naive, overall = 0, 0, 0
    for _ in range(150):
        values = (rng.random(96) < np.repeat(rng.beta(0.6, 0.4, 24), 4)).astype(float)
        score = clustered(values, clusters)
        inside += score.low <= 0.6 <= score.high
        alone = wilson(values.sum(), 96)
        naive += alone.low <= 0.6 <= alone.high
        both = macro({"a": (values, clusters), "b": (np.ones(96), clusters)})
        overall += both.low <= 0.8 <= both.high
        assert score.low <= alone.low and score.high >= alone.high
    assert inside / 150 > 0.9 and overall / 150 > 0.9 and naive / 150 < 0.87
    assert clustered(values, clusters) == clustered(values, clusters)


def test_macro_weighs_tags_evenly():
    score = macro({"small": ([1.0], ["x"]), "large": ([0.0] * 9, list("abcdefghi"))})
    assert score.value == 0.5 and score.n == 10
    with pytest.raises(ValueError, match="no groups"):
        macro({})
    with pytest.raises(ValueError, match="needs its cluster"):
        clustered([1.0, 0.0], ["a"])


def test_paired_differences_are_sharper_than_two_intervals():
    rng = np.random.default_rng(1)
    a = (rng.random(200) < 0.5).astype(float)
    b = np.maximum(a, rng.random(200) < 0.1)
    better = paired(a, b)
    assert better.low > 0 and better.value == pytest.approx((b - a).mean()) and better.n == 200
    assert wilson(a.sum(), 200).high > wilson(b.sum(), 200).low  # two separate intervals overlap
    assert paired(a, a).low == paired(a, a).high == 0
    tags = ["x"] * 150 + ["y"] * 50
    assert paired(a, b, groups=tags).value == pytest.approx(((b - a)[:150].mean() + (b - a)[150:].mean()) / 2)
    with pytest.raises(ValueError, match="same items"):
        paired(a, b[1:])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_grid_and_curves(tmp_path):
    image = shapes.render(shapes.random_scene(np.random.default_rng(0)), 64)
    sheet = grid([image] * 5, ["a red circle"] * 4 + ["long " * 60 + "w" * 90], 3, [True, False, None, True, False])
    found = {sheet.getpixel((15, 15)), sheet.getpixel((15 + 148, 15))}
    assert sheet.mode == "RGB" and sheet.width < 500 and found == {(30, 142, 80), (206, 58, 58)}
    assert enlarge(PIL.Image.new("RGB", (48, 96)), 128).size == (64, 128)
    with pytest.raises(ValueError, match="2 captions"):
        grid([image], ["a", "b"])

    rows = [{"step": i, "loss": 9 / (i + 1), "loss/text": 1.0, "tokens_per_second": 50.0} for i in range(99)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 99, "lo')
    png = curves(path)
    assert png.startswith(b"\x89PNG") and curves(rows) == png
    assert curves([{"step": 0, "losses": {"loss_text": 1.0}}]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row"):
        curves([{"step": 1}])
