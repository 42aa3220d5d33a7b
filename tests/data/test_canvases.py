"""Grounds, canvases, emoji by name, and conversations: judges read true pictures of every canvas, answers are true."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from diptych.core.sample import Image
from diptych.data.worlds import (
    canvas_sources,
    embedded,
    emoji,
    emoji_scenes,
    grounds,
    shapes,
    shapes_judge,
    shapes_sources,
    talk_sources,
)
from diptych.data.worlds.grounds import Ground

NAMES = (*canvas_sources.SOURCES, *talk_sources.SOURCES)


def _ground(info) -> Ground:
    return Ground.from_json(json.loads(json.dumps(info))["ground"])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_pure_functions_of_the_index(name):
    one, two = (embedded.source(name, seed=1) for _ in range(2))
    for i in (3, 0, 3, 2**39):
        a, b = one[i], two[i]
        assert a == b and a.info == b.info and json.dumps(a.info)
        assert [p.pixels.tobytes() for p in a.images()] == [p.pixels.tobytes() for p in b.images()]
        for picture in a.images():
            width, height = picture.pixels.size
            assert {width % 16, height % 16} == {0} and 32 <= min(width, height) <= max(width, height) <= 128
            assert max(width, height) <= 2 * min(width, height) and picture.pixels.mode == "RGB"


def test_a_ground_is_its_paper_and_noise():
    for kind in ("plain", "gradient", "checkers", "noise"):
        for ground in grounds.every(kind):
            pixels, _ = ground.canvas(np.random.default_rng(0), (80, 64))
            off = pixels[..., :3].astype(float) - ground.paper((80, 64))
            assert pixels.shape == (64, 80, 4) and Ground.from_json(ground.to_json()) == ground
            assert np.abs(off).mean() < grounds.NOISE if kind == "noise" else not off.any()
    with pytest.raises(ValueError, match="read-only"):
        grounds.WHITE.paper((64, 64))[:] = 0


def test_held_out_canvases_are_in_the_test_split_alone():
    for name in ("canvas/draw", "things/scenes"):
        train, test = (embedded.source(name, split) for split in ("train", "test"))
        assert not any(train[i].info["held_out"] for i in range(300))
        assert any(test[i].info["held_out"] for i in range(300))


def test_the_judge_reads_true_pictures_of_every_canvas():
    drawn, edits, right, copied = embedded.source("canvas/draw", "test"), embedded.source("canvas/edit"), 0, 0
    for i in range(250):
        info = drawn[i].info
        prompt, image = shapes.Prompt.from_json(info["prompt"]), next(drawn[i].images()).pixels
        right += shapes_judge.check(image, prompt, _ground(info)).ok
        other = shapes.Prompt.from_json(drawn[i + 1].info["prompt"])
        copied += shapes_judge.check(image, other, _ground(info)).ok
    assert right >= 248 and copied < 60
    for i in range(60):
        edit, (before, after) = shapes_sources.Edit.from_json(edits[i].info), edits[i].images()
        how = edit.before, edit.after, edit.side, _ground(edits[i].info)
        verdict = shapes_judge.check_edit(after.pixels, *how)
        assert verdict.ok, verdict
        assert not shapes_judge.check_edit(before.pixels, *how).ok
        assert verdict.difference < grounds.NOISE


def test_emoji_have_their_names_and_keywords():
    words = dict(canvas_sources.keywords("train"))
    assert words["dog"].id == "dog-face" and words["red apple"].id == "red-apple"
    assert all(emoji.split_of(e) == "train" for e in words.values())
    assert {e.id for e in words.values()} == {e.id for e in emoji.concepts("train")}, "a concept without a word"
    source = embedded.source("things/draw")
    for i in range(100):
        info = source[i].info
        (id,) = info["ids"]
        e, text = emoji.find(id), info["text"]
        assert any(word in text for word in (*e.tags, e.labels["en"], emoji.NOUNS.get(id, "?"))), info


def test_scenes_say_what_they_show():
    source, sizes = embedded.source("things/scenes"), Counter()
    for i in range(200):
        info = source[i].info
        sizes[len(info["ids"])] += 1
        (w, h), boxes = info["size"], []
        for _, left, top, side in info["things"]:
            x, y, s = left * w, top * h, side * min(w, h)
            assert -0.01 <= x <= w - s + 0.01 and -0.01 <= y <= h - s + 0.01, info
            assert all(
                x + s <= a + 0.05 or a + c <= x + 0.05 or y + s <= b + 0.05 or b + c <= y + 0.05 for a, b, c in boxes
            )
            boxes.append((x, y, s))
        if info["type"] == "position":
            (x0, y0, _), (x1, y1, _) = boxes
            word = next(r for r in emoji_scenes.RELATIONS if f" {r} " in info["text"])
            offset = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}[word]
            assert offset > 0.3 * min(w, h) * 0.5, info
        else:
            assert info["text"] == emoji_scenes.listing(info["ids"])
    assert set(sizes) == {1, 2, 3, 4, 5, 6}


def test_scene_answers_agree_with_the_scene():
    source, kinds = embedded.source("things/ask"), Counter()
    for i in range(300):
        sample = source[i]
        said, info = sample.info["answer"], sample.info
        question = sample.messages[0].parts[1].text
        nouns = [emoji.NOUNS[id] for id, *_ in info["things"]]
        kinds[info["type"], said if info["type"] == "exists" else ""] += 1
        if info["type"] == "count":
            noun = next(n for n in emoji.NOUNS.values() if question == f"how many {emoji_scenes.plural(n)} are there?")
            assert said == shapes.NUMBERS[nouns.count(noun)]
        elif info["type"] == "exists":
            noun = next(n for n in emoji.NOUNS.values() if question == f"is there {emoji_scenes.article(n)}?")
            assert (said == "yes") == (noun in nouns)
        elif info["type"] == "caption":
            assert Counter(said.replace(" and ", ", ").split(", ")) == Counter(map(emoji_scenes.article, nouns))
    assert {kind for kind, _ in kinds} == set(canvas_sources.QUESTIONS)
    assert 0.3 < kinds["exists", "yes"] / (kinds["exists", "yes"] + kinds["exists", "no"]) < 0.7


def test_turns_are_answered_by_the_picture_that_stands_last():
    source, forms = embedded.source("talk/turns"), Counter()
    for i in range(200):
        sample = source[i]
        info = sample.info
        forms[info["type"]] += 1
        scene = shapes.Scene.from_json(info["scene"])
        last = [p for p in sample.images()][-1].pixels
        found = Counter(f.kind for f in shapes_judge.detect(last, _ground(info)))
        assert found == Counter(t.kind for t in scene.things), info
        assert all((m.role == "user") == (n % 2 == 0) for n, m in enumerate(sample.messages))
        question, answer = sample.messages[-2].parts[-1], sample.messages[-1].parts[-1]
        if isinstance(answer, Image):
            continue
        if question.text.startswith("how many objects"):
            assert answer.text == shapes.NUMBERS[len(scene.things)]
        elif question.text.startswith("what colour"):
            noun = question.text.split()[-1].removesuffix("?")
            assert [t.colour for t in scene.things if t.shape == noun] == [answer.text]
    assert set(forms) == set(talk_sources.FORMS)


def test_options_hold_the_answer_once_and_at_every_letter():
    source, letters = embedded.source("talk/options"), Counter()
    for i in range(200):
        info = source[i].info
        assert info["answer"] == f"({info['letter']}) {info['options'][info['letter']]}"
        assert len(set(info["options"].values())) == len(info["options"]) >= 2
        letters[info["letter"]] += 1
    assert max(letters.values()) < 0.55 * 200 and set(letters) == set("ABCD")


def test_words_to_read_and_help():
    train, test = talk_sources.printable("train"), talk_sources.printable("test")
    assert not set(train) & set(test) and len(test) > 200 and {len(w) for w in train} == {3, 4, 5, 6}
    pairs = dict(talk_sources.help_pairs())
    assert len(pairs) == len(talk_sources.help_pairs()) > 200, "a question with two answers"
    assert pairs["hello"].startswith("Hello!") and pairs["what is a circle?"] == "A round shape."
