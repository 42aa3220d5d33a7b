"""What benchmarks of drawn pictures share: an item for each picture of a prompt, and a flat folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diptych.core.sample import Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.scores import UNJUDGED, Item, Outcome
from diptych.machine import disk

UNREAD = "the judge's reply cannot be read"


def picture_item(
    name: str, category: str, id: str, prompt: str, seed: int, reference: Mapping, place: str, picture: int = 0
) -> Item:
    """The item of a prompt's picture number ``picture``; pictures of one prompt are a cluster."""
    key = f"{name}/{category}/{id}/{picture}"
    return Item(key, name, category, prompt, Sample(key, (user(prompt),)), seed_of(seed, key), id, reference, place)


def write_flat(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Every picture at its place, ``prompts.jsonl`` (prompt, file), and ``scores.jsonl`` of the verdicts' parts."""
    prompts, marks = [], []
    for o in outcomes:
        if o.image is not None:
            files.save(o.image, folder / o.item.place)
            prompts.append({"id": o.item.cluster, "prompt": o.item.prompt, "file": o.item.place})
        if o.verdict is not UNJUDGED:
            marks.append({"prompt_id": o.item.cluster, **o.verdict.parts, "score": o.verdict.grade})
    for name, rows in (("prompts", prompts), ("scores", marks)):
        if rows:
            disk.write_text(folder / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
