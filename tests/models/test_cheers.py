"""What is Cheers's own: the published size and names, the layout, quirks, unequal rows, the source of an edit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.core.tensors import NONE
from diptych.models import configs, store
from diptych.models import table as table_
from diptych.models.cheers import Cheers, Config, Settings
from diptych.models.protocol import NOTHING, TEXT, Context
from diptych.models.published.cheers import cheers
from diptych.models.published.key_map import export, load
from diptych.parts.attention import Cache
from diptych.parts.flow import schedule
from diptych.training.parameters import by_part
from tests.support import tiny
from tests.support.tolerances import LOGITS, PIXELS

SHAPES = Path(__file__).parents[1] / "numbers" / "cheers" / "release_shapes.json"


@pytest.fixture(scope="module")
def published() -> Cheers:
    return store.create("cheers", table_.config("cheers/1.5b"), device="meta")


def made(**changes) -> Cheers:
    """A shaken tiny model with another config."""
    torch.manual_seed(0)
    model = store.create("cheers", replace(tiny.cheers(), **changes))
    model.initialise(0)
    return tiny.shake(model).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Cheers:
    return made()


# ---- the published size -----------------------------------------------------------------------------------------

COUNTS = {  # of the published checkpoint
    "decoder": 1_543_714_304,
    "vision": 413_534_448 + 15_238_352,
    "pixels": 49_620_259,
    "projector": 28_320_000,
    "head": 4_379_904 + 347_698_176 + 1_331_713 + 83_454_464,
    "autoencoder": 34_425_856 + 49_620_259,
}


def test_parameters(published):
    assert all(t.is_meta for t in (*published.parameters(), *published.buffers()))
    counts = {part: sum(p.numel() for p in parameters.values()) for part, parameters in by_part(published).items()}
    assert counts == COUNTS and sum(counts.values()) == 2_571_337_735
    assert sum(p.numel() for p in published.vision.head.parameters()) == 15_238_352
    trained = sum(n for part, n in counts.items() if part not in published.frozen)
    assert trained == 2_487_291_620  # the paper's full training: all but the autoencoder


def test_checkpoint_names(published):
    """The names and shapes of the released index, and back."""
    shapes = {name: tuple(shape) for name, shape in json.loads(SHAPES.read_text()).items()}
    state = published.state_dict()
    theirs = export(cheers(16), state)
    assert len(theirs) == 1321 and {name: tuple(t.shape) for name, t in theirs.items()} == shapes
    assert sum(t.numel() for t in theirs.values()) * 2 == 5_609_423_890
    assert load(cheers(16), theirs, state).keys() == state.keys()
    del theirs["model.hi_gate.gate.2.bias"]
    with pytest.raises(ValueError, match=r"missing model.hi_gate.gate.2.bias \(ours: gate.gate.2.bias\)"):
        load(cheers(16), theirs, state)


def test_tiny_fits_its_budget():
    parameters = sum(p.numel() for p in store.create("cheers", Config.tiny(), device="meta").parameters())
    assert 2 * parameters < 12e6


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"pixels": False}, "vision.patch_size must be 1, one patch for each latent, not 8"),
        ({"size": (40, 32)}, "size and sizes.stride must be multiples of 16, not 40"),
        ({"merge": 0}, "merge 0 and head_layers"),
    ],
)
def test_bad_configs_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        replace(tiny.cheers(), **changes)
    with pytest.raises(ValueError, match=r"source_share must be in \[0, 1\), not 1.5"):
        Settings(source_share=1.5)


def test_unknown_quirks_are_named():
    row = configs.config_to_json("cheers", tiny.cheers()) | {"published_quirks": ["nonsense"]}
    with pytest.raises(ValueError, match=r"cheers.published_quirks.*repeated_positions.*endpoint_step"):
        configs.config_from_json(row)


def test_a_vocabulary_without_room_for_the_markers_is_refused():
    c = tiny.cheers()
    with pytest.raises(ValueError, match="the tokenizer has 1029 tokens with Cheers's, the decoder 1024"):
        store.create("cheers", replace(c, decoder=replace(c.decoder, vocab_size=1024)))


def test_a_guided_step_costs_what_it_should(published):
    """5.5 TFLOP at most at 512 pixels (the published code: 8.9), by sharing the tokenizer: counted, not computed."""
    c = published.config.decoder

    def operations(branches: int) -> float:
        cache = Cache(c.num_hidden_layers, c.num_key_value_heads, c.width, torch.float32, "meta").reserve(0, 64)
        sides = [(NOTHING, 1.0), (TEXT, 9.5)][:branches]
        contexts = tuple(Context(cache, 64, 64, private=()) for _ in sides)
        noise = torch.zeros(128, 32, 32, device="meta")
        drawing = published.begin(noise, contexts, dict(sides), (512, 512), published.settings)
        with FlopCounterMode(display=False) as counter:
            published.step([drawing])
        return counter.get_total_flops() / 1e12

    plain, guided = operations(1), operations(2)
    assert plain == pytest.approx(4.453, rel=2e-3)  # counted on the published code
    assert guided <= 5.5


# ---- layout -----------------------------------------------------------------------------------------------------


def test_chatml():
    """The published template: a system turn, roles, markers around every picture, a newline after a user's."""
    laid = made(roles=True).lay_out(tiny.request(tiny.ask()))
    model = made(roles=True)
    m, encode = model.markers, model.tokenizer.encode
    head = [m["turn"], *encode("system\nYou are a helpful assistant."), m["stop"], *encode("\n")]
    question = [m["end"], *encode("\nhow many stars are there?"), m["stop"], *encode("\n")]
    text, picture, rest = laid.segments
    assert list(text.ids) == [*head, m["turn"], *encode("user\n"), m["start"]]
    assert picture.kind == Kind.VISION and set(picture.ids) == {NONE} and picture.full
    assert list(rest.ids) == question
    opened = model.lay_out(replace(tiny.ask(), messages=(*tiny.request(tiny.ask()).messages, assistant())))
    assert list(opened.segments[-1].ids) == [*question, m["turn"], *encode("assistant\n")]
    own = Sample("s", (replace(user("be brief"), role="system"), user("hello")))
    assert model.lay_out(own).describe(model.tokenizer.decode).count("helpful") == 0


def test_blanking_keeps_length_and_markers(model):
    full, bare = (model.lay_out(tiny.edit(), drop) for drop in (frozenset(), frozenset({"text"})))
    ids = [[i for s in q.segments for i in s.ids] for q in (full, bare)]
    kept = {NONE, model.markers["start"], model.markers["end"]}
    assert [i if i in kept else model.markers["blank"] for i in ids[0]] == ids[1]
    assert all(s.supervised == 0 for s in bare.segments)


def test_answers_learn_to_begin_pictures_and_to_stop(model):
    laid = model.lay_out(tiny.story())
    targets = [t for s in laid.segments for t in s.targets if t != NONE]
    assert targets.count(model.markers["start"]) == 1 and targets.count(model.markers["stop"]) == 2
    noised, clean = (s for s in laid.segments if s.image is not None)
    assert noised.hidden and noised.moves == 0 and clean.kind == Kind.VISION and clean.moves == len(clean)


def test_structural_labels_and_visible_noise():
    plain, quirky = made(), made(published_quirks=("structural_labels", "visible_noise"))
    a, b = (m.lay_out(tiny.story()) for m in (plain, quirky))
    assert sum(s.supervised for s in b.segments) > sum(s.supervised for s in a.segments)
    assert [s.kind for s in b.segments if s.image is not None] == [Kind.NOISED] and not any(
        s.hidden for s in b.segments
    )


def test_the_dummy_picture():
    quirky = made(published_quirks=("dummy_picture", "loss_on_all_pictures"))
    first = quirky.lay_out(tiny.say()).segments[0]
    assert first.kind == Kind.NOISED and not first.full and not first.generated
    batch = pack([quirky.lay_out(tiny.say())])
    assert quirky.counts(batch)["image"] == 16 and float(quirky(batch, Noise())["image"].sum) > 0
    asked = [replace(tiny.say(name), messages=(user("hello"), assistant())) for name in ("a", "b")]
    a, b = (quirky.lay_out(s).segments[0] for s in asked)
    assert a.kind == Kind.VISION and not torch.equal(a.image, b.image)  # belongs to the request, not to a clock
    assert not any(s.image is not None for s in made().lay_out(tiny.say()).segments)


def test_pictures_are_framed_as_published():
    model = made(sizes=None)
    wide = tiny.picture(1, 64, 32)
    shown = model.lay_out(Sample("s", (user(Image(wide)),))).segments[1].image
    assert shown.shape == (3, 32, 32) and not shown[:, :8].any() and not shown[:, 24:].any() and shown[:, 8:24].any()
    drawn = model.lay_out(Sample("s", (user("x"), assistant(Image(wide, "target"))))).segments[-1].image
    assert drawn.shape == (3, 32, 32) and drawn[:, :4].any()
    assert model.canvas(Sample("s", (user(Image(wide, "condition"), "x"), assistant(Image(None, "target"))))) == (
        32,
        32,
    )


# ---- unequal rows, many pictures, any shape ---------------------------------------------------------------------


def several() -> list[Sample]:
    """Requests of unequal length: none, one, two and three pictures of unequal shapes in one message."""
    pictures = [Image(tiny.picture(i, *size)) for i, size in enumerate([(32, 32), (64, 32), (32, 48)])]
    return [
        Sample("none", (user("hello"),)),
        Sample("one", (user("what is", pictures[1], "there?"),)),
        Sample("two", (user(pictures[0], pictures[2], "which is red?"),)),
        Sample("three", (user(*pictures, "how many stars are there in all of these?"),)),
    ]


def test_unequal_requests_together_equal_each_alone(model):
    laid = [model.lay_out(s) for s in several()]
    assert [q.pictures for q in laid] == [0, 1, 2, 3]
    together = model.extend([model.open() for _ in laid], laid)
    for context, sequence in zip(together, laid, strict=True):
        [alone] = model.extend([model.open()], [sequence])
        assert torch.allclose(context.logits, alone.logits, rtol=0, atol=LOGITS)
    first, second = tiny.picture(0), tiny.picture(9)  # the first of several pictures is read too
    a, b = (model.lay_out(Sample("s", (user(Image(p), Image(tiny.picture(3)), "x"),))) for p in (first, second))
    ca, cb = model.extend([model.open(), model.open()], [a, b])
    assert not torch.allclose(ca.logits, cb.logits, atol=1e-3)


def test_pictures_of_unequal_prompts_together_equal_each_alone(model):
    requests = [replace(s, messages=(*s.messages, assistant(Image(None, "target", (48, 32))))) for s in several()]
    drops = (frozenset(), frozenset({"text"}))
    contexts = [tuple(model.extend([model.open()], [model.lay_out(r, d)])[0] for d in drops) for r in requests]
    settings = replace(model.settings, num_inference_steps=2)
    n = len(contexts)
    start = model.start(contexts, requests, [settings] * n, list(range(n)))

    def draw(drawings):
        while not drawings[0].done:
            drawings = model.step(drawings)
        return model.finish(drawings)

    together = draw(start)
    for pixels, one in zip(together, start, strict=True):
        assert torch.allclose(pixels, draw([one])[0], rtol=0, atol=PIXELS)


# ---- drawing ----------------------------------------------------------------------------------------------------


def test_an_edit_begins_at_its_source(model):
    def begin(share, size=(32, 32), image=True):
        part = [Image(tiny.picture(1), "condition")] if image else []
        request = Sample("e", (user(*part, "make it red"), assistant(Image(None, "target", size))))
        [context] = model.extend([model.open()], [model.lay_out(request)])
        settings = replace(
            model.settings, source_share=share, num_inference_steps=10, timestep_shift=2.0, guidance_scale=1.0
        )
        return model.start([(context,)], [request], [settings], [3])[0]

    noise, edit = begin(0.0), begin(0.3)
    source = edit.contexts[0].private[-1][1]
    assert torch.allclose(edit.state, 0.3 * source.flatten(1).T + 0.7 * noise.state, atol=1e-6)
    assert (noise.steps, edit.steps) == (10, 7)
    assert float(edit.times[0]) == pytest.approx(0.7) and float(edit.times[-1]) == 0  # time and state agree
    assert torch.equal(begin(0.3, image=False).state, noise.state)
    with pytest.raises(ValueError, match="begins at its source has the source's size"):
        begin(0.3, size=(64, 32))


def test_a_new_drawing_does_not_begin_at_an_old_source(model):
    """Sources are the pictures of the request; an earlier edit's is context."""
    settings = replace(model.settings, source_share=0.3, guidance_scale=1.0)
    edit = (user(Image(tiny.picture(1), "condition"), "make it red"), assistant(Image(tiny.picture(2), "target")))
    wanted = assistant(Image(None, "target", (32, 32)))

    def begin(*messages):
        request = Sample("r", (*messages, wanted))
        [context] = model.extend([model.open()], [model.lay_out(request)])
        return model.start([(context,)], [request], [settings], [3])[0]

    fresh, later = begin(user("a star")), begin(*edit, user("a star"))
    assert torch.equal(later.state, fresh.state) and later.steps == fresh.steps
    again = begin(*edit, user(Image(tiny.picture(2), "condition"), "and larger"))
    direct = begin(user(Image(tiny.picture(2), "condition"), "and larger"))
    assert torch.allclose(again.state, direct.state, atol=1e-5) and not torch.allclose(again.state, fresh.state)


def test_a_rewound_context_forgets_later_sources(model):
    request = Sample("e", (user(Image(tiny.picture(1), "condition"), "make it red"),))
    [context] = model.extend([model.open()], [model.lay_out(request)])
    assert len(context.private) == 1
    assert (
        model.rewind(context, 3, 3).private == ()
        and len(model.rewind(context, len(model.lay_out(request)), 9).private) == 1
    )


def test_schedules():
    """The published shift a is ours inverted; N points and an end step of 1/N where the quirk asks for them."""
    plain, quirky = made(), made(published_quirks=("endpoint_step",))
    settings = Settings(4, timestep_shift=2.0, renorm="none")
    assert torch.equal(plain._times(settings, 0.0), schedule(4, 2.0))
    s = torch.linspace(0, 1, 4)
    expected = 1 - 0.5 * s / (1 - 0.5 * s)
    times = quirky._times(settings, 0.0)
    assert torch.allclose(times[:4], expected, atol=1e-7) and float(times[4]) == -0.25


def test_bf16_latents_are_a_quirk():
    contexts = {}
    for name, model in (("plain", made()), ("quirky", made(published_quirks=("bf16_latents",)))):
        request = Sample("p", (user("a star"), assistant(Image(None, "target", (32, 32)))))
        [context] = model.extend([model.open()], [model.lay_out(request)])
        [d] = model.start([(context,)], [request], [replace(model.settings, guidance_scale=1.0)], [0])
        [contexts[name]] = model.step([d])
    states = {name: d.state for name, d in contexts.items()}
    assert torch.equal(states["quirky"], states["plain"].bfloat16().float())
    assert not torch.equal(states["quirky"], states["plain"])


def test_both_branches_share_the_tokenizer(model):
    """Guided or not, a step looks at the picture once."""
    request = Sample("p", (user("a star"), assistant(Image(None, "target", (32, 32)))))
    settings = replace(model.settings, guidance_scale=3.0, guidance_interval=(0.0, 1.0))
    drops = model.branches(request, settings)
    contexts = tuple(model.extend([model.open()], [model.lay_out(request, d)])[0] for d in drops)
    seen = []
    hook = model.vision.layers[0].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    model.step(model.start([contexts], [request], [settings], [0]))
    hook.remove()
    assert len(contexts) == 2 and seen == [1]


def test_positions_of_other_grids_are_resized(model):
    table = model.vision.position_embedding.weight
    assert torch.equal(model.vision.resized((4, 4)), table)
    wide = model.vision.resized((4, 8))
    assert wide.shape == (32, table.shape[1]) and not torch.equal(wide[:16], table)


# ---- the ablations' switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"detail": "added"},
        {"detail": "none"},
        {"merge": 1},
        {"head_layers": (3, 0)},
        {"pixels": False, "vision": replace(tiny.cheers().vision, patch_size=1, image_size=4)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_every_arm_trains_reads_and_draws(changes):
    model = made(**changes).requires_grad_(True)
    losses = model(pack([model.lay_out(s) for s in tiny.samples()]), Noise())
    (losses["text"].sum + losses["image"].sum).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("autoencoder.")]
    assert without == [n for n in without if n.startswith("gate.gate")] and bool(without) == (
        changes.get("detail") == "added"
    )
    request = Sample("p", (user("a star"), assistant(Image(None, "target", (32, 32)))))
    [context] = model.extend([model.open()], [model.lay_out(request)])
    [d] = model.step(model.start([(context,)], [request], [replace(model.settings, guidance_scale=1.0)], [0]))
    assert model.preview([d]).shape == (1, 3, 32, 32)


def test_detail_is_all_that_the_arm_without_it_lacks():
    gated, none = made(), made(detail="none")
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in none.parameters())
    s, e, other = torch.randn(3, 2, 16, 32)
    assert torch.equal(none.gate(s, e), none.gate(s, other)) and not torch.equal(gated.gate(s, e), gated.gate(s, other))


def test_text_of_an_answer_may_come_around_its_picture(model):
    """Text, picture, text in one answer: trained as one sequence, and read back the same in pieces."""
    picture = Image(tiny.picture(5), "target")
    sample = Sample("s", (user("draw"), assistant("here it is", picture, Text("a star", loss=True))))
    kinds = [s.kind for s in model.lay_out(sample).segments if s.image is not None]
    assert kinds == [Kind.NOISED, Kind.VISION]
    spoken = [t for s in model.lay_out(sample).segments for t in s.targets if t != NONE]
    words = [*model.tokenizer.encode("here it is"), model.markers["start"], *model.tokenizer.encode("a star")]
    assert spoken == [*words, model.markers["stop"]]
