"""Training from rewards: its objectives against the plain way, and stages of the smallest models."""

from __future__ import annotations

import json
import logging
import shlex
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from diptych import cli
from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.models import configs, store
from diptych.models.predictions import FlowPrediction, Noised, TokenPrediction, score
from diptych.recipes import rewards
from diptych.recipes.rollouts import Scheduled
from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training import rewards as stages
from diptych.training.objectives import Policy, Recorder, grpo, nft
from diptych.training.recipe import Limits, Optimizer, Recipe, Reward
from diptych.training.rewards import asked
from tests.support import rewards as own
from tests.support import tiny
from tests.training.test_loop import metrics
from tests.training.test_parallel import run_with, same_weights

RED = "tests.support.rewards:red"


def flow(kind="velocity", n=6):
    draws = torch.Generator().manual_seed(0)
    data, noise, new = (torch.randn(n, 5, 4, generator=draws) for _ in range(3))
    times = torch.linspace(0.1, 0.9, n)
    return FlowPrediction(new.requires_grad_(), Noised(data, noise, times), kind, torch.arange(n))


# ---- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["velocity", "data"])
def test_the_first_update_of_nft_is_advantage_weighted_regression_for_every_beta(kind):
    part, r = flow(kind), torch.tensor([0.0, 0.2, 0.5, 0.5, 0.8, 1.0])

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), part.prediction)[0]

    first, second = (gradient(nft(part, part.prediction.detach(), r, beta)) for beta in (1.0, 0.1))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    error = (part.clean(part.prediction) - part.target.data).flatten(1)
    weight = 5 * (2 * r - 1) / error.detach().abs().mean(1)
    torch.testing.assert_close(first, gradient(weight * error.square().mean(1)), rtol=1e-4, atol=1e-6)
    assert not first[2].abs().max() > 1e-6 < first[0].abs().max()  # r = 1/2 says nothing


def test_nft_away_from_the_old_policy_is_eq_5():
    part, r = flow(), torch.tensor([0.9] * 6)
    old = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    x_t, t = part.target.x_t, part.target.times.view(-1, 1, 1)
    expected = 0.0
    for share, v in ((r, 0.7 * old + 0.3 * part.prediction), (1 - r, 1.3 * old - 0.3 * part.prediction)):
        error = (x_t - t * v - part.target.data).flatten(1)
        expected = expected + share * error.square().mean(1) / error.abs().mean(1)
    torch.testing.assert_close(nft(part, old, r, 0.3), 5 / 0.3 * expected, rtol=1e-4, atol=1e-4)


def test_token_grpo_in_chunks_is_autograd_on_whole_logits():
    draws = torch.Generator().manual_seed(0)
    states, table = (torch.randn(s, generator=draws).requires_grad_() for s in ((40, 8), (13, 8)))
    targets = torch.randint(0, 13, (40,), generator=draws)
    a, shift, far = (torch.randn(40, generator=draws) for _ in range(3))
    part = TokenPrediction(states, table, targets, torch.zeros(40, dtype=torch.long))
    logp = (states @ table.T / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    old, first = logp.detach() + 0.3 * shift, logp.detach() + 0.3 * far
    rho = (logp - old).exp()
    k3 = (first - logp).exp() - (first - logp) - 1
    whole = (-torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a) + 0.05 * k3).sum()
    chunked = grpo(part, a, old, first, 0.2, 0.05, 0.7)
    torch.testing.assert_close(chunked.sum, whole, rtol=1e-5, atol=1e-5)
    assert 0 < chunked.logged["clipped"] < 40
    for ours, expected in zip(
        torch.autograd.grad(chunked.sum, (states, table)), torch.autograd.grad(whole, (states, table)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_policy_objective_fits_every_family(family):
    """Recorded predictions of the same weights change nothing; the sign of the advantage turns the gradient round."""
    model = tiny.shake(tiny.model(family)).requires_grad_(False)
    part = next(n for n, _ in model.named_parameters() if any(n.startswith(p) for p in ("decoder.lay", "dit.")))
    weight = model.get_parameter(part).requires_grad_()
    batch = pack([model.lay_out(s) for s in (tiny.draw(), tiny.edit(), tiny.say())], model.routes)
    how = Reward({"shapes": 1.0}, reference={"text": 0.1, "image": 0.1})
    recorder = Recorder({})
    model(batch, Noise(1, 2), recorder)
    gradients = []
    for sign, old in ((1.0, None), (1.0, recorder.values), (-1.0, recorder.values)):
        policy = Policy(torch.tensor([1.0, -2.0, 0.5]) * sign, how, {}, old, recorder.values)
        losses = model(batch, Noise(1, 2), policy)
        assert losses.keys() == model.counts(batch).keys()
        gradients.append(torch.autograd.grad(sum(t.sum for t in losses.values()), weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], -gradients[2], rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().max() > 0
    assert score(model.predict(batch, Noise(1, 2)), batch, model.counts(batch)).keys() == losses.keys()


# ---- asks and rewards -----------------------------------------------------------------------------------------------


def test_an_ask_is_the_row_without_its_answer():
    assert asked(tiny.draw(size=(64, 32))).messages[-1] == assistant(Image(None, "target"))
    assert asked(tiny.ask()).messages == tiny.ask().messages[:-1]
    assert asked(Sample("a", (user("x"),))).messages[-1] == assistant(Image(None, "target"))
    turns = Sample("t", (user("a"), assistant("b"), user("c"), assistant("d")))
    assert all(not p.loss for m in asked(turns).messages for p in m.parts if isinstance(p, Text))
    with pytest.raises(ValueError, match="sample 'story' draws a picture before its last answer"):
        asked(tiny.story())
    with pytest.raises(ValueError, match="sample 'n' is no ask"):
        asked(Sample("n", (assistant("x"),)))


def test_rewards_of_the_embedded_worlds(tmp_path):
    """The right answer of a row gets the most, another row's less."""
    from diptych.data.worlds import embedded

    for name, source in {
        "shapes": "shapes/reward",
        "shapes:graded": "shapes/reward",
        "edit": "shapes/edit",
        "answer": "shapes/ask",
        "caption": "shapes/caption",
        "overlap": "shapes/sgt/semantic",
    }.items():
        rows = [embedded.source(source)[i] for i in range(8)]
        last = [r.messages[-1].parts[-1] for r in rows]
        made = [p.text if isinstance(p, Text) else p.pixels for p in last]
        reward = rewards.find(name, tmp_path)
        right, wrong = reward(rows, made), reward(rows, made[1:] + made[:1])
        assert right == [1.0] * 8 and sum(wrong) < 7.5 and all(0 <= v <= 1 for v in wrong), name
        other = "words" if not isinstance(made[0], str) else tiny.picture(0)
        assert reward(rows[:1], [other]) == [None], name
    assert rewards.find("shapes", tmp_path)([tiny.draw()], [tiny.picture(0)]) == [None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "unknown reward 'shape'; choose from shapes, shapes:graded, edit"),
        ("nowhere:f", "reward 'nowhere:f' cannot be imported"),
        ("tests.support.rewards:down", "is no function"),
        ("judge:qwen", "a judge is named MODEL@URL"),
    ],
)
def test_wrong_names_of_rewards(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rewards.find(name, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rewards": {}}, "at least one reward"),
        ({"rewards": {"shapes": float("inf")}}, "must be finite"),
        ({"group": 1}, "reward.group must be at least 2"),
        ({"follow": (0, 0.1, 1.0)}, "reward.follow"),
        ({"draws": 0}, "must be at least 1"),
        ({"reference": {"pictures": 1.0}}, "reward.reference names 'pictures'"),
        ({"groups": 3}, "groups"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    row = json.loads(recipe().to_json())
    row["stages"][0]["reward"] |= wrong
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(row)


# ---- stages ---------------------------------------------------------------------------------------------------------


@cache
def started(family: str) -> str:
    """A folder with random weights: the family's own begin with a head that draws one picture for every seed."""
    folder = Path(tempfile.mkdtemp()) / family
    store.save(tiny.shake(tiny.model(family)), folder)
    return str(folder)


def recipe(family="bagel", steps=4, data=None, every=2, rates=None, **how) -> Recipe:
    reward = Reward(**{"rewards": {RED: 1.0}, "group": 4, "asks": 2, "draws": 1} | how)
    made = tiny.recipe(
        name="rewards",
        model=configs.config_to_json(family, tiny.FAMILIES[family]()),
        steps=steps,
        train=rates or {"generation": 1e-3},
        data=data or {"shapes/draw": 1.0},
        loss={"text": 1.0, "image": 1.0},
        optimizer=Optimizer("adamw", eps=1e-4),
        limits=Limits(tokens=512, pictures=32),
        dropout={},
        ema=None,
        checkpoint_every=every,
    )
    stage = replace(made.stages[0], reward=reward)
    return replace(made, stages=(stage,), init={"model": started(family)})


def run(made: Recipe, folder, **how) -> list[dict]:
    loop.train(made, folder, stage_sources, show=False, rollouts=Scheduled(), **how)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> bytes:
    return (folder / "release" / "model.safetensors").read_bytes()


def plain(rows) -> list[dict]:
    """What two runs must share: everything but speed and memory."""
    clocks = ("seconds", "seconds/rollouts", "tokens_per_second", "images_per_second", "memory")
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows]


@pytest.mark.parametrize("family", ["bagel", "synergen"])
def test_the_reward_of_one_ask_rises(family, tmp_path):
    """Redder pictures of a flow and of codes, from nothing but the reward."""
    sampling = {"guidance_scale": 1.0} | ({"top_k": 36, "temperature": 1.0} if family == "synergen" else {})
    rates, draws = ({"generation": 1e-2}, 1) if family == "synergen" else ({"generation": 3e-2}, 2)
    how = {"sampling": sampling, "group": 16, "asks": 1, "draws": draws}
    made = recipe(family, 12, {"shapes/draw#1": 1.0}, 100, rates, **how)
    rows = run(made, tmp_path / "run")
    early, late = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert late > early + 2 * rows[0]["reward/std"] / 4  # two standard errors of a step's mean
    assert all(r["rollouts"] == 16 and 0 < r["variety"] < 2 for r in rows)


def test_killed_is_not_killed(tmp_path):
    """With old and first weights, dev asks and two updates: the same numbers and the same weights, to the bit."""
    how = {
        "follow": (1, 0.1, 0.5),
        "reference": {"image": 0.5},
        "updates": 2,
        "dev": {"shapes/dev": 1.0},
        "dev_asks": 2,
    }
    made = recipe(**how)
    whole = run(made, tmp_path / "whole")
    assert {"policy/image/from_old", "policy/image/from_first", "dev_before/score", "dev/score"} <= {
        *whole[0],
        *whole[1],
    }

    def crash(model, step, folder):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(made, tmp_path / "cut", hook=crash)
    assert plain(run(made, tmp_path / "cut", resume=True)) == plain(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    sheets = [f.name for f in sorted((tmp_path / "whole" / "samples").iterdir())]
    assert sheets == ["step-00000002-rollouts.png", "step-00000004-rollouts.png"]


def test_equal_rewards_move_nothing_and_are_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stages, "PATIENCE", 2)
    made = recipe(rewards={"tests.support.rewards:same": 1.0}, steps=2, reference={"image": 1.0})
    with caplog.at_level(logging.WARNING, logger="diptych.training"):
        rows = run(made, tmp_path / "run")
    assert [r["even"] for r in rows] == [1.0, 1.0] and [r["gradient_norm"] for r in rows] == [0.0, 0.0]
    assert "for 2 steps the rollouts of every ask have had equal rewards" in caplog.text
    from safetensors.torch import load_file

    from diptych.training.build import build

    fresh, released = build(made).state_dict(), load_file(tmp_path / "run" / "release" / "model.safetensors")
    assert all(torch.equal(fresh[name], value) for name, value in released.items())


@pytest.mark.parametrize(
    ("how", "calls", "last"),
    [({"every": 100}, 3, "step-00000003"), ({"dev": {"shapes/draw": 1.0}, "dev_asks": 2}, 6, "step-00000002")],
    ids=["rollouts", "dev asks after the update"],
)
def test_a_judge_that_is_gone_ends_the_run_with_what_there_is(tmp_path, how, calls, last):
    made = recipe(rewards={"tests.support.rewards:flaky": 1.0}, **how)
    whole = run(made, tmp_path / "whole")
    own.down["after"] = calls
    try:
        with pytest.raises(ConnectionError, match="cannot be reached"):
            run(made, tmp_path / "cut")
    finally:
        own.down["after"] = None
    crash = json.loads((tmp_path / "cut" / "crash.json").read_text())
    assert crash["step"] == 4 and crash["last_checkpoint"].endswith(last)
    assert plain(run(made, tmp_path / "cut", resume=True)) == plain(whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"rewards": {"tests.support.rewards:undefined": 1.0}},
            "rewards must be finite; rollout 0 of ask 'shapes/draw",
        ),
        ({"rewards": {"tests.support.rewards:few": 1.0}}, "returned 1 values for 8 rollouts"),
        ({"sampling": {"steps": 3}}, "unknown settings"),
    ],
)
def test_bad_rewards_end_the_run(how, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(recipe(**how), tmp_path / "run")


def test_codes_are_rolled_out_as_they_are_trained(tmp_path):
    with pytest.raises(ValueError, match="rollouts of codes need reward.sampling with"):
        run(recipe("synergen"), tmp_path / "run")


def test_answers_are_trained_from_rewards(tmp_path):
    """Words: token GRPO, with answers that reach their limit judged and not trained on."""
    how = {"rewards": {"tests.support.rewards:letters": 1.0}, "max_new_tokens": 3, "temperature": 1.5}
    rows = run(recipe(data={"shapes/ask": 1.0}, rates={"decoder": 1e-3}, steps=2, **how), tmp_path / "run")
    assert all(r["reward/tests.support.rewards:letters"] > 0 and "loss/text" in r for r in rows)
    assert all(r["trained"] + r.get("cut", 0) <= 8 for r in rows)


def test_rollouts_without_guidance_and_without_a_reference_are_warned_of(tmp_path, caplog):
    made = recipe(steps=1, sampling={"guidance_scale": 1.0})
    with caplog.at_level(logging.WARNING, logger="diptych.training"):
        run(made, tmp_path / "run")
    assert "reward.reference has no weight for image" in caplog.text


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """docs/rewards.md, on one ask of two rollouts: the recipe, the page's own function as a reward, and its release."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    [command] = [line for line in page.splitlines() if "mine:bright" in line and line.startswith("diptych train")]
    small = {"asks": 1, "group": 2, "dev": "{}", "sampling.num_inference_steps": 2}
    changes = [x for name, value in small.items() for x in ("--set", f"stages.0.reward.{name}={value}")]
    verb = [*shlex.split(command)[1:], *changes, "--steps", "1", "--out", "runs/rewarded", "--device", "cpu"]
    assert cli.main(verb) == 0
    [row] = [json.loads(line) for line in Path("runs/rewarded/metrics.jsonl").read_text().splitlines()]
    assert 0 < row["reward/mine:bright"] <= 1 and row["rollouts"] == 2
    assert "done: runs/rewarded/release" in capsys.readouterr().out


def test_two_processes_equal_one(tmp_path):
    """Every process takes some of the asks; dev asks and the first weights are shared, too."""
    made = recipe(steps=2, asks=3, reference={"image": 0.5}, dev={"shapes/dev": 1.0}, dev_asks=3)
    rows = run(made, tmp_path / "one")
    run_with(2, made, tmp_path / "two")
    for a, b in zip(rows, metrics(tmp_path / "two"), strict=True):
        for name in ("reward", "reward/std", "trained", "loss", "gradient_norm", "variety"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    same_weights(tmp_path / "one", tmp_path / "two")
