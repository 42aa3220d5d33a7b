"""The vocabulary: samples and their JSON, segments, packing, the one rule of who sees whom, losses, noise."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.losses import Term, add_counts, check_weights, combine
from diptych.core.mask import dense
from diptych.core.noise import Noise
from diptych.core.sample import Image, Message, Sample, Text, assistant, sample_from_json, sample_to_json, user
from diptych.core.tensors import NONE, to_float, to_uint8

# ---- samples ----------------------------------------------------------------------------------------------------

writable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)  # the others are refused
texts = st.builds(Text, writable, st.booleans())
images = st.builds(
    Image,
    st.text("abc/.", min_size=1, max_size=6),
    st.sampled_from(["understand", "condition", "target"]),
    st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(texts | images, min_size=1, max_size=3).map(tuple),
)


@pytest.mark.parametrize(("text", "reason"), [("a\ud800", "lone surrogate .U.D800. at character 1"), ("\0", "NUL")])
def test_texts_that_no_encoder_can_write_are_refused(text, reason):
    row = {"messages": [{"role": "user", "content": text}]}
    for door in (lambda: user(text), lambda: assistant(text), lambda: sample_from_json(row)):
        with pytest.raises(ValueError, match=reason):
            door()
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\].text holds"):
        sample_from_json(row)
    if text != "\0":  # a model may generate NUL
        with pytest.raises(ValueError, match=reason):
            Text(text)


def test_a_sample_without_a_target_says_so():
    seen = Image("a.png")
    assert not Sample("a", (user("q"),)).has_target
    assert not Sample("a", (user(seen), assistant(Text("read, not learned")))).has_target
    assert not Sample("a", (user("q"), assistant(""))).has_target
    assert Sample("a", (user("q"), assistant("x"))).has_target
    assert Sample("a", (assistant(Image("a.png", "target")),)).has_target


@given(st.builds(Sample, st.text(max_size=5), st.lists(messages, min_size=1, max_size=3).map(tuple)))
def test_a_sample_round_trips_through_json(sample):
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample


def test_roles_and_losses_by_default():
    row = {
        "id": 7,
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "image", "image": "b.png", "size": [8, 4]}]},
            {"role": "assistant", "content": "bye"},
        ],
    }
    sample = sample_from_json(row)
    assert sample.id == "7"
    assert sample.messages == (
        user(Image("a.png"), "hi"),
        assistant(Image("b.png", "target", (8, 4))),
        assistant("bye"),
    )
    assert [i.image for i in sample.images()] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "row, told",
    [
        ([], "row must be an object, not []"),
        ({}, "row lacks ['messages']"),
        ({"messages": []}, "'messages' must be a list with at least one message"),
        (
            {"messages": [{"role": "user", "content": "x"}], "image": 1},
            "row has unknown keys ['image']; known: ['id', 'info', 'messages']",
        ),  # noqa: E501
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "messages[0].role is 'human'; choose from system, user, assistant",
        ),  # noqa: E501
        (
            {"messages": [{"role": "user", "content": []}]},
            "messages[0].content must be a text or a list with at least one part",
        ),  # noqa: E501
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0].type is 'video'; choose from text, image",
        ),  # noqa: E501
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "content[0].text must be a string, not 3",
        ),  # noqa: E501
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "loss": 1}]}]},
            "loss must be true or false, not 1",
        ),  # noqa: E501
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": ""}]}]}, "image must be a path, not ''"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "role": "x"}]}]},
            "role is 'x'; choose from understand",
        ),  # noqa: E501
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "size": [0, 1]}]}]},
            "size must be [width, height]",
        ),  # noqa: E501
        ({"messages": [{"role": "user", "content": "x"}], "info": 3}, "'info' must be an object, not 3"),
    ],
)
def test_a_bad_row_is_named(row, told):
    with pytest.raises(ValueError) as error:
        sample_from_json(row)
    assert told in str(error.value)


def test_a_picture_on_disk_has_no_pixels_and_a_decoded_one_no_json():
    with pytest.raises(ValueError, match="picture 'a.png' has not been decoded"):
        Image("a.png").pixels  # noqa: B018
    decoded = Sample("s", (user(Image(PIL.Image.new("RGB", (2, 2)))),))
    with pytest.raises(ValueError, match="'s' holds a decoded picture"):
        sample_to_json(decoded)


def test_a_request_ends_with_an_open_turn():
    asked, said = user("what is it?"), assistant("a star")
    for last in (assistant(), assistant(Image(None, "target", (8, 8)))):
        sample = Sample("s", (asked, said, user("draw it"), last))
        assert sample.is_open and sample.request == user("draw it")
    for messages in ((asked,), (asked, said), (asked, assistant(Image("a.png", "target")))):
        assert not Sample("s", messages).is_open and Sample("s", messages).request == asked


# ---- segments and rows --------------------------------------------------------------------------------------------


def text(n, **changes):
    return Segment(Kind.TEXT, tuple(range(5, 5 + n)), **changes)


def drawn(n=2, kind=Kind.NOISED, **changes):
    settings = {"full": True, "hidden": True, "shared": True, "advance": 0, "route": 1, "generated": True} | changes
    return Segment(kind, (1, *[NONE] * n, 2), image=torch.zeros(3, 2, n), grid=(1, n), **settings)


def test_segments_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="at least one token"):
        Segment(Kind.TEXT, ())
    with pytest.raises(ValueError, match="2 ids but 1 targets"):
        Segment(Kind.TEXT, (1, 2), targets=(3,))
    with pytest.raises(ValueError, match=r"3 picture tokens for a grid of \(2, 2\)"):
        Segment(Kind.CLEAN, (NONE,) * 3, image=torch.zeros(3, 2, 2), grid=(2, 2))
    with pytest.raises(FrozenInstanceError):
        text(2).ids = ()


def test_the_request_is_that_of_the_drawing():
    blank, drawn = Image(None, "target"), Image("a.png", "target")
    first, later = user("a cat"), user("what is it?")
    assert Sample("open", (first, assistant(drawn), later, assistant(blank))).request is later
    assert Sample("asked", (first, assistant(drawn), later, assistant())).request is later
    assert Sample("ends", (first, assistant(drawn), later)).request is later
    told = Sample("told", (first, assistant(drawn, "done"), later, assistant("a cat")))
    assert told.request is first and told.drawing == (1, 0) and told.prompt == "a cat"
    twice = Sample("twice", (first, assistant(drawn), first, assistant("here", drawn)))
    assert twice.drawing == (3, 1) and twice.request_at == 2
    alone = Sample("alone", (assistant(drawn),))
    assert alone.request is None and alone.prompt == "" and Sample("said", (first, assistant("yes"))).drawing is None


def test_positions_shared_advanced_and_counted():
    clean = drawn(3, Kind.CLEAN, hidden=False, advance=1)
    sequence = Layout("s", (text(2), drawn(), clean, text(2)))
    assert sequence.positions() == [0, 1, *[2] * 4, *[2] * 5, 3, 4]
    assert sequence.positions(10)[0] == 10
    assert sequence.pictures == 2


def test_pack_lays_documents_side_by_side():
    a, b = Layout("a", (text(3, targets=(6, 7, NONE)), drawn())), Layout("b", (text(2), drawn(), drawn()))
    batch = pack([a, b], routes=2, pad_to=32)
    assert len(batch) == 32 and batch.lengths == (7, 10) and batch.samples == ("a", "b")
    assert batch.document.tolist() == [0] * 7 + [1] * 10 + [NONE] * 15
    assert batch.targets.tolist()[:3] == [6, 7, NONE] and int((batch.targets != NONE).sum()) == 2
    [group] = batch.of(Kind.NOISED)
    assert group.owners == ("a", "b", "b") and group.ordinals == (0, 0, 1)
    assert group.tokens.tolist() == [[4, 5], [10, 11], [14, 15]]
    assert batch.routes[1].tolist() == [4, 5, 10, 11, 14, 15]  # markers around pictures take route 0
    assert sorted(torch.cat(batch.routes).tolist()) == list(range(32))
    assert batch.to("cpu").ids.tolist() == batch.ids.tolist()


@pytest.mark.parametrize("nothing", [[], [Layout("a", ())]])
def test_nothing_cannot_be_packed(nothing):
    with pytest.raises(ValueError, match="cannot pack an empty list of sequences"):
        pack(nothing)


def test_pictures_of_unlike_shape_make_groups():
    small, large = drawn(2), drawn(4)
    batch = pack([Layout("a", (small, large)), Layout("b", (small,))], routes=2)
    assert [len(g.images) for g in batch.of(Kind.NOISED)] == [2, 1]
    assert [g.ordinals for g in batch.of(Kind.NOISED)] == [(0, 0), (1,)]


def test_the_rule_by_hand():
    row = pack([Layout("a", (text(2), drawn(1), text(1))), Layout("b", (text(1),))], routes=2)
    allowed = [
        "1000000",  # text is causal
        "1100000",
        "1111100"[:7],  # the noised picture sees what came before and all of itself
        "1111100",
        "1111100",
        "1100010",  # text after it does not see it
        "0000001",  # nor anything of another document
    ]
    assert ["".join("01"[int(x)] for x in line) for line in dense(row).tolist()] == allowed


# ---- losses, noise, pixels ----------------------------------------------------------------------------------------


def test_losses_are_normalised_once_by_the_global_count():
    terms = {"text": Term(torch.tensor(6.0), 3.0), "image": Term(torch.tensor(0.0), 0.0)}
    assert float(combine(terms, {"text": 2.0, "image": 1.0}, {"text": 12.0, "image": 0.0})) == 1.0
    assert add_counts([{"text": 1.0}, {"text": 2.0, "image": 5.0}]) == {"text": 3.0, "image": 5.0}


def test_terms_and_weights_must_match():
    check_weights({"text"}, {"text": 1.0})
    with pytest.raises(ValueError, match=r"loss terms \['image'\] have no weight; the recipe weighs \['text'\]"):
        check_weights({"text", "image"}, {"text": 1.0})
    with pytest.raises(ValueError, match=r"unknown loss terms \['vq'\]; the family has \['text'\]"):
        check_weights({"text"}, {"text": 1.0, "vq": 1.0})


def test_noise_is_addressed():
    def draw(*address, seed=0, step=0):
        return Noise(seed, step).normal(*address, (4,)).tolist()

    assert draw("a", "x") == draw("a", "x")
    others = [draw("b", "x"), draw("a", "y"), draw("a", "x", seed=1), draw("a", "x", step=1)]
    assert all(o != draw("a", "x") for o in others)
    many = Noise().normal("s", "n", (20_000,))
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03
    level = Noise().uniform("s", "n", (20_000,))
    assert 0 <= float(level.min()) and float(level.max()) < 1 and abs(float(level.mean()) - 0.5) < 0.02


def test_every_byte_survives_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
