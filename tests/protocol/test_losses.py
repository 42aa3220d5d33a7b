"""What a loss may depend on: its own sample, and nothing else in the row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.losses import combine
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.data.loader import Row, Stats
from diptych.data.self_condition import SelfConditioned, bare
from diptych.models.protocol import latent_tokens
from diptych.training import optim
from diptych.training.checkpoint import Saver
from diptych.training.log import Work
from diptych.training.loop import State, _Job
from diptych.training.parameters import freeze, select
from diptych.training.recipe import Limits, Optimizer
from tests.support import tiny
from tests.support.tolerances import PARAMETERS, SUM

NOISE = Noise(3, 5)
WEIGHTS = {"text": 0.5, "image": 1.0}


def sums(model, sequences, noise=NOISE, **how):
    """The loss sums of a packed row, as floats by name."""
    with torch.no_grad():
        losses = model(pack(sequences, model.routes, **how), noise)
    return {name: float(term.sum) for name, term in losses.items()}


def near(a, b):
    return a == pytest.approx(b, rel=SUM)


def test_losses_are_what_counts_announces(model):
    batch = pack([model.lay_out(s) for s in tiny.samples()], model.routes)
    losses = model(batch, NOISE)
    assert {n: t.count for n, t in losses.items()} == model.counts(batch)
    assert all(t.count > 0 and torch.isfinite(t.sum) and t.sum > 0 for t in losses.values())


def test_every_term_tells_what_each_document_adds(model):
    samples = tiny.samples()
    losses = model(pack([model.lay_out(s) for s in samples], model.routes), NOISE)
    for name, term in losses.items():
        total, count = term.documents.sum(0).tolist()
        assert near(float(term.sum.detach()), total) and count == term.count > 0
        for sample, (value, n) in zip(samples, term.documents.tolist(), strict=True):
            alone = pack([model.lay_out(sample)], model.routes)
            assert n == model.counts(alone)[name]
            if n:
                assert near(sums(model, [model.lay_out(sample)])[name], value)


def test_packed_equals_separate(model):
    laid = [model.lay_out(s) for s in tiny.samples()]
    alone = [sums(model, [x]) for x in laid]
    assert near(sums(model, laid), {n: sum(a[n] for a in alone) for n in alone[0]})


def test_order_in_a_row_is_irrelevant(model):
    laid = [model.lay_out(s) for s in tiny.samples()]
    assert near(sums(model, laid), sums(model, laid[::-1]))
    assert near(sums(model, laid), sums(model, laid[3:] + laid[:3]))


def test_pictures_of_any_shape_share_a_row_and_those_of_one_bucket_their_forward(model):
    """The size rule's stride is the bucket (docs/scaling.md): sizes that it rounds to one another are one group."""
    sizes = [(64, 32), (66, 33), (32, 64), (48, 48), (16, 80)]  # (width, height); the first two are one at 16 pixels
    laid = [model.lay_out(tiny.draw(f"draw-{i}", i, "a star", size)) for i, size in enumerate(sizes)]
    groups = [g for g in pack(laid, model.routes).pictures if g.generated and g.images is not None]
    members = {g.owners: g.tokens.shape[1] for g in groups}
    assert members.keys() == {("draw-0", "draw-1"), ("draw-2",), ("draw-3",), ("draw-4",)}
    area = {owners: sizes[int(owners[0][-1])] for owners in members}
    assert len({members[o] / (w * h) for o, (w, h) in area.items()}) == 1  # tokens by area, whatever the shape
    alone = [sums(model, [x]) for x in laid]
    assert near(sums(model, laid), {n: sum(a[n] for a in alone) for n in alone[0]})


@pytest.mark.parametrize("pad_to", [64, 256])
def test_a_tail_of_padding_changes_nothing(model, pad_to):
    laid = [model.lay_out(s) for s in tiny.samples()]
    batch = pack(laid, model.routes, pad_to)
    assert len(batch) % pad_to == 0 and len(batch) > sum(batch.lengths)
    assert near(sums(model, laid), sums(model, laid, pad_to=pad_to))


def test_the_global_random_state_is_neither_read_nor_moved(model):
    laid = [model.lay_out(s) for s in tiny.samples()]
    torch.manual_seed(0)
    first, state = sums(model, laid), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sums(model, laid) == first


def test_noise_belongs_to_the_sample_and_the_step(model):
    a, b = model.lay_out(tiny.draw("a")), model.lay_out(tiny.draw("b"))
    if not any(s.kind == Kind.NOISED for s in a.segments):  # nothing is random
        assert sums(model, [a]) == sums(model, [b]) == sums(model, [a], Noise(4, 6))
        return
    assert sums(model, [a])["image"] != sums(model, [b])["image"]  # one picture, two names
    assert sums(model, [a], Noise(3, 6))["image"] != sums(model, [a])["image"] != sums(model, [a], Noise(4, 5))["image"]


def test_a_picture_read_and_the_same_picture_drawn_have_noise_of_their_own():
    model, same = tiny.sampling("bagel"), tiny.picture(1)
    sample = Sample("again", (user(Image(same, "condition"), "again"), assistant(Image(same, "target"))))
    batch = pack([model.lay_out(sample)], model.routes)
    read, drawn = (latent_tokens(model, *batch.of(kind), NOISE) for kind in (Kind.CLEAN, Kind.NOISED))
    assert read.shape == drawn.shape and not torch.equal(read, drawn)


def itself(masked: float, name="self", seed=5) -> Sample:
    """A picture that is drawn from its own tokens, some of them blank."""
    return SelfConditioned([bare(tiny.draw(name, seed, size=(64, 64)))], masked, "the same picture")[0]


def test_a_picture_is_drawn_from_what_its_mask_leaves(model):
    """Masked self-conditioning (IOMM 3.2) on every family: nothing masked is the picture, everything is no picture."""

    def loss(*samples, noise=NOISE):
        return sums(model, [model.lay_out(s) for s in samples], noise)["image"]

    def shown(masked, seed=5):  # the picture that is read is another than the one that is drawn
        read = Image(tiny.picture(seed, 64, 64), masked=masked)
        return loss(Sample("self", (user(read, "x"), *tiny.draw().messages[1:])))

    assert len({shown(m) for m in (0.0, 0.5, 1.0)}) == 3
    assert shown(1.0, 5) == pytest.approx(shown(1.0, 6), rel=1e-6) and shown(0.5, 5) != shown(0.5, 6)
    some = [itself(0.5), tiny.draw("pair"), itself(0.25, "other", 6)]
    assert loss(*some) == pytest.approx(sum(loss(s) for s in some), rel=SUM)
    assert loss(itself(0.5), noise=Noise(3, 6)) != loss(itself(0.5))
    assert "masked 0.5" in model.lay_out(itself(0.5)).describe()


@pytest.mark.parametrize("role", ["condition", "target"])
def test_only_a_picture_to_understand_can_be_masked(role):
    with pytest.raises(ValueError, match=f"only a picture to understand can be masked, no {role}"):
        Image(tiny.picture(0), role, masked=0.5)


def quiet(seed: int, words: str) -> Sample:
    """A neighbour that carries no loss."""
    return Sample("neighbour", (user(Image(tiny.picture(seed)), words),))


def test_nothing_leaks_from_another_document(model):
    mine = [model.lay_out(s) for s in tiny.samples()]
    first = sums(model, [mine[0], model.lay_out(quiet(1, "how many stars are there?")), *mine[1:]])
    other = sums(model, [mine[0], model.lay_out(quiet(2, "is that red square on top?")), *mine[1:]])
    assert near(first, other)
    assert near(first, sums(model, mine))


def test_no_gradient_reaches_another_document(model):
    def leaf(sequence):
        pixels = [(s.image.float() / 127.5 - 1).requires_grad_() for s in sequence.segments if s.image is not None]
        images = iter(pixels)
        new = (replace(s, image=next(images)) if s.image is not None else s for s in sequence.segments)
        return replace(sequence, segments=tuple(new)), pixels[0]

    if any(s.kind == Kind.CODES for s in model.lay_out(tiny.ask()).segments):
        pytest.skip("codes pass no gradient to pixels")
    mine, own = leaf(model.lay_out(tiny.ask()))
    neighbour, other = leaf(model.lay_out(quiet(1, "a star")))
    after, late = leaf(model.lay_out(quiet(2, "a star")))
    model(pack([neighbour, mine, after], model.routes), NOISE)["text"].sum.backward()
    assert own.grad.abs().max() > 0
    assert (other.grad is None or not other.grad.any()) and (late.grad is None or not late.grad.any())


def test_nothing_leaks_out_of_a_hidden_segment(model):
    laid = model.lay_out(tiny.story())
    if not any(s.hidden for s in laid.segments):
        pytest.skip("this family hides nothing")
    turned = tuple(replace(s, image=255 - s.image) if s.hidden and s.image is not None else s for s in laid.segments)
    a, b = sums(model, [laid]), sums(model, [replace(laid, segments=turned)])
    assert a["image"] != b["image"] and a["text"] == pytest.approx(b["text"], rel=1e-6)
    c = sums(model, [laid], Noise(99, 99))  # nor does its noise
    assert a["image"] != c["image"] and a["text"] == pytest.approx(c["text"], rel=1e-6)


def test_what_follows_a_hidden_segment_does_see_its_clean_copy(model):
    def text(seed):
        return sums(model, [model.lay_out(tiny.story(seed=seed))])["text"]

    assert text(3) != text(4)


def test_nothing_looks_ahead(model):
    first, *rest = tiny.story().messages
    answered = [*rest[:-1], replace(rest[-1], parts=(Text("blue stars", loss=True),))]
    a, b = (sums(model, [model.lay_out(Sample("story", (first, *m)))]) for m in (rest, answered))
    assert a["image"] == pytest.approx(b["image"], rel=1e-6) and a["text"] != b["text"]


def test_a_picture_depends_on_its_prompt(fresh):
    a, b = (sums(fresh, [fresh.lay_out(tiny.draw(prompt=p))])["image"] for p in ("a blue star", "two red squares"))
    assert a != b


# ---- training ---------------------------------------------------------------------------------------------------


def rows(model, groups):
    stats = Stats(0, 0.0, 0, 0, {}, {}, {})
    return [Row(pack([model.lay_out(s) for s in g], model.routes), i, stats) for i, g in enumerate(groups)]


def run(model, recipe, groups, steps):
    """``steps`` optimizer steps of the real loop over given rows; returns the losses."""
    stage = recipe.stages[0]
    rates, parts = select(model, stage.train), freeze(model, stage.train)
    state = State(model, optimizers=optim.build(model, parts, rates, stage.optimizer))
    saver = Saver(Path("nowhere"), 1, False)
    job = _Job(recipe, Path(), lambda *_: {}, state, None, Event(), None, 0, 1, 1, saver)
    job.work = Work("cpu", recipe.precision, lambda batch: 0.0)
    losses = []
    for _ in range(steps):
        losses.append(job.step(stage, iter(rows(model, groups)), stage.limits.accumulate, parts)["loss"])
        state.done, state.step = state.done + 1, state.step + 1
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulating_four_rows_equals_one_row_of_four(family, optimizer):
    some = [tiny.ask(), tiny.draw(), tiny.edit(), tiny.story()]
    trainable = {p: 1e-3 for p in tiny.model(family).parts if p not in tiny.model(family).frozen}
    settings = Optimizer(optimizer, eps=1e-4)
    curves, weights = [], []
    for groups in ([some], [[s] for s in some]):
        model = tiny.shake(tiny.model(family))
        recipe = tiny.recipe(train=trainable, optimizer=settings, limits=Limits(accumulate=len(groups)))
        curves.append(run(model, recipe, groups, 3))
        weights.append(model.state_dict())
    assert curves[0] == pytest.approx(curves[1], rel=SUM)
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=0, atol=PARAMETERS), name


def test_overfits_one_row(family):
    model = tiny.model(family)
    trainable = {p: 5e-3 for p in model.parts if p not in model.frozen}
    stage = tiny.recipe(train=trainable).stages[0]
    parts = freeze(model, trainable)
    optimizers = optim.build(model, parts, select(model, trainable), stage.optimizer)
    batch = pack([model.lay_out(s) for s in tiny.samples()[:5]], model.routes)
    counts, losses = model.counts(batch), []
    optim.set_rates(optimizers, 1.0)
    for _ in range(120):
        loss = combine(model(batch, NOISE), WEIGHTS, counts)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.15 * losses[0]


def test_what_is_not_named_stays_bit_identical(family):
    for part in tiny.model(family).parts:
        model = tiny.shake(tiny.model(family))
        if part in model.frozen:
            with pytest.raises(ValueError, match="is always frozen"):
                select(model, {part: 1e-2})
            continue
        before = {n: v.clone() for n, v in model.state_dict().items()}
        run(model, tiny.recipe(train={part: 1e-2}), [tiny.samples()], 2)
        after, own = model.state_dict(), freeze(model, {part: 1e-2})[part].keys()
        moved = {n for n in after if not torch.equal(before[n], after[n])}
        assert moved and moved <= own, f"training {part} moved {sorted(moved - own)}"
        assert len(moved) > len(own) / 2, f"training {part} left {sorted(own - moved)} alone"
        assert not any(
            m.training for m in model.modules() if (ps := list(m.parameters())) and not any(p.requires_grad for p in ps)
        )


def test_kinds_are_counted_once_each(model):
    batch = pack([model.lay_out(s) for s in tiny.samples()], model.routes)
    assert sorted(torch.cat(batch.routes).tolist()) == list(range(len(batch)))
    places = torch.cat([p.tokens.flatten() for p in batch.pictures])
    assert len(set(places.tolist())) == len(places) == int((batch.ids == -1).sum())
    assert len(batch.of(Kind.NOISED)) + len(batch.of(Kind.CODES)) >= 1
