"""CLIPScore (arXiv 2104.08718): how well a drawn picture fits its prompt, 2.5 * max(cos, 0) of CLIP's embeddings.

The authors' script uses ViT-B/32 and puts "A photo depicts " before a caption. Here CLIP is transformers' in float32,
of the user's choice (``--clip``), so the score is called ``clipscore@ours[CLIP]``; with openai/clip-vit-base-patch32
the formula and the network are the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import PIL.Image

from diptych.evaluation import files
from diptych.evaluation.benchmarks.drawing import picture_item, write_flat
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges.detector import colourist
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, by_category, grades

WEIGHT = 2.5
PREFIX = "A photo depicts "
SCALE = (0.0, WEIGHT)


def clip_score(cosine: float) -> float:
    """The score of a cosine, in [0, 2.5]."""
    return WEIGHT * max(cosine, 0.0)


def prompt_items(rows: Sequence[dict], seed: int, size: int) -> list[Item]:
    """One picture a prompt, numbered from 0."""
    return [
        picture_item("clipscore", str(r.get("category", "all")), f"{i:05d}", r["prompt"], seed, {}, f"{i:05d}.png")
        for i, r in enumerate(rows)
    ]


def judge_pictures(tools: Tools, items: Sequence[Item], images: Sequence[PIL.Image.Image]) -> list[Verdict]:
    """The score of each picture and its prompt."""
    clip = colourist(tools.clip, tools.device)
    cosines = clip.fit(images, [PREFIX + item.prompt for item in items])
    return [Verdict(True, "", {"cosine": c}, clip_score(c)) for c in cosines]


def clip_scores(stamp: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The mean of all pictures, and by category."""
    groups = {"overall": outcomes} | {k: some for k, some in by_category(outcomes).items() if k != "all"}
    return {f"{stamp}/{k}": grades(some, SCALE) for k, some in groups.items()}


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """CLIPScore of the prompts of the user's jsonl."""
    assert file is not None
    rows = files.rows(file)
    for n, row in enumerate(rows, 1):
        files.field(row, ("prompt",), f"{file} line {n}")
    stamp = f"clipscore@ours[{Path(tools.clip).name}]"
    return Benchmark(
        name,
        "draw",
        partial(prompt_items, rows),
        partial(judge_pictures, tools),
        partial(clip_scores, stamp),
        scorer={"clip": tools.clip},
        layout=write_flat,
    )
