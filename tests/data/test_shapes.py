"""The shapes world: its detector, its captions and answers, its edits, and what it holds out."""

import json
import re
from collections import Counter

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from diptych.data.worlds import embedded, shapes, shapes_judge, shapes_questions, shapes_sources
from diptych.data.worlds.shapes import Need, Prompt, Scene, Thing


def degrade(image, rng, blur=0.7, noise=8):
    pixels = np.asarray(image.filter(PIL.ImageFilter.GaussianBlur(blur)))
    return PIL.Image.fromarray((pixels + rng.normal(0, noise, pixels.shape)).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("tag", [*shapes.TAGS, "description"])
@pytest.mark.parametrize("size, n, worn", [(64, 500, False), (32, 200, False), (128, 15, False), (64, 60, True)])
def test_what_satisfies_a_prompt_passes_its_check(tag, size, n, worn):
    rng = np.random.default_rng(size + worn)
    n = n // 5 if tag == "description" else n
    passed = 0
    for _ in range(n):
        prompt = shapes.random_prompt(rng, tag)
        image = shapes.render(shapes.scene_for(rng, prompt), size)
        passed += shapes_judge.check(degrade(image, rng) if worn else image, prompt).ok
    assert passed >= 0.98 * n


def test_chance_is_low_and_known():
    rates = shapes_judge.chance(100)
    assert list(rates) == list(shapes.TAGS)
    assert max(rates.values()) < 0.35 and rates["color_attr"] < 0.05


THREE = Scene(
    (
        Thing("circle", "red", 0.2, 0.2, 0.27),
        Thing("star", "blue", 0.8, 0.2, 0.27),
        Thing("star", "blue", 0.8, 0.8, 0.27),
    )
)


@pytest.mark.parametrize(
    "needs, relation, ok",
    [
        ([Need("circle", "red"), Need("star", "blue", 2)], None, True),
        ([Need("star", None, 2), Need("circle", None)], None, True),
        ([Need("circle", "red"), Need("star", "blue")], None, False),  # one object too many
        ([Need("circle", "red"), Need("star", "blue", 3)], None, False),
        ([Need("circle", "red"), Need("star", "green", 2)], None, False),
        ([Need("circle", "blue"), Need("star", "red"), Need("star", "blue")], None, False),  # colours swapped
        ([Need("square", "red"), Need("star", "blue", 2)], None, False),
        ([Need("circle", "red"), Need("star", None, 2)], "left of", True),
        ([Need("circle", "red"), Need("star", None, 2)], "right of", False),
    ],
)
def test_check_is_strict(needs, relation, ok):
    verdict = shapes_judge.check(shapes.render(THREE, 64), Prompt("x", "x", tuple(needs), relation))
    assert verdict.ok == ok and bool(verdict.reason) != ok


def test_specks_are_ignored_and_real_extras_are_not():
    prompt = Prompt("colors", "a red circle", (Need("circle", "red"),))
    base = Scene((Thing("circle", "red", 0.3, 0.3, 0.27),))
    pixels = np.asarray(shapes.render(base, 64)).copy()
    pixels[50:53, 50:53] = (20, 20, 20)
    assert shapes_judge.check(PIL.Image.fromarray(pixels), prompt).ok
    small = Scene((*base.things, Thing("triangle", "green", 0.75, 0.75, 0.15)))
    assert not shapes_judge.check(shapes.render(small, 64), prompt).ok


@pytest.mark.parametrize("paint", [(128, 128, 128), (255, 140, 0), (120, 220, 255)])
def test_foreign_colours_are_unknown(paint):
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:38, 20:38] = paint
    assert [f.colour for f in shapes_judge.detect(PIL.Image.fromarray(pixels))] in (["unknown"], [])


def test_noise_and_blank_pictures_pass_nothing():
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    blank = PIL.Image.new("RGB", (64, 64), (255, 255, 255))
    for tag in shapes.TAGS:
        for prompt in shapes.prompts(tag, 5):
            assert not shapes_judge.check(noise, prompt).ok and not shapes_judge.check(blank, prompt).ok


def test_masks_are_the_ink_and_do_not_overlap():
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = shapes.random_scene(rng)
        masks, ink = shapes.masks(scene, 64), np.asarray(shapes.render(scene, 64))
        assert masks.shape == (len(scene.things), 64, 64) and masks.sum(0).max() == 1
        touched = shapes.coverage(scene, 64).max(0) > 0
        assert (ink[~touched] == 255).all() and (ink[touched] != 255).any(-1).all()
        for mask, thing in zip(masks, scene.things, strict=True):
            rows, columns = np.nonzero(mask)
            left, top, right, bottom = (64 * edge for edge in shapes.box(thing))
            assert abs(columns.min() - left) <= 1.5 and abs(columns.max() + 1 - right) <= 1.5
            assert abs(rows.max() + 1 - bottom) <= 1.5 and rows.min() >= top - 1.5


def test_held_out_pairs_never_meet_in_a_source():
    kinds = [(c, s) for c in shapes.COLOURS for s in shapes.SHAPES]
    pairs = [(a, b) for i, a in enumerate(kinds) for b in kinds[:i]]
    held = [pair for pair in pairs if shapes.held_out(*pair)]
    assert 0.07 < len(held) / len(pairs) < 0.13
    assert all(shapes.held_out(b, a) for a, b in held)
    rng, met = np.random.default_rng(2), Counter()
    for i in range(4000):
        if i % 4 == 0:
            scenes = [shapes.random_scene(rng)]
        elif i % 4 == 1:
            tag = (*shapes.TAGS, "description")[i // 4 % 7]
            scenes = [shapes.scene_for(rng, shapes.random_prompt(rng, tag))]
        elif i % 4 == 2:
            scenes = [shapes_questions.random_question(rng).scene]
        else:
            edit = shapes_sources.random_edit(rng)
            scenes = [edit.before, edit.after]
        for scene in scenes:
            here = sorted({t.kind for t in scene.things})
            met.update((a, b) for i, a in enumerate(here) for b in here[:i])
    assert not any(shapes.held_out(a, b) for a, b in met)
    assert len(met) == len(pairs) - len(held)  # and every other pair does meet


@pytest.mark.parametrize("tag", shapes.TAGS)
def test_prompts_are_distinct_and_repeatable(tag):
    drawn = shapes.prompts(tag, 20, seed=3)
    assert drawn == shapes.prompts(tag, 20, seed=3)
    assert len({p.text for p in drawn}) == min(20, {"single_object": 5, "counting": 15}.get(tag, 20))
    assert all(Prompt.from_json(json.loads(json.dumps(p.to_json()))) == p for p in drawn)


def test_held_out_prompts_name_held_out_pairs():
    for tag in ("position", "color_attr"):
        for prompt in shapes.prompts(tag, 50, held_out=True):
            (a, b) = ((need.colour, need.shape) for need in prompt.needs)
            assert shapes.held_out(a, b)
    with pytest.raises(ValueError, match="counting.*color_attr"):
        shapes.prompts("counting", 1, held_out=True)
    with pytest.raises(ValueError, match="colour.*single_object"):
        shapes.prompts("colour", 1)


def answer(question, things):
    """An answer worked out from the words of a question and the raw objects, by other code than the world's own."""
    words = question.removesuffix("?").split()

    def count(colour=None, shape=None):
        return sum(t["colour"] == (colour or t["colour"]) and t["shape"] == (shape or t["shape"]) for t in things)

    def related(a, relation, b):
        dx, dy = a["x"] - b["x"], a["y"] - b["y"]
        return {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation] > max(abs(dx), abs(dy)) * 0.999

    if words[:2] == ["how", "many"]:
        noun = words[2:-2]
        shape = next((s for s in shapes.SHAPES if noun[-1] in (s + "s", s + "es")), None)
        return shapes.NUMBERS[count(noun[0] if noun[0] in shapes.COLOURS else None, shape)]
    if words[:2] == ["what", "colour"]:
        return " ".join(t["colour"] for t in things if t["shape"] == words[-1])
    if words[:2] == ["what", "shape"]:
        return " ".join(t["shape"] for t in things if t["colour"] == words[-2])
    if words[:2] == ["is", "there"]:
        return "yes" if count(words[-2], words[-1]) else "no"
    by_shape = {t["shape"]: t for t in things}
    if words[0] == "what":
        return " ".join(t["shape"] for t in things if related(t, words[2], by_shape[words[-1]]))
    return "yes" if related(by_shape[words[2]], words[3], by_shape[words[-1]]) else "no"


def test_answers_agree_with_the_scene():
    source, answers = embedded.source("shapes/ask", size=16), {}
    for i in range(600):
        sample = source[i]
        question, said = sample.messages[0].parts[1].text, sample.messages[1].parts[0].text
        assert said == sample.info["answer"] == answer(question, sample.info["scene"]["things"]), question
        answers.setdefault(sample.info["type"], Counter())[said] += 1
    assert set(answers) == set(shapes_questions.QUESTIONS)
    for kind in ("exists", "position"):
        assert 0.4 < answers[kind]["yes"] / answers[kind].total() < 0.6


def test_blind_guessing_scores_little():
    report = shapes_questions.majority(100)
    assert max(r["accuracy"] for r in report.values()) < 0.6 and max(r["blind"] for r in report.values()) < 0.6
    assert report["count"]["accuracy"] < 0.35 and report["colour"]["accuracy"] < 0.3


def test_captions_name_exactly_the_objects():
    rng = np.random.default_rng(4)
    scenes = [shapes.random_scene(rng) for _ in range(300)]
    for scene, other in zip(scenes, scenes[1:], strict=False):
        text = shapes.describe(scene)
        assert shapes_judge.caption_ok(text, scene)
        if Counter(t.kind for t in other.things) != Counter(t.kind for t in scene.things):
            assert not shapes_judge.caption_ok(text, other)
    assert shapes_judge.caption_ok("Two blue stars, and a red circle.", THREE)
    assert not shapes_judge.caption_ok("a red circle and a blue star", THREE)
    assert not shapes_judge.caption_ok("a red circle, two blue stars and so on", THREE)


def test_edits_change_only_their_objects_and_their_scorer_sees_it():
    rng, kinds = np.random.default_rng(5), Counter()
    for _ in range(60):
        edit = shapes_sources.random_edit(rng)
        assert shapes_sources.Edit.from_json(json.loads(json.dumps(edit.to_json()))) == edit
        kinds[edit.type] += 1
        before, after = (shapes.render(scene, 64) for scene in (edit.before, edit.after))
        changed = tuple(set(edit.before.things) ^ set(edit.after.things))
        region = shapes.coverage(Scene(changed), 64).max(0) > 0
        differs = (np.asarray(before) != np.asarray(after)).any(-1)
        assert differs.any() and not (differs & ~region).any()
        good = shapes_judge.check_edit(degrade(after, rng), edit.before, edit.after, edit.side)
        copied = shapes_judge.check_edit(before, edit.before, edit.after, edit.side)
        assert good.ok and good.difference < 20, (edit.text, good)
        assert not copied.done and copied.kept and copied.difference == 0
        exact = shapes_judge.check_edit(after, edit.before, edit.after, edit.side)
        assert exact.ok and exact.difference == 0
        if len(edit.after.things) > 1 and edit.after.things[-1] in edit.before.things:
            lost = shapes_judge.check_edit(
                shapes.render(Scene(edit.after.things[:-1]), 64), edit.before, edit.after, edit.side
            )
            assert not lost.kept
    assert set(kinds) == set(shapes_sources.EDITS)


def test_samples_are_pure_functions_of_the_index_and_splits_differ():
    for name in shapes_sources.SOURCES:
        one, two = (embedded.source(name, seed=7) for _ in range(2))
        test = embedded.source(name, split="test", seed=7)
        for i in (5, 0, 5, 2**39):
            a, b = one[i], two[i]
            assert a == b and a.info == b.info and json.dumps(a.info)
            assert [p.pixels.tobytes() for p in a.images()] == [p.pixels.tobytes() for p in b.images()]
        assert not {one[i].id for i in range(10)} & {test[i].id for i in range(10)}
        if name == "shapes/read":  # words alone
            continue
        seen, fresh = ({next(s[i].images()).pixels.tobytes() for i in range(40)} for s in (one, test))
        assert len(seen) == 40 and not seen & fresh


def test_drawings_satisfy_their_captions():
    source = embedded.source("shapes/draw")
    for i in range(150):
        sample = source[i]
        (target,) = sample.images()
        prompt = Prompt.from_json(sample.info["prompt"])
        assert target.role == "target" and prompt.text in sample.messages[0].parts[0].text
        assert shapes_judge.check(target.pixels, prompt).ok


def test_prompts_to_tune_with_and_to_train_from_rewards_with_are_none_that_are_scored():
    scored = {p.text for tag in shapes.TAGS for p in shapes.prompts(tag, shapes.EVALUATED)}
    dev = {p.text for tag in shapes.TAGS for p in shapes.dev_prompts(tag, shapes.EVALUATED)}
    assert not scored & dev and len(dev) == len(shapes.TAGS) * shapes.EVALUATED
    source, tags = embedded.source("shapes/reward"), Counter()
    for i in range(400):
        sample = source[i]
        tags[sample.info["type"]] += 1
        assert sample.prompt not in shapes.evaluated_texts()
        kinds = [(need["colour"], need["shape"]) for need in sample.info["prompt"]["needs"]]
        assert shapes.seen(kinds)
    assert set(tags) == {"counting", "color_attr", "position", "description"}
    assert {embedded.source("shapes/dev")[i].prompt for i in range(200)} <= dev
    with pytest.raises(ValueError, match="tag 'single_object' has 25 texts beyond the first 24, not 26"):
        shapes.dev_prompts("single_object", 26)


def test_a_drawing_shows_everything_where_its_words_say():
    source, places = embedded.source("shapes/draw-where"), Counter()
    ends = {"top": (1, 0), "bottom": (1, 2), "left": (0, 0), "right": (0, 2)}  # axis, third
    for i in range(150):
        sample = source[i]
        (target,) = sample.images()
        left = [(f.kind, (int(f.x * 3), int(f.y * 3))) for f in shapes_judge.detect(target.pixels)]
        for text in sorted(re.split(", | and ", sample.messages[0].parts[0].text), key=len, reverse=True):  # vague last
            colour, shape, place = re.fullmatch(r"a (\w+) (\w+)(?: (?:at|on) the (.+))?", text).groups()
            words = (place or "").split()
            asked = [ends.get(w, (k == 0, 1)) for k, w in enumerate(words)]  # a "middle" is a row, then a column
            match = next(f for f in left if f[0] == (colour, shape) and all(f[1][axis] == at for axis, at in asked))
            left.remove(match)
            places[len(words)] += 1
        assert not left and shapes_judge.check(target.pixels, Prompt.from_json(sample.info["prompt"])).ok
    assert set(places) == {0, 1, 2} and places[2] > places[1] > 20 and places[0] > 20


def test_questions_about_words_are_answered_by_the_words():
    source, answers = embedded.source("shapes/read"), Counter()
    for i in range(600):
        sample = source[i]
        (told, asked), info = sample.messages[0].parts[0].text.split(". "), sample.info
        prompt, answer = Prompt.from_json(info["prompt"]), sample.messages[1].parts[0].text
        assert told == prompt.text and answer == info["answer"] and not list(sample.images())
        answers[info["type"], answer if answer in ("yes", "no") else ""] += 1
        words, needs = asked.rstrip("?").split(), prompt.needs
        if info["type"] == "colour":
            assert f"{answer} {words[-1]}" in told
        elif info["type"] == "shape":
            assert f"{words[-2]} {answer}" in told
        elif info["type"] == "count":
            number = sum(n.count for n in needs if shapes.plural(n.shape) == words[2])
            assert answer == shapes.NUMBERS[number]
        elif info["type"] == "exists":
            assert (answer == "yes") == any((n.colour, n.shape) == tuple(words[-2:]) for n in needs)
        else:
            places = zip(needs, SPOTS[prompt.relation], strict=True)
            things = {n.shape: Thing(n.shape, n.colour or "red", *at, 0.25) for n, at in places}
            relation = next(r for r in shapes.RELATIONS if f" {r} the" in asked)
            subject = words[2] if info["type"] == "position" else answer
            holds = relation in shapes.relations(things[subject], things[words[-1]])
            assert holds == (answer != "no")
    kinds = {kind for kind, _ in answers}
    assert kinds == set(shapes_questions.QUESTIONS)
    assert all(0.4 < answers[k, "yes"] / (answers[k, "yes"] + answers[k, "no"]) < 0.8 for k in ("exists", "position"))


SPOTS = {  # centres of two things in a relation
    "left of": ((0.2, 0.5), (0.8, 0.5)),
    "right of": ((0.8, 0.5), (0.2, 0.5)),
    "above": ((0.5, 0.2), (0.5, 0.8)),
    "below": ((0.5, 0.8), (0.5, 0.2)),
}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="shapes/drow.*shapes/draw.*stamps/ask"):
        embedded.source("shapes/drow")
    with pytest.raises(ValueError, match="split is 'dev'"):
        embedded.source("shapes/draw", split="dev")
    with pytest.raises(IndexError):
        embedded.source("shapes/draw")[-1]
