"""GenEval's rules on made detections, and the whole way through tiny random networks in the published format."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.evaluation import harness
from diptych.evaluation.benchmarks import aggregate, geneval
from diptych.evaluation.benchmarks.clipscore import clip_score
from diptych.evaluation.benchmarks.geneval import CLASSES, templates, things, verdict
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.harness import evaluate
from diptych.evaluation.judges.detector import COLOURS, Colourist, Detection, Detector, _detections, _prepared
from diptych.evaluation.other_results import read
from diptych.evaluation.remote import PictureFolder
from diptych.evaluation.scores import Verdict


def seen(name, x, y, side=20, score=0.95):
    return Detection(CLASSES.index(name), score, (x, y, x + side, y + side), np.zeros((1, 1), bool))


def judged(row, found, colours=()):
    names = list(colours)
    return verdict(row, things(found, row["tag"]), lambda some, noun: names[: len(some)])


def row(tag, include, exclude=()):
    return {"tag": tag, "include": include, "exclude": list(exclude), "prompt": "x"}


def test_thresholds_and_counts():
    two_dogs = row("counting", [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}])
    dogs = [seen("dog", 30 * i, 0, score=s) for i, s in enumerate((0.95, 0.92, 0.91))]
    assert judged(two_dogs, dogs[:2])[0]
    ok, reason = judged(two_dogs, dogs)
    assert not ok and reason == "expected dog<3, found 3"
    assert judged(two_dogs, [*dogs[:2], seen("dog", 90, 0, score=0.9)])[0]  # 0.9 is not above 0.9
    assert judged(two_dogs, dogs[:1])[1] == "expected dog>=2, found 1"
    one = row("single_object", [{"class": "dog", "count": 1}])
    assert judged(one, [seen("dog", 0, 0, score=0.31)])[0] and not judged(one, [seen("dog", 0, 0, score=0.3)])[0]
    many = things([seen("dog", i, 0, score=0.5 + i / 100) for i in range(30)], "single_object")["dog"]
    assert len(many) == 16 and many[0].score == 0.79 and many[-1].score == pytest.approx(0.64)


def test_colours_are_those_of_the_best_boxes():
    red = row("colors", [{"class": "car", "count": 1, "color": "red"}])
    both = [seen("car", 0, 0, score=0.5), seen("car", 50, 0, score=0.9)]
    assert judged(red, both, ["red", "blue"])[0]  # only the first counts, as many as the clause asks for
    ok, reason = judged(red, both, ["blue", "red"])
    assert not ok and reason == "expected red car>=1, found 1 blue"


@pytest.mark.parametrize(
    "at, relation, right",
    [
        ((0, 50), "left of", True),
        ((0, 50), "right of", False),
        ((100, 50), "right of", True),
        ((50, 0), "above", True),
        ((50, 100), "below", True),
        ((50, 100), "above", False),
        ((0, 0), "left of", True),
        ((0, 0), "above", True),  # the diagonal is both
        ((47, 50), "left of", False),  # within a tenth of both sizes there is no relation
        ((45, 50), "left of", False),
        ((0, 25), "above", False),
    ],
)
def test_positions(at, relation, right):
    asked = row("position", [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}])
    ok, reason = judged(asked, [seen("cat", 50, 50), seen("dog", *at)])
    assert ok is right, reason
    assert judged(asked, [seen("dog", *at)])[1].endswith("expected dog>=1, found 1") is False
    assert "no target for dog" in judged(asked, [seen("dog", *at)])[1]


def test_our_prompts_are_as_many_as_the_official_ones(tmp_path):
    rows = templates()
    assert {tag: sum(r["tag"] == tag for r in rows) for tag in geneval.COUNTS} == geneval.COUNTS and len(rows) == 553
    assert len({r["prompt"] for r in rows}) == 553 and templates() == rows and templates(1) != rows
    assert "a photo of an apple" in {r["prompt"] for r in rows}
    for r in rows:
        for clause in r["include"]:
            assert clause["class"] in CLASSES and clause.get("color", "red") in COLOURS
            assert not ("color" in clause and clause["class"] == "person")
        colours = [clause["color"] for clause in r["include"] if "color" in clause]
        assert len(set(colours)) == len(colours)
    count = next(r for r in rows if r["tag"] == "counting")
    assert count["exclude"] == [{"class": count["include"][0]["class"], "count": count["include"][0]["count"] + 1}]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert geneval.read_metadata(file) == rows and geneval.protocol(rows, file) == "original"
    assert geneval.protocol([{**r, "prompt": "rewritten " + r["prompt"]} for r in rows], file) == "long"
    assert geneval.protocol(rows[:9], tmp_path / "some.jsonl") == "some" and geneval.protocol(rows, None) == "ours"


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"tag": "sizes"}, "line 1: the tag is 'sizes'; GenEval has single_object"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "the class is 'unicorn'"),
        ({"include": [{"class": "dog", "count": 0}]}, "the count is 0"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "the color is 'mauve'; choose from red"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "an earlier clause"),
        ({"prompt": None}, "has no 'prompt'"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, wrong, text):
    good = {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "x"} | wrong
    (tmp_path / "m.jsonl").write_text(json.dumps({k: v for k, v in good.items() if v is not None}) + "\n")
    with pytest.raises(ValueError, match=text):
        resolve([f"geneval={tmp_path / 'm.jsonl'}"], Tools())


# --- the networks -----------------------------------------------------------------------------------------------------


def test_pictures_are_prepared_as_published():
    for size, inner in (((512, 512), (800, 800)), ((1024, 512), (667, 1333)), ((100, 50), (667, 1333))):
        x, filled = _prepared([PIL.Image.new("RGB", size, (255, 0, 0))])
        assert filled == inner and x.shape == (1, 3, -(-inner[0] // 32) * 32, -(-inner[1] // 32) * 32)
        assert x[0, 0, 0, 0] == pytest.approx((255 - 123.675) / 58.395) and x[0, 1, 0, 0] == pytest.approx(
            -116.28 / 57.12
        )
        assert (x[..., inner[0] :, :] == 0).all() and (x[..., :, inner[1] :] == 0).all()
    stripes = np.zeros((4, 4 * 1333, 3), np.uint8)
    stripes[:, 1::4] = stripes[:, 2::4] = 255  # a quarter as wide: the mean of the two in the middle, not of all
    x, _ = _prepared([PIL.Image.fromarray(stripes)])
    assert x[0, 0, 0, :1333].min() == pytest.approx((255 - 123.675) / 58.395)


def test_detections_are_pairs_of_query_and_class():
    """Against the same sums written out: scores are class times the mask's mean inside itself, boxes are the masks'."""
    rng = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(6, 5, generator=rng) * 3, torch.randn(6, 8, 8, generator=rng) * 2
    found = _detections(classes, masks, (32, 32), (32, 24), (12, 16), 0.0)
    full = torch.nn.functional.interpolate(masks[None], (32, 32), mode="bilinear")[..., :32, :24]
    full = torch.nn.functional.interpolate(full, (16, 12), mode="bilinear")[0]
    expected = []
    for q in range(6):
        for c in range(4):
            inside = full[q] > 0
            score = classes[q].softmax(0)[c] * full[q].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
            expected.append((float(score), c))
    expected.sort(reverse=True)
    assert [d.label for d in found] == [c for _, c in expected]
    assert [d.score for d in found] == pytest.approx([s for s, _ in expected], abs=1e-5)
    rows, columns = np.nonzero(found[0].mask)
    assert found[0].mask.shape == (16, 12)
    assert found[0].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    least = found[3].score
    some = _detections(classes, masks, (32, 32), (32, 24), (12, 16), least)
    assert [d.score for d in some] == [d.score for d in found[:3]]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Tiny random Mask2Former and CLIP checkpoints as they are published."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("networks")
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=8,
        num_labels=80,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():  # random networks are sure of nothing
            net.class_predictor.weight.mul_(60)
        net.save_pretrained(folder / "mask2former")
        side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        words = [
            "<|startoftext|>",
            "<|endoftext|>",
            *(f"{c}</w>" for c in ("a", "photo", "of", "object")),
            *"abcdefghijklmnopqrstuvwxyz-",
            *(f"{c}</w>" for c in "bcdefghijklmnopqrstuvwxyz-"),
        ]
        CLIPModel(
            CLIPConfig(
                text_config={**side, "vocab_size": len(words), "eos_token_id": 1, "bos_token_id": 0},
                vision_config={**side, "image_size": 32, "patch_size": 16},
                projection_dim=8,
            )
        ).save_pretrained(folder / "clip")
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return folder


def scene(seed):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))


def test_clip_score(tmp_path, networks):
    """2.5 * max(cos, 0) of transformers' own embeddings, of pictures and "A photo depicts PROMPT"."""
    import torch

    assert [clip_score(c) for c in (-1, -0.1, 0, 0.3, 1)] == pytest.approx([0, 0, 0, 0.75, 2.5])
    prompts = [f"a photo of {c} things" for c in ("red", "blue")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p, "category": p[11:14]}) + "\n" for p in prompts))
    (tmp_path / "made").mkdir()
    for i in range(2):
        scene(i).save(tmp_path / f"made/{i:05d}.png")
    tools = Tools(clip=str(networks / "clip"))
    spec = f"clipscore={tmp_path / 'p.jsonl'}"
    result = evaluate(PictureFolder(tmp_path / "made"), (spec,), tools=tools, progress=False)
    clip = Colourist(tools.clip)
    with torch.inference_mode():
        batch = clip.processor(
            text=[f"A photo depicts {p}" for p in prompts],
            images=[scene(0), scene(1)],
            return_tensors="pt",
            padding=True,
        )
        out = clip.net(**batch)
    cosines = (out.image_embeds * out.text_embeds).sum(-1).tolist()
    values = [o.verdict.value for o in result.outcomes]
    assert values == pytest.approx([2.5 * max(0, c) for c in cosines], abs=1e-5)
    scores = result.scores
    assert scores["clipscore@ours[clip]/overall"].value == pytest.approx(sum(values) / 2) and len(scores) == 3


def test_the_whole_way(tmp_path, networks):
    tools = Tools(detector=str(networks / "mask2former"), clip=str(networks / "clip"))
    find, images = Detector(tools.detector), [scene(0), scene(1)]
    alone = [find.find([i], 0.001)[0] for i in images]
    assert all(len(a) > 3 for a in alone)
    both = find.find(images, 0.001, batch=2)
    for a, b in zip(alone, both, strict=True):
        assert [d.label for d in a[:5]] == [d.label for d in b[:5]]
        assert [d.score for d in a[:5]] == pytest.approx([d.score for d in b[:5]], abs=1e-4)
    clip = Colourist(tools.clip)
    assert clip._texts("dog").shape == (10, 8) and set(clip.name(images[0], alone[0][:3], "dog")) <= set(COLOURS)

    rows = [r for tag in geneval.COUNTS for r in [q for q in templates() if q["tag"] == tag][:1]]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(len(rows)):
        (tmp_path / f"made/{i:05d}/samples").mkdir(parents=True)
        scene(i).save(tmp_path / f"made/{i:05d}/samples/0000.png")
    spec = f"geneval={tmp_path / 'm.jsonl'}"
    tools = Tools(detector=tools.detector, clip=tools.clip, pictures=1)
    result = evaluate(PictureFolder(tmp_path / "made"), (spec,), tools=tools, progress=False)
    assert {k.rpartition("/")[2] for k in result.scores} == {
        "overall",
        *aggregate.GENEVAL,
        "images",
        "prompts-with-any",
    }
    assert list(result.scores)[0] == "geneval@m[mask2former]/overall" and result.failures == 0
    assert result.scorers["geneval"]["least counting"] == 0.9
    [out] = harness.write_layout(tmp_path / "out", result, resolve([spec], tools)[0])
    assert json.loads((out / "00002/metadata.jsonl").read_text()) == rows[2]
    again = read("geneval", out / "results.jsonl")
    assert {k.partition("/")[2]: s.value for k, s in again.items()} == {
        k.partition("]/")[2]: s.value for k, s in result.scores.items()
    }
    copied = evaluate(PictureFolder(out), (spec,), tools=tools, progress=False)  # what we write, we read
    assert copied.scores == result.scores


def test_folders_that_official_scripts_write(tmp_path, monkeypatch):
    monkeypatch.setattr(geneval, "_judge", lambda tools, items, images: [Verdict(True) for _ in items])
    rows = [row("colors", [{"class": "dog", "count": 1, "color": "red"}]) | {"prompt": p} for p in ("one", "two")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec, made = f"geneval={tmp_path / 'm.jsonl'}", tmp_path / "made"
    for i, r in enumerate(rows):
        (made / f"{i:05d}/samples").mkdir(parents=True)
        (made / f"{i:05d}/metadata.jsonl").write_text(json.dumps(r) + "\n")
    for name in ("00000.png", "00001.PNG", "2.jpg", "grid.png"):  # numbers however many zeros they have
        scene(0).save(made / "00000/samples" / name)
    whole = evaluate(PictureFolder(made), (spec,), progress=False)
    assert whole.failures == 5 and whole.scores["geneval@m[mask2former-swin-small-coco-instance]/colors"].value == 3 / 8
    unscored = evaluate(PictureFolder(made), (spec,), progress=False, score=False)
    assert unscored.failures == 5 and not unscored.scores
    [out] = harness.write_layout(tmp_path / "out", unscored, resolve([spec], Tools())[0])
    assert (out / "00000/samples/0002.png").is_file() and not (out / "results.jsonl").exists()  # nobody has judged
    (made / "00001/metadata.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="00001/metadata.jsonl says 'one', the benchmark 'two'"):
        evaluate(PictureFolder(made), (spec,), progress=False)


def test_missing_networks_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read from .*nowhere.*--detector"):
        Detector(str(tmp_path / "nowhere"))
    (tmp_path / "r.jsonl").write_text('{"tag": "colors", "prompt": "x", "correct": "yes"}\n')
    with pytest.raises(ValueError, match="line 1: correct is 'yes'"):
        read("geneval", tmp_path / "r.jsonl")


def test_the_overall_score_is_the_mean_of_tags():
    rights = {tag: [(float(i < k), str(i)) for i in range(10)] for k, tag in enumerate(aggregate.GENEVAL)}
    scores = geneval.scores("x", rights)
    assert scores["x/overall"].value == pytest.approx(np.mean([k / 10 for k in range(6)]))
    assert "x/overall" not in geneval.scores("x", {"colors": rights["colors"]})
    assert scores["x/prompts-with-any"].value == scores["x/images"].value  # one picture a prompt here
