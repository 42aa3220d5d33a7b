"""What OmniGen2 does beyond the protocol: templates, roles, guidance, references, limits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diptych.core.layout import Kind
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.generation.engine import Engine
from diptych.models import store
from diptych.models.omnigen2 import BOTH, DROPPED_SYSTEM, SYSTEM, Settings
from diptych.models.protocol import NOTHING, TEXT
from diptych.parts.images import to_tensor
from diptych.parts.solvers import dpm_step, euler_step, extrapolate
from tests.support import tiny

PUBLISHED_FOLDER = Path(__file__).parents[1] / "numbers" / "omnigen2" / "folder"


@pytest.fixture(scope="module")
def model():
    return tiny.shake(tiny.model("omnigen2")).requires_grad_(False)


@pytest.fixture(scope="module")
def verbose():
    """The same with the published templates: a system turn, roles and labels."""
    config = replace(tiny.FAMILIES["omnigen2"](), system=SYSTEM, dropped_system=DROPPED_SYSTEM, labels="always")
    made = store.create("omnigen2", config)
    made.initialise(0)
    return made.eval()


def shown(seed: int, role="condition", size=(32, 32)) -> Image:
    return Image(tiny.picture(seed, *size), role)


def asked(*parts) -> Sample:
    return Sample("r", (user(*parts), assistant(Image(None, "target"))))


def kinds(model, sample, drop=NOTHING) -> list[Kind]:
    return [s.kind for s in model.lay_out(sample, drop).segments]


def test_a_request_answered_by_a_picture_takes_the_drawing_template_and_references_stay_outside_the_reader(model):
    sample = asked(shown(1), shown(2, size=(64, 32)), "both")
    laid = model.lay_out(sample)
    assert [s.kind for s in laid.segments] == [Kind.TEXT, Kind.CLEAN, Kind.CLEAN]
    assert all(s.hidden and s.moves == 0 for s in laid.segments[1:])
    assert kinds(model, sample, TEXT) == [Kind.TEXT, Kind.CLEAN, Kind.CLEAN]
    assert kinds(model, sample, BOTH) == [Kind.TEXT]


def test_a_picture_to_understand_is_read_and_is_no_reference(model):
    laid = model.lay_out(asked(shown(1, "understand"), "x"))
    [vision] = [s for s in laid.segments if s.kind == Kind.VISION]
    assert not vision.reference and not any(s.kind == Kind.CLEAN for s in laid.segments)
    [context] = model.extend([model.open()], [laid])
    assert len(model._states(context)) == len(laid) - 1  # every state but that of the token that opens the picture


def test_in_a_conversation_the_reader_sees_a_reference_and_its_states_are_left_out(model):
    turn = assistant(Text("", loss=True), Image(None, "target"))
    laid = model.lay_out(Sample("c", (user(shown(1), "x"), turn)))
    [vision] = [s for s in laid.segments if s.kind == Kind.VISION]
    [clean] = [s for s in laid.segments if s.kind == Kind.CLEAN]
    assert vision.reference
    [context] = model.extend([model.open()], [laid])
    opening = 1  # the token that opens the picture conditions nothing either
    assert len(model._states(context)) == len(laid) - len(vision) - len(clean) - opening


def test_the_picture_drawn_last_is_the_reference_of_a_request_that_shows_none(model):
    first = assistant(Image(tiny.picture(4), "target"))
    later = Sample("l", (user("a star"), first, user("make it red"), assistant(Image(None, "target"))))
    [reference] = model._references(later)
    assert reference.image is first.parts[0].image
    assert [s.kind for s in model.lay_out(later).segments].count(Kind.CLEAN) == 1


def test_a_training_row_without_its_words_has_the_other_system_text_and_a_request_has_not(verbose):
    def told(sample):
        return verbose.lay_out(sample, TEXT).describe(verbose.tokenizer.decode)

    drawn = Sample("d", (user("a star"), assistant(Image(tiny.picture(1), "target"))))
    assert "generates images." in told(drawn) and "high-quality" not in told(drawn)
    assert "high-quality" in told(asked("a star"))


def test_pictures_of_a_turn_are_labelled(verbose):
    laid = verbose.lay_out(Sample("q", (user(shown(1, "understand"), shown(2, "understand"), "x"), assistant())))
    told = laid.describe(verbose.tokenizer.decode)
    assert "<img1>: " in told and "<img2>: " in told


def test_branches_are_those_of_the_paper(model):
    edit, plain = asked(shown(1), "x"), asked("x")
    assert model.branches(plain, Settings(2, 4.0, 2.0)) == {NOTHING: 1.0, TEXT: 4.0}
    assert model.branches(edit, Settings(2, 4.0, 2.0)) == {NOTHING: 1.0, TEXT: 4.0, BOTH: 2.0}
    assert model.branches(edit, Settings(2, 4.0, 1.0)) == {NOTHING: 1.0, BOTH: 4.0}
    with pytest.warns(UserWarning, match="image_guidance_scale has no effect"):
        assert model.branches(edit, Settings(2, 1.0, 2.0)) == {NOTHING: 1.0}


def test_guidance_is_active_in_a_share_of_the_steps():
    settings = Settings(5, guidance_range=(0.2, 0.4))
    assert [settings.guided(i, 5) for i in range(5)] == [False, True, True, False, False]


def test_combined_guidance():
    f, r, u = torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    branches = {NOTHING: 1.0, TEXT: 4.0, BOTH: 2.5}
    assert Settings().combine([f, r, u], branches) == u + 2.5 * (r - u) + 4.0 * (f - r)
    assert torch.equal(Settings().combine([f], branches), f)
    assert Settings().combine([f, u], {NOTHING: 1.0, BOTH: 4.0}) == u + 4.0 * (f - u)


def test_a_reference_matters_in_its_place(model):
    """Which picture is shown, and which comes first."""
    engine, few = Engine(model), {"num_inference_steps": 2, "seed": 1, "size": (32, 32)}
    pictures = [tiny.picture(1), tiny.picture(2)]
    made = {
        name: engine.edit(order, "both", **few).images[0].tobytes()
        for name, order in {"ab": pictures, "ba": pictures[::-1], "a": pictures[:1], "b": pictures[1:]}.items()
    }
    assert len(set(made.values())) == 4


def test_a_seed_fixes_the_posterior_too():
    made, request = tiny.sampling("omnigen2"), asked(shown(1), "x")

    def references(seed, **changes):
        settings = replace(made.settings, guidance_scale=1.0, **changes)
        context = made.extend([made.open()], [made.lay_out(request)])[0]
        [drawing] = made.start([(context,)], [request], [settings], [seed])
        return drawing.private.references[0][0].tokens

    assert torch.equal(references(3), references(3)) and not torch.equal(references(3), references(4))
    assert torch.equal(references(3, posterior="mean"), references(4, posterior="mean"))


def test_a_step_cache_runs_the_network_less_often_and_stays_near(model):
    """Exact on polynomials of degree two; the network runs in 5 + 5 of 20 steps, for every branch."""
    square = [(t, torch.tensor([[t * t - 3 * t]])) for t in (0.9, 0.7, 0.6)]
    assert torch.allclose(extrapolate(square, 0.4), torch.tensor([[0.4**2 - 1.2]]), atol=1e-5)
    samples, calls, pictures = [asked("a star"), asked(shown(1), "as a circle")], [], {}
    handle = model.dit.register_forward_hook(lambda _, inputs, out: calls.append(len(inputs[0])))
    for cache in ("none", "taylor"):
        settings = Settings(20, guidance_scale=2.0, image_guidance_scale=1.5, cache=cache)
        pictures[cache] = [
            to_tensor(d.image, d.image.size) for d in Engine(model).draw(samples, [0, 1], settings=settings)
        ]
        ran, calls = len(calls), []
        assert ran == {"none": 2 * 20, "taylor": 2 * 10}[cache]  # the two requests have different branches
    handle.remove()
    for a, b in zip(pictures["none"], pictures["taylor"], strict=True):
        assert 0 < (a.float() - b.float()).abs().mean() < 8  # of 255


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_solvers_end_at_the_data_of_a_straight_path(solver):
    """On a straight path every solver is exact, whatever the number of steps."""
    data, noise = torch.randn(3, 4), torch.randn(3, 4)
    for steps in (1, 2, 3, 7):
        times, x, before = Settings(steps, timestep_shift=3.0).times(steps, 64), noise, None
        for i in range(steps):
            if solver == "euler":
                x = euler_step(x, noise - data, times, i)
            else:
                x, before = dpm_step(x, noise - data, times, i, before)
        assert torch.allclose(x, data, atol=1e-5)


def test_dpm_needs_fewer_steps_than_euler():
    """A curved field (v of a Gaussian of deviation 1/2): the same error in fewer steps."""

    def end(solver, steps):
        x, before = torch.ones(1, 1, dtype=torch.float64), None
        times = Settings(steps, timestep_shift=1.0).times(steps, 64)
        for i in range(steps):
            t = float(times[i])
            v = x * (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4)
            if solver == "euler":
                x = euler_step(x, v, times, i)
            else:
                x, before = dpm_step(x, v, times, i, before)
        return abs(float(x) - 0.5)

    assert end("dpm", 8) < end("euler", 8) / 2


def test_more_references_than_the_model_takes_are_one_clear_line(model):
    with pytest.raises(ValueError, match="shows 6 pictures to draw from; the model takes at most 5"):
        Engine(model).edit([tiny.picture(i) for i in range(6)], "x")


def test_what_does_not_fit_the_positions_is_refused_before_anything_is_computed():
    config = tiny.FAMILIES["omnigen2"]()
    short = store.create("omnigen2", replace(config, dit=replace(config.dit, axes_lens=(24, 4, 4))))
    with pytest.raises(ValueError, match=r"position \d+ .* the model has 24 positions"):
        short.lay_out(asked("a star " * 30))
    with pytest.raises(ValueError, match="multiples of 16 from 16 to 64"):
        short.canvas(Sample("s", (user("x"), assistant(Image(None, "target", (128, 32))))))


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("transformer", "num_layers", 9, "num_layers is 9, but the weights have 2"),
        ("transformer", "in_channels", 8, "in_channels is 8, but the weights have 4"),
        ("mllm", "vocab_size", 100, "vocab_size is 100, but the weights have 360"),
        ("vae", "latent_channels", 8, "latent_channels is 8, but the weights have 4"),
    ],
)
def test_a_folder_whose_json_contradicts_its_weights_is_one_clear_line(tmp_path, file, key, value, said):
    folder = tmp_path / "folder"
    shutil.copytree(PUBLISHED_FOLDER, folder)
    path = folder / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        store.load(folder)


def test_a_folder_without_its_processor_says_what_it_lacks(tmp_path):
    shutil.copytree(PUBLISHED_FOLDER, tmp_path / "folder", ignore=shutil.ignore_patterns("processor"))
    with pytest.raises(ValueError, match="lacks processor/tokenizer.json; a published omnigen2 folder holds"):
        store.load(tmp_path / "folder")


def test_settings_name_what_is_wrong():
    for bad, told in (
        ({"guidance_range": (0.5, 0.2)}, "guidance_range must be 0 <= low <= high <= 1"),
        ({"guidance_scale": -1.0}, "guidance scales must be at least 0"),
        ({"timestep_shift": 0.0}, "timestep_shift must be positive or None"),
    ):
        with pytest.raises(ValueError, match=told):
            Settings(**bad)


def test_the_reader_learns_through_the_condition():
    made = tiny.shake(tiny.model("omnigen2"))
    from diptych.core.batch import pack
    from diptych.core.noise import Noise

    sample = Sample("s", (user(shown(1, "understand"), "x"), assistant(Image(tiny.picture(2), "target"))))
    made.losses(pack([made.lay_out(sample)]), Noise())["image"].sum.backward()
    moved = {n for n, p in made.mllm.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("visual" in n for n in moved) and any("language_model.layers.0" in n for n in moved)


def test_a_network_that_predicts_the_data_moves_towards_it():
    """The step of a drawing is that of the velocity (x - data) / t of what the network returns."""
    config = tiny.FAMILIES["omnigen2"]()
    model = tiny.shake(store.create("omnigen2", replace(config, prediction="data"))).requires_grad_(False)
    [context] = model.extend([model.open()], [model.lay_out(asked("a star"))])
    [drawing] = model.start([(context,)], [asked("a star")], [Settings(4, guidance_scale=1.0)], [0])
    returned = []
    handle = model.dit.register_forward_hook(lambda _, inputs, out: returned.append(out[0]))
    for _ in range(2):
        [after] = model.step([drawing])
        now, then = (float(t) for t in drawing.times[drawing.step : drawing.step + 2])
        assert torch.allclose(
            after.state, drawing.state - (drawing.state - returned[-1]) / now * (now - then), atol=1e-5
        )
        drawing = after
    handle.remove()
