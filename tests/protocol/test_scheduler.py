"""Continuous batching: whoever joins or leaves, what a request gives keeps every bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.generation import scheduler
from diptych.generation.engine import Engine
from diptych.generation.events import ImageDone, ImagePreview, Stop, TextDelta
from diptych.generation.prefix_cache import PrefixCache, _same, units
from diptych.generation.scheduler import ImageRequest, Scheduler, TextRequest
from diptych.parts.batch_invariant import Linear, linear
from tests.support import tiny
from tests.support.tolerances import LOGITS


def prompt(text: str) -> Sample:
    return Sample(text, (user(text),))


def mixed(model):
    """Requests of every kind, length and size."""
    few = replace(model.settings, **tiny.having(model, num_inference_steps=3))
    plain = replace(model.settings, **tiny.having(model, num_inference_steps=2), guidance_scale=1.0)
    return [
        ImageRequest(prompt("a blue star"), 0, None, model.settings),
        TextRequest(tiny.request(tiny.ask()), 6),
        ImageRequest(prompt("two red squares left of a very large green circle"), 1, None, few),
        ImageRequest(prompt("a star"), 2, None, plain),
        TextRequest(prompt("hello"), 9, temperature=1.0, seed=3, logprobs=2),
        ImageRequest(tiny.request(tiny.edit(size=(32, 32))), 4, None, replace(few, image_guidance_scale=2.0)),
        ImageRequest(prompt("a hat"), 5, (64, 32), few),
        ImageRequest(prompt("a hat"), 6, (16, 16), few, negative_prompt="a red hat"),
        TextRequest(tiny.request(tiny.ask("b", 2, "what is there?")), 1),
    ]


def run(loop, jobs):
    """All events by job; every bit of them, as text."""
    told = {id(j): [] for j in jobs}
    while not loop.idle:
        for job, event in loop.tick():
            told[id(job)].append(event)
    return [[_bits(e) for e in told[id(j)]] for j in jobs]


def _bits(event):
    if isinstance(event, (ImageDone, ImagePreview)):
        return event.image.tobytes()
    return repr(event)


@pytest.fixture
def states(monkeypatch, model):
    """The final latents of every picture by seed: pixels would hide bits."""
    kept, finish = {}, type(model).finish

    def keeping(self, drawings):
        for d in drawings:
            kept.setdefault(len(kept), d.state.clone())
        return finish(self, drawings)

    monkeypatch.setattr(type(model), "finish", keeping)
    return kept


def test_a_request_gives_the_same_bits_alone_and_in_any_company(model):
    alone = []
    for request in mixed(model):
        one = Scheduler(model)
        alone += run(one, [one.submit(request)])
    together = Scheduler(model)
    assert run(together, [together.submit(r) for r in mixed(model)]) == alone
    narrow = Scheduler(model, slots=2)  # they join as others leave
    assert run(narrow, [narrow.submit(r) for r in mixed(model)]) == alone
    backwards = Scheduler(model, slots=5)
    assert run(backwards, [backwards.submit(r) for r in mixed(model)[::-1]]) == alone[::-1]


@pytest.mark.parametrize("threads", [1, 2])
def test_latents_keep_every_bit_in_float32(model, states, threads):
    torch.set_num_threads(threads)
    try:
        request = ImageRequest(prompt("a blue star"), 0, None, model.settings)
        one = Scheduler(model)
        run(one, [one.submit(request)])
        for company in (1, 2, 5):
            loop = Scheduler(model)
            first = loop.submit(request)
            others = [loop.submit(ImageRequest(prompt("a hat " * i), i, None, model.settings)) for i in range(company)]
            run(loop, [first, *others])
        finished = [s for s in states.values() if s.shape == states[0].shape]
        assert sum(torch.equal(s, states[0]) for s in finished) == 4
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_of_a_product_do_not_depend_on_how_many_there_are(threads):
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        for wide, out in ((192, 192), (48, 32), (384, 64)):
            layer = Linear(wide, out)
            with torch.inference_mode():
                x = torch.randn(200, wide, generator=generator)
                whole = layer(x)
                for rows in [*range(1, 40), 64, 144]:
                    assert torch.equal(layer(x[7 : 7 + rows]), whole[7 : 7 + rows]), (wide, out, rows)
                assert layer(x.view(2, 100, wide)).shape == (2, 100, out)
    finally:
        torch.set_num_threads(1)
    assert linear(x[:1].clone().requires_grad_(), layer.weight).requires_grad  # training goes its own way


def test_a_cancelled_request_is_gone_at_once_and_disturbs_nobody(model):
    first, second, third = mixed(model)[:3]
    one = Scheduler(model)
    alone = run(one, [one.submit(second)])
    loop = Scheduler(model, slots=2)
    a, b, c = (loop.submit(r) for r in (first, second, third))
    told = [e for j, e in loop.tick() if j is b]
    loop.cancel(a)
    loop.cancel(c)  # still waiting
    assert loop.running == [b] and not loop.waiting
    while not loop.idle:
        for job, event in loop.tick():
            assert job is b
            told.append(event)
    assert [_bits(e) for e in told] == alone[0]
    loop.cancel(a)  # twice does no harm


def test_previews_are_as_many_as_asked_for_and_spread(model):
    for steps, previews in ((4, 1), (4, 3), (7, 2), (1, 2), (2, 5)):
        loop = Scheduler(model)
        own = tiny.having(model, num_inference_steps=steps)
        loop.submit(ImageRequest(prompt("a hat"), 0, None, replace(model.settings, **own), previews=previews))
        seen: list[ImagePreview] = []
        while not loop.idle:
            seen += [e for _, e in loop.tick() if isinstance(e, ImagePreview)]
        of = seen[0].steps if seen else 1
        assert of == own.get("num_inference_steps", of)
        assert len(seen) == min(previews, of - 1) and len({e.step for e in seen}) == len(seen)


def test_stop_texts_end_an_answer_and_are_never_told(model):
    def said(**how):
        loop = Scheduler(model)
        job = loop.submit(TextRequest(prompt("hello"), 12, temperature=1.0, seed=1, **how))
        events = []
        while not loop.idle:
            events += [e for _, e in loop.tick()]
        return "".join(e.text for e in events if isinstance(e, TextDelta)), events[-1].reason, job

    whole, reason, _ = said()
    assert reason == "length"
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut, reason, job = said(stop=(stop, "never said"))
    assert reason == "stop" and cut == whole[: whole.find(stop)] and stop not in cut
    assert len(job.ids) <= 12


def test_logprobs_are_those_of_the_model(model):
    loop = Scheduler(model)
    job = loop.submit(TextRequest(prompt("hello"), 4, logprobs=3))
    words = []
    while not loop.idle:
        words += [w for _, e in loop.tick() if isinstance(e, TextDelta) for w in e.logprobs]
    [context] = model.extend([model.open()], [model.lay_out(job.opened)])
    scores = context.logits.log_softmax(-1)
    assert words[0].logprob == pytest.approx(float(scores.max()), abs=1e-5)
    assert [p for _, p in words[0].top] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-5)
    assert words[0].top[0] == (words[0].text, words[0].logprob)


def test_a_negative_prompt_guides_and_needs_guidance(model):
    engine = Engine(model)
    plain, less = (engine.generate("a star", negative_prompt=n).images[0].tobytes() for n in ("", "a red star"))
    assert plain != less
    assert engine.generate("a star", negative_prompt="red").parameters["negative_prompt"] == "red"
    with pytest.raises(ValueError, match="negative_prompt needs guidance"):
        engine.generate("a star", negative_prompt="red", guidance_scale=1.0)


# ---- answers that draw -------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """What answers say, word for word, whatever the model would have said."""

    def says(*words):
        said = iter(words)
        monkeypatch.setattr("diptych.generation.scheduler.next_token", lambda *_: next(said))

    return says


def spoken(model) -> tuple[list[int], list[int], list[int]]:
    """Words, a picture's beginning, and words again until the end."""
    if model.picture_word is None:
        pytest.skip("this family's answers begin no pictures")
    before, after = (model.tokenizer.encode(t) for t in ("" if model.opens_with_picture else "a red", "done"))
    return before, [model.picture_word], [*after, min(model.stop_ids)]


def test_a_spoken_beginning_starts_a_picture_and_the_answer_goes_on(model, script):
    before, word, after = spoken(model)
    script(*before, *word, *after)
    loop, sample = Scheduler(model, PrefixCache(model)), prompt("hello")
    talk = loop.submit(TextRequest(sample, 20, seed=3))
    events = []
    while not loop.idle:
        for job, event in loop.tick():
            assert job is talk
            events.append(event)
    kinds = [type(e) for e in events if not isinstance(e, TextDelta)]
    assert kinds == [ImageDone, Stop] and events[-1].reason == "stop" and events[-1].usage.pictures == 1
    at = next(i for i, e in enumerate(events) if isinstance(e, ImageDone))
    text = ["".join(e.text for e in some if isinstance(e, TextDelta)) for some in (events[:at], events[at:])]
    assert text == [model.tokenizer.decode(before), model.tokenizer.decode(after[:-1])]
    assert text[1] and bool(text[0]) != model.opens_with_picture
    assert [id(i) for i in talk.images] == [id(events[at].image)]
    # the picture is the one that is asked for in the same place, and what follows has read it
    place = Sample("p", (*sample.messages, assistant(Text(text[0], loss=True), Image(None, "target"))))
    asked = Engine(model).draw([place], [3])[0].image
    assert np.abs(np.asarray(asked, int) - np.asarray(events[at].image, int)).max() <= 2
    spoken_turn = assistant(Text(text[0], loss=True), Image(events[at].image, "target"), Text(text[1], loss=True))
    laid = model.lay_out(Sample("p", (*sample.messages, spoken_turn, user("and then?"), assistant())))
    known, _ = loop.prefixes.entries[-1]
    assert all(map(_same, known, units(laid.segments)))  # the next turn reads on from where this answer ended
    [fresh], [later] = (m.prefill([laid], [True]) for m in (PrefixCache(model), loop.prefixes))
    assert torch.allclose(later.logits, fresh.logits, rtol=0, atol=10 * LOGITS)  # pixels were looked at


def test_pictures_beyond_the_allowed_are_words(model, script):
    before, word, after = spoken(model)
    script(*before, *word, *after)
    loop = Scheduler(model)
    talk = loop.submit(TextRequest(prompt("hello"), 20, pictures=0))
    while not loop.idle:
        assert not any(isinstance(e, ImageDone) for _, e in loop.tick())
    assert talk.ids == [*before, *word, *after[:-1]] and not talk.images


def test_an_answer_that_draws_is_cancelled_with_its_picture(model, script):
    before, word, after = spoken(model)
    script(*before, *word)
    loop = Scheduler(model)
    talk = loop.submit(TextRequest(prompt("hello"), 20))
    while not talk.image_job:
        loop.tick()
    assert len(loop.running) == 2
    loop.cancel(talk)
    assert loop.idle


def test_what_cannot_be_served_is_refused_before_it_waits(model):
    loop = Scheduler(model)
    with pytest.raises(ValueError, match="multiples of"):
        loop.submit(ImageRequest(prompt("x"), 0, (17, 16), model.settings))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        TextRequest(prompt("x"), 0)
    with pytest.raises(ValueError, match="top_p in"):
        TextRequest(prompt("x"), 1, top_p=0.0)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Scheduler(model, slots=0)
    assert loop.idle


@pytest.mark.parametrize("broken", ["step", "finish", "extend", "next_token"])
def test_an_error_names_whose_work_it_was_and_costs_nobody_else_a_bit(model, monkeypatch, broken):
    """Whatever fails, whenever: what the others are told is what they are told without it."""
    few = replace(model.settings, **tiny.having(model, num_inference_steps=2))
    mine = [TextRequest(prompt("hello"), 4, temperature=1.0), TextRequest(prompt("a hat"), 5, temperature=1.0, seed=1)]
    mine += [ImageRequest(prompt("a star"), 0, None, few), ImageRequest(prompt("a hat"), 1, (16, 16), few)]
    whole = Scheduler(model)
    expected = run(whole, [whole.submit(r) for r in mine])
    home = scheduler if broken == "next_token" else type(model)
    works, calls = getattr(home, broken), 0

    def fails(*given, **how):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("a bad step")
        return works(*given, **how)

    monkeypatch.setattr(home, broken, fails)
    loop = Scheduler(model)
    jobs = [loop.submit(r) for r in mine]
    told: dict[int, list] = {id(j): [] for j in jobs}
    blamed: list = []
    while not loop.idle:
        try:
            loop.tick()
        except RuntimeError:
            blamed += loop.active
            for job in loop.active:
                loop.cancel(job)
        for job, event in loop.events:
            told[id(job)].append(_bits(event))
    assert blamed
    for job, all_of_it in zip(jobs, expected, strict=True):
        if job in blamed:
            assert told[id(job)] == all_of_it[: len(told[id(job)])] != all_of_it
        else:
            assert told[id(job)] == all_of_it
