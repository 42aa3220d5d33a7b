"""The task ladder: the target alone is supervised, what is drawn can be read back, every draw has an address."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import permutations

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.layout import Kind
from diptych.core.sample import Image, Sample, sample_from_json, sample_to_json
from diptych.data.tasks import degrade, ladder
from diptych.data.tasks.ladder import TASKS, Annotated
from diptych.data.worlds import embedded, shapes, shapes_sources
from diptych.evaluation.judges import segmentation
from diptych.parts.images import to_tensor
from tests.support.tiny import model, picture

WORLDS = ("shapes", "emoji")
NAMES = [f"{world}/sgt/{task}" for world in WORLDS for task in TASKS]
LABELS = [name for name, task in TASKS.items() if task.nearest]
MODEL = model("bagel")


def drawn(name: str, index: int = 0, size: int = 64, **how) -> tuple[Sample, PIL.Image.Image, PIL.Image.Image]:
    sample = embedded.source(name, size=size, **how)[index]
    shown, target = (image.pixels for image in sample.images())
    return sample, shown, target


def blobs(seed: int, n: int = 6, width: int = 40, height: int = 30, classes: int = 4) -> Annotated:
    """Random overlapping rectangles over a random photo, with everything known of them."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        (x, y), (w, h) = rng.integers(0, (width - 4, height - 4)), rng.integers(2, (width, height))
        mask[y : y + h, x : x + w] = True
    labels = tuple(rng.integers(0, classes, n).tolist())
    names = tuple("abcdefgh"[:classes])
    countable = tuple((rng.random(n) < 0.7).tolist())
    return Annotated(
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)),
        masks,
        labels,
        names,
        countable if any(countable) else (True,) * n,
        phrases=tuple(f"thing {i}" for i in range(n)),
        depth=rng.random((height, width)),
        view=PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)),
    )


# ---- the supervised picture is the target ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(index=st.integers(0, 2**30), size=st.sampled_from([32, 48, 64, 80, 150]))
def test_the_supervised_picture_is_the_target_and_the_source_is_only_understood(name, index, size):
    sample, shown, target = drawn(name, index, size)
    task = TASKS[name.split("/")[-1]]
    sequence = MODEL.lay_out(sample)
    kinds = [segment.kind for segment in sequence.segments]
    assert kinds == [Kind.VISION, Kind.TEXT, Kind.NOISED]
    vision, text, noised = sequence.segments
    assert [s.generated for s in sequence.segments] == [False, False, True] and not text.supervised
    side = MODEL.config.draw(*target.size)
    assert torch.equal(noised.image, to_tensor(target, side, nearest=task.nearest))
    assert torch.equal(vision.image, to_tensor(shown, MODEL.config.see(*shown.size)))
    if task.name != "reconstruct" and shown.tobytes() != target.tobytes():
        assert not torch.equal(noised.image, to_tensor(shown, side, nearest=task.nearest))


def test_all_tasks_have_their_level_and_their_direction():
    levels = {level: [t.name for t in TASKS.values() if t.level == level] for level in ("low", "mid", "high")}
    assert [len(names) for names in levels.values()] == [8, 2, 6]
    a = blobs(1)
    for task in TASKS.values():
        pair, photo = task.pair(a, np.random.default_rng(0)), a.image.tobytes()
        restored = task.level == "low" and task.name not in ("reconstruct", "edges")
        assert pair.input.size == pair.target.size == a.image.size
        if restored:
            assert pair.target.tobytes() == photo != pair.input.tobytes()
        else:
            assert pair.input.tobytes() == photo and (pair.target.tobytes() == photo) == (task.name == "reconstruct")


# ---- reading back ---------------------------------------------------------------------------------------------------


def expected(name: str, a: Annotated) -> np.ndarray:
    """The ids of a label task, by the rules of the table, pixel by pixel."""
    areas = a.masks.sum((1, 2))
    chosen = a.things if name == "instance" else range(len(a.masks))
    order = sorted(chosen, key=lambda i: (-areas[i], i))
    out = np.zeros(a.masks.shape[1:], int)
    for rank, i in enumerate(order):
        before = sum(a.labels[j] == a.labels[i] and j in a.things for j in order[:rank])
        out[a.masks[i]] = {
            "segment": rank % 20 + 1,
            "instance": rank + 1,
            "semantic": a.labels[i] + 1,
            "panoptic": a.labels[i] + 1 + (before * (len(a.classes) + 1) if i in a.things else 0),
        }[name]
    return out


@pytest.mark.parametrize("name", ["segment", "instance", "semantic", "panoptic"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), n=st.integers(1, 30), side=st.sampled_from([(40, 30), (96, 64), (17, 23), (80, 60)]))
def test_label_pictures_are_read_back_exactly_also_at_the_models_size(name, seed, n, side):
    a, task = blobs(seed, n), TASKS[name]
    pair = task.pair(a, np.random.default_rng(0))
    truth = expected(name, a)
    assert np.array_equal(task.decode(pair.target, pair.count), truth)
    resized = PIL.Image.fromarray(to_tensor(pair.target, side, nearest=True).permute(1, 2, 0).numpy())
    same = np.asarray(PIL.Image.fromarray(truth.astype(np.int32)).resize(side, PIL.Image.Resampling.NEAREST))
    assert np.array_equal(task.decode(resized, pair.count), same)
    assert segmentation.mean_iou(task.decode(resized, pair.count), same, name in segmentation.FREE) == 1.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_a_referred_region_and_a_depth_are_read_back(seed):
    a = blobs(seed)
    rng = ladder.generator(0, str(seed), "referring")
    pair = TASKS["referring"].pair(a, rng)
    assert np.array_equal(TASKS["referring"].decode(pair.target), a.masks[a.phrases.index(pair.phrase)])
    near = TASKS["depth"].decode(TASKS["depth"].pair(a, rng).target) / 255
    assert np.abs(1 - near - a.depth).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("world", WORLDS)
def test_boxes_are_read_back_and_are_those_of_the_masks(world):
    make = {"shapes": lambda rng: shapes_sources.annotated(shapes.random_scene(rng), 64)}
    for i in range(60):
        if world == "shapes":
            a = make[world](np.random.default_rng(i))
            pair = TASKS["detect"].pair(a, np.random.default_rng(0))
            assert np.array_equal(TASKS["detect"].decode(pair.target, photo=a.image), ladder.box_list(a))
            assert {tuple(b) for b in ladder.box_list(a)} == {tuple(b) for b in ladder.boxes_of(a.masks)}
        else:
            sample, _, target = drawn("emoji/sgt/detect", i)
            assert segmentation.score(sample, target) == {"recall": 1.0, "precision": 1.0}


def test_palettes_have_no_colour_twice_and_bits_are_far_apart():
    for name, count in (("tab20", 21), ("bits", 4096), ("binary", 2), ("inferno", 256), ("grey", 256), ("boxes", 24)):
        colours = ladder.palette(name, count).astype(int)
        assert colours.shape == (count, 3) and len(np.unique(colours, axis=0)) == count, name
    for count, least in ((8, 128), (64, 64), (512, 32)):
        bits = ladder.palette("bits", count).astype(int)
        far = np.abs(bits[:, None] - bits).max(-1) + 999 * np.eye(count, dtype=int)
        assert far.min() == least
    assert tuple(ladder.palette("tab20")[1]) == (31, 119, 180) and not ladder.palette("tab20")[0].any()


@pytest.mark.parametrize("name", LABELS)
def test_a_noisy_drawing_is_read_almost_as_well(name):
    sample, _, target = drawn(f"shapes/sgt/{name}", 5)
    pixels = np.asarray(target).astype(int) + np.random.default_rng(0).integers(-12, 13, (64, 64, 3))
    noisy = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    found = segmentation.score(sample, noisy)
    assert found.get("miou", found.get("quality", 1 - found.get("error", 0))) > 0.93


# ---- words ----------------------------------------------------------------------------------------------------------


def test_every_task_has_its_own_instructions():
    every = [text for task in TASKS.values() for text in task.instructions]
    assert all(len(task.instructions) >= 20 for task in TASKS.values())
    assert len({" ".join(text.lower().split()) for text in every}) == len(every) and all(t.strip() == t for t in every)
    for task in TASKS.values():
        assert all(("{phrase}" in text) == (task.name == "referring") for text in task.instructions)
        heads = [tuple(text.split()[:3]) for text in task.instructions]
        assert len(set(heads)) > 0.8 * len(heads), task.name


def test_phrases_single_out_one_thing():
    boxes = np.array([[0, 0, 10, 10], [30, 2, 40, 12], [60, 0, 70, 10], [0, 50, 10, 60]])
    names = ["red star", "red star", "red star", "cat"]
    assert ladder.phrases_of(names, boxes) == ("the leftmost red star", "", "the rightmost red star", "the cat")
    crowd = ladder.phrases_of(names, boxes, [True, False, True, True])
    assert crowd == ("", "", "", "the cat")
    stacked = np.array([[0, 0, 10, 10], [1, 40, 11, 50]])
    assert ladder.phrases_of(["a", "a"], stacked) == ("the topmost a", "the lowest a")
    assert ladder.phrases_of(["a", "a"], np.zeros((2, 4)) + [0, 0, 9, 9]) == ("", "")


@pytest.mark.parametrize("world", WORLDS)
def test_referring_names_its_target(world):
    for i in range(40):
        sample, _, target = drawn(f"{world}/sgt/referring", i)
        assert sample.info["phrase"] in sample.messages[0].parts[1].text and np.asarray(target).any()


# ---- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_its_index_alone(name):
    one, two = embedded.source(name, size=40), pickle.loads(pickle.dumps(embedded.source(name, size=40)))
    shuffled = {i: two[i] for i in (9, 2, 7)}
    for i, other in shuffled.items():
        assert one[i] == other and one[i].info == other.info and json.dumps(other.info)
        assert [p.pixels.tobytes() for p in one[i].images()] == [p.pixels.tobytes() for p in other.images()]
    assert embedded.source(name, size=40, seed=1)[2] != one[2]


def test_draws_belong_to_seed_sample_and_task():
    first = ladder.generator(0, "a/1", "denoise").random(4)
    assert np.array_equal(first, ladder.generator(0, "a/1", "denoise").random(4))
    for other in ((1, "a/1", "denoise"), (0, "a/2", "denoise"), (0, "a/1", "deblur"), (0, "a/1d", "enoise")):
        assert not np.array_equal(first, ladder.generator(*other).random(4))


@pytest.mark.parametrize("spoil", [t.make.keywords["spoil"] for t in TASKS.values() if hasattr(t.make, "keywords")])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**30), side=st.sampled_from([(8, 8), (9, 31), (64, 64), (400, 20), (1, 12)]))
def test_spoilt_photos_keep_shape_and_type(spoil, seed, side):
    photo = np.random.default_rng(seed).integers(0, 256, (*side, 3), np.uint8)
    one, two = (spoil(photo.copy(), np.random.default_rng(seed)) for _ in range(2))
    assert one.shape == photo.shape and one.dtype == np.uint8 and np.array_equal(one, two)


def test_edges_are_where_something_changes():
    photo = np.zeros((10, 12, 3), np.uint8)
    assert not degrade.edges(photo + 90).any()
    photo[:, 6:, 1] = 255
    found = degrade.edges(photo)
    assert (found[:, 5:7] == 255).all() and not found[:, :5].any() and not found[:, 7:].any()


def test_smearing_keeps_the_mean_and_draws_a_line():
    dot = np.zeros((21, 21, 1))
    dot[10, 10] = 1
    across, down = degrade.smear(dot, 5, 0), degrade.smear(dot, 5, 90)
    assert np.isclose(across.sum(), 1) and (across > 0).sum() == 5 and (across[10] > 0).sum() == 5
    assert (down[:, 10] > 0).sum() == 5


def test_drawn_depth_is_nearer_for_wider_things_and_the_right_view_moves_them_left():
    scene = shapes.Scene(
        (shapes.Thing("square", "red", 0.3, 0.3, 0.29), shapes.Thing("square", "blue", 0.7, 0.7, 0.24))
    )
    a = shapes_sources.annotated(scene, 64)
    near, far = (a.depth[mask][0] for mask in a.masks)
    assert 0 <= near < far < 1 and (a.depth[~a.masks.any(0)] == 1).all()
    before, after = (np.nonzero((np.asarray(i)[:32, ..., 1] < 120).any(0))[0].mean() for i in (a.image, a.view))
    assert 2 < before - after < 64 * ladder.BASELINE


# ---- what is refused ------------------------------------------------------------------------------------------------


def masks(*shape) -> np.ndarray:
    return np.ones(shape, bool)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"masks": masks(2, 32, 31)}, r"masks have shape \(2, 32, 31\); they must have \(2, 32, 32\)"),
        ({"masks": masks(2, 32, 32).astype(np.uint8)}, "masks are uint8; they must be bool"),
        ({"masks": ~masks(2, 32, 32)}, r"masks \[0, 1\] of 2 are empty"),
        ({"masks": masks(2, 32, 32), "labels": (0,), "classes": ("a",)}, "1 labels for 2 masks"),
        ({"masks": masks(1, 32, 32), "labels": (1,), "classes": ("a",)}, r"labels \[1\] are no index of the 1 classes"),
        ({"masks": masks(1, 32, 32), "phrases": ()}, "0 phrases for 1 masks"),
        ({"boxes": np.array([[3, 3, 3, 9]])}, r"boxes \[0\] of 1 have no area"),
        ({"depth": np.ones((32, 32)) * 2}, r"depth must lie in \[0, 1\]; it spans 2.0"),
        ({"depth": np.full((32, 32), np.nan)}, r"depth must lie in \[0, 1\]"),
        ({"view": PIL.Image.new("RGB", (9, 9))}, r"view is RGB \(9, 9\); it must be RGB \(32, 32\)"),
        ({"view": PIL.Image.new("L", (32, 32))}, "view is L"),
    ],
)
def test_annotations_that_do_not_fit(known, message):
    with pytest.raises(ValueError, match=message):
        Annotated(picture(0), **known)


def test_tasks_refuse_what_they_cannot_make():
    rng, bare = np.random.default_rng(0), Annotated(picture(0))
    for task in TASKS.values():
        if task.needs:
            with pytest.raises(ValueError, match=f"task '{task.name}' needs .*; the picture has none"):
                task.pair(bare, rng)
    stuff = Annotated(picture(0), masks(1, 32, 32), (0,), ("sky",), (False,))
    with pytest.raises(ValueError, match=r"task 'instance' needs things; the picture has \['masks', 'labels'\]"):
        TASKS["instance"].pair(stuff, rng)
    with pytest.raises(ValueError, match="needs masks; the picture has none"):
        TASKS["segment"].pair(Annotated(picture(0), np.zeros((0, 32, 32), bool)), rng)
    with pytest.raises(ValueError, match="task 'denoise' draws a photo; these can be read back: edges, depth, detect"):
        TASKS["denoise"].decode(picture(0))
    with pytest.raises(ValueError, match="count is 0; reading 'semantic' needs"):
        TASKS["semantic"].decode(picture(0))
    with pytest.raises(ValueError, match="needs the photo"):
        TASKS["detect"].decode(picture(0))
    with pytest.raises(ValueError, match="unknown task 'segmnt'; choose from reconstruct, denoise"):
        ladder.find("segmnt")


def test_nearest_travels_in_json():
    row = {
        "id": "a",
        "messages": [{"role": "assistant", "content": [{"type": "image", "image": "m.png", "nearest": True}]}],
    }
    sample = sample_from_json(row)
    assert next(sample.images()) == Image("m.png", "target", nearest=True)
    assert sample_from_json(sample_to_json(sample)) == sample
    row["messages"][0]["content"][0]["nearest"] = 1
    with pytest.raises(ValueError, match=r"content\[0\].nearest must be true or false, not 1"):
        sample_from_json(row)


# ---- scoring --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**30), n=st.integers(0, 5), m=st.integers(0, 5))
def test_assignment_is_the_best_of_all(seed, n, m):
    gain = np.random.default_rng(seed).integers(0, 10, (n, m)) / 10
    pairs = segmentation.assign(gain)
    assert len(pairs) == min(n, m) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
    g = gain if n <= m else gain.T
    best = max((sum(g[i, j] for i, j in enumerate(p)) for p in permutations(range(max(n, m)), min(n, m))), default=0)
    assert np.isclose(sum(gain[i, j] for i, j in pairs), best)


def test_overlap_by_class_and_by_matching():
    truth = np.repeat([[1, 1, 2, 2]], 4, 0)
    swapped = np.repeat([[2, 2, 1, 1]], 4, 0)
    assert segmentation.mean_iou(swapped, truth) == 0 and segmentation.mean_iou(swapped, truth, free=True) == 1
    split = truth.copy()
    split[:2, 2:] = 3
    assert segmentation.mean_iou(split, truth) == pytest.approx((1 + 0.5 + 0) / 3)
    assert segmentation.mean_iou(split, truth, free=True) == pytest.approx((1 + 0.5) / 3)
    assert segmentation.mean_iou(truth * 0, truth * 0) == segmentation.mean_iou(truth * 0, truth * 0, True) == 1
    assert segmentation.mean_iou(truth * 0, truth, True) == 0
    with pytest.raises(ValueError, match=r"the drawing is \(4, 3\), the truth \(4, 4\)"):
        segmentation.mean_iou(truth[:, :3], truth)


def test_boundaries_forgive_the_tolerance_and_no_more():
    truth = np.zeros((40, 40), int)
    truth[:, 20:] = 1
    for shift, tolerance, expected in ((0, 0, 1), (1, 1, 1), (2, 1, 0), (2, 2, 1), (3, 2, 0)):
        a, b = segmentation.boundaries(np.roll(truth, shift, 1)[:, 5:35]), segmentation.boundaries(truth[:, 5:35])
        assert segmentation.boundary_f(a, b, tolerance) == expected
    flat = np.zeros((40, 40), bool)
    assert (
        segmentation.boundary_f(flat, flat) == 1 and segmentation.boundary_f(flat, segmentation.boundaries(truth)) == 0
    )


def test_recall_and_panoptic_quality():
    assert segmentation.recall(np.array([[1.0, 0], [0, 0.7]])) == pytest.approx((10 + 5) / 20)
    assert segmentation.recall(np.zeros((0, 3))) == 1 and segmentation.recall(np.zeros((2, 0))) == 0
    truth = np.repeat([[1, 1, 2, 2, 0, 0]], 4, 0)
    assert segmentation.panoptic_quality(truth, truth, 4) == 1
    assert segmentation.panoptic_quality(np.where(truth == 2, 7, truth), truth, 4) == 1  # another one of class 2
    assert segmentation.panoptic_quality(np.where(truth == 2, 3, truth), truth, 4) == 0.5
    assert segmentation.box_iou(np.array([[0, 0, 4, 4]]), np.array([[2, 0, 6, 4], [9, 9, 10, 10]])).tolist() == [
        [1 / 3, 0]
    ]


@pytest.mark.parametrize("name", TASKS)
def test_the_target_scores_best_and_the_photo_worse(name):
    sample, shown, target = drawn(f"emoji/sgt/{name}", 3)
    best = segmentation.score(sample, target)
    assert all(v == {"psnr": 99.0, "error": 0.0}.get(k, 1.0) for k, v in best.items()), best
    if name != "reconstruct":
        other = segmentation.score(sample, shown)
        assert any(v != best[k] for k, v in other.items()), other
    assert segmentation.score(sample, target.resize((32, 32))).keys() == best.keys()
    with pytest.raises(ValueError, match="unknown task 'None'; choose from reconstruct"):
        segmentation.score(replace(sample, info={}), target)


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if "light" in task.papers])
def test_label_pictures_on_light_paper_say_the_same(name):
    dark, light = (embedded.source(f"shapes/{folder}/{name}", size=48) for folder in ("sgt", "sgt-light"))
    a, task, info = (
        shapes_sources.annotated(shapes.random_scene(np.random.default_rng(3)), 48),
        TASKS[name],
        light[0].info,
    )
    (_, on_dark), (_, on_light) = (
        list(Sample("", ladder.make(task, a, np.random.default_rng(0), paper)[0]).images()) for paper in task.papers
    )
    count = ladder.make(task, a, np.random.default_rng(0))[1]["count"]
    ids = task.decode(on_dark.pixels, count)
    assert np.array_equal(task.decode(on_light.pixels, count, paper="light"), ids)
    assert np.asarray(on_light.pixels).mean() > np.asarray(on_dark.pixels).mean() + 60, "light paper is dark"
    assert info["paper"] == "light" and "paper" not in dark[0].info
    for i in range(40):
        text = light[i].messages[0].parts[-1].text.replace(light[i].info.get("phrase", "-"), "")
        assert text.endswith(ladder.ON_LIGHT) and not set(text.split()) & {"dark"}
        assert "on black" not in text and "black everywhere" not in text and "rest black" not in text, text
    target = list(light[0].images())[-1].pixels
    parts = segmentation.score(light[0], target)
    assert parts.get("miou", parts.get("quality", 1.0)) == 1.0 and parts.get("error", 0.0) == 0.0


def test_a_task_without_labels_has_no_light_paper():
    a = shapes_sources.annotated(shapes.random_scene(np.random.default_rng(3)), 48)
    with pytest.raises(ValueError, match="paper is 'light'; task 'denoise' has dark"):
        ladder.make(TASKS["denoise"], a, np.random.default_rng(0), "light")
    assert "shapes/sgt-light/detect" not in embedded.names() and "shapes/sgt-light/segment" in embedded.names()
