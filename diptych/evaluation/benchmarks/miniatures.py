"""Small versions of public benchmarks on drawn scenes: emoji, CV-Bench, POPE, small words, label pictures.

geneval-emoji   composed scenes of the forty emoji of ``data.worlds.emoji.NOUNS``; the judge is a small network
                (``judges.recogniser``), and its own accuracy on true scenes is a baseline of every score
cvbench-mini    count and relation (2D), depth order and distance (3D) of shapes, multiple choice; overall as CV-Bench's
pope-mini       "is there a red circle?": the absent things are random, the most frequent ones, or ones that share
                colour and shape with things that are there (arXiv 2305.10355)
ocr-mini        read a small printed word
seg-mini        four of SGT's label pictures: how well regions and their boundaries agree
compose-mini    two references in one picture: at each of the two places stands the emoji that was asked for, among the
                64 iconic ones ("seen", which models that ship were trained with) or those of the test split ("new")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import PIL.Image

from diptych.core.sample import Image, Sample, user
from diptych.data.canvas import pick
from diptych.data.worlds import embedded, emoji, emoji_scenes, shapes
from diptych.data.worlds.choices import SPACE, lettered, with_options
from diptych.data.worlds.emoji_sources import composed, composed_places
from diptych.data.worlds.talk_sources import printable, written
from diptych.evaluation.benchmarks.aggregate import cv_bench
from diptych.evaluation.benchmarks.questions import judge_choice, judge_yes_no, yes_no_scores
from diptych.evaluation.benchmarks.shapes import PICTURES, PROMPTS, SIDE, asked, seed_of, unsquare
from diptych.evaluation.judges import replies, segmentation, short_answers
from diptych.evaluation.judges.recogniser import recogniser
from diptych.evaluation.scores import (
    Baselines,
    Benchmark,
    Item,
    Outcome,
    Score,
    Verdict,
    by_category,
    clustered,
    each,
    grades,
    macro,
    share,
    weighted,
)

# --- emoji scenes -----------------------------------------------------------------------------------------------------


def _emoji_items(seed: int, size: int) -> list[Item]:
    items = []
    for tag in emoji_scenes.TAGS:
        for picture in range(PICTURES):  # every prompt once before any twice, as in geneval-mini
            for i, p in enumerate(emoji_scenes.prompts(tag, PROMPTS, seed)):
                key = f"geneval-emoji/{tag}/{i}/{picture}"
                sample = Sample(key, (user(p.text),))
                reference = {"tag": p.tag, "text": p.text, "ids": list(p.ids), "relation": p.relation}
                items.append(Item(key, "geneval-emoji", tag, p.text, sample, seed_of(seed, key), p.text, reference))
    return items


def _judge_emoji(items: Sequence[Item], images: Sequence[PIL.Image.Image]) -> list[Verdict]:
    detections = recogniser().find(images)
    prompts = [emoji_scenes.EmojiPrompt.from_json(item.reference) for item in items]
    return [unsquare(image) or _matches(p, f) for p, image, f in zip(prompts, images, detections)]


def _matches(prompt: emoji_scenes.EmojiPrompt, detections: Sequence[shapes.DetectedObject]) -> Verdict:
    seen, wanted = Counter(f.shape for f in detections), Counter(prompt.ids)
    if seen != wanted:
        counts = ", ".join(f"{n} {emoji.NOUNS.get(id, id)}" for id, n in seen.items()) or "nothing"
        return Verdict(False, f"found {counts}")
    if prompt.relation:
        first, second = (next(f for f in detections if f.shape == id) for id in prompt.ids)
        if prompt.relation not in shapes.relations(first, second):
            return Verdict(False, f"the things are right, but not {prompt.relation}")
    return Verdict(True)


def _emoji_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    stamp = "geneval-emoji@recognised"
    groups = {
        tag: ([float(o.verdict.ok) for o in group], [o.item.cluster for o in group])
        for tag, group in by_category(outcomes).items()
    }
    return {f"{stamp}/overall": macro(groups)} | {f"{stamp}/{tag}": clustered(*g) for tag, g in groups.items()}


def _emoji_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``recogniser``: the judge's own accuracy, on scenes drawn by rules for these prompts; ``chance``: on scenes of
    the prompts before."""
    rows: Baselines = {}
    for tag, group in by_category(items).items():
        rng = np.random.default_rng(0)
        asked = list({i.prompt: emoji_scenes.EmojiPrompt.from_json(i.reference) for i in group}.values())
        detections = recogniser().find([emoji_scenes.render_scene(emoji_scenes.scene_for(rng, p), size) for p in asked])
        right = np.mean([_matches(p, f).ok for p, f in zip(asked, detections, strict=True)])
        rows[f"geneval-emoji@recognised/{tag}"] = {"recogniser": float(right)}
        if len(asked) > 1:
            other = np.mean([_matches(p, f).ok for p, f in zip(asked, detections[-1:] + detections[:-1], strict=True)])
            rows[f"geneval-emoji@recognised/{tag}"]["chance"] = float(other)
    mean = {k: float(np.mean([row.get(k, 0) for row in rows.values()])) for k in ("recogniser", "chance")}
    return {"geneval-emoji@recognised/overall": mean} | rows


# --- multiple choice about space --------------------------------------------------------------------------------------

EACH = 50  # questions of each kind


def _space_items(seed: int, size: int) -> list[Item]:
    """Multiple choice about count, relation, depth order and distance in drawn scenes."""
    items = []
    for kind in SPACE:
        for i in range(EACH):
            rng = np.random.default_rng((seed, list(SPACE).index(kind), i))
            scene, question, options, right = SPACE[kind](rng)
            letters, answer = lettered(rng, options, right)
            text = with_options(question, letters)
            key = f"cvbench-mini/{kind}/{i}"
            sample = Sample(key, (user(Image(shapes.render(scene, size)), text),))
            reference = {"answer": f"({answer}) {right}", "letter": answer, "options": letters}
            items.append(Item(key, "cvbench-mini", kind, text, sample, seed_of(seed, key), key, reference))
    return items


def _space_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    stamp, groups = "cvbench-mini@vanilla", by_category(outcomes)
    scores = {f"{stamp}/{kind}": share(group) for kind, group in groups.items()}
    overall = cv_bench(
        scores[f"{stamp}/count"].value,
        scores[f"{stamp}/relation"].value,
        (scores[f"{stamp}/depth"].value + scores[f"{stamp}/distance"].value) / 2,
    )
    total = weighted(groups, dict.fromkeys(groups, 1 / len(groups)))
    assert abs(total.value - overall) < 1e-9, "with two kinds on both sides CV-Bench's mean is even"
    return {f"{stamp}/overall": total} | scores


def _space_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``guessing``: one letter in so many; ``majority``: always the letter that is right most often here."""
    stamp, rows = "cvbench-mini@vanilla", {}
    for kind, group in by_category(items).items():
        blind = float(np.mean([1 / len(i.reference["options"]) for i in group]))
        most = Counter(i.reference["letter"] for i in group).most_common(1)[0][1] / len(group)
        rows[f"{stamp}/{kind}"] = {"guessing": blind, "majority": most}
    mean = {k: float(np.mean([row[k] for row in rows.values()])) for k in ("guessing", "majority")}
    return {f"{stamp}/overall": mean} | rows


# --- is it there? -----------------------------------------------------------------------------------------------------

SPLITS = ("random", "popular", "adversarial")


def _pope_items(seed: int, size: int) -> list[Item]:
    """Yes-or-no questions about things that are there, and absent ones of three kinds."""
    rng = np.random.default_rng((seed, 7))
    scenes = [shapes.random_scene(rng) for _ in range(EACH)]
    often = [kind for kind, _ in Counter(t.kind for s in scenes for t in s.things).most_common()]
    items = []
    for split in SPLITS:
        for i, scene in enumerate(scenes):
            there = [t.kind for t in scene.things]
            rng = np.random.default_rng((seed, 8, SPLITS.index(split), i))
            absent = [(c, s) for c in shapes.COLOURS for s in shapes.SHAPES if (c, s) not in there]
            if split == "popular":
                absent = [kind for kind in often if kind not in there][:3]
            elif split == "adversarial":
                near = [k for k in absent if any(k[0] == c for c, _ in there) and any(k[1] == s for _, s in there)]
                absent = near or [k for k in absent if any(k[0] == c or k[1] == s for c, s in there)]
            for true, kind in ((True, pick(rng, there)), (False, shapes.pick(rng, absent))):
                key = f"pope-mini/{split}/{i}/{'yes' if true else 'no'}"
                text = f"is there a {' '.join(kind)}?"
                sample = Sample(key, (user(Image(shapes.render(scene, size)), text),))
                reference = {"answer": "yes" if true else "no"}
                items.append(Item(key, "pope-mini", split, text, sample, seed_of(seed, key), str(i), reference))
    return items


# --- small words ------------------------------------------------------------------------------------------------------

WORDS = 100


def _word_items(seed: int, size: int) -> list[Item]:
    items = []
    for length in (3, 4, 5, 6):
        candidates = [w for w in printable("test") if len(w) == length]
        rng = np.random.default_rng((seed, length))
        for i, k in enumerate(rng.permutation(len(candidates))[: WORDS // 4]):
            word, key = candidates[int(k)], f"ocr-mini/{length} letters/{i}"
            text = "what does it say?"
            sample = Sample(key, (user(Image(written(word, size, rng)), text),))
            reference = {"answer": word}
            items.append(Item(key, "ocr-mini", f"{length} letters", text, sample, seed_of(seed, key), word, reference))
    return items


def _judge_word(item: Item, text: str) -> Verdict:
    true, answer = item.reference["answer"], replies.plain(text)
    return Verdict(
        answer == true, "" if answer == true else f"it is {true}", {"anls": short_answers.anls(answer, [true], 0.0)}
    )


def _word_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    rows = {"ocr-mini@exact/overall": share(outcomes)}
    rows |= {f"ocr-mini@exact/{k}": share(group) for k, group in by_category(outcomes).items()}
    near = {"": ([o.verdict.parts.get("anls", 0.0) for o in outcomes], [o.item.cluster for o in outcomes])}
    return rows | {"ocr-mini@edit-similarity/overall": macro(near, graded=True)}


# --- label pictures ---------------------------------------------------------------------------------------------------

LABELS = ("semantic", "referring", "instance", "segment")
DRAWINGS = 15  # of each


def _label_items(seed: int, size: int) -> list[Item]:
    items = []
    for task in LABELS:
        source = embedded.source(f"shapes/sgt/{task}", "test", size, seed)
        for i in range(DRAWINGS):
            key, sample = f"seg-mini/{task}/{i}", source[i]
            asked = Sample(key, sample.messages[:-1], sample.info)
            text = sample.messages[0].parts[-1].text  # type: ignore[union-attr]
            reference = {"source": [f"shapes/sgt/{task}", size, seed, i], **sample.info}
            items.append(Item(key, "seg-mini", task, text, asked, seed_of(seed, key), sample.id, reference))
    return items


def _truth(item: Item) -> Sample:
    name, size, seed, i = item.reference["source"]
    return embedded.source(name, "test", size, seed)[i]


def _judge_labels(item: Item, image: PIL.Image.Image) -> Verdict:
    parts = segmentation.score(_truth(item), image)
    good = parts["miou"] >= 0.5
    return Verdict(good, "" if good else f"overlap {parts['miou']:.2f}", parts, parts["miou"])


def _label_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    groups = by_category(outcomes)
    rows = {"seg-mini@miou/overall": weighted(groups, dict.fromkeys(groups, 1 / len(groups)))}
    rows |= {f"seg-mini@miou/{task}": grades(group) for task, group in groups.items()}
    edges = {
        task: ([o.verdict.parts.get("boundary_f", 0.0) for o in group], [o.item.cluster for o in group])
        for task, group in groups.items()
    }
    return rows | {"seg-mini@boundary-f/overall": macro(edges, graded=True)}


def _label_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``black``: a picture without regions; ``photo``: the picture that was shown, copied."""
    rows: Baselines = {}
    for name in ("black", "photo"):
        black = PIL.Image.new("RGB", (size, size))
        pictures = [black if name == "black" else next(i.sample.images()).pixels for i in items]
        outcomes = [Outcome(i, _judge_labels(i, m)) for i, m in zip(items, pictures, strict=True)]
        for key, score in _label_scores(outcomes).items():
            rows.setdefault(key, {})[name] = score.value
    return rows


# --- two references ---------------------------------------------------------------------------------------------------

COMPOSED = {"seen": "emoji64/compose", "new": "emoji/compose"}
PAIRS = 40  # of each


def _compose_items(seed: int, size: int) -> list[Item]:
    items = []
    for category, source in COMPOSED.items():
        for item in asked("compose-mini", source, PAIRS, seed, size):
            key = item.id.replace("/compose/", f"/{category}/")
            sample = replace(item.sample, id=key)
            items.append(replace(item, id=key, category=category, sample=sample, seed=seed_of(seed, key)))
    return items


@cache
def _emoji_pictures(category: str, side: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Ids and pictures (n, side, side, 3) of the emoji that a composition of this category may show."""
    candidates = emoji.concepts("test", 64 if category == "seen" else None)
    return tuple(e.id for e in candidates), np.stack([np.asarray(emoji.render(e, side), float) for e in candidates])


def _judge_composition(item: Item, image: PIL.Image.Image) -> Verdict:
    """Each place shows the emoji of its reference: no other candidate is nearer in RGB."""
    if wrong := unsquare(image):
        return wrong
    side = image.width // 2
    ids, pictures = _emoji_pictures(item.category, side)
    pixels, seen = np.asarray(image.convert("RGB"), float), []
    for left, top in composed_places(item.reference["relation"]):
        x, y = round(left * image.width), round(top * image.height)
        distances = np.square(pictures - pixels[y : y + side, x : x + side]).mean((1, 2, 3))
        seen.append(ids[int(distances.argmin())])
    ok = [a == b for a, b in zip(seen, item.reference["emoji"], strict=True)]
    parts = {"first": ok[0], "second": ok[1]}
    return Verdict(all(ok), "" if all(ok) else f"nearest to {' and '.join(seen)}", parts)


def _compose_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    stamp = "compose-mini@nearest"
    scores = {f"{stamp}/{k}": share(group) for k, group in by_category(outcomes).items()}
    return {f"{stamp}/overall": share(outcomes)} | scores


def _compose_baselines(items: Sequence[Item], size: int) -> Baselines:
    """``truth``: the judge on true compositions; ``copy``: on the first reference."""
    rows: Baselines = {}
    truth = [composed([emoji.find(id) for id in i.reference["emoji"]], i.reference["relation"], size) for i in items]
    copies = [next(i.sample.images()).pixels for i in items]
    for name, images in (("truth", truth), ("copy", copies)):
        outcomes = [Outcome(i, _judge_composition(i, image)) for i, image in zip(items, images, strict=True)]
        for key, score in _compose_scores(outcomes).items():
            rows.setdefault(key, {})[name] = score.value
    return rows


# --- the table --------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Benchmark] = {
    "geneval-emoji": Benchmark(
        "geneval-emoji",
        "draw",
        _emoji_items,
        _judge_emoji,
        _emoji_scores,
        _emoji_baselines,
        PICTURES,
        SIDE,
        macro=True,
    ),
    "cvbench-mini": Benchmark(
        "cvbench-mini",
        "answer",
        _space_items,
        each(judge_choice),
        _space_scores,
        _space_baselines,
        side=SIDE,
        macro=True,
    ),
    "pope-mini": Benchmark(
        "pope-mini",
        "answer",
        _pope_items,
        each(judge_yes_no),
        partial(yes_no_scores, {"ours": "pope-mini@lone-word"}),
        lambda items, size: {"pope-mini@lone-word/accuracy": {"always yes": 0.5}},
        side=SIDE,
    ),
    "ocr-mini": Benchmark(
        "ocr-mini",
        "answer",
        _word_items,
        each(_judge_word),
        _word_scores,
        side=SIDE,
    ),
    "seg-mini": Benchmark(
        "seg-mini",
        "draw",
        _label_items,
        each(_judge_labels),
        _label_scores,
        _label_baselines,
        side=SIDE,
        macro=True,
    ),
    "compose-mini": Benchmark(
        "compose-mini",
        "draw",
        _compose_items,
        each(_judge_composition),
        _compose_scores,
        _compose_baselines,
        side=SIDE,
    ),
}
