"""Printed text: prompts for pictures that show a text, which is read back by ``tesseract`` or by a judge."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import PIL.Image

from diptych.evaluation import files
from diptych.evaluation.benchmarks.drawing import picture_item, write_flat
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import short_answers
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark, Item, Outcome, Score, Verdict, each, grades, macro, share

ASK = "Write down all text in this picture, exactly as it is, and nothing else. If there is none, write NONE."


def tesseract(image: PIL.Image.Image) -> str:
    """What the program ``tesseract`` reads. Raises ``ValueError`` where it is not installed."""
    if shutil.which("tesseract") is None:
        raise ValueError(
            "reading text needs the program tesseract on the path, or a judge: --judge MODEL --judge-url ..."
        )
    out = io.BytesIO()
    scale = max(1, round(300 / min(image.size)))  # it was made for scans
    image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.BICUBIC).save(out, "PNG")
    done = subprocess.run(["tesseract", "stdin", "stdout", "--psm", "11"], input=out.getvalue(), capture_output=True)
    if done.returncode:
        raise ValueError(f"tesseract failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


def read_back(reading: str, true: str) -> dict[str, float]:
    """How much of a text a reader found: ``words`` is the share of its words, ``similarity`` 1 - edit distance / length
    of the whole, both in lower case without punctuation."""
    a, b = ("".join(c if c.isalnum() else " " for c in t.lower()).split() for t in (reading, true))
    left, right = list(a), 0
    for word in b:
        if word in left:
            left.remove(word)
            right += 1
    whole = " ".join(a), " ".join(b)
    near = 1 - short_answers.edit_distance(*whole) / max(len(whole[0]), len(whole[1]), 1)
    return {"words": right / len(b), "similarity": near}


def read_prompts(file: Path) -> list[dict]:
    """The rows (prompt, text, category) of a jsonl file. Raises ``ValueError`` naming the line."""
    rows = files.rows(file)
    for n, row in enumerate(rows, 1):
        files.field(row, ("prompt",), f"{file} line {n}")
        if not any(c.isalnum() for c in files.field(row, ("text",), f"{file} line {n}")):
            raise ValueError(f"{file} line {n}: the text {row['text']!r} has no letter to read")
    return rows


def text_items(rows: Sequence[dict], seed: int, size: int) -> list[Item]:
    """One picture a prompt, numbered from 0."""
    return [
        picture_item(
            "text",
            str(r.get("category", "all")),
            f"{i:05d}",
            r["prompt"],
            seed,
            {"text": str(r["text"])},
            f"{i:05d}.png",
        )
        for i, r in enumerate(rows)
    ]


def judge_text(judge: Judge | None, item: Item, image: PIL.Image.Image) -> Verdict:
    """Right where every word of the text is read back."""
    reading = judge.ask(ASK, [image]).text if judge else tesseract(image)
    parts = read_back("" if reading.strip() == "NONE" else reading, item.reference["text"])
    return Verdict(parts["words"] == 1, f"reads {' '.join(reading.split())!r}", parts, parts["words"])


def text_scores(reader: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The share of words read, of texts read whole, and the mean edit similarity."""
    near = {"": ([o.verdict.parts.get("similarity", 0.0) for o in outcomes], [o.item.cluster for o in outcomes])}
    return {
        f"text@words{reader}/overall": grades(outcomes),
        f"text@whole{reader}/overall": share(outcomes),
        f"text@edit-similarity{reader}/overall": macro(near, graded=True),
    }


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """Printed text with the user's jsonl."""
    assert file is not None
    rows, judge = read_prompts(file), tools.judge
    reader, work = f"[{judge.model}]" if judge else "[tesseract]", partial(judge_text, judge)
    return Benchmark(
        "text",
        "draw",
        partial(text_items, rows),
        judge.of(work) if judge else each(work),
        partial(text_scores, reader),
        scorer={"reader": reader},
        layout=write_flat,
    )
