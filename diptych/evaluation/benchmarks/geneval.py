"""GenEval (arXiv 2310.11513), natively: its prompts' metadata, its rules, its folders and its results, on any device.

``geneval=evaluation_metadata.jsonl`` reads the official prompts; without a file the six tags are filled by our own
templates, and the scores are named ``geneval@ours``. Correct is a picture in which every ``include`` clause is met by
the ``count`` most certain boxes of its class, and no ``exclude`` clause; the overall score is the mean of six tags.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diptych.core.sample import Sample, user
from diptych.data.worlds.shapes import DetectedObject, relations
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges.detector import COLOURS, Detection, colourist, detector
from diptych.evaluation.scores import UNJUDGED, Benchmark, Item, Outcome, Score, Verdict, by_category, clustered, macro
from diptych.machine import disk

_CLASSES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
    ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
    glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
    dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(" ".join(_CLASSES.split()).split(", "))  # COCO's, as GenEval names them
SURE, SURE_COUNTING, MOST = 0.3, 0.9, 16  # a box's least score, the same for "counting", boxes of one class
COUNTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
PICTURES = 4
RELATIONS = ("left of", "right of", "above", "below")


# --- prompts ----------------------------------------------------------------------------------------------------------


def templates(seed: int = 0) -> list[dict]:
    """553 prompts as metadata rows, with as many of each tag as the official file has: every class alone once, and
    what else the tag needs drawn at random; persons are given no colour, and two things never the same one. They are
    ours, not the official ones."""
    rng = np.random.default_rng((seed, 553))
    rows = [_row("single_object", [{"class": c, "count": 1}], f"a photo of {_a(c)}") for c in CLASSES]

    def pair(names: Sequence[str] = CLASSES) -> tuple[str, str]:
        a, b = rng.permutation(len(names))[:2]
        return names[int(a)], names[int(b)]

    def two_object() -> dict:
        a, b = pair()
        return _row(
            "two_object", [{"class": a, "count": 1}, {"class": b, "count": 1}], f"a photo of {_a(a)} and {_a(b)}"
        )

    def counting() -> dict:
        c, n = pair()[0], int(rng.integers(2, 5))
        text = f"a photo of {('two', 'three', 'four')[n - 2]} {_plural(c)}"
        return _row("counting", [{"class": c, "count": n}], text, [{"class": c, "count": n + 1}])

    def colors() -> dict:
        c, paint = pair(CLASSES[1:])[0], pair(COLOURS)[0]
        return _row("colors", [{"class": c, "count": 1, "color": paint}], f"a photo of {_a(f'{paint} {c}')}")

    def position() -> dict:
        (a, b), relation = pair(), RELATIONS[int(rng.integers(4))]
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        return _row("position", include, f"a photo of {_a(a)} {relation} {_a(b)}")

    def color_attr() -> dict:
        (a, b), (first, second) = pair(CLASSES[1:]), pair(COLOURS)
        include = [{"class": a, "count": 1, "color": first}, {"class": b, "count": 1, "color": second}]
        return _row("color_attr", include, f"a photo of {_a(f'{first} {a}')} and {_a(f'{second} {b}')}")

    for make in (two_object, counting, colors, position, color_attr):
        some: dict[str, dict] = {}
        while len(some) < COUNTS[make.__name__]:
            row = make()
            some.setdefault(row["prompt"], row)
        rows += some.values()
    return rows


def _row(tag: str, include: list[dict], prompt: str, exclude: list[dict] | None = None) -> dict:
    return {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {}) | {"prompt": prompt}


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    if noun in ("skis", "scissors", "sheep"):
        return noun
    if noun == "person":
        return "people"
    if noun.endswith(("knife",)):
        return noun[:-2] + "ves"
    if noun.endswith(("mouse",)):
        return noun[:-5] + "mice"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def read_metadata(file: Path) -> list[dict]:
    """The rows of an ``evaluation_metadata.jsonl``. Raises ``ValueError`` naming the line and what is wrong with it."""
    rows = files.rows(file)
    for n, row in enumerate(rows, 1):
        where = f"{file} line {n}"
        files.field(row, ("prompt",), where)
        if files.field(row, ("tag",), where) not in COUNTS:
            raise ValueError(f"{where}: the tag is {row['tag']!r}; GenEval has {', '.join(COUNTS)}")
        include = files.field(row, ("include",), where, list)
        for i, clause in enumerate([*include, *files.field({"exclude": [], **row}, ("exclude",), where, list)]):
            if (name := files.field(clause, ("class",), f"{where}: a clause")) not in CLASSES:
                raise ValueError(
                    f"{where}: the class is {name!r}; the detector knows {len(CLASSES)}, "
                    f"such as {', '.join(CLASSES[:5])}"
                )
            if not isinstance(clause.get("count"), int) or clause["count"] < 1:
                raise ValueError(f"{where}: the count is {clause.get('count')!r}; it must be at least 1")
            if clause.get("color", "red") not in COLOURS:
                raise ValueError(f"{where}: the color is {clause['color']!r}; choose from {', '.join(COLOURS)}")
            if "position" in clause:
                relation, target = (*files.field(clause, ("position",), where, list), None, None)[:2]
                if relation not in RELATIONS or target not in range(i):
                    raise ValueError(
                        f"{where}: the position is {clause['position']!r}; it names a relation of "
                        f"{', '.join(RELATIONS)} and an earlier clause"
                    )
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def protocol(rows: Sequence[Mapping], file: Path | None) -> str:
    """How these prompts are named: "ours", "original" (as many of each tag as officially, and the official wording),
    "long" (as many, rewritten), else the file's stem."""
    if file is None:
        return "ours"
    counts = {tag: sum(r["tag"] == tag for r in rows) for tag in COUNTS}
    if counts != COUNTS:
        return file.stem
    return "original" if all(r["prompt"].startswith("a photo of ") for r in rows) else "long"


# --- rules ------------------------------------------------------------------------------------------------------------


def things(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Detections by class, best first, as the rules of a tag take them; nothing is suppressed for overlapping."""
    least = SURE_COUNTING if tag == "counting" else SURE
    by_class: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > least and len(by_class.setdefault(CLASSES[d.label], [])) < MOST:
            by_class[CLASSES[d.label]].append(d)
    return {k: v for k, v in by_class.items() if v}


def verdict(row: Mapping[str, Any], there: Mapping[str, Sequence[Detection]], colours: Any) -> tuple[bool, str]:
    """(correct, reasons) of a picture by its metadata row; ``colours(things, class)`` names colours when it comes to
    that."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in row["include"]:
        name, count = clause["class"], clause["count"]
        some = there.get(name, [])[:count]
        wrong = ""
        if len(some) < count:
            wrong = f"expected {name}>={count}, found {len(some)}"
        elif "color" in clause and (seen := colours(some, name)).count(clause["color"]) < count:
            counts = ", ".join(f"{seen.count(c)} {c}" for c in COLOURS if c in seen)
            wrong = f"expected {clause['color']} {name}>={count}, found {counts}"
        elif "position" in clause:
            relation, target = clause["position"]
            if (others := groups[target]) is None:
                wrong = f"no target for {name} to be {relation}"
            else:
                wrong = next((w for a in some for b in others if (w := _misplaced(name, a, relation, target, b))), "")
        if wrong:
            reasons.append(wrong)
        groups.append(None if wrong else some)
    for clause in row.get("exclude", []):
        if len(there.get(clause["class"], [])) >= clause["count"]:
            number = len(there[clause["class"]])
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return not reasons, "\n".join(reasons)


def _misplaced(name: str, a: Detection, relation: str, target: int, b: Detection) -> str:
    true = relations(_placed(a), _placed(b))
    if relation in true:
        return ""
    return f"expected {name} {relation} target, found {' and '.join(sorted(true)) or 'no relation'} target"


def _placed(d: Detection) -> DetectedObject:
    """The box for the shapes world's rule, which is GenEval's, in pixels."""
    x0, y0, x1, y1 = d.box
    return DetectedObject("", "", (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, d.score)


def _judge(tools: Tools, items: Sequence[Item], images: Sequence[PIL.Image.Image]) -> list[Verdict]:
    find, name = detector(tools.detector, tools.device), None
    verdicts = []
    for item, image, detections in zip(items, images, find.find(images, SURE, 1 if tools.device == "cpu" else 8)):
        row, there = item.reference, things(detections, item.reference["tag"])

        def colours(some: Sequence[Detection], noun: str, image: PIL.Image.Image = image) -> list[str]:
            nonlocal name
            name = name or colourist(tools.clip, tools.device)
            return name.name(image, some, noun)

        ok, reason = verdict(row, there, colours)
        verdicts.append(Verdict(ok, reason, {k: float(len(v)) for k, v in there.items()}))
    return verdicts


# --- scores -----------------------------------------------------------------------------------------------------------


def scores(stamp: str, rights: Mapping[str, Sequence[tuple[float, str]]]) -> dict[str, Score]:
    """Of (right, prompt) of every picture by tag: each tag, their mean where all six are there, and, as the official
    summary has it, the share of all pictures and of prompts with any picture right."""
    groups = {tag: ([v for v, _ in pictures], [p for _, p in pictures]) for tag, pictures in rights.items()}
    table = {f"{stamp}/{tag}": clustered(*group) for tag, group in groups.items()}
    if set(groups) == set(aggregate.GENEVAL):
        table = {f"{stamp}/overall": macro(groups)} | table
    values = [value for grades, _ in groups.values() for value in grades]
    prompts = [f"{tag}/{p}" for tag, (_, c) in groups.items() for p in c]
    any_right: dict[str, float] = {}
    for value, prompt in zip(values, prompts, strict=True):
        any_right[prompt] = max(any_right.get(prompt, 0.0), value)
    table[f"{stamp}/images"] = clustered(values, prompts)
    return table | {f"{stamp}/prompts-with-any": clustered(list(any_right.values()), list(any_right))}


def read_results(file: Path) -> dict[str, Score]:
    """The scores of an official ``results.jsonl``, under ``geneval@official``."""
    rights: dict[str, list[tuple[float, str]]] = {}
    for n, row in enumerate(files.rows(file), 1):
        where = f"{file} line {n}"
        tag, prompt = files.field(row, ("tag",), where), files.field(row, ("prompt",), where)
        rights.setdefault(tag, []).append((float(files.field(row, ("correct",), where, bool)), prompt))
    if not rights:
        raise ValueError(f"{file} has no rows")
    return scores("geneval@official", rights)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """GenEval with the official prompts of ``file``, or with ours."""
    rows = templates() if file is None else read_metadata(file)
    stamp = f"geneval@{protocol(rows, file)}[{Path(tools.detector).name}]"
    n = tools.pictures or PICTURES

    def items(seed: int, size: int) -> list[Item]:
        drawings = []
        for picture in range(n):
            for i, row in enumerate(rows):
                key = f"geneval/{row['tag']}/{i:05d}/{picture}"
                sample = Sample(key, (user(row["prompt"]),))
                place = f"{i:05d}/samples/{picture:04d}.png"
                drawings.append(
                    Item(key, "geneval", row["tag"], row["prompt"], sample, seed_of(seed, key), f"{i:05d}", row, place)
                )
        return drawings

    scorer = {
        "detector": tools.detector,
        "clip": tools.clip,
        "least": SURE,
        "least counting": SURE_COUNTING,
        "most": MOST,
    }
    return Benchmark(
        "geneval",
        "draw",
        items,
        partial(_judge, tools),
        lambda outcomes: scores(
            stamp,
            {
                tag: [(float(o.verdict.ok), o.item.cluster) for o in group]
                for tag, group in by_category(outcomes).items()
            },
        ),
        pictures_per_prompt=n,
        scorer=scorer,
        macro=True,
        layout=write_layout,
    )


def write_layout(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """The official tree, NUMBER/metadata.jsonl and NUMBER/samples/PICTURE.png, and ``results.jsonl`` of the verdicts.
    A picture that could not be drawn is not there: the official scorer counts what it finds."""
    rows = []
    for o in outcomes:
        path = folder / o.item.place
        metadata = path.parent.parent / "metadata.jsonl"
        if not metadata.is_file():
            disk.write_text(metadata, json.dumps(dict(o.item.reference)) + "\n")
        if o.picture is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(o.picture, Path):
            shutil.copyfile(o.picture, path)
        else:
            files.save(o.picture, path)
        if o.verdict is UNJUDGED:
            continue
        row = {"filename": o.item.place, "tag": o.item.category, "prompt": o.item.prompt, "correct": o.verdict.ok}
        row |= {"reason": o.verdict.reason, "metadata": json.dumps(dict(o.item.reference)), "details": "{}"}
        rows.append(row)
    if rows:
        disk.write_text(folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
