"""Stamps: preparing a tiny tree, exact masks, the split, and the words when nothing has been prepared."""

import json

import numpy as np
import PIL.Image
import pytest

from diptych.data.tasks import ladder
from diptych.data.worlds import embedded, stamps

NOUNS = ("frog", "red apple", "owl", "brown hen", "saw", "trumpet", "lion", "zebra", "goat", "key", "fox", "onion")


def cutout(path, seed, width=90, height=60):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
    y, x = np.mgrid[:height, :width]
    pixels[..., 3] = 255 * (((x - width / 2) / (width / 2 - 5)) ** 2 + ((y - height / 2) / (height / 2 - 5)) ** 2 < 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    base = tree / "usr" / "share" / "tuxpaint"
    for i, noun in enumerate(NOUNS):
        path = base / "stamps" / ("food" if noun in ("red apple", "onion") else "animals") / f"{i}.png"
        cutout(path, i)
        path.with_suffix(".txt").write_text(f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}.\nes.utf8=Algo.\n")
    cutout(base / "stamps" / "food" / "rude.png", 50)
    (base / "stamps" / "food" / "rude.txt").write_text("Eat your broccoli!\n")
    PIL.Image.new("RGBA", (40, 40), (255, 0, 0, 255)).save(base / "stamps" / "food" / "flat.png")
    (base / "stamps" / "food" / "flat.txt").write_text("A flat thing.\n")
    (base / "templates").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    PIL.Image.fromarray(noise).save(base / "templates" / "mossy_bark.jpg")
    counts = stamps.prepare(out, tree)
    assert (counts["stamps"], counts["captions"], counts["backgrounds"]) == (12, 12, 1)
    assert counts["skipped: caption is not a name"] == 1 and counts["skipped: not a photographic cut-out"] == 1
    return out


@pytest.mark.parametrize(
    "caption, noun",
    [
        ("A frog.", "frog"),
        ("An hippopotamus.", "hippopotamus"),
        ("A peacock (a male peafowl).", "peacock"),
        ("A “Sierra Beauty” apple.", "sierra beauty apple"),
        ("A ginger 'root'.", "ginger root"),
        ("A Seville orange, also called a bitter orange.", "seville orange"),
        ("A plumber’s wrench.", "plumber's wrench"),
        ("Eat your broccoli!", None),
        ("A dumper. It carries its load in the front.", None),
        ("A very poisonous lionfish!", None),
        ("Two wild boars.", None),
        ("A stethoscope lets your doctor listen to your heart and lungs.", None),
    ],
)
def test_captions_are_cleaned(caption, noun):
    assert stamps.noun_of(caption) == noun


def test_masks_are_where_the_stamps_are(root):
    loaded, rng = stamps.load(root), np.random.default_rng(0)
    for _ in range(20):
        scene = stamps.random_scene(rng, loaded, "train")
        assert stamps.StampScene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
        masks = stamps.masks(scene, loaded, 64)
        assert masks.shape == (len(scene.things), 64, 64) and masks.sum(0).max() == 1
        for mask, (left, top, right, bottom) in zip(masks, stamps.boxes(scene, 64), strict=True):
            inside = np.zeros_like(mask)
            inside[top:bottom, left:right] = True
            assert mask.any() and not (mask & ~inside).any()
        empty = stamps.StampScene(scene.background, scene.crop, ())
        with_, without = (np.asarray(stamps.render(s, loaded, 64)) for s in (scene, empty))
        differs = (with_ != without).any(-1)
        assert differs[masks.any(0)].mean() > 0.95 and (differs & ~masks.any(0)).sum() < 0.5 * masks.sum()


def test_split_holds_out_whole_captions(root):
    loaded = stamps.load(root)
    train, test = ({s.noun for s in loaded.stamps if stamps.split_of(s) == split} for split in ("train", "test"))
    assert not train & test and train | test == set(NOUNS)
    source = embedded.source("stamps/scenes", root=root)
    assert all(t["noun"] in train for i in range(30) for t in source[i].info["scene"]["things"])


@pytest.mark.parametrize("name", stamps.SOURCES)
def test_samples_are_pure_and_answers_are_right(root, name):
    one, two = (embedded.source(name, size=48, root=root) for _ in range(2))
    for i in (4, 0, 4, *range(40)):
        a, b = one[i], two[i]
        assert a == b and a.info == b.info and json.dumps(a.info)
        assert [p.pixels.tobytes() for p in a.images()] == [p.pixels.tobytes() for p in b.images()]
        nouns = {t["noun"] for t in a.info["scene"]["things"]}
        if a.info["type"] == "exists":
            asked = a.messages[0].parts[1].text.removesuffix("?").split(" ", 3)[3]
            assert a.info["answer"] == ("yes" if asked in nouns else "no")
        elif a.info["type"] == "name":
            assert {a.info["answer"]} == nouns


def test_unprepared_stamps_name_the_command(tmp_path):
    with pytest.raises(ValueError, match="diptych data prepare stamps"):
        embedded.source("stamps/draw", root=tmp_path)
    with pytest.raises(ValueError, match="no folder 'stamps'"):
        stamps.prepare(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("task", ["segment", "referring", "semantic", "detect", "denoise"])
def test_stamps_are_pictures_of_sgt_tasks(root, task):
    sample = embedded.source(f"stamps/sgt/{task}", "train", 64, root=root)[3]
    shown, target = sample.images()
    assert (shown.role, target.role, target.nearest) == ("understand", "target", ladder.TASKS[task].nearest)
    assert shown.pixels.size == target.pixels.size == (64, 64) and sample.info["type"] == task
    if task == "referring":
        drawn = ladder.TASKS[task].decode(target.pixels)
        assert 0 < drawn.mean() < 1 and sample.info["phrase"] in sample.messages[0].parts[-1].text
    with pytest.raises(ValueError, match="unknown source 'stamps/sgt/depth'"):
        embedded.source("stamps/sgt/depth", root=root)


def test_a_folder_of_others_is_not_written_to(tmp_path):
    (tmp_path / "index.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="holds index.json, which is not of a folder of stamps"):
        stamps.prepare(tmp_path, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["index.json"]
