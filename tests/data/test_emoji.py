"""Emoji: the bundle, its split, exact parts and recolourings, and composed scenes."""

import json
from collections import Counter

import numpy as np
import pytest

from diptych.data.worlds import embedded, emoji, emoji_scenes

NAMES = [name for name in embedded.names() if name.startswith("emoji")]


def test_the_bundle_is_whole():
    records = emoji.records()
    assert len(records) == 1594 == len({e.id for e in records})
    assert all(set(e.labels) == set(emoji.LANGUAGES) and all(e.labels.values()) for e in records)
    assert len(emoji.ICONIC) == 64 == len(set(emoji.ICONIC))
    apple = emoji.find("red-apple")
    assert apple.labels["de"] == "roter Apfel" and emoji.kind(apple) == "food"
    with pytest.raises(ValueError, match="unknown emoji 'blue-apple'; similar: .*red-apple"):
        emoji.find("blue-apple")


def test_every_emoji_shows_something():
    for e in emoji.records():
        assert np.asarray(emoji.render(e, 16)).min() < 250, e.id


def test_split_is_by_concept_and_keeps_the_iconic_in_training():
    train, test = ({e.id for e in emoji.concepts(split)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 1594
    assert 0.03 < len(test) / 1594 < 0.07 and set(emoji.ICONIC) <= train
    source = embedded.source("emoji/draw", split="test", size=16)
    assert all(source[i].info["emoji"] in test for i in range(100))
    assert emoji.concepts("train", 64) == emoji.concepts("test", 64)
    with pytest.raises(ValueError, match="limit is 65"):
        emoji.concepts("train", 65)


def test_backgrounds_and_cutouts_compose_exactly():
    e = emoji.find("red-apple")
    cut = np.asarray(emoji.cutout(e, 48)).astype(float)
    alpha = cut[..., 3:] / 255
    for background in ((255, 255, 255), (0, 0, 0), (10, 200, 90)):
        composed = cut[..., :3] * alpha + np.array(background) * (1 - alpha)
        assert np.abs(composed - np.asarray(emoji.render(e, 48, background))).max() <= 3


def test_parts_are_disjoint_and_show_their_own_colour():
    for id in ("red-apple", "automobile", "house", "sunflower", "frog", "penguin"):
        e = emoji.find(id)
        pixels, parts = np.asarray(emoji.render(e, 96)).astype(int), emoji.part_masks(e, 96)
        assert len(parts) >= 2 and sum(p.mask.astype(int) for p in parts).max() <= 1
        for part in parts:
            off = np.abs(pixels[part.mask] - part.fill).max(1)
            assert np.median(off) <= 8
    assert [p.colour for p in emoji.part_masks(emoji.find("red-apple"), 64)].count("red") == 1


def test_recolouring_changes_only_what_the_colour_touches():
    source = embedded.source("emoji/edit")
    for i in range(120):
        sample = source[i]
        before, after = (np.asarray(image.pixels) for image in sample.images())
        e, colour = emoji.find(sample.info["emoji"]), sample.info["colour"]
        differs = (before != after).any(-1)
        assert differs.any() and not (differs & ~emoji.touched(e, colour, 64)).any(), sample.info
        mask = emoji.colour_mask(e, colour, 64)
        assert differs[mask].mean() > 0.9
    assert {image.role for image in sample.images()} == {"condition", "target"}
    with pytest.raises(ValueError, match="has no blue part; it has red"):
        emoji.recolour(emoji.find("red-apple"), "blue", "red")
    with pytest.raises(ValueError, match="unknown colour 'mauve'.*red"):
        emoji.recolour(emoji.find("red-apple"), "red", "mauve")


def test_part_targets_are_the_masks():
    sample = embedded.source("emoji/parts")[3]
    _, target = sample.images()
    mask = emoji.colour_mask(emoji.find(sample.info["emoji"]), sample.info["colour"], 64)
    assert (np.asarray(target.pixels) == mask[..., None] * 255).all()


def test_answers_agree_with_the_emoji():
    source, answers = embedded.source("emoji64/ask", size=16), {}
    for i in range(600):
        sample = source[i]
        e, question = emoji.find(sample.info["emoji"]), sample.messages[0].parts[1].text
        said = sample.messages[1].parts[0].text
        answers.setdefault(sample.info["type"], Counter())[said] += 1
        if sample.info["type"] == "kind":
            assert said == emoji.kind(e)
        elif sample.info["type"] == "name":
            assert (said == "yes") == question.endswith(f" {e.labels['en']}?")
        else:
            offered = question.removeprefix("which word fits, ").removesuffix("?").split(" or ")
            assert said in e.tags and [word in e.tags for word in offered].count(True) == 1
    assert 0.4 < answers["name"]["yes"] / answers["name"].total() < 0.6
    assert answers["kind"].most_common(1)[0][1] < 0.3 * answers["kind"].total()


def test_scene_masks_are_the_ink():
    source = embedded.source("emoji/scenes")
    for i in range(30):
        sample = source[i]
        scene = emoji_scenes.scene_from_json(json.loads(json.dumps(sample.info))["scene"])
        (target,) = sample.images()
        masks = emoji_scenes.scene_masks(scene, 64)
        assert len(masks) == len(scene) and masks.sum(0).max() == 1 and masks.any((1, 2)).all()
        assert (np.asarray(emoji_scenes.render_scene(scene, 64)) == np.asarray(target.pixels)).all()
        ink = (np.asarray(target.pixels) < 250).any(-1)
        assert (ink & ~masks.any(0)).sum() < 0.5 * ink.sum() and (ink & masks.any(0)).sum() > 0.5 * masks.sum()


def test_scene_answers_agree_with_the_scene():
    source, answers = embedded.source("emoji/scenes-ask", size=16), {}
    for i in range(500):
        sample = source[i]
        scene = emoji_scenes.scene_from_json(sample.info["scene"])
        question, said = sample.messages[0].parts[1].text.removesuffix("?"), sample.messages[1].parts[0].text
        answers.setdefault(sample.info["type"], Counter())[said] += 1
        nouns = [emoji.NOUNS[t.emoji] for t in scene]
        last = question.split()[-1]
        if sample.info["type"] == "count":
            stem = question.split()[2]
            n = sum(stem.startswith(noun[:-1]) and len(stem) - len(noun) in (1, 2) for noun in nouns)
            assert said == emoji_scenes.NUMBERS[n], (question, nouns)
        elif sample.info["type"] == "exists":
            assert said == ("yes" if last in nouns else "no")
        else:
            a = said if sample.info["type"] == "which" else question.split()[2]
            a, b = (scene[nouns.index(noun)] for noun in (a, last))
            dx, dy = a.left - b.left, a.top - b.top
            word = next(w for w in ("left", "right", "above", "below") if f" {w} " in question)
            true = {"left": -dx, "right": dx, "above": -dy, "below": dy}[word] > 0.25
            assert true == (said != "no")
    assert set(answers) == {"count", "exists", "position", "which"}
    assert 0.35 < answers["exists"]["yes"] / answers["exists"].total() < 0.65


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_pure_functions_of_the_index(name):
    one, two = (embedded.source(name, size=32, seed=1) for _ in range(2))
    for i in (3, 0, 3, 2**39):
        a, b = one[i], two[i]
        assert a == b and a.info == b.info and json.dumps(a.info)
        assert [p.pixels.tobytes() for p in a.images()] == [p.pixels.tobytes() for p in b.images()]
        assert all(p.pixels.size == (32, 32) and p.pixels.mode == "RGB" for p in a.images())
    for split in ("train", "test"):
        source = embedded.source(name, split=split, size=16)
        assert len({source[i].id for i in range(20)}) == 20
