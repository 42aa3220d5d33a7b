"""What a family makes of samples, before any network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.core.tensors import NONE
from diptych.training.parameters import by_part
from tests.support import tiny


@pytest.mark.parametrize("sample", tiny.samples(), ids=lambda s: s.id)
def test_lay_out_is_pure(model, sample):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b = model.lay_out(sample), model.lay_out(sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.id == sample.id and [s.ids for s in a.segments] == [s.ids for s in b.segments]
    assert all(torch.equal(x.image, y.image) for x, y in zip(a.segments, b.segments) if x.image is not None)


@pytest.mark.parametrize("sample", tiny.samples(), ids=lambda s: s.id)
def test_describe_has_one_line_a_segment(model, sample):
    laid = model.lay_out(sample)
    head, *lines = laid.describe(model.tokenizer.decode).splitlines()
    assert head == f"{sample.id}: {len(laid)} tokens, {laid.pictures} pictures"
    assert len(lines) == len(laid.segments)
    assert all(s.kind in line and f"{len(s)} tokens" in line for s, line in zip(laid.segments, lines))
    told = "\n".join(lines)
    assert all(p.text in told for m in sample.messages for p in m.parts if isinstance(p, Text))


def test_text_without_loss_has_no_targets_and_text_with_loss_has_its_next_words(model):
    laid = model.lay_out(tiny.say())
    quiet, said = (s for s in laid.segments if s.kind == Kind.TEXT)
    assert quiet.supervised == 0
    assert all(t in (NONE, n) for t, n in zip(said.targets, said.ids[1:])) and said.supervised == len(said.ids) - 1


def test_a_message_that_stands_twice_is_laid_out_like_two_that_are_alike(model):
    drawn, other = (assistant(Image(tiny.picture(1), "target")) for _ in range(2))
    once, twice = (Sample("s", (user("a"), first, user("b"), drawn)) for first in (other, drawn))
    assert [s.ids for s in model.lay_out(once).segments] == [s.ids for s in model.lay_out(twice).segments]


def test_dropping_text_leaves_the_instruction_out(model):
    full, bare = model.lay_out(tiny.edit()), model.lay_out(tiny.edit(), frozenset({"text"}))
    assert "star" in full.describe(model.tokenizer.decode) and "star" not in bare.describe(model.tokenizer.decode)
    assert bare.pictures == full.pictures


def test_dropping_images_leaves_pictures_to_read_out_and_the_target_in(model):
    full, bare = model.lay_out(tiny.edit()), model.lay_out(tiny.edit(), frozenset({"image"}))
    assert 0 < bare.pictures < full.pictures
    assert "star" in bare.describe(model.tokenizer.decode)
    assert model.counts(pack([bare], model.routes))["image"] == model.counts(pack([full], model.routes))["image"] > 0


def two_drawings(*end) -> Sample:
    """A picture to understand, a drawing, and another drawing after it."""
    seen, first = Image(tiny.picture(0)), Image(tiny.picture(1), "target")
    return Sample("two", (user(seen, "a red star"), assistant(first), user("make it blue"), *end))


@pytest.mark.parametrize("end", [assistant(Image(tiny.picture(2), "target")), assistant(Image(None, "target"))])
def test_dropping_images_drops_every_picture_before_the_drawing_and_no_word(model, end):
    """In training and in a request: what was drawn earlier is a condition of what is drawn now. A family that drops
    segment by segment (BAGEL, as its published packer does) trains on the earlier target too."""
    bare = model.lay_out(two_drawings(end), frozenset({"image"}))
    targets = 0 if end.parts[0].blank else 2 if model.segmented else 1
    assert bare.pictures == targets and all(s.generated for s in bare.segments if s.image is not None)
    told = bare.describe(model.tokenizer.decode)
    assert "red star" in told and "make it blue" in told


def test_dropping_words_drops_those_of_the_drawing_alone(model):
    told = model.lay_out(two_drawings(assistant(Image(None, "target"))), frozenset({"text"}))
    assert "make it blue" not in told.describe(model.tokenizer.decode) and told.pictures >= 2


def test_a_picture_without_pixels_is_the_one_to_draw_or_an_error(model):
    for messages in ((user(Image(None), "x"), assistant("y")), (user("x"), assistant(Image(None, "target"), "y"))):
        with pytest.raises(ValueError, match="sample 'bad' has a picture without pixels that is not the one to draw"):
            model.lay_out(Sample("bad", messages))


def test_dropping_everything_leaves_nothing_of_a_request(model):
    """Nothing at all, or words that say nothing: the same for every request of as many words."""
    asked = [tiny.request(sample).messages for sample in (tiny.edit(), tiny.edit(seed=5))]
    made = [Sample("asked", (*messages, assistant(Image(None, "target")))) for messages in asked]
    left = [model.lay_out(request, frozenset({"text", "image"})) for request in made]
    assert [x.ids for x in left[0].segments] == [x.ids for x in left[1].segments]
    assert left[0].pictures == 0 and "star" not in left[0].describe(model.tokenizer.decode)


def test_dropping_text_drops_the_request_of_the_drawing_and_not_a_later_question(model):
    """A picture is drawn, then asked about: what the drawing is drawn from goes, and nothing after it. A family that
    drops segment by segment (BAGEL, as its published packer does) drops every text without a loss in training."""
    bare = model.lay_out(tiny.story(), frozenset({"text"})).describe(model.tokenizer.decode)
    assert "green square" not in bare and ("what colour" in bare) == (not model.segmented)
    full = model.lay_out(tiny.story())
    assert sum(s.supervised for s in model.lay_out(tiny.story(), frozenset({"text"})).segments) >= 1
    asked = Sample("asked", (*tiny.story().messages[:3], assistant()))
    assert "what colour" not in model.lay_out(asked, frozenset({"text"})).describe(model.tokenizer.decode)
    assert full.pictures == model.lay_out(tiny.story(), frozenset({"text"})).pictures


def words(model, laid) -> list[str]:
    return [model.tokenizer.decode([i for i in s.ids if i != NONE]) for s in laid.segments if s.kind == Kind.TEXT]


def test_a_condition_is_read_with_more_detail_than_a_picture_to_understand(model):
    def read(role):
        return model.lay_out(Sample("s", (user(Image(tiny.picture(0), role)),)))

    assert len(read("condition")) >= len(read("understand")) > 0


def test_every_parameter_is_in_exactly_one_part(model):
    parts = by_part(model)
    assert all(parts.values()), "a part without parameters"
    names = [n for part in parts.values() for n in part]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert model.frozen <= parts.keys()


def test_a_parameter_without_a_home_is_found(fresh):
    fresh.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="parameter stray is in 0 parts"):
        by_part(fresh)


def test_blocks_are_modules_of_the_model_and_disjoint(model):
    own, seen = set(map(id, model.modules())), set()
    blocks = list(model.blocks())
    assert blocks and all(id(b) in own for b in blocks)
    for block in blocks:
        parameters = set(map(id, block.parameters()))
        assert not parameters & seen
        seen |= parameters


def test_activated_parameters_are_some_of_all(model):
    assert 0 < model.activated_parameters() <= sum(p.numel() for p in model.parameters())


def test_fresh_weights_belong_to_the_seed(family):
    a, b, c = (tiny.model(family, s) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


def test_packing_refuses_a_route_that_the_family_lacks(model):
    laid = model.lay_out(tiny.draw())
    bad = replace(laid, segments=tuple(replace(s, route=9) for s in laid.segments))
    with pytest.raises(ValueError, match=f"takes route 9 of {model.routes}"):
        pack([bad], model.routes)
    with pytest.raises(ValueError, match="empty list"):
        pack([], model.routes)
