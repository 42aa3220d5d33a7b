"""Recipes: every one in the table is complete, round-trips, and says what is wrong with a changed one."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych import recipes
from diptych.data.self_condition import PICTURES
from diptych.data.worlds import embedded
from diptych.models import configs, store, table
from diptych.parts.autoencoder import LatentDecoder
from diptych.parts.decoder import Decoder
from diptych.parts.mllm import Mllm
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionEncoder
from diptych.recipes import sgt
from diptych.training import optim
from diptych.training.build import FOREIGN
from diptych.training.loop import _check
from diptych.training.parameters import select
from diptych.training.recipe import Limits, Recipe, Schedule, Stage, leaves
from tests.support import tiny
from tests.training.test_loop import train

every = pytest.mark.parametrize("name", recipes.RECIPES)


@every
def test_round_trips_through_json_and_yaml(name, tmp_path):
    recipe = recipes.find(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    (tmp_path / "r.json").write_text(recipe.to_json())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(json.loads(recipe.to_json())))
    assert recipes.find(tmp_path / "r.json") == recipes.find(tmp_path / "r.yaml") == recipe


@every
def test_names_parts_terms_and_data_that_exist(name):
    recipe = recipes.find(name)
    assert recipe.name == name
    family, config = configs.config_from_json(recipe.model)
    model = store.create(family, config, Tokenizer.tiny(), "meta")
    _check(recipe, model)
    for stage in recipe.stages:
        assert select(model, stage.train)
        module, function = recipes.RECIPES[name].split(":")
        told = getattr(importlib.import_module(module), function).__doc__
        assert "--catalog" in told or {n.removesuffix(PICTURES) for n in stage.data} <= set(embedded.names())
    for part, source in recipe.init.items():
        module = model.get_submodule("" if part == "model" else part)
        if source.startswith(FOREIGN):
            assert isinstance(module, (Decoder, VisionEncoder, LatentDecoder, Mllm))
        else:
            assert source.partition("#")[0] in table.SIZES or source in told  # what does not ship is told of


@every
def test_every_leaf_can_be_overridden(name):
    recipe = recipes.find(name)
    changed = recipe.override({path: json.dumps(value) for path, value in leaves(json.loads(recipe.to_json())).items()})
    assert changed == recipe


@every
@pytest.mark.parametrize("steps", [7, 100, 100_000])
def test_any_number_of_steps(name, steps):
    recipe = recipes.find(name).with_steps(steps)
    assert recipe.steps == steps and all(s.schedule.warmup <= s.steps for s in recipe.stages)


@every
def test_is_documented_with_its_command(name):
    import importlib

    module, function = recipes.RECIPES[name].split(":")
    assert f"diptych train {name}" in getattr(importlib.import_module(module), function).__doc__


def two_stages():
    first = tiny.recipe().stages[0]
    return replace(tiny.recipe(), stages=(replace(first, name="a", steps=30), replace(first, name="b", steps=10)))


def test_steps_are_shared_in_proportion():
    assert [s.steps for s in two_stages().with_steps(20).stages] == [15, 5]
    assert [s.steps for s in two_stages().with_steps(2).stages] == [1, 1]
    with pytest.raises(ValueError, match="2 stages need at least as many steps, not 1"):
        two_stages().with_steps(1)


def test_override_changes_a_leaf_and_nothing_else():
    base = two_stages()
    changed = base.override({"stages.1.limits.tokens": "99", "name": "other", "stages.0.ema": "null"})
    assert changed.stages[1].limits == replace(base.stages[1].limits, tokens=99)
    assert changed.name == "other" and changed.stages[0].ema is None
    assert replace(changed, name="test", stages=base.stages) == base


def test_free_mappings_take_new_keys():
    changed = two_stages().override(
        {
            "stages.0.data.emoji/draw": "0.5",
            "stages.0.dropout.image": "0.2",
            "stages.1.train.autoencoder": "1e-5",
            "stages.1.loss.codes": "1",
            "init.model": "bagel/tiny",
        }
    )
    assert changed.stages[0].data["emoji/draw"] == 0.5 and changed.stages[0].dropout["image"] == 0.2
    assert changed.stages[1].train["autoencoder"] == 1e-5 and changed.init == {"model": "bagel/tiny"}


def test_a_part_with_a_dot_in_its_name_can_be_set():
    assert two_stages().override({"stages.0.train.decoder.image": "1e-4"}).stages[0].train["decoder.image"] == 1e-4


@pytest.mark.parametrize(
    "path, value, told",
    [
        ("stages.0.step", "3", "stages.0 has no field 'step'; did you mean 'steps'?"),
        ("sede", "3", "recipe has no field 'sede'; did you mean 'seed'?"),
        ("stages.0.limits.qqq", "3", "stages.0.limits has no field 'qqq'; it has tokens, pictures, accumulate"),
        ("stages.0.optimiser.name", "adamw", "stages.0 has no field 'optimiser'; did you mean 'optimizer'?"),
        ("stages.7.steps", "3", "stages is a list of 2; '7' is not one of its indices"),
        ("stages.first.steps", "3", "stages is a list of 2; 'first' is not one of its indices"),
        ("seed.x", "3", "seed is 0; it has no field 'x'"),
        ("model.decoder.hidden", "3", "model.decoder has no field 'hidden'; did you mean 'hidden_size'?"),
        ("stages.0.steps", "many", "stages.0.steps: Input should be a valid integer"),
        ("stages.0.steps", "0", "stage 'a' needs at least one step, not 0"),
        ("stages.0.train", "{}", "stage 'a' trains nothing"),
        ("stages.0.train.decoder", "fast", "stages.0.train.decoder: Input should be a valid number"),
        ("stages.0.limits.tokens", "0", "tokens, pictures, accumulate and rows must be at least 1"),
        ("stages.0.schedule.decay", "2", "a schedule needs warmup >= 0 and decay, floor in [0, 1]"),
        ("stages.0.optimizer.name", "sgd", "name: Input should be 'adamw', 'muon' or 'adamw8bit' (got 'sgd')"),
        ("precision", "fp8", "precision: Input should be 'fp32', 'bf16' or 'auto' (got 'fp8')"),
        ("stages", "[]", "recipe 'test' has no stages"),
        ("stages.1.name", "a", "has two stages of one name"),
        ("model.family", "eagle", "unknown family 'eagle'; choose from bagel"),
        ("model.latent_patch", "two", "bagel.latent_patch: Input should be a valid integer"),
    ],
)
def test_a_bad_change_is_an_error_that_helps(path, value, told):
    with pytest.raises(ValueError) as error:
        two_stages().override({path: value})
    assert told in str(error.value)


def test_a_bad_file_is_named_with_its_line_or_field(tmp_path):
    def told(name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as error:
            Recipe.load(tmp_path / name)
        return str(error.value)

    good = tiny.recipe().to_json()
    assert told("a.json", '{\n "name": "x",\n}').startswith(f"{tmp_path / 'a.json'}:3: not valid JSON")
    assert told("a.yaml", "name: x\nstages: [").startswith(f"{tmp_path / 'a.yaml'}:2: not valid YAML")
    assert told("b.json", good.replace('"seed"', '"sead"')).endswith("sead: Unexpected keyword argument (got 0)")
    assert "stages.0.lr: Unexpected keyword argument" in told("c.json", good.replace('"ema"', '"lr"'))
    assert f"{tmp_path / 'd.json'}: name: Field required" in told("d.json", "{}")
    assert str(tmp_path / "e.json") in told("e.json", "[1]")


def test_unknown_recipes_list_the_names():
    with pytest.raises(ValueError, match="no recipe 'bagel/huge': not a file, and the names are bagel/tiny"):
        recipes.find("bagel/huge")


def test_a_recipe_is_frozen_and_all_data():
    recipe = tiny.recipe()
    with pytest.raises(AttributeError):
        recipe.seed = 1
    assert json.loads(json.dumps(asdict(recipe)))["stages"][0]["steps"] == 10
    assert {f.name for f in fields(Stage)} >= {"train", "data", "loss", "dropout"}


def test_schedules():
    def rates(steps=10, **how):
        return [round(optim.factor(Schedule(**how), i, steps), 4) for i in range(steps)]

    assert rates() == [1.0] * 10
    assert rates(warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(decay=0.5) == [1.0] * 6 + [0.8, 0.6, 0.4, 0.2]
    assert rates(decay=0.5, floor=0.5)[-1] == 0.6
    cosine = rates(shape="cosine", warmup=2)
    assert (
        cosine[:3] == [0.3333, 0.6667, 1.0]
        and cosine[6] == 0.5
        and cosine == cosine[:2] + sorted(cosine[2:], reverse=True)
    )
    assert rates(shape="cosine", floor=0.1)[-1] > 0.1
    assert min(rates(shape="cosine", warmup=2, decay=0.3)) > 0
    assert Limits().accumulate == 1


@pytest.mark.parametrize("family", ["cheers", "synergen", "omnigen2"])
def test_sgt_goes_on_from_any_family_that_names_its_parts(family, tmp_path):
    """The same rates, mix and terms, on another model; who lacks a part is told which."""
    recipe = replace(sgt.tiny(steps=2), init={"model": str(tmp_path / "start")})
    recipe = recipe.override({"stages.0.limits": '{"tokens": 512, "pictures": 24}', "stages.0.schedule.warmup": "1"})
    store.save(tiny.model(family), tmp_path / "start")
    rows = train(replace(recipe, model=store.read_config(tmp_path / "start")), tmp_path / "run")
    assert all({"samples/shapes/sgt/segment", "samples/shapes/ask", "loss/text", "loss/image"} <= set(r) for r in rows)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("start", "run/release"))
    moved = {
        part
        for part, globs in tiny.model(family).parts.items()
        if any(not torch.equal(before[n], after[n]) for n in before if any(fnmatchcase(n, g) for g in globs))
    }
    assert {part.split(".")[0] for part in moved} == set(tiny.model(family).unified)
    other = replace(recipe, model=configs.config_to_json("iomm", tiny.iomm()))
    with pytest.raises(ValueError, match="unknown part 'decoder'; iomm has:"):
        _check(other, tiny.model("iomm"))


OMNIGEN2 = {  # data of a test in place of what a catalog names, or None where the recipe's own ships
    "omnigen2/tiny": None,
    "omnigen2/tune": {"emoji64/compose": 1.0},
    "sgt/omnigen2": {"shapes/sgt/segment": 2.0, "shapes/ask": 1.0},
    "sgt/omnigen2-published": {"shapes/sgt/segment": 2.0, "shapes/ask": 1.0},
}


@pytest.mark.parametrize("name", OMNIGEN2)
def test_recipes_of_omnigen2_take_steps(name, tmp_path):
    """Each with a small network; a step weighs its terms as the recipe says, and moves the parts that it names."""
    recipe, data = recipes.find(name).with_steps(4), OMNIGEN2[name]
    model = configs.config_to_json("omnigen2", tiny.omnigen2())
    limits = Limits(512, 24)
    stages = tuple(replace(s, limits=limits, data=data or s.data) for s in recipe.stages)
    run = replace(
        recipe, model=model, init={}, stages=stages, precision="fp32", engine=replace(recipe.engine, shard="none")
    )
    rows = train(run, tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        weights = next(s.loss for s in stages if s.name == row["stage"])
        assert row["loss"] == pytest.approx(sum(w * row.get(f"loss/{t}", 0.0) for t, w in weights.items()), rel=1e-4)
    assert recipes.find("sgt/omnigen2-published").stages[0].loss["image"] == pytest.approx(
        60 * recipes.find("sgt/omnigen2-published").stages[0].loss["text"]
    )
