"""Annotations in the formats they are published in: tiny files made here, read through a catalog, wrong ones named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.data.catalog import load_catalog
from diptych.data.check import check
from diptych.data.decoding import open_labels
from diptych.data.tasks import annotations, ladder
from diptych.data.tasks.annotations import rle_compress, rle_decode, rle_encode, rle_expand, shrunk
from diptych.data.tasks.ladder import TASKS, Annotated
from diptych.evaluation.judges.segmentation import score

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
COCO = "format: coco, path: coco/instances.json, images: coco/images"
PANOPTIC = "format: coco-panoptic, path: coco/panoptic.json, images: coco/images, masks: coco/panoptic"
STUFF = "format: images, path: coco/images, labels: coco/stuff, classes: coco/labels.txt"
MINE = "format: images, path: mine/photos"
SAM = "format: sa1b, path: sa1b, read: sgt/segment"
H, W = 24, 32
PHOTO = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)


def box(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[y : y + h, x : x + w] = True
    return mask


PERSON, DOG, CROWD = box(2, 3, 8, 16), box(14, 10, 10, 8), box(26, 0, 6, 24)


def rle(mask: np.ndarray, compressed: bool = True) -> dict:
    counts = rle_encode(mask)
    return {"size": [H, W], "counts": rle_compress(counts) if compressed else counts}


def instances() -> dict:
    """COCO's instances json: a polygon, a compressed run length and a crowd; picture 9 has no annotation."""
    corners = [2, 3, 10, 3, 10, 19, 2, 19]
    return {
        "info": {"year": 2017},
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": H, "width": W} for i in (7, 9)],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 1,
                "iscrowd": 0,
                "area": 128,
                "bbox": [2, 3, 8, 16],
                "segmentation": [corners],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 18,
                "iscrowd": 0,
                "area": 80,
                "bbox": [14, 10, 10, 8],
                "segmentation": rle(DOG),
            },
            {
                "id": 3,
                "image_id": 7,
                "category_id": 1,
                "iscrowd": 1,
                "area": 144,
                "bbox": [26, 0, 6, 24],
                "segmentation": rle(CROWD, False),
            },
        ],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}],
    }


def panoptic() -> tuple[dict, np.ndarray]:
    """COCO's panoptic json and the picture of its segments: a person, a dog, and grass around them."""
    ids = np.full((H, W), 3_000_001)
    ids[PERSON], ids[DOG] = 257, 70_000
    pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    segments = [(257, 1, 0), (70_000, 18, 0), (3_000_001, 193, 0)]
    info = [
        {"id": id, "category_id": c, "iscrowd": crowd, "area": 1, "bbox": [0, 0, 1, 1]} for id, c, crowd in segments
    ]
    return {
        "images": instances()["images"],
        "annotations": [{"image_id": 7, "file_name": f"{7:012}.png", "segments_info": info}],
        "categories": [
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 18, "name": "dog", "isthing": 1},
            {"id": 193, "name": "grass", "isthing": 0},
        ],
    }, pixels


def sam(compressed: bool = True) -> dict:
    """One json of SA-1B; masks without classes, one inside another."""
    masks = (box(0, 0, 20, 20), box(4, 4, 6, 6), DOG)
    return {
        "image": {"image_id": 5, "width": W, "height": H, "file_name": "sa_5.jpg"},
        "annotations": [
            {
                "id": i,
                "segmentation": rle(m, compressed),
                "area": int(m.sum()),
                "bbox": [0, 0, 1, 1],
                "predicted_iou": 0.9,
                "point_coords": [[1, 1]],
                "crop_box": [0, 0, W, H],
                "stability_score": 0.9,
            }
            for i, m in enumerate(masks)
        ],
    }


@pytest.fixture
def folder(tmp_path):
    """What the page's catalog names."""
    for name in ("coco/images", "coco/panoptic", "coco/stuff", "sa1b", "mine/photos", "mine/masks", "mine/depth"):
        (tmp_path / name).mkdir(parents=True)
    photo = PIL.Image.fromarray(PHOTO)
    for name in ("coco/images/000000000007.jpg", "coco/images/000000000009.jpg", "sa1b/sa_5.jpg", "mine/photos/a.png"):
        photo.save(tmp_path / name)
    (tmp_path / "coco/instances.json").write_text(json.dumps(instances()))
    data, pixels = panoptic()
    (tmp_path / "coco/panoptic.json").write_text(json.dumps(data))
    PIL.Image.fromarray(pixels).save(tmp_path / "coco/panoptic/000000000007.png")
    (tmp_path / "sa1b/sa_5.json").write_text(json.dumps(sam()))
    stuff = np.full((H, W), 255, np.uint8)
    stuff[PERSON], stuff[DOG] = 0, 2
    for i in (7, 9):
        PIL.Image.fromarray(stuff).save(tmp_path / f"coco/stuff/{i:012}.png")
    (tmp_path / "coco/labels.txt").write_text("0: person\n1: bicycle\n2: dog\n")
    PIL.Image.fromarray((PERSON * 1 + DOG * 2).astype(np.uint8)).save(tmp_path / "mine/masks/a.png")
    PIL.Image.fromarray(np.linspace(0, 65535, H * W).astype(np.uint16).reshape(H, W)).save(
        tmp_path / "mine/depth/a.png"
    )
    return tmp_path


def opened(folder: Path, entry: str) -> annotations.Proxies:
    (folder / "c.yaml").write_text(f"a: {{{entry}}}\n")
    return load_catalog(folder / "c.yaml")["a"]


def ids(source: annotations.Proxies, index: int = 0) -> np.ndarray:
    sample = source[index]
    shown, target = (image.pixels for image in sample.images())
    return source.task.decode(target, sample.info["count"], shown)


# ---- run lengths ----------------------------------------------------------------------------------------------------


def test_run_lengths_by_hand():
    row = np.array([[0, 0, 1, 1, 1, 0, 1]], bool)
    assert (
        rle_encode(row) == [2, 3, 1, 1] and rle_compress([2, 3, 1, 1]) == "231N" and rle_expand("231N") == [2, 3, 1, 1]
    )
    assert rle_encode(row[:, 2:]) == [0, 3, 1, 1]
    assert rle_encode(np.array([[1, 0], [1, 0], [0, 0]], bool)) == [0, 2, 4]  # down the columns
    assert rle_compress([100]) == "T3" and rle_expand(b"T3") == [100]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 0.02, 0.5, 0.98, 1]), st.integers(0, 2**30))
def test_run_lengths_round_trip(h, w, share, seed):
    mask = np.random.default_rng(seed).random((h, w)) < share
    counts = rle_encode(mask)
    assert sum(counts) == h * w and rle_expand(rle_compress(counts)) == counts
    for held in (counts, rle_compress(counts), rle_compress(counts).encode()):
        assert np.array_equal(rle_decode(held, (h, w)), mask)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**24), max_size=12))
def test_any_counts_survive_compression(counts):
    assert rle_expand(rle_compress(counts)) == counts


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("23 1", r"holds \[' '\]; characters go from '0' to 'o'"),
        ("23~", r"holds \['~'\]"),
        ("23T", "a compressed run length is cut off"),
        ("231", "add up to 6, but 1 x 7 pixels are 7"),
        ([2, 3, 1], "add up to 6, but 1 x 7 pixels are 7"),
        ([2, -3, 8], "whole numbers from 0"),
        ([2, 3.0, 2], "whole numbers from 0"),
        ("2N7", "whole numbers from 0"),
        ({"a": 1}, "whole numbers from 0"),
    ],
)
def test_broken_run_lengths(counts, message):
    with pytest.raises(ValueError, match=message):
        rle_decode(counts, (1, 7))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_no_string_crashes(text):
    try:
        rle_decode(text, (3, 4))
    except ValueError:
        return


def test_polygons_hold_the_pixels_whose_centres_they_hold():
    square = annotations.polygons([[2, 3, 10, 3, 10, 19, 2, 19]], (H, W))
    assert np.array_equal(square, PERSON)
    two = annotations.polygons([[0, 0, 4, 0, 4, 4, 0, 4], [2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0]], (H, W))
    assert np.array_equal(two, box(0, 0, 4, 4) | box(2, 2, 4, 4))
    for wrong in ([[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [3]):
        with pytest.raises(ValueError, match="at least three pairs of numbers"):
            annotations.polygons(wrong, (H, W))


# ---- formats through the catalog ------------------------------------------------------------------------------------


def test_coco_instances(folder):
    coco = COCO + ", read: sgt/"
    source = opened(folder, coco + "instance")
    assert len(source) == 1 and source[0].id == "7" and source.where(0).endswith("instances.json: image 7")
    assert np.array_equal(ids(source), PERSON * 1 + DOG * 2)  # by area; the crowd is not countable
    semantic = opened(folder, coco + "semantic")  # classes by category id: person, dog
    assert np.array_equal(ids(semantic), (PERSON | CROWD) * 1 + DOG * 2)
    assert ids(opened(folder, coco + "detect")).tolist() == [[2, 3, 10, 19], [14, 10, 24, 18]]
    assert opened(folder, coco + "referring")[0].info["phrase"] == "the dog"  # persons are crowded
    assert np.array_equal(ids(opened(folder, coco + "segment")), CROWD * 1 + PERSON * 2 + DOG * 3)
    denoise = opened(folder, coco + "denoise")
    assert [denoise[i].id for i in range(2)] == ["7", "9"]


def test_coco_panoptic(folder):
    entry = PANOPTIC + ", read: sgt/"
    grass = ~(PERSON | DOG)
    assert np.array_equal(ids(opened(folder, entry + "panoptic")), PERSON * 1 + DOG * 2 + grass * 3)
    assert np.array_equal(ids(opened(folder, entry + "instance")), PERSON * 1 + DOG * 2)
    sample = opened(folder, entry + "panoptic")[0]
    assert score(sample, list(sample.images())[1].pixels) == {"quality": 1.0, "boundary_f": 1.0}


@pytest.mark.parametrize("compressed", [True, False])
def test_sa1b(folder, compressed):
    (folder / "sa1b/sa_5.json").write_text(json.dumps(sam(compressed)))
    source = opened(folder, SAM)
    expected = box(0, 0, 20, 20) * 1
    expected[DOG], expected[box(4, 4, 6, 6)] = 2, 3  # the smaller on top
    assert len(source) == 1 and source[0].id == "sa_5" and np.array_equal(ids(source), expected)
    assert tuple(np.asarray(list(source[0].images())[1].pixels)[0, 0]) == (31, 119, 180)


def test_folders_of_label_pictures(folder):
    stuff = STUFF + ", read: sgt/semantic"
    assert np.array_equal(ids(opened(folder, stuff)), PERSON * 1 + DOG * 3)
    mine = MINE + ", masks: mine/masks, depth: mine/depth, read: sgt/"
    assert np.array_equal(ids(opened(folder, mine + "segment")), PERSON * 1 + DOG * 2)
    assert np.array_equal(ids(opened(folder, mine + "instance")), PERSON * 1 + DOG * 2)
    near = ids(opened(folder, mine + "depth"))
    assert near[0, 0] == 255 and near[-1, -1] == 0 and (np.diff(near.ravel()) <= 0).all()
    (folder / "mine/masks/a.png").unlink()
    (folder / "mine/masks/a").mkdir()
    for name, mask in (("0", DOG), ("1", PERSON)):
        PIL.Image.fromarray(mask).save(folder / f"mine/masks/a/{name}.png")
    assert np.array_equal(ids(opened(folder, mine + "instance")), PERSON * 1 + DOG * 2)
    view = opened(folder, MINE + ", view: mine/photos, read: sgt/view")[0]
    assert len({image.pixels.tobytes() for image in view.images()}) == 1


def test_pictures_are_shrunk_and_draws_belong_to_the_row(folder):
    entry = MINE + ", read: sgt/denoise"
    one, again, other = (opened(folder, e)[0] for e in (entry, entry, entry + ", seed: 1"))
    assert one == again and one != other
    small = opened(folder, SAM + ", longest: 16")[0]
    assert {image.pixels.size for image in small.images()} == {(16, 12)}
    known = Annotated(
        PIL.Image.fromarray(PHOTO), np.stack([DOG, box(1, 1, 1, 1)]), (0, 1), ("a", "b"), depth=np.ones((H, W))
    )
    less = shrunk(known, 8)
    assert less.masks.shape == (1, 6, 8) and less.labels == (0,) and less.depth.shape == (6, 8)
    assert shrunk(known, 32) is known


def test_rows_show_what_check_counts(folder):
    source = opened(folder, SAM)
    assert [image.image for image in source.row(0).images()] == ["understand", "target"]
    assert source.picture(0, "target").tobytes() == list(source[0].images())[1].pixels.tobytes()
    with pytest.raises(IndexError, match="a has no row 1; it has 1"):
        source[1]


# ---- what is wrong is named -----------------------------------------------------------------------------------------


def broken(change) -> dict:
    data = instances()
    change(data)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "instances.json: has no list 'images'"),
        (broken(lambda d: d.pop("categories")), "has no list 'categories'"),
        (broken(lambda d: d["annotations"][1].pop("category_id")), r"annotations\[1\] lacks \['category_id'\]; it has"),
        (broken(lambda d: d["images"].append(3)), r"images\[2\] must be an object, not 3"),
        (broken(lambda d: d["annotations"].clear()), "no picture has what task 'instance' needs: things"),
        (broken(lambda d: d["annotations"][0].pop("segmentation")), r"image 7: annotation 1 lacks \['segmentation'\]"),
        (broken(lambda d: d["annotations"][0].update(category_id=5)), r"category ids \[5\] are not in 'categories'"),
        (broken(lambda d: d["annotations"][1]["segmentation"].update(size=[3, 4])), r"2: .* of \[3, 4\] pixels"),
        (broken(lambda d: d["annotations"][1]["segmentation"].update(counts="~")), "annotation 2: .*characters go"),
        (broken(lambda d: d["annotations"][1].update(segmentation=rle(DOG & False))), "2: its mask is empty"),
        (broken(lambda d: d["annotations"][1].update(segmentation="x")), "2: 'segmentation' must be polygons"),
        (broken(lambda d: d["images"][0].update(file_name="no.jpg")), "image 7: picture 'no.jpg' does not exist"),
        (broken(lambda d: d["images"][0].update(file_name="../c.yaml")), "lies outside the image folder"),
    ],
)
def test_wrong_coco(folder, data, message):
    (folder / "coco/instances.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        opened(folder, COCO + ", read: sgt/instance")[0]


def test_wrong_panoptic_and_sa1b(folder):
    entry = PANOPTIC + ", read: sgt/panoptic"
    drawn = folder / "coco/panoptic/000000000007.png"
    PIL.Image.new("RGB", (W, H)).save(drawn)
    with pytest.raises(
        ValueError, match=r"image 7: segments \[257, 70000, 3000001\] are not drawn in '000000000007.png'"
    ):
        opened(folder, entry)[0]
    PIL.Image.new("RGB", (3, 4)).save(drawn)
    with pytest.raises(ValueError, match=r"'000000000007.png' is \(3, 4\), the picture \(32, 24\)"):
        opened(folder, entry)[0]
    for text, message in (
        ("{", "sa_5.json: .*sa_5.json:1: not JSON"),
        ("{}", r"the file lacks \['image', 'annotations'\]; it has nothing"),
        ('{"image": {}, "annotations": []}', r"'image' lacks \['file_name'\]"),
        (json.dumps(sam() | {"annotations": []}), "task 'segment' needs masks; the picture has none"),
    ):
        (folder / "sa1b/sa_5.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(folder, SAM)[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (COCO, "'read' is missing"),
        (COCO + ", read: segment", "read is 'segment': choose from sgt/"),
        ("format: coco, path: coco/instances.json, read: sgt/segment", "'images' is missing"),
        ("format: coco, path: no.json, images: coco/images, read: sgt/segment", "no.json' does not exist"),
        (COCO + ", masks: x, read: sgt/segment", "coco takes no 'masks'"),
        (
            "format: coco-panoptic, path: coco/panoptic.json, images: coco/images, read: sgt/segment",
            "'masks' is missing",
        ),
        ("format: sa1b, path: nowhere, read: sgt/segment", "nowhere' does not exist"),
        (MINE + ", masks: mine/masks", r"\['masks'\] go with read: sgt/"),
        (MINE + ", read: sgt/segment", "task 'segment' needs masks; the folders give pictures"),
        (MINE + ", masks: mine/none, read: sgt/segment", "masks: folder .*none' does not exist"),
        ("format: images, path: coco/images, labels: coco/stuff, read: sgt/semantic", "labels and classes go together"),
        (STUFF + ", read: sgt/instance", "needs things"),
        (
            "format: images, path: coco/images, labels: coco/stuff, masks: coco/stuff, read: sgt/segment",
            "exclude each other",
        ),
        (MINE + ", read: sgt/denoise, seed: x", "seed is 'x'"),
    ],
)
def test_wrong_entries_are_named_by_file_and_line(folder, entry, message):
    with pytest.raises(ValueError, match=r"c.yaml:1: data set 'a': .*" + message):
        opened(folder, entry)


def test_wrong_label_pictures(folder):
    PIL.Image.new("L", (3, 4), 9).save(folder / "mine/masks/a.png")
    with pytest.raises(ValueError, match=r"photos/a.png: masks: 'a.png' is \(3, 4\), the picture \(32, 24\)"):
        opened(folder, MINE + ", masks: mine/masks, read: sgt/segment")[0]
    (folder / "mine/masks/a.png").unlink()
    with pytest.raises(ValueError, match="picture 'masks: a.png' does not exist"):
        opened(folder, MINE + ", masks: mine/masks, read: sgt/segment")[0]
    PIL.Image.fromarray(PHOTO).save(folder / "mine/depth/a.png")
    with pytest.raises(ValueError, match="depth: 'a.png' is coloured; it must be grey"):
        opened(folder, MINE + ", depth: mine/depth, read: sgt/depth")[0]
    stuff = STUFF + ", read: sgt/semantic"
    PIL.Image.new("L", (W, H), 9).save(folder / "coco/stuff/000000000007.png")
    with pytest.raises(ValueError, match=r"'000000000007.png' has values \[9\]; there are 3 classes"):
        opened(folder, stuff)[0]
    (folder / "coco/labels.txt").write_text("0: a\n2: b\n")
    with pytest.raises(ValueError, match="labels.txt:2: class '2' should be 1; values count from 0"):
        opened(folder, stuff)


def test_label_pictures_keep_their_values(tmp_path):
    values = np.arange(H * W).reshape(H, W)
    palette = PIL.Image.fromarray((values % 7).astype(np.uint8))
    palette = palette.convert("P") if palette.mode != "P" else palette
    palette.putpalette(list(range(255, 255 - 21, -1)))
    for image, expected in (
        (PIL.Image.fromarray((values % 251).astype(np.uint8)), values % 251),
        (palette, values % 7),
        (PIL.Image.fromarray((values * 80).astype(np.uint16)), values * 80),
        (PIL.Image.fromarray(DOG), DOG),
        (
            PIL.Image.fromarray(np.stack([values & 255, values >> 8, values % 3], -1).astype(np.uint8)),
            values + 65536 * (values % 3),
        ),
    ):
        image.save(tmp_path / "a.png")
        assert np.array_equal(open_labels(tmp_path / "a.png"), expected)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_documented_annotations_can_be_used(folder):
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL) if "sgt/" in b)
    (folder / "catalog.yaml").write_text(block)
    report = check(folder / "catalog.yaml")
    assert report.ok and set(report.tallies) == set(yaml.safe_load(block)), str(report)
    formats = {(e["format"], e["read"]) for e in yaml.safe_load(block).values()}
    assert {f for f, _ in formats} == {"coco", "coco-panoptic", "sa1b", "images"} and len(formats) >= 6
    named = re.findall(r"^\| `([a-z_]+)` \| (low|mid|high) \|", DOCS.read_text("utf-8"), re.MULTILINE)
    assert named == [(task.name, task.level) for task in TASKS.values()]
    assert ladder.TASKS is TASKS
