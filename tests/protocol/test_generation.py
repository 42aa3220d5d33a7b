"""Reading, saying and drawing: caches, batches and branches change nothing."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, assistant, user
from diptych.generation.engine import Engine
from diptych.generation.events import ImageDone, ImagePreview, ReasoningDelta, Stop, TextDelta
from diptych.generation.prefix_cache import PrefixCache
from diptych.generation.thinking import Think
from diptych.models import store
from tests.support import tiny
from tests.support.tolerances import LOGITS, PIXELS, SUM


def read(model, *sequences):
    return model.extend([model.open() for _ in sequences], list(sequences))


def cut(laid):
    """The sequence's segments one by one."""
    return [replace(laid, segments=(s,)) for s in laid.segments]


def test_word_by_word_from_a_cache_equals_training(model):
    laid = model.lay_out(tiny.ask(answer="two red stars"))
    last = laid.segments[-1]
    [context] = read(model, replace(laid, segments=laid.segments[:-1]))
    loss = 0.0
    for word, target in zip(last.ids, last.targets, strict=True):
        [context] = model.extend([context], [model.reply([word])])
        if target >= 0:
            loss += float(F.cross_entropy(context.logits, torch.tensor(target)))
    expected = model(pack([laid], model.routes), Noise())["text"].sum
    assert loss == pytest.approx(float(expected), rel=SUM)


@pytest.mark.parametrize("sample", [tiny.say(), tiny.ask(), tiny.request(tiny.edit())], ids=lambda s: s.id)
def test_reading_in_pieces_equals_reading_at_once(model, sample):
    laid = model.lay_out(sample)
    [whole] = read(model, laid)
    context = model.open()
    for piece in cut(laid):
        [context] = model.extend([context], [piece])
    assert (context.length, context.position) == (whole.length, whole.position)
    assert torch.allclose(context.logits, whole.logits, rtol=0, atol=LOGITS)


def test_sampled_latents_are_those_of_the_whole_when_reading_goes_on():
    """A picture's noise is its own, also where reading begins in the middle: in pieces, and from a memory."""
    model = tiny.sampling("bagel")
    sources = [Image(tiny.picture(i), "condition") for i in (1, 2)]
    sample = Sample("two", (user(sources[0], "one"), assistant("yes"), user(sources[1], "two"), assistant()))
    [whole] = read(model, laid := model.lay_out(sample))
    context = model.open()
    for piece in cut(laid):
        [context] = model.extend([context], [piece])
    assert torch.allclose(context.logits, whole.logits, rtol=0, atol=LOGITS)
    memory = PrefixCache(model)
    memory.prefill([model.lay_out(replace(sample, messages=sample.messages[:2]))], [False])
    [later] = memory.prefill([laid], [True])
    assert torch.allclose(later.logits, whole.logits, rtol=0, atol=LOGITS)
    [other] = read(model, replace(laid, segments=tuple(replace(s, ordinal=0) for s in laid.segments)))
    assert not torch.allclose(other.logits, whole.logits, rtol=0, atol=LOGITS)


def test_reading_together_equals_reading_alone(model):
    laid = [model.lay_out(s) for s in (tiny.say(), tiny.ask(), tiny.request(tiny.edit()))]
    for together, one in zip(read(model, *laid), laid, strict=True):
        [alone] = read(model, one)
        assert torch.allclose(together.logits, alone.logits, rtol=0, atol=LOGITS)


def test_a_branch_leaves_the_old_context_usable(model):
    [root] = read(model, model.lay_out(tiny.request(tiny.ask())))
    words = [model.tokenizer.encode(t) for t in (" red star circle", " blue", " two squares are there")]
    alone = []
    for ids in words:
        [fresh] = read(model, model.lay_out(tiny.request(tiny.ask())))
        [context] = model.extend([fresh], [model.reply(ids)])
        alone.append(context.logits)
    branches = [model.extend([root], [model.reply(ids)])[0] for ids in words]
    for branch, logits in zip(branches, alone, strict=True):
        assert torch.equal(branch.logits, logits)
    again = [model.extend([b], [model.reply(words[0])])[0] for b in branches]  # and branches of branches
    [direct] = read(model, model.lay_out(tiny.request(tiny.ask())))
    for ids in (words[2], words[0]):
        [direct] = model.extend([direct], [model.reply(ids)])
    assert torch.equal(again[2].logits, direct.logits)
    both = model.extend([root, root], [model.reply(words[0]), model.reply(words[1])])  # twice in one call
    assert torch.allclose(both[0].logits, alone[0], rtol=0, atol=LOGITS)
    assert torch.allclose(both[1].logits, alone[1], rtol=0, atol=LOGITS)


def test_a_picture_being_drawn_cannot_be_read(model):
    laid = model.lay_out(tiny.draw())
    if not any(s.kind == Kind.NOISED for s in laid.segments):
        pytest.skip("this family draws no noised pictures")
    with pytest.raises(ValueError, match="a noised picture cannot be prefilled"):
        read(model, laid)


# ---- words ------------------------------------------------------------------------------------------------------


def questions():
    asked = [tiny.ask("a", 1), tiny.ask("b", 2, "what is there?"), tiny.say("c")]
    return [tiny.request(s) for s in asked]


def test_greedy_text_is_equal_for_batch_1_and_3(engine):
    together = engine.answers(questions(), max_new_tokens=12)
    alone = [a for q in questions() for a in engine.answers([q], max_new_tokens=12)]
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert len({a.ids for a in together}) > 1  # a random model still answers by what it reads


def test_sampled_text_belongs_to_its_seed_not_to_its_neighbours(engine):
    how = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7, "top_p": 0.9}
    together = engine.answers(questions(), **how)
    assert [a.ids for a in together] == [engine.answers([q], **how)[0].ids for q in questions()]
    assert together[0].ids != engine.answers(questions()[:1], **how | {"seed": 8})[0].ids


def test_a_stream_says_what_an_answer_says(engine):
    sample = questions()[0]
    answer = engine.chat(sample.messages, max_new_tokens=9)
    *deltas, stop = engine.stream(sample.messages, max_new_tokens=9)
    assert all(isinstance(d, TextDelta) for d in deltas) and isinstance(stop, Stop)
    assert "".join(d.text for d in deltas) == answer.text
    assert stop.reason == answer.finish_reason and stop.usage.written == len(answer.ids) and stop.usage.read > 0
    assert stop.parameters == answer.parameters


def test_an_answer_ends_at_a_stop_word(engine):
    sample = questions()[0]
    first = engine.answers([sample], max_new_tokens=3)[0].ids[1]

    class Stopping(type(engine.model)):
        stop_ids = frozenset({first})

    try:
        engine.model.__class__, own = Stopping, engine.model.__class__
        answer = engine.answers([sample], max_new_tokens=3)[0]
    finally:
        engine.model.__class__ = own
    assert answer.finish_reason == "stop" and first not in answer.ids


# ---- pictures ---------------------------------------------------------------------------------------------------


def to_draw(prompt="a blue star", size=(32, 32)) -> Sample:
    """A request for a picture: its open turn says the size."""
    return Sample("p", (user(prompt), assistant(Image(None, "target", size))))


def begin(model, prompt="a blue star", seed=0, **changes):
    request, settings = to_draw(prompt), replace(model.settings, **changes)
    contexts = []
    for drop in model.branches(request, settings):
        laid = model.lay_out(request, drop)
        contexts.append(read(model, laid)[0] if len(laid) else model.open())
    return model.start([tuple(contexts)], [request], [settings], [seed])[0]


def finish(model, *drawings):
    drawings = list(drawings)
    while not drawings[0].done:
        drawings = model.step(drawings)
    return model.finish(drawings)


def test_a_picture_drawn_alone_equals_one_drawn_in_a_batch(model):
    how = [("a blue star", 0), ("two red squares and a circle", 1), ("", 2)]
    together = finish(model, *(begin(model, p, s) for p, s in how))
    for pixels, (prompt, seed) in zip(together, how, strict=True):
        assert torch.allclose(pixels, finish(model, begin(model, prompt, seed))[0], rtol=0, atol=PIXELS)
    assert not torch.allclose(together[0], together[1], atol=0.01)


def test_a_picture_may_be_joined_late_and_left_early(model):
    longer = tiny.having(model, num_inference_steps=6)
    first, second = begin(model, "a blue star", 0), begin(model, "two red squares", 1, **longer)
    alone = [
        finish(model, d)[0] for d in (begin(model, "a blue star", 0), begin(model, "two red squares", 1, **longer))
    ]
    [first] = model.step([first])
    [first] = model.step([first])
    while not first.done:
        second, first = model.step([second, first])
    assert not second.done
    assert torch.allclose(finish(model, first)[0], alone[0], rtol=0, atol=PIXELS)
    assert torch.allclose(finish(model, second)[0], alone[1], rtol=0, atol=PIXELS)


def test_a_step_changes_no_drawing_that_it_was_given(model):
    drawing = begin(model)
    before = drawing.state.clone()
    model.step([drawing])
    assert torch.equal(drawing.state, before) and drawing.step == 0
    assert torch.equal(finish(model, drawing), finish(model, drawing))


def test_reading_on_does_not_disturb_a_drawing(model):
    drawing, expected = begin(model), finish(model, begin(model))
    [drawing] = model.step([drawing])
    model.extend([drawing.contexts[0]], [model.reply(model.tokenizer.encode(" red star"))])
    assert torch.equal(finish(model, drawing), expected)


def test_guidance_scale_1_is_no_guidance(model):
    plain = finish(model, begin(model, guidance_scale=1.0))
    always, never = (tiny.having(model, guidance_interval=(0.0, high)) for high in (1.0, 0.0))
    barely = finish(model, begin(model, guidance_scale=1.0 + 1e-7, **always))
    guided = finish(model, begin(model, guidance_scale=5.0, **always))
    if never:
        assert torch.allclose(plain, finish(model, begin(model, guidance_scale=5.0, **never)), rtol=0, atol=PIXELS)
    assert torch.allclose(plain, barely, rtol=0, atol=1e-4)
    assert not torch.allclose(plain, guided, atol=0.01)


def test_every_branch_drops_what_it_says(model):
    settings = replace(model.settings, guidance_scale=2.0, image_guidance_scale=1.5)
    edit = replace(tiny.edit(), messages=(tiny.edit().messages[0], assistant(Image(None, "target"))))
    plain = {frozenset(): 1.0, frozenset({"text"}): 2.0}
    if model.family == "bagel":  # as published, its second scale counts without pictures too
        plain[frozenset({"image"})] = 1.5
    assert model.branches(to_draw(), settings) == plain
    assert [g for drop, g in model.branches(edit, settings).items() if "image" in drop] == [1.5]
    for request in (to_draw(), edit):
        first, *rest = model.branches(request, settings)
        assert first == frozenset() and rest and all(b <= set(model.conditions) for b in rest)
        told = [model.lay_out(request, drop).describe(model.tokenizer.decode) for drop in (first, *rest)]
        lacks_nothing = request == to_draw() and len(plain) == 3  # no picture: the image branch reads all
        assert len(set(told)) == len(told) - lacks_nothing
        words = "a blue star" if request is not edit else "make the star red"
        assert all((words in t) == ("text" not in drop) for t, drop in zip(told, (first, *rest)))
    assert model.branches(edit, replace(settings, guidance_scale=1.0, image_guidance_scale=1.0)) == {frozenset(): 1.0}


def test_a_drawing_has_a_context_for_every_branch(model):
    request, settings = to_draw(), replace(model.settings, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance needs contexts without nothing, text; there are 1"):
        model.start([(read(model, model.lay_out(request))[0],)], [request], [settings], [0])


def test_a_drawing_takes_as_many_steps_as_the_model_says(model):
    drawing, settings = begin(model, **tiny.having(model, num_inference_steps=3)), model.settings.within(3)
    assert drawing.steps == model.steps(drawing.canvas, settings) == model.steps(drawing.canvas, settings.within(9))
    assert drawing.steps == 3 or drawing.steps == len(drawing.state)  # where a step is a token of codes
    assert model.steps((64, 64), settings) in (3, 4 * drawing.steps)


def test_a_finished_drawing_takes_no_further_step(model):
    drawing = begin(model, **tiny.having(model, num_inference_steps=1))
    while not drawing.done:
        [drawing] = model.step([drawing])
    with pytest.raises(ValueError, match="takes no further step"):
        model.step([drawing])
    with pytest.raises(ValueError, match="one canvas size"):
        model.step([begin(model), replace(begin(model), canvas=(64, 64))])


def test_edits_with_image_guidance(engine):
    how = tiny.having(engine.model, num_inference_steps=2, guidance_scale=2.0)
    a, b, c = (
        engine.edit(tiny.picture(p), "make it red", image_guidance_scale=g, **how).images[0]
        for p, g in ((1, 1.0), (1, 3.0), (2, 1.0))
    )
    assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() > 0  # the scale matters
    assert np.abs(np.asarray(a, int) - np.asarray(c, int)).max() > 0  # the source matters


def test_edits_have_defaults_of_their_own(fresh):
    """Where a model has them: of requests that show a source, and of no conversation that once showed one."""
    drawn = tiny.request(tiny.draw())
    edit = tiny.request(tiny.edit(size=(32, 32)))
    after = Sample("after", (*tiny.edit().messages, user("a star")))
    assert all(fresh.defaults(s) == fresh.settings for s in (drawn, edit, after)) or fresh.edits
    fresh.edits = replace(fresh.settings, guidance_scale=1.25, **tiny.having(fresh, num_inference_steps=2))
    assert fresh.defaults(edit) == fresh.edits and fresh.defaults(drawn) == fresh.defaults(after) == fresh.settings
    engine = Engine(fresh)
    assert engine.edit(tiny.picture(1), "x").parameters["guidance_scale"] == 1.25
    assert engine.edit(tiny.picture(1), "x", guidance_scale=1.5).parameters["guidance_scale"] == 1.5
    assert [p.parameters["guidance_scale"] for p in engine.draw([drawn, edit], [0, 1])] == [
        fresh.settings.guidance_scale,
        1.25,
    ]


def test_an_edit_has_its_sources_size(engine):
    assert engine.edit(tiny.picture(0, 64, 32), "make it red").images[0].size == (64, 32)
    many = [Sample("s", (user("a star"),)), tiny.request(tiny.edit("e", size=(64, 32)))]
    alone = [engine.draw([s], [i])[0].image for i, s in enumerate(many)]
    together = [d.image for d in engine.draw(many, [0, 1])]
    assert [i.size for i in together] == [(32, 32), (64, 32)]
    for a, b in zip(alone, together, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_pictures_of_one_request_have_seeds_one_after_another(engine):
    three = engine.generate("a blue star", n=3, seed=4)
    one = engine.generate("a blue star", seed=5)
    assert np.abs(np.asarray(three.images[1], int) - np.asarray(one.images[0], int)).max() <= 1
    assert three.parameters["size"] == (32, 32) and three.seed == 4 and three.parameters["seed"] == 4


def test_a_streamed_picture_is_the_drawn_one(engine):
    sample = (user("a blue star"),)
    *previews, done, stop = engine.stream_picture(sample, seed=3, previews=2)
    assert previews and all(isinstance(p, ImagePreview) and 0 < p.step < p.steps for p in previews)
    assert isinstance(done, ImageDone) and isinstance(stop, Stop) and stop.usage.pictures == 1
    drawn = engine.generate("a blue star", seed=3)
    assert done.image.tobytes() == drawn.images[0].tobytes()
    assert stop.parameters == drawn.parameters


def test_save_load_same_picture_bit_for_bit(engine, tmp_path):
    store.save(engine.model, tmp_path / "m")
    again = Engine(store.load(tmp_path / "m"))
    for key, value in engine.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)
    assert again.model.config == engine.model.config
    a, b = (e.generate("a blue star", seed=1).images[0].tobytes() for e in (engine, again))
    assert a == b
    assert engine.ask(tiny.picture(1), "how many?").ids == again.ask(tiny.picture(1), "how many?").ids


def test_only_sizes_that_can_be_drawn(model):
    stride = model.config.stride
    assert model.canvas(to_draw(size=(stride * 2, stride))) == (stride, stride * 2)
    with pytest.raises(ValueError, match=f"multiples of {stride}"):
        model.canvas(to_draw(size=(stride + 1, stride)))
    assert model.canvas(to_draw(size=None)) == model.config.size[::-1]
    source = Image(tiny.picture(0, 1000, 504), "condition")
    height, width = model.canvas(Sample("e", (user(source, "x"), assistant(Image(None, "target")))))
    assert height % stride == 0 and width % stride == 0 and width > height


def test_engine_refuses_what_it_cannot_do(engine):
    known = ", ".join(asdict(engine.model.settings))
    with pytest.raises(ValueError, match=rf"unknown settings \['steps'\]; known: {known}"):
        engine.generate("x", steps=3)
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        engine.generate("x", n=0)
    for n in (1.5, "2", True):
        with pytest.raises(ValueError, match="n must be a whole number"):
            engine.generate("x", n=n)
    for prompt in ({"prompt": "x"}, b"x", None, 5):
        with pytest.raises(ValueError, match=f"a text or a list of texts, not {type(prompt).__name__}"):
            engine.generate(prompt)
    for name, value in asdict(engine.model.settings).items():
        if type(value) in (int, float):
            with pytest.raises(ValueError, match=f"{name} must be a"):
                engine.generate("x", **{name: "3"})
    with pytest.raises(ValueError, match="must end with a user's message"):
        engine.chat(tiny.say().messages)
    for bad in tiny.having(engine.model, num_inference_steps=0, temperature=-1.0, guidance_scale=-1.0).items():
        with pytest.raises(ValueError, match="must be at least|at least 0"):
            engine.generate("x", **dict([bad]))
    with pytest.raises(ValueError, match="picture 'nowhere.png' does not exist"):
        engine.ask("nowhere.png", "what?")
    with pytest.raises(ValueError, match="at least one picture"):
        engine.edit([], "x")
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        engine.chat([user("x")], temperature=-1.0)
    with pytest.raises(ValueError, match="no pixels"):
        engine.chat([user(Image(None), "x")])


def test_a_conversation_is_read_once(model, monkeypatch):
    """Text, picture, edit, question: every turn reads on from the last, and says and draws as a fresh reading would."""
    read_lengths = []
    extend = type(model).extend

    def counted(self, contexts, sequences):
        read_lengths.append(sum(map(len, sequences)))
        return extend(self, contexts, sequences)

    talk, going, turns = Engine(model), [], []
    monkeypatch.setattr(type(model), "extend", counted)
    for text in ("hello", "a red circle", "make it blue", "what is it?"):
        going.append(user(text))
        fresh, reads = Engine(model), []
        if text in ("a red circle", "make it blue"):
            how = tiny.having(model, num_inference_steps=2, guidance_scale=1.0) | {
                "seed": 1
            }  # one branch: the conversation
            drawn = []
            for engine in (talk, fresh):
                *_, done, _ = engine.stream_picture(going, **how)
                drawn.append(done.image)
                reads.append(read_lengths[0])
                read_lengths.clear()
            assert np.allclose(*(np.asarray(image, int) for image in drawn), atol=1)
            going.append(assistant(Image(drawn[0], "target")))
        else:
            answers = []
            for engine in (talk, fresh):
                answers.append(engine.chat(going, max_new_tokens=3))
                reads.append(read_lengths[0])
                read_lengths.clear()
            assert answers[0].ids == answers[1].ids
            going.append(assistant(answers[0].text))
        turns.append(tuple(reads))
    assert turns[0][0] == turns[0][1]
    assert all(first < whole for first, whole in turns[1:]), turns
    assert 0 < len(talk.prefixes.entries) <= talk.prefixes.size


def test_first_turns_do_not_depend_on_what_was_asked_before(model):
    few = tiny.having(model, num_inference_steps=2)
    alone = Engine(model).generate("two red stars", seed=3, **few).images[0]
    engine = Engine(model)
    engine.generate("two red circles", seed=3, **few)
    assert engine.generate("two red stars", seed=3, **few).images[0].tobytes() == alone.tobytes()


def test_a_picture_is_planned_first_and_drawn_from_its_plan(engine):
    """Thinking before drawing is one protocol for every family: a system text, a plan, and the plan in the request."""
    how = {"num_inference_steps": 2} if engine.model.settings.num_inference_steps else {}
    think = Think(max_new_tokens=6)
    plain = engine.generate("a blue star", **how)
    planned = engine.generate("a blue star", n=2, think=think, **how)
    assert plain.reasoning == () and len(planned.reasoning) == 2
    *deltas, done, stop = engine.stream_picture("a blue star", think=think, **how)
    assert isinstance(done, ImageDone) and isinstance(stop, Stop) and stop.usage.written > 0
    assert all(isinstance(d, ReasoningDelta) for d in deltas)
    assert "".join(d.text for d in deltas) == planned.reasoning[0]
    assert done.image.tobytes() == planned.images[0].tobytes() != plain.images[0].tobytes()
    asked = Sample("p", (user("a blue star"), assistant(Image(None, "target"))))
    one, other = (engine.model.lay_out(engine.model.planned(asked, plan)) for plan in ("a red star", "no star"))
    assert one.describe(engine.model.tokenizer.decode) != other.describe(engine.model.tokenizer.decode)


def test_thoughts_before_an_answer_are_told_apart(engine, monkeypatch):
    tokenizer = engine.model.tokenizer
    words = [*tokenizer.encode("<think> it is red </think> two"), next(iter(engine.model.stop_ids))]
    given = iter(words * 2)
    monkeypatch.setattr("diptych.generation.scheduler.next_token", lambda *_: next(given))
    answer = engine.chat("how many?", think=True, pictures=0, max_new_tokens=40)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("it is red ", "two", "stop")
    *deltas, _ = engine.stream("how many?", think=True, max_new_tokens=40)
    kinds = {kind: "".join(d.text for d in deltas if isinstance(d, kind)) for kind in (ReasoningDelta, TextDelta)}
    assert kinds == {ReasoningDelta: "it is red ", TextDelta: "two"}
