"""The loop: what it trains, what it refuses, how it ends; optimizers and averages."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import diptych
from diptych.core.batch import pack
from diptych.data.loader import Row, Stats
from diptych.machine import disk
from diptych.models import configs, store, table
from diptych.parts.decoder import Decoder, decoder_weights_from
from diptych.recipes.run import Watch, stage_sources
from diptych.training import build, checkpoint, loop, optim
from diptych.training.log import Work
from diptych.training.parameters import Average, by_part, freeze, release_state, select
from diptych.training.recipe import Optimizer, Recipe
from tests.support import tiny


def train(recipe, run, **how) -> list[dict]:
    """Runs the recipe without pictures and returns its metrics."""
    loop.train(recipe, run, stage_sources, show=False, **how)
    return metrics(run)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(rows) -> list[tuple]:
    """What must be equal for two runs to be the same."""
    keys = ("step", "stage", "loss", "loss/text", "loss/image", "count/text", "count/image", "lr", "gradient_norm")
    return [tuple(r[k] for k in keys) for r in rows]


def test_a_run_leaves_what_it_promises(tmp_run):
    recipe = tiny.recipe(steps=4, checkpoint_every=2, keep=1)
    rows = train(recipe, tmp_run)
    assert Recipe.load(tmp_run / "recipe.json") == recipe
    assert {"python", "machine", "git", "torch", "diptych"} <= json.loads(
        (tmp_run / "environment.json").read_text()
    ).keys()
    assert [p.name for p in (tmp_run / "checkpoints").iterdir()] == ["step-00000004"]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for key in ("tokens_per_second", "images_per_second", "fill", "data_wait", "memory", "skipped", "gradient_norm"):
        assert all(r[key] >= 0 for r in rows)
    assert all(0.5 < r["fill"] <= 1 for r in rows)
    released = store.load(tmp_run)
    assert configs.config_to_json("bagel", released.config) == recipe.model
    with pytest.raises(ValueError, match="already holds a run"):
        train(recipe, tmp_run)


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again = (train(tiny.recipe(steps=3), tmp_path / n) for n in "ab")
    assert losses(first) == losses(again)
    assert losses(train(tiny.recipe(steps=3, seed=1), tmp_path / "c")) != losses(first)
    a, b = ((tmp_path / n / "release" / "model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_unnamed_parts_stay_as_they_were(tmp_run):
    recipe = tiny.recipe(steps=3, train={"head": 1e-2}, ema=None)
    before = build.build(recipe).state_dict()
    train(recipe, tmp_run)
    after = store.load(tmp_run)
    own = by_part(after)["head"].keys()
    moved = {n for n, v in after.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and moved <= own


def test_the_hook_sees_every_checkpoint(tmp_run):
    seen = []
    train(tiny.recipe(steps=5, checkpoint_every=2), tmp_run, hook=lambda model, step, run: seen.append((step, run)))
    assert seen == [(2, tmp_run), (4, tmp_run), (5, tmp_run)]


def test_diptych_train_draws_samples_and_can_be_called(tmp_run):
    release = diptych.train(
        tiny.recipe(steps=2), tmp_run, device="cpu", watch=Watch(show=False), override={"stages.0.ema": "null"}
    )
    assert release == tmp_run / "release" and (tmp_run / "samples" / "step-00000002.png").is_file()
    assert diptych.load(release).generate("a red circle").images[0].size == (32, 32)


def test_bf16_trains_too(tmp_run):
    plain = train(tiny.recipe(steps=1, train={"head": 1e-3}), tmp_run)
    half = train(tiny.recipe(steps=1, train={"head": 1e-3}, precision="bf16"), tmp_run.with_name("half"))
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02) and half[0]["loss"] != plain[0]["loss"]


def test_a_step_waits_for_the_device_three_times_however_many_rows_it_has(tmp_run, monkeypatch):
    """Losses, norms and what is logged are read once each: on a GPU the rows of a step follow without a gap."""
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)

        def counted(self, real=real):
            if sys._getframe(1).f_globals["__name__"] in ("diptych.training.loop", "diptych.training.log"):
                reads.append(real)
            return real(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    train(tiny.recipe(steps=2, limits=tiny.Limits(tokens=256, accumulate=3)), tmp_run)
    assert len(reads) == 3 * 2


def test_precision_auto_is_what_the_machine_does_faster_and_stays_so(tmp_run, monkeypatch):
    recipe = tiny.recipe(steps=1, train={"head": 1e-3}, precision="auto")
    monkeypatch.setattr(loop, "fastest_precision", lambda device: "bf16")
    auto = train(recipe, tmp_run)
    half = train(replace(recipe, precision="bf16"), tmp_run.with_name("half"))
    assert losses(auto) == losses(half) and Recipe.load(tmp_run / "recipe.json").precision == "bf16"
    monkeypatch.setattr(loop, "fastest_precision", lambda device: "fp32")
    train(recipe.with_steps(2), tmp_run, resume=True)
    assert Recipe.load(tmp_run / "recipe.json").precision == "bf16"


# ---- what is wrong is said before the first step ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"train": {"flowhead": 1e-3}},
            "unknown part 'flowhead'; bagel has: decoder.text, decoder.image, vision, projector, head, autoencoder",
        ),  # noqa: E501
        ({"train": {"autoencoder": 1e-3}}, "part 'autoencoder' of bagel is always frozen"),
        ({"loss": {"text": 1.0}}, "loss terms ['image'] have no weight; the recipe weighs ['text']"),
        (
            {"loss": {"text": 1.0, "image": 1.0, "vq": 1.0}},
            "unknown loss terms ['vq']; the family has ['image', 'text']",
        ),  # noqa: E501
        ({"data": {"cats": 1.0}}, "unknown data set 'cats'; no catalog was given; embedded: shapes/"),
        ({"data": {"shapes/draw": -1.0}}, "the weight of data set 'shapes/draw' is -1.0"),
        ({"dropout": {"sound": 0.1}}, "unknown condition 'sound' in dropout; choose from text, image"),
        ({"init": {"head": "bagel/huge"}}, "no model 'bagel/huge'"),
        ({"workers": 3}, "streams must be a multiple of world x workers"),
    ],
)
def test_a_wrong_recipe_stops_before_the_first_step(changes, told, tmp_run):
    with pytest.raises(ValueError) as error:
        train(tiny.recipe(**changes), tmp_run)
    assert told in str(error.value)
    assert not (tmp_run / "metrics.jsonl").exists() or not metrics(tmp_run)


def test_an_unknown_device_lists_the_choices(tmp_run):
    with pytest.raises(ValueError, match="unknown device 'tpux'; choose from auto, cpu, cuda, mps"):
        diptych.train(tiny.recipe(), tmp_run, device="tpux", watch=Watch(show=False))
    assert not tmp_run.exists()


def test_parts_of_another_model_are_taken_over(tiny_model, tmp_path):
    recipe = tiny.recipe(init={"vision": str(tiny_model)})
    other, built = store.load(tiny_model).state_dict(), build.build(recipe).state_dict()
    plain = build.build(tiny.recipe()).state_dict()
    assert all(torch.equal(built[n], other[n]) for n in built if n.startswith("vision."))
    torch.manual_seed(0)
    assert all(torch.equal(built[n], plain[n]) for n in built if n.startswith("decoder."))
    whole = build.build(tiny.recipe(init={"model": str(tiny_model)})).state_dict()
    assert all(torch.equal(whole[n], other[n]) for n in other)
    with pytest.raises(ValueError, match="bagel has no module 'legs'; it has decoder, vision"):
        build.build(tiny.recipe(init={"legs": str(tiny_model)}))


def test_a_decoder_begins_as_another_family_s(tiny_model):
    """The route of words serves every route, words that the other lacks stay fresh, a tied table is its embeddings."""
    theirs, cheers = store.load(tiny_model).decoder, tiny.recipe(model=configs.config_to_json("cheers", tiny.cheers()))
    mine, fresh = (
        build.build(replace(cheers, init=init)).decoder.state_dict() for init in ({"decoder": str(tiny_model)}, {})
    )
    state, words = theirs.state_dict(), theirs.config.vocab_size
    assert len(mine["embed_tokens.weight"]) > words and theirs.config.routes == 2
    assert torch.equal(mine["embed_tokens.weight"][:words], state["embed_tokens.weight"])
    assert torch.equal(mine["embed_tokens.weight"][words:], fresh["embed_tokens.weight"][words:])
    assert all(torch.equal(mine[n], state[n]) for n in mine if n != "embed_tokens.weight")
    source = Decoder(replace(theirs.config, routes=1, routed=(), tie_word_embeddings=True))
    back = decoder_weights_from(source, theirs)
    assert back.keys() == state.keys() and torch.equal(back["norm.1.weight"], back["norm.0.weight"])
    assert torch.equal(back["lm_head.weight"], back["embed_tokens.weight"])
    with pytest.raises(ValueError, match="bagel/tiny, taken over as 'decoder', does not fit"):
        build.build(replace(cheers, init={"decoder": "bagel/tiny"}))


def _one_step(model, recipe, sample=None):
    stage = recipe.stages[0]
    parts = freeze(model, stage.train)
    optimizers = optim.build(model, parts, select(model, stage.train), stage.optimizer)
    row = Row(
        pack([model.lay_out(sample or tiny.draw("shapes/draw/17"))], model.routes), 0, Stats(0, 0.0, 0, 0, {}, {}, {})
    )
    state, saver = loop.State(model, optimizers=optimizers), checkpoint.Saver(Path("nowhere"), 1, False)
    job = loop._Job(recipe, Path("nowhere"), stage_sources, state, None, threading.Event(), None, 0, 1, 1, saver)
    job.work = Work("cpu", "fp32", lambda batch: 0.0)
    return job.step(stage, iter([row]), 1, parts)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_samples():
    model = tiny.shake(tiny.model("bagel"))
    with torch.no_grad():
        model.latent_out.bias[0] = float("nan")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match="step 1: the loss is nan; nothing was updated. Samples of the row: shapes/draw/17"
    ):
        _one_step(model, tiny.recipe())
    assert all(torch.equal(v, before[n]) or n == "latent_out.bias" for n, v in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = tiny.shake(tiny.model("bagel"))
    model.latent_out.weight.register_hook(lambda grad: grad * float("inf"))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match="step 1: the gradient's norm is (nan|inf); nothing was updated. .*shapes/draw/17"
    ):
        _one_step(model, tiny.recipe())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_terms_that_nothing_supervises_add_nothing():
    logged = _one_step(tiny.shake(tiny.model("bagel")), tiny.recipe(), tiny.say())
    assert logged["count/image"] == 0 and logged["loss/image"] == 0 and logged["loss/text"] > 0


# ---- optimizers, averages, parts ----------------------------------------------------------------------------------


def test_every_trained_parameter_is_in_exactly_one_group():
    for name in ("adamw", "muon"):
        for train_ in ({"decoder": 1e-3, "vision": 2e-3, "projector": 1e-3, "head": 1e-3}, {"decoder.image": 1e-4}):
            model = tiny.model("bagel")
            parts = freeze(model, train_)
            optimizers = optim.build(model, parts, select(model, train_), Optimizer(name, weight_decay=0.1))
            grouped = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
            trained = [id(p) for p in model.parameters() if p.requires_grad]
            assert sorted(grouped) == sorted(trained)
            assert {type(o).__name__ for o in optimizers} == ({"AdamW", "Muon"} if name == "muon" else {"AdamW"})
            layers = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
            for o in optimizers:
                for g in o.param_groups:  # norms, biases, embeddings and tables of positions keep their size
                    assert {id(p) in layers for p in g["params"]} == {g["weight_decay"] > 0}
            optim.set_rates(optimizers, 0.5)
            assert all(g["lr"] == 0.5 * g["peak"] for o in optimizers for g in o.param_groups)


def test_muon_takes_only_matrices_of_blocks():
    model = tiny.model("bagel")
    train_ = {p: 1e-3 for p in model.parts if p not in model.frozen}
    _, muon = optim.build(model, freeze(model, train_), select(model, train_), Optimizer("muon"))
    inside = {id(p) for b in model.blocks() for p in b.parameters()}
    assert all(p.dim() == 2 and id(p) in inside for g in muon.param_groups for p in g["params"])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 4), (1, 4, 16)])
def test_orthogonalise(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = optim.orthogonalise(x)
    singular = torch.linalg.svdvals(y)
    assert y.shape == x.shape and 0.3 < float(singular.min()) and float(singular.max()) < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert float((y * (u @ v)).sum() / (y.norm() * (u @ v).norm())) > 0.97  # towards the nearest orthogonal matrix
    assert torch.allclose(optim.orthogonalise(x.mT), y.mT, atol=1e-4)
    assert torch.allclose(optim.orthogonalise(1e-3 * x), y, atol=1e-2)
    assert not optim.orthogonalise(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16)])
def test_orthogonalise_in_bfloat16(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, half = optim.orthogonalise(x), optim.orthogonalise(x, torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < float((half - exact).norm() / exact.norm()) < 0.02
    model = tiny.model("bagel")
    parts = freeze(model, {"decoder": 1e-3})
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        built = optim.build(model, parts, select(model, {"decoder": 1e-3}), Optimizer("muon"), precision)
        assert built[1].dtype == dtype


def test_muon_takes_a_few_matrices_at_a_time(monkeypatch):
    def steps(numbers):
        ps = [nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))) for i in range(5)]
        monkeypatch.setattr(optim, "at_once", lambda rows, columns: numbers)
        muon = optim.Muon([{"params": ps}], lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            for p in ps:
                p.grad = p.detach().square()
            muon.step()
        return torch.stack([p.detach() for p in ps])

    assert torch.equal(steps(2), steps(5))


def test_muon_decays_weights_and_goes_downhill():
    target, p = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), nn.Parameter(torch.zeros(6, 6))
    muon = optim.Muon([{"params": [p]}], lr=0.1, momentum=0.9, weight_decay=0.0)
    start = float((p - target).detach().square().sum())
    for _ in range(60):
        muon.zero_grad()
        (p - target).square().sum().backward()
        muon.step()
    assert float((p - target).detach().square().sum()) < 0.2 * start
    still = nn.Parameter(torch.ones(2, 2))
    still.grad = torch.zeros(2, 2)
    optim.Muon([{"params": [still]}], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.allclose(still, torch.full((2, 2), 0.95))


def test_the_average_is_its_closed_form():
    p = nn.Parameter(torch.tensor([1.0]))
    average, expected = Average({"p": p}, 0.9), 1.0
    for k in range(1, 200):
        with torch.no_grad():
            p.fill_(float(k) ** 0.5)
        average.update()
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * float(k) ** 0.5
        assert float(average.shadow["p"]) == pytest.approx(expected, rel=1e-5)


def test_a_plain_average_keeps_the_share_of_its_start():
    """Without warm-up, as published: after s steps the start weighs decay ** s."""
    p = nn.Parameter(torch.tensor([1.0]))
    average = Average({"p": p}, 0.99, warmup=False)
    with torch.no_grad():
        p.fill_(0.0)
    for _ in range(70):
        average.update()
    assert float(average.shadow["p"]) == pytest.approx(0.99**70, rel=1e-5)


def test_what_is_released_is_the_average_of_what_was_trained():
    model = tiny.model("bagel")
    head = by_part(model)["head"]
    average = Average(head, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    average.update()
    released = release_state(model, average)
    assert released.keys() == model.state_dict().keys()
    assert all(torch.equal(released[n], average.shadow[n]) for n in head)
    assert all(torch.equal(released[n], v) for n, v in model.state_dict().items() if n not in head)


def test_a_longer_part_name_has_the_last_word():
    model = tiny.model("bagel")
    assert select(model, {"decoder": 1.0}) == {"decoder.text": 1.0, "decoder.image": 1.0}
    for train_ in ({"decoder": 1.0, "decoder.image": 2.0}, {"decoder.image": 2.0, "decoder": 1.0}):
        assert select(model, train_) == {"decoder.text": 1.0, "decoder.image": 2.0}


# ---- saved models -------------------------------------------------------------------------------------------------


def test_loading_is_strict(tiny_model, tmp_path):
    model = store.load(tiny_model)
    state = dict(model.state_dict())
    state.pop("latent_out.bias")
    state["latent_in.weight"] = torch.zeros(1, 1)
    state["stray"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        store.load_strict(model, state, "that folder")
    for told in (
        "that folder does not fit",
        "missing latent_out.bias",
        "unknown stray",
        "latent_in.weight has shape (1, 1), the config",
    ):
        assert told in str(error.value)


def test_broken_folders_are_named(tiny_model, tmp_path):
    import shutil

    folder = Path(shutil.copytree(tiny_model, tmp_path / "m"))
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot read .*model.safetensors"):
        store.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        store.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no model: neither config.json nor release/config.json"):
        store.load(folder)
    with pytest.raises(ValueError, match="no model 'nowhere': not a folder, and these ship: "):
        store.load("nowhere")


def test_saving_replaces_a_model_as_a_whole(tiny_model, tmp_path):
    folder = tmp_path / "m"
    store.save(store.load(tiny_model), folder)
    (tmp_path / ".m.12345.tmp").mkdir()  # what a killed process left
    store.save(store.load(tiny_model), folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]

    def fails(tmp):
        (tmp / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        disk.write_folder(folder, fails)
    assert (folder / "config.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"family": "eagle"}, "unknown family 'eagle'; choose from bagel, "),
        ({"latent_patches": 2}, "bad model config: bagel.latent_patches: Unexpected keyword argument"),
        ({"size": [1]}, "bagel.size"),
    ],
)
def test_bad_model_configs_are_named(change, told):
    with pytest.raises(ValueError) as error:
        configs.config_from_json(tiny.recipe().model | change)
    assert told in str(error.value)


def test_configs_round_trip():
    for size in table.SIZES:
        name, config = table.SIZES[size].family, table.config(size)
        row = json.loads(json.dumps(configs.config_to_json(name, config)))
        assert row == configs.config_to_json(name, config) and configs.config_from_json(row) == (name, config)
    with pytest.raises(ValueError, match="unknown model 'bagel/x'; choose from bagel/tiny"):
        table.config("bagel/x")


def test_the_autoencoder_trains(tmp_run):
    from diptych.models.autoencoder import Config

    config = Config(tiny.bagel().autoencoder)
    recipe = replace(
        tiny.recipe(
            steps=6,
            train={"encoder": 5e-3, "decoder": 5e-3},
            data={"shapes/draw": 1.0},
            loss={"mse": 1.0, "l1": 0.3},
            dropout={},
            optimizer=Optimizer(),
        ),
        model=configs.config_to_json("autoencoder", config),
    )
    rows = train(recipe, tmp_run)
    assert rows[-1]["loss/mse"] < rows[0]["loss/mse"]
    with pytest.raises(ValueError, match="neither answers nor draws"):
        diptych.load(tmp_run)
