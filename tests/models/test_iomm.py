"""IOMM: what its paper (arXiv 2603.16139) fixes. The protocol suite tests the rest."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from diptych import models
from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text, assistant, user
from diptych.data.catalog import sources
from diptych.data.mixture import Mixture
from diptych.data.self_condition import SelfConditioned, bare
from diptych.generation.engine import Engine
from diptych.models import configs, store, table
from diptych.models.iomm import Config, Prompts
from diptych.parts.adapters import Connector, QueryBlock, ResidualQueries, StaticQueries
from diptych.parts.batch_invariant import steady
from diptych.parts.dit import DitConfig, Group, build_dit
from diptych.parts.flow import FlowSettings, TimeDraw, warp
from diptych.parts.mllm import MllmConfig
from diptych.recipes import iomm as recipes
from diptych.recipes.run import precompute, stage_sources
from diptych.training import build, loop, optim
from diptych.training.parameters import Average, by_part, freeze, select
from diptych.training.recipe import Limits, Optimizer, Recipe, SelfCondition
from tests.protocol.test_losses import run
from tests.support import tiny
from tests.support.tolerances import LOGITS, SUM

NOISE = Noise(3, 5)


def made(**changes) -> models.protocol.UnifiedModel:
    """A shaken model with other settings."""
    torch.manual_seed(0)
    model = store.create("iomm", replace(tiny.iomm(), **changes))
    model.initialise(0)
    return tiny.shake(model).eval()


@pytest.fixture(scope="module")
def model():
    return made()


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def alone(name: str = "self", seed: int = 5, masked: float = 0.5, size=(32, 32)) -> Sample:
    """A picture that is drawn from itself."""
    picture = Sample(name, (assistant(Image(tiny.picture(seed, *size), "target")),))
    return SelfConditioned([picture], masked)[0]


def conditions(model, batch, noise=NOISE):
    """(conditions, which are real) of the pictures to draw, as training computes them."""
    from diptych.parts.attention import Recorded, documents

    with torch.no_grad():
        s = model._embed(batch, noise)
        attend = Recorded(documents(s.columns))
        states = model.mllm(s.x, s.positions, attend)
    return model._condition(batch, s, states, attend.memory)


def image_loss(model, batch) -> float:
    """The summed loss of the pictures to draw."""
    with torch.no_grad():
        return float(model(batch, NOISE)["image"].sum)


# ---- 1 sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads", "expected"), [(1536, 12, 28_718_592), (2048, 16, 50_874_368)])
def test_the_adapter_has_as_many_parameters_as_published(width, heads, expected):
    with torch.device("meta"):
        assert count(ResidualQueries(width, 256, heads)) == expected
        # the controls of equal size: static queries and one block after g; one block alone lacks the queries only
        assert count(StaticQueries(width, 256)) + count(QueryBlock(width, heads)) == expected
        plain, with_block = Connector(width, 64, heads), Connector(width, 64, heads, layers=1)
        assert count(with_block) - count(plain) == expected - 256 * width


@pytest.mark.parametrize(("size", "billions"), [("b", 1.6), ("l", 2.7), ("xl", 6.0)])
def test_generators_have_their_published_sizes(size, billions):
    model = store.create("iomm", table.config(f"iomm/{size}"), device="meta")
    parts = {part: sum(p.numel() for p in named.values()) for part, named in by_part(model).items()}
    assert parts["dit"] + parts["connector"] == pytest.approx(billions * 1e9, rel=0.05)
    assert parts["adapter"] == 28_718_592
    assert parts["mllm"] == pytest.approx(2.09e9, rel=0.01)  # InternVL3-2B
    assert all(p.is_meta for p in model.parameters())
    assert model.mllm.picture((512, 512)).open == 256 and model.features == 64


@pytest.mark.parametrize(("width", "layers", "heads"), [(2048, 36, 16), (3584, 28, 28)])
def test_another_reader_has_an_adapter_of_its_width(width, layers, heads):
    """Qwen2.5-VL of 3 B and of 7 B."""
    text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 4}
    reader = MllmConfig({"model_type": "qwen2_5_vl", "text_config": text})
    model = store.create("iomm", Config.b(reader), device="meta")
    assert model.mllm.width == width == 128 * model.adapter.layers[0].heads


def test_muon_takes_the_matrices_of_the_adapter_too(model):
    train = {"adapter": 1.0, "connector": 1.0, "dit": 1.0}
    adamw, muon = optim.build(model, freeze(model, train), select(model, train), Optimizer("muon"))
    turned, rest = ({id(p) for g in o.param_groups for p in g["params"]} for o in (muon, adamw))
    assert all(id(p) in turned for p in model.adapter.layers.parameters() if p.dim() == 2)
    assert id(model.adapter.queries) in rest and id(model.connector.linear.weight) in rest


# ---- 2, 4 the sequence and the prefix ---------------------------------------------------------------------------


def test_queries_are_appended_and_nothing_else_changes(model):
    with_queries = model.lay_out(alone())
    without = made(adapter="none").lay_out(alone())
    kinds = [s.kind for s in with_queries.segments]
    assert kinds == [Kind.TEXT, Kind.VISION, Kind.TEXT, Kind.QUERY, Kind.NOISED]
    assert len(with_queries) == len(without) + model.config.queries
    assert [s.ids for s in with_queries.segments if s.kind != Kind.QUERY] == [s.ids for s in without.segments]
    batch = pack([with_queries])
    query = (batch.ids == -1) & (batch.hidden) & ~batch.full
    rest = ~query
    assert torch.equal(batch.positions[rest], pack([without]).positions)  # they move no position
    condition, valid = conditions(model, batch)
    bare_condition, bare_valid = conditions(made(adapter="none"), pack([without]))
    assert condition.shape[1] == bare_condition.shape[1] + model.config.queries and valid.all() and bare_valid.all()


def test_text_stands_before_the_picture_and_drawing_has_its_prompt(model):
    decode = model.tokenizer.decode
    words = {
        "alone": (alone(), model.config.prompts.pictures),
        "pair": (tiny.draw(prompt="two red squares"), "two red squares"),
        "nothing": (bare(tiny.draw()), model.config.prompts.nothing),
    }
    for sample, prompt in words.values():
        first, *_ = model.lay_out(sample).segments
        assert prompt in decode(first.ids)
    first, image, *_ = model.lay_out(tiny.edit()).segments
    assert "make the star red" in decode(first.ids) and image.kind == Kind.VISION
    swapped = made(text_first=False).lay_out(tiny.edit())
    assert [s.kind for s in swapped.segments][:3] == [Kind.TEXT, Kind.VISION, Kind.TEXT]
    assert "make the star red" in decode(swapped.segments[2].ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cond_tokens": "queries"},
        {"mask_mode": "zero_hide"},
        {"mask_mode": "drop"},
        {"adapter": "static"},
        {"adapter_layers": 2, "connector_layers": 1},
    ],
    ids=str,
)
def test_the_kept_prefix_equals_the_plain_way(changes):
    model = made(**changes)
    samples = [tiny.say(), tiny.draw(), alone(), tiny.edit(), tiny.story(), tiny.draw("wide", 7, "a star", (64, 32))]
    batch = pack([model.lay_out(s) for s in samples])
    a, valid = conditions(model, batch)
    b, same = model.reference(batch, NOISE)
    assert torch.equal(valid, same)
    assert torch.allclose(a[valid], b[valid], rtol=0, atol=LOGITS)
    rows = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)) * valid[..., None]
    gradients = []
    for c in (a, b):
        model.zero_grad()
        (c * rows).sum().backward()
        gradients.append([p.grad.clone() for p in (*model.adapter.parameters(), *model.connector.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=LOGITS)


def test_the_prefix_does_not_see_the_queries(model):
    batch = pack([model.lay_out(tiny.story())])
    changed = made()
    with torch.no_grad():
        changed.adapter.queries.copy_(model.adapter.queries.flip(1))
        a, b = model(batch, NOISE), changed(batch, NOISE)
    assert a["image"].sum != b["image"].sum and torch.equal(a["text"].sum, b["text"].sum)


# ---- 3 what learns ----------------------------------------------------------------------------------------------


def digest(module) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        made.update(name.encode() + tensor.numpy().tobytes())
    return made.hexdigest()


def test_training_reaches_queries_connector_and_generator_and_nothing_frozen():
    model = made()
    frozen = {n: digest(m) for n, m in (("mllm", model.mllm), ("autoencoder", model.autoencoder))}
    before = Engine(model).answers([tiny.request(tiny.ask())], max_new_tokens=6)[0].ids
    train = dict.fromkeys(recipes.TRAINED, 1e-2)
    run(model, tiny.recipe(train=train), [[alone(), tiny.draw(), tiny.edit()]], 3)
    batch = pack([model.lay_out(s) for s in (alone(), tiny.draw())])
    losses = model(batch, NOISE)
    losses["image"].sum.backward()
    assert all(p.grad is None for m in (model.mllm, model.autoencoder) for p in m.parameters())
    for part in recipes.TRAINED:
        own = by_part(model)[part].values()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own), part
    assert {n: digest(m) for n, m in (("mllm", model.mllm), ("autoencoder", model.autoencoder))} == frozen
    assert Engine(model).answers([tiny.request(tiny.ask())], max_new_tokens=6)[0].ids == before


# ---- 5 masking --------------------------------------------------------------------------------------------------


def embedded(model, sample, noise=NOISE):
    laid = model.lay_out(sample)
    batch = pack([laid])
    [group] = batch.of(Kind.VISION)
    with torch.no_grad():
        stream = model._embed(batch, noise)
    places = torch.searchsorted(stream.places, group.tokens[0])
    return stream, places, group


def test_no_mask_is_the_identity_and_a_whole_mask_hides_every_pixel(model):
    free, places, group = embedded(model, alone(masked=0.0))
    with torch.no_grad():
        assert torch.equal(free.x[places], model.mllm.look(group.images)[0])
    blank, places, _ = embedded(model, alone(masked=1.0))
    other, _, _ = embedded(model, alone(masked=1.0, seed=9))
    assert torch.equal(blank.x, other.x) and not blank.x[places].any()


def test_tokens_are_blank_as_a_whole_and_words_never(model):
    free, places, _ = embedded(model, alone(masked=0.0))
    some, _, _ = embedded(model, alone(masked=0.5))
    gone = (some.x == 0).all(-1)
    changed = (some.x != free.x).any(-1)
    assert torch.equal(gone, changed) and 0 < int(gone.sum()) < len(places)
    assert set(gone.nonzero()[:, 0].tolist()) <= set(places.tolist())
    words = (pack([model.lay_out(alone())]).ids >= 0).sum()
    assert int((~torch.isin(torch.arange(len(some.x)), places)).sum()) == int(words)  # markers and prompt, untouched


@pytest.mark.parametrize("masked", [0.25, 0.45, 0.85])
def test_the_share_that_stays_is_what_was_asked(masked):
    from diptych.parts.vision import kept

    model = made()
    batch = pack([model.lay_out(alone(f"s{i}", masked=masked)) for i in range(40)])
    [group] = batch.of(Kind.VISION)
    keep = torch.stack([kept(group, Noise(0, step)) for step in range(10)]).float()
    sigma = (masked * (1 - masked) / keep.numel()) ** 0.5
    assert abs(float(keep.mean()) - (1 - masked)) < 3 * sigma
    assert not torch.equal(keep[0], keep[1]) and not torch.equal(keep[0][0], keep[0][1])  # by step and by sample


def test_pairs_edits_and_questions_are_not_masked(model):
    stage = replace(recipes.tiny().stages[1], data={"shapes/draw": 1.0, "shapes/ask": 1.0, "shapes/edit": 1.0})
    found = stage_sources(replace(recipes.tiny(), stages=(stage,)), stage)
    for source in found.values():
        assert not any(s.masked for s in model.lay_out(source[0]).segments)


@pytest.mark.parametrize("mode", ["zero_hide", "drop"])
def test_blank_tokens_may_also_be_hidden_or_left_out(model, mode):
    hidden, zero = made(mask_mode=mode), model
    stream, _, _ = embedded(hidden, alone(masked=0.5))
    whole, _, _ = embedded(zero, alone(masked=0.5))
    gone = int((whole.x == 0).all(-1).sum())
    if mode == "drop":
        assert len(stream.x) == len(whole.x) - gone and set(stream.positions.tolist()) < set(whole.positions.tolist())
    else:
        assert torch.equal(stream.x, whole.x) and int((~stream.seen).sum()) == gone
    batch = pack([zero.lay_out(alone(masked=0.5))])
    a, b = (image_loss(m, batch) for m in (zero, hidden))
    assert a != b
    with pytest.raises(ValueError, match="mask_mode 'zero' only"):
        hidden.extend([hidden.open()], [hidden.lay_out(tiny.request(alone()))])


# ---- 6, 7 flow and guidance -------------------------------------------------------------------------------------


def test_the_path_of_the_paper():
    c = Config.b()
    assert c.prediction == "velocity" and c.times == TimeDraw(uniform=True)
    t = c.times(Noise(), tuple(f"s{i}" for i in range(2000)), (0,) * 2000)
    assert 0 <= float(t.min()) and float(t.max()) < 1 and abs(float(t.mean()) - 0.5) < 3 * 12**-0.5 / 2000**0.5
    assert (c.settings.num_inference_steps, c.settings.guidance_scale, c.settings.timestep_shift) == (50, 4.5, 1.0)
    times = warp(50)
    assert times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())
    assert torch.equal(FlowSettings(10, warped=True).times(10), warp(10))


def test_guidance_1_is_the_conditional_field_and_0_the_unconditional(model):
    request = Sample("p", (user("a blue star"), assistant(Image(None, "target", (32, 32)))))

    def fields(**changes):
        settings = replace(model.settings, guidance_interval=(0.0, 1.0), num_inference_steps=1, **changes)
        drops = model.branches(request, settings)
        contexts = tuple(model.extend([model.open()], [model.lay_out(request, d)])[0] for d in drops)
        return model.start([contexts], [request], [settings], [0])[0]

    full, free = fields(guidance_scale=2.0).private
    one, zero = fields(guidance_scale=1.0), fields(guidance_scale=0.0)
    assert len(one.contexts) == 1 and torch.allclose(one.private[0], full, atol=LOGITS)
    assert not torch.equal(full[: len(free)], free[: len(full)])
    unconditional = replace(one, private=(free,))
    assert torch.allclose(model.finish(model.step([zero])), model.finish(model.step([unconditional])), atol=LOGITS)


# ---- 8, 13 recipes ----------------------------------------------------------------------------------------------


def test_the_share_of_pictures_without_words():
    pairs = {"shapes/draw": 0.85, "emoji64/draw": 0.15}
    assert recipes.mixed("mix", None, pairs, 0.0) == pairs
    parts = recipes.mixed("mix", {"images": 4.0}, {"a": 3.0, "b": 1.0}, 0.2)  # whatever the weights of each add up to
    assert parts == pytest.approx({"images": 0.2, "a": 0.6, "b": 0.2})
    assert set(recipes.mixed("mix", None, pairs, 1.0)) == {"shapes/draw/pictures", "emoji64/draw/pictures"}
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not 1.5"):
        recipes.mixed("mix", None, pairs, 1.5)
    weights, n = recipes.mixed("mix", None, pairs, 0.5), 4000
    mixture = Mixture(sources(weights), weights, seed=0)
    pictures = sum(mixture.draw().source.endswith("/pictures") for _ in range(n))
    assert abs(pictures / n - 0.5) < 3 * 0.5 / n**0.5


def test_six_recipes_are_one_config_and_share_stage_one():
    six = {(a, b): recipes.tiny(a, b) for a in ("image", "pair") for b in ("image", "pair", "mix")}
    assert len({str(r.stages) for r in six.values()}) == 6
    same = {str(replace(s, name="", steps=1, data={})) for r in six.values() for s in r.stages}
    assert len(same) == 1  # nothing but the data differs
    for (first, _), r in six.items():
        assert r.stages[0] == six[first, "mix"].stages[0] and r.model == six["image", "mix"].model
    words = {k: [any("pictures" not in n and n != "images" for n in s.data) for s in r.stages] for k, r in six.items()}
    assert words["image", "image"] == [False, False] and words["pair", "pair"] == [True, True]
    silent = {k: [any("pictures" in n or n == "images" for n in s.data) for s in r.stages] for k, r in six.items()}
    assert silent["image", "mix"] == [True, True] and silent["pair", "pair"] == [False, False]


# Tables 4 and 5: optimizer, EMA, batch of stage 1, mask ratio.
TABLE_4 = {"b": ("adamw", 0.999, 1024, 0.85), "l": ("adamw", None, 512, 0.85), "xl": ("muon", None, 4096, 0.45)}
TABLE_5 = [("b", 512, 256), ("b", 1024, 96), ("l", 512, 256), ("l", 1024, 96), ("xl", 512, 256)]


@pytest.mark.parametrize(("size", "resolution", "batch"), TABLE_5)
def test_published_recipes_are_the_tables(size, resolution, batch):
    optimizer, ema, first_batch, masked = TABLE_4[size]
    recipe = recipes.published(size)
    if resolution == 1024:  # nothing is pre-trained there
        with pytest.raises(ValueError, match="no pre-training at 1024 pixels"):
            recipes.published(size, resolution=resolution)
        tuned = recipes.published(size, resolution=resolution, start="run")
        assert tuned.init == {"model": "run"} and tuned.model["size"] == [1024, 1024]
        recipe = replace(recipe, stages=(recipe.stages[0], *tuned.stages))
    for stage, samples, side in zip(recipe.stages, (first_batch, batch), (512, resolution), strict=True):
        assert 0 < stage.limits.tokens / (stage.limits.pictures // 2) - (side // 16) ** 2 < 1024
        o = stage.optimizer
        assert (o.name, o.betas, o.clip, o.weight_decay) == (optimizer, (0.9, 0.95), 1.0, 0.0)
        assert set(stage.train.values()) == {1e-4} and set(stage.train) == {"adapter", "connector", "dit"}
        assert (stage.ema, stage.self_condition.masked) == (ema, masked)
        assert stage.limits.pictures // 2 * stage.limits.accumulate * recipes.PROCESSES == samples
        assert stage.dropout == {"text": 0.1, "image": 0.1}  # U9
    image_only, mixed = (s.data for s in recipe.stages)
    assert image_only == {"images": 1.0} and mixed == {"pairs/pictures": 0.5, "pairs": 0.5}  # λ = 0.5
    steps = recipe.stages[1].steps
    assert steps * batch == pytest.approx(10 * 210_000, rel=0.01)
    if size == "b":
        assert recipe.stages[0].steps * first_batch == pytest.approx(10 * 11e6, rel=0.01)
    with pytest.raises(ValueError, match="is tuned at"):
        recipes.published(size, resolution=2048)


def test_published_rows_hold_their_pictures():
    """A sample of every kind fits a row as often as the batch counts on."""
    config = table.config("iomm/b")
    longest = 256 + 2 + 20 + config.queries + (512 // 16) ** 2  # a picture to read, markers and words, queries, latents
    for size in recipes.SIZES:
        for stage in recipes.published(size).stages:
            assert longest * stage.limits.pictures / 2 <= stage.limits.tokens


def test_mixed_tuning_of_another_family(tmp_path):
    """Table 6's strategy on BAGEL: pairs, and masked pictures without words."""
    lora = recipes.bagel_lora()  # the column of Qwen-Image
    [stage] = lora.stages
    assert lora.lora == {"generation": 64} and stage.ema is None and set(stage.train.values()) == {1e-4}
    assert stage.limits.pictures // 2 * stage.limits.accumulate * recipes.PROCESSES == 48
    assert stage.steps * 48 == pytest.approx(5 * 210_000, rel=0.01)
    [stage], recipe = recipes.bagel().stages, recipes.tuning()
    o = stage.optimizer
    assert (o.name, o.betas, o.clip, o.weight_decay, stage.ema) == ("adamw", (0.9, 0.95), 1.0, 0.0, 0.999)
    assert set(stage.train.values()) == {1e-4} and stage.data == {"pairs/pictures": 0.5, "pairs": 0.5}
    assert stage.limits.pictures // 2 * stage.limits.accumulate * recipes.PROCESSES == 256
    assert stage.steps * 256 == pytest.approx(12 * 210_000, rel=0.01)
    assert recipe.stages[0].train.keys() == stage.train.keys() == {"generation"}
    assert recipe.stages[0].self_condition == stage.self_condition == SelfCondition(0.85, recipes.SAME)
    model = tiny.shake(tiny.model("bagel"))
    stage = recipe.stages[0]
    found = stage_sources(recipe, stage)
    laid = [model.lay_out(found["shapes/draw/pictures"][i]) for i in range(3)]
    seen = [s for s in laid[0].segments if s.kind == Kind.VISION]
    assert [s.masked for s in seen] == [0.85] and recipes.SAME in laid[0].describe(model.tokenizer.decode)
    assert "masked 0.85" in laid[0].describe()
    free = [replace(x, segments=tuple(replace(s, masked=0.0) for s in x.segments)) for x in laid]
    a, b = (image_loss(model, pack(x, 2)) for x in (laid, free))
    assert a != b
    apart = sum(image_loss(model, pack([x], 2)) for x in laid)
    assert a == pytest.approx(apart, rel=SUM)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_mixed_tuning_of_every_family(family, rank, tmp_path):
    """What draws moves, everything else stays bit for bit; so does reading where it shares nothing with drawing."""
    if rank:
        pytest.importorskip("peft")
    store.save(tiny.shake(tiny.model(family)), start := tmp_path / "start")
    recipe = recipes.tuning(steps=2, rank=rank).on(start)
    stage = replace(recipe.stages[0], limits=Limits(tokens=512, pictures=8), ema=None)
    recipe = replace(recipe, stages=(stage,), size=32, workers=0)
    release = loop.train(recipe, tmp_path / "run", stage_sources, show=False)
    before, after = (store.load(m) for m in (start, release))
    moved = {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}
    allowed = {n for part in select(before, {"generation": 1.0}) for n in by_part(before)[part]}
    assert moved and moved <= allowed


# ---- 10 averages, 14 resuming -----------------------------------------------------------------------------------


def test_the_average_of_weights_is_the_closed_form():
    weight = torch.nn.Parameter(torch.zeros(3))
    average, decay, expected = Average({"w": weight}, 0.999), 0.999, torch.zeros(3)
    for k in range(1, 40):
        with torch.no_grad():
            weight.copy_(torch.full((3,), float(k)))
        average.update()
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * weight.detach()
    assert torch.allclose(average.state()["w"], expected, rtol=1e-6)


def short(tmp_path, **changes) -> Recipe:
    """Both stages in a few steps, on a reader of its own."""
    store.save(tiny.shake(tiny.model("iomm")), tmp_path / "reader")
    base = recipes.tiny()
    stages = tuple(replace(s, steps=3, limits=Limits(400, 12)) for s in base.stages)
    init = {"mllm": str(tmp_path / "reader"), "autoencoder": str(tmp_path / "reader")}
    row = configs.config_to_json("iomm", tiny.iomm())
    return replace(base, model=row, init=init, stages=stages, size=32, workers=0, streams=4, **changes)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path):
    import threading

    recipe = short(tmp_path, checkpoint_every=2)
    whole = loop.train(recipe, tmp_path / "a", stage_sources, show=False)
    stop = threading.Event()
    with pytest.raises(loop.Interrupted):
        loop.train(recipe, tmp_path / "b", stage_sources, show=False, stop=stop, hook=lambda m, s, r: stop.set())
    again = loop.train(recipe, tmp_path / "b", stage_sources, show=False, resume=True)
    one, other, reader = (store.load(m) for m in (whole, again, tmp_path / "reader"))
    assert digest(one) == digest(other)
    assert digest(one.mllm) == digest(reader.mllm) and digest(one.dit) != digest(reader.dit)


def test_unlabelled_pictures_are_read_from_a_plain_folder(tmp_path):
    from diptych.recipes.run import configured

    for i in range(3):
        tiny.picture(i, 40, 32).save(tmp_path / f"{i}.png")
    recipe = configured("iomm/tiny", folders={"images": str(tmp_path)})
    found = stage_sources(recipe, recipe.stages[0])["images"]
    assert len(found) == 3 and len({found[i].id for i in range(3)}) == 3
    laid = made().lay_out(found[0])
    assert [s.kind for s in laid.segments] == [Kind.TEXT, Kind.VISION, Kind.TEXT, Kind.QUERY, Kind.NOISED]
    assert laid.segments[1].masked == recipes.TINY_MASK
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match="has no data set 'image'; it has emoji64/draw, images, shapes/draw"):
        configured("iomm/tiny", folders={"image": str(tmp_path)})


# ---- settings that contradict -----------------------------------------------------------------------------------


def test_bad_settings_are_refused():
    for bad in ({"size": (-64, 64)}, {"queries": 0}, {"latent_patch": 0}, {"adapter_heads": 0}, {"adapter_layers": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least [01], not"):
            replace(tiny.iomm(), **bad)
    with pytest.raises(ValueError, match="heads must be at least 1, not 0"):
        DitConfig("double", 32, 2, 0, (4, 6, 6))
    for words in ("Generate an image:", "{} and {}"):
        with pytest.raises(ValueError, match=r"words must hold \{\} once"):
            Prompts(words)
    with pytest.raises(ValueError, match="needs an adapter"):
        replace(tiny.iomm(), adapter="none", cond_tokens="queries")
    with pytest.raises(ValueError, match="16 pixels a token"):
        replace(tiny.iomm(), size=(40, 40))
    with pytest.raises(ValueError, match="axes"):
        DitConfig("double", 64, 2, 2, (0, 8, 8))
    with pytest.raises(ValueError, match="no refiners"):
        DitConfig("double", 64, 2, 2, (8, 12, 12), refiners=1)
    with pytest.raises(ValueError, match="not a multiple of 3 heads"):
        QueryBlock(32, 3)
    with pytest.raises(ValueError, match=r"\[0, 1\], not 1.5"):
        SelfCondition(1.5)
    with pytest.raises(ValueError, match=r"\[0, 1\], not -1"):
        Image(None, masked=-1.0)
    with pytest.raises(ValueError, match="draws no picture"):
        bare(tiny.ask())


@pytest.mark.parametrize(
    "config",
    [
        DitConfig("single", 32, 2, 2, (4, 6, 6), refiners=1, theta=256.0),  # as XL
        DitConfig("double", 32, 2, 2, (4, 6, 6)),
        DitConfig("double", 32, 2, 2, (0, 8, 8)),  # as B and L
    ],
)
def test_padding_of_a_condition_changes_nothing_its_words_do_and_their_order_where_it_is_known(config):
    dit = build_dit(config, 8)
    dit.initialise(torch.Generator().manual_seed(0))
    tiny.shake(dit)
    g = torch.Generator().manual_seed(1)
    x, t, c = torch.randn(2, 6, 8, generator=g), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 32, generator=g)
    valid = torch.tensor([[True] * 5, [True, True, False, False, True]])  # queries stand behind what words leave free
    with torch.no_grad():
        [together] = dit([Group(x, t, c, valid, (2, 3))])
        alone = Group(x[1:], t[1:], c[1:, [0, 1, 4]], valid[1:, [0, 1, 4]], (2, 3))
        kinds = {
            "other": alone._replace(condition=alone.condition.flip(2)),
            "turned": alone._replace(grid=(3, 2)),
            "swapped": alone._replace(condition=alone.condition.flip(1)),
        }
        apart, *changed = dit([alone, *kinds.values()])
    assert torch.allclose(together[1:], apart, rtol=0, atol=1e-5)
    far = {kind: not torch.allclose(y, apart, atol=0.01) for kind, y in zip(kinds, changed, strict=True)}
    assert far == {"other": True, "turned": True, "swapped": config.axes[0] > 0}


@pytest.mark.parametrize("changes", [{}, {"queries": 7, "adapter_layers": 2, "connector_layers": 1}])
def test_conditions_do_not_depend_on_their_company(changes):
    """Identical to the bit (docs/serving.md), whatever the lengths of the prompts beside it."""
    model = made(**changes)
    steady(model)
    words = (
        "a star",
        "a long prompt with many more words than that one",
        "two red squares",
        "a blue cross left of a star",
    )
    asked = [Sample(w, (user(w), assistant(Image(None, "target", (32, 32))))) for w in words]
    with torch.inference_mode():
        contexts = [model.extend([model.open()], [model.lay_out(s)])[0] for s in asked]
        for alone, together in zip(
            [model._conditions([c])[0] for c in contexts], model._conditions(contexts), strict=True
        ):
            assert torch.equal(alone, together)


def test_crops_are_the_same_for_what_is_read_and_drawn():
    model = made(crop=True, size=(32, 32))
    wide = model.lay_out(alone(size=(64, 32), masked=0.0))
    seen, drawn = wide.segments[1].image, wide.segments[-1].image
    assert drawn.shape == (3, 32, 32)
    middle = SelfConditioned(
        [Sample("m", (assistant(Image(tiny.picture(5, 64, 32).crop((16, 0, 48, 32)), "target")),))], 0.0
    )[0]
    again = model.lay_out(middle)
    assert torch.equal(again.segments[1].image, seen) and torch.equal(again.segments[-1].image, drawn)


def test_a_picture_drawn_before_is_read_as_it_was_drawn():
    model, wide = made(crop=True, size=(32, 32)), tiny.picture(5, 64, 32)

    def read(picture):
        drawn = assistant(Image(picture, "target"))
        laid = model.lay_out(Sample("s", (user("a star"), drawn, user("make it blue"), drawn)))
        return next(s.image for s in laid.segments if s.kind == Kind.VISION)

    assert torch.equal(read(wide), read(wide.crop((16, 0, 48, 32))))


def test_a_system_message_is_no_caption():
    model = made(prompts=Prompts("draw {}", nothing="draw"))
    sample = Sample("s", (Message("system", (Text("be nice"),)), assistant(Image(tiny.picture(5), "target"))))
    words = model.tokenizer.decode(model.lay_out(sample).segments[0].ids)
    assert words.count("draw") == 1 and words.index("be nice") < words.index("draw")


def test_crops_of_label_pictures_make_no_colour_up():
    labels = PIL.Image.fromarray(np.random.default_rng(0).choice([0, 90, 255], (37, 53)).astype(np.uint8)).convert(
        "RGB"
    )
    laid = made(crop=True, size=(32, 32)).lay_out(
        Sample("s", (user("a"), assistant(Image(labels, "target", nearest=True))))
    )
    assert len(laid.segments[-1].image.flatten(1).unique(dim=1).T) == 3


def test_what_was_encoded_of_other_pictures_is_refused(tmp_path):
    recipe = short(tmp_path)
    precompute(recipe, tmp_path / "encoded", data=["images"], limit=2)
    mine = tmp_path / "mine"
    mine.mkdir()
    tiny.picture(0).save(mine / "a.png")
    with pytest.raises(ValueError, match="encoded from .*, not from .*mine"):
        sources(["images"], size=recipe.size, encoded=tmp_path / "encoded", folders={"images": str(mine)})


def test_what_was_encoded_of_a_catalog_is_known_by_every_name_of_its_data(tmp_path):
    settings = "pairs: {{format: images, path: {}}}\n".format
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            tiny.picture(i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "one.yaml").write_text(settings("a"))
    (tmp_path / "two.yaml").write_text(settings("b"))
    recipe = replace(short(tmp_path), catalog=str(tmp_path / "one.yaml"))
    for name in ("pairs/pictures", "pairs#2"):
        precompute(recipe, tmp_path / "encoded", data=[name])
        again = [[name], tmp_path / "one.yaml"], {"size": recipe.size, "encoded": tmp_path / "encoded"}
        assert len(sources(*again[0], **again[1])[name])
        with pytest.raises(ValueError, match="encoded from"):
            sources([name], tmp_path / "two.yaml", **again[1])


def test_features_and_latents_computed_once_train_the_same(tmp_path):
    recipe = short(tmp_path)
    told = precompute(recipe, tmp_path / "encoded", data=["images"], limit=3)
    assert told["images"]["pictures"] == 6  # read and drawn
    once = replace(recipe, encoded=str(tmp_path / "encoded"))
    model = build.build(recipe).eval()
    stage = replace(recipe.stages[0], self_condition=SelfCondition(0.7))  # r may change afterwards
    fresh, kept = (stage_sources(r, stage)["images"] for r in (recipe, once))
    assert len(kept) == 3
    for i in range(3):
        a, b = model.lay_out(fresh[i]), model.lay_out(kept[i])
        assert [s.encoded for s in b.segments if s.image is not None] == [True, True] and a.id == b.id
        assert [s.masked for s in b.segments] == [s.masked for s in a.segments] and b.segments[1].masked == 0.7
        assert image_loss(model, pack([a])) == pytest.approx(image_loss(model, pack([b])), rel=SUM)
