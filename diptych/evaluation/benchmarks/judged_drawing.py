"""Drawings that a vision-language judge scores: DPG-Bench, WISE, GenEval 2; and printed text, read back.

The judge is anyone's (``judge.Judge``), so its name stands in every score. What it is told is in our words unless the
user brings the official ones (``--rubrics FOLDER``), and the score says which.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, prod
from pathlib import Path

import PIL.Image

from diptych.core.sample import Sample, user
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks.shapes import seed_of
from diptych.evaluation.benchmarks.table import Tools
from diptych.evaluation.judges import official, replies, short_answers
from diptych.evaluation.remote import tiled
from diptych.evaluation.scores import (
    UNJUDGED,
    Benchmark,
    Item,
    Outcome,
    Score,
    Verdict,
    by_category,
    each,
    grades,
    macro,
    ratio,
    share,
    weighted,
)
from diptych.machine import disk

UNREAD = "the judge's reply cannot be read"


def _item(name: str, category: str, id: str, prompt: str, seed: int, reference: Mapping, place: str, picture: int = 0) -> Item:  # fmt: skip  # noqa: E501
    key = f"{name}/{category}/{id}/{picture}"
    return Item(key, name, category, prompt, Sample(key, (user(prompt),)), seed_of(seed, key), id, reference, place)


# --- DPG-Bench --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposition:
    """A question of a dense prompt; it counts only where those that it depends on are answered with yes."""

    id: int
    question: str
    parents: tuple[int, ...]
    category: str


def read_dpg(file: Path) -> dict[str, tuple[str, list[Proposition]]]:
    """{item: (prompt, its questions in order)} of a ``dpg_bench.csv``. Raises ``ValueError`` naming the line."""
    found: dict[str, tuple[str, list[Proposition]]] = {}
    for n, row in enumerate(files.table(file), 2):
        where = f"{file} line {n}"
        if row.get("proposition_id") == "proposition_id":  # a second header line
            continue
        item, number = files.field(row, ("item_id",), where), files.field(row, ("proposition_id",), where, int)
        dependency = (row.get("dependency") or "0").split(",")
        if not all(p.strip().isdigit() for p in dependency):
            raise ValueError(f"{where}: dependency is {row['dependency']!r}, not proposition ids with commas")
        question = files.field(row, ("question_natural_language", "question"), where)
        category = files.field(row, ("category_broad", "category"), where).strip().lower()
        found.setdefault(item, (files.field(row, ("text", "prompt"), where), []))[1].append(
            Proposition(number, question, tuple(int(p) for p in dependency if int(p)), category)
        )
    if not found:
        raise ValueError(f"{file} has no rows")
    return found


def dependent(said: Mapping[int, bool], propositions: Sequence[Proposition]) -> dict[int, bool]:
    """The answers with every one set to no whose parent is no, in the order of ids, so that a no is inherited."""
    out = dict(said)
    for p in sorted(propositions, key=lambda p: p.id):
        if not all(out.get(parent, True) for parent in p.parents):
            out[p.id] = False
    return out


DPG_ASK = "{question}\nAnswer with yes or no only."


def _dpg(file: Path, tools: Tools) -> Benchmark:
    judge, rows, n = tools.need_judge("dpg"), read_dpg(file), tools.pictures or 4
    ask, stamp = tools.rubric("dpg", DPG_ASK), f"dpg@ours{tools.judged('dpg')}"

    def items(seed: int, size: int) -> list[Item]:
        reference = {k: {"questions": [[p.id, p.question, list(p.parents), p.category] for p in q]} for k, (_, q) in rows.items()}  # fmt: skip  # noqa: E501
        return [
            _item(
                "dpg",
                "all",
                k,
                prompt,
                seed,
                reference[k],
                f"{k}.png" if n == 1 else f"{k}.png#{picture}" if n == 4 else f"{k}-{picture}.png",
                picture,
            )  # fmt: skip  # noqa: E501
            for picture in range(n)
            for k, (prompt, _) in rows.items()
        ]

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        asked = [Proposition(i, q, tuple(p), c) for i, q, p, c in item.reference["questions"]]
        said: dict[int, bool] = {}
        for p in asked:
            answer = judge.read(replies.yes_no, ask.replace("{question}", p.question), [image])
            if answer is None:
                return Verdict(False, f"{UNREAD}: {p.question}", failed=True, value=0.0)
            said[p.id] = answer
        right = dependent(said, asked)
        parts: dict[str, float] = {}
        for p in asked:
            parts[f"{p.category}/right"] = parts.get(f"{p.category}/right", 0.0) + right[p.id]
        wrong = "; ".join(p.question for p in asked if not right[p.id])
        return Verdict(not wrong, wrong and f"no: {wrong}", parts, sum(right.values()) / len(asked))

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        where = [o.item.cluster for o in outcomes]
        categories = sorted({p.category for _, q in rows.values() for p in q})
        found = {f"{stamp}/overall": grades(outcomes).times(100)}
        for c in categories:  # of all pictures; the official script takes those of each prompt's last one
            asked = [sum(q[3] == c for q in o.item.reference["questions"]) for o in outcomes]
            right = [o.verdict.parts.get(f"{c}/right", 0.0) for o in outcomes]
            if any(asked):
                found[f"{stamp}/{c}"] = ratio(right, asked, where).times(100)
        return found

    return Benchmark(
        "dpg", "draw", items, judge.of(work), scores, pictures_per_prompt=n, scorer=judge.stamp | {"ask": ask},
        layout=write_grids,
    )  # fmt: skip


def write_grids(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """One picture of a prompt's pictures, two by two, named as the prompt's file. Prompts with a failure are left out,
    and named in ``failed.txt``."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.item.cluster, []).append(o)
    failed = [k for k, of in groups.items() if any(o.picture is None for o in of)]
    for k, of in groups.items():
        if k not in failed:
            files.save(tiled([o.image for o in of if o.image is not None]), folder / f"{k}.png")
    if failed:
        disk.write_text(folder / "failed.txt", "\n".join(failed) + "\n")


# --- WISE -------------------------------------------------------------------------------------------------------------

WISE_LEGACY = """A picture was drawn for this prompt: "{prompt}"
What it should show, and why: {explanation}

Give three marks, each 0, 1 or 2, and be strict.
Consistency: does the picture show what the explanation says it should? 0 not at all, 1 in part, 2 fully.
Realism: is it physically plausible and accurate in its details? 0 no, 1 with flaws, 2 yes.
Aesthetic Quality: 0 poor, 1 fair, 2 good.

Reply with exactly three lines:
Consistency: MARK
Realism: MARK
Aesthetic Quality: MARK"""
WISE_BINARY = """A picture was drawn for this prompt: "{prompt}"
What it should show, and why: {explanation}

Does the picture show what the explanation says it should? Reply with exactly one line, 1 for yes and 0 for no:
Score: MARK"""


def read_wise(path: Path) -> list[dict]:
    """The rows (prompt_id, Prompt, Explanation, category) of WISE's JSON, of one file or every one of a folder."""
    rows: list[dict] = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        found = files.load(file)
        if not isinstance(found, list):
            raise ValueError(f"{file} is not a list of prompts")
        for n, row in enumerate(found, 1):
            where = f"{file} row {n}"
            rows.append(
                {
                    "id": files.field(row, ("prompt_id",), where, int),
                    "prompt": files.field(row, ("Prompt", "prompt"), where),
                    "explanation": files.field(row, ("Explanation", "explanation"), where),
                    "category": f"{row.get('Category', '')} {row.get('Subcategory', '')}".lower(),
                }
            )
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return sorted(rows, key=lambda row: row["id"])


def wise_category(row: Mapping, verified: bool) -> str:
    """One of the six categories: by id, as the legacy script has it; the verified set has culture by id and says the
    rest. Raises ``ValueError`` for a prompt of none."""
    if not verified:
        for name, last in aggregate.WISE_IDS.items():
            if 1 <= row["id"] <= last:
                return name
    elif 1 <= row["id"] <= aggregate.WISE_IDS["culture"]:
        return "culture"
    else:
        names = {"time": "time", "spac": "space", "biol": "biology", "physic": "physics", "chemi": "chemistry"}
        found = {name for part, name in names.items() if part in row["category"]}
        if len(found) == 1:
            return found.pop()
    raise ValueError(f"WISE prompt {row['id']} ({row['category']!r}) is of no category of {', '.join(aggregate.WISE)}")


def _wise(file: Path, tools: Tools, verified: bool) -> Benchmark:
    name = "wise-verified" if verified else "wise"
    judge, rows = tools.need_judge(name), read_wise(file)
    rubric = tools.rubric(name, WISE_BINARY if verified else WISE_LEGACY)
    stamp = f"wise@{'verified' if verified else 'legacy'}{tools.judged(name)}"
    weights = aggregate.VERIFIED if verified else aggregate.WISE

    def items(seed: int, size: int) -> list[Item]:
        return [
            _item(name, wise_category(r, verified), str(r["id"]), r["prompt"], seed, r, f"{r['id']}.png") for r in rows
        ]

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        text = rubric.replace("{prompt}", item.prompt).replace("{explanation}", item.reference["explanation"])
        names = ("Score",) if verified else ("Consistency", "Realism", "Aesthetic Quality")
        marks = judge.read(lambda r: replies.named_marks(r, names, 0, 1 if verified else 2), text, [image])
        if marks is None:
            return Verdict(False, UNREAD, failed=True, value=0.0)
        value = marks["score"] if verified else aggregate.wiscore(*marks.values())
        told = ", ".join(f"{k} {v:g}" for k, v in marks.items())
        return Verdict(value >= 0.5, told, marks, value)

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        groups = by_category(outcomes)
        found = {f"{stamp}/{k}": grades(of) for k, of in groups.items()}
        return ({f"{stamp}/overall": weighted(groups, weights)} if set(groups) == set(weights) else {}) | found

    return Benchmark(
        name, "draw", items, judge.of(work), scores, scorer=judge.stamp | {"rubric": rubric}, macro=True,
        layout=write_flat,
    )  # fmt: skip


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


# --- GenEval 2 --------------------------------------------------------------------------------------------------------

SOFT_ASK = "{question}\nAnswer with one word only."
LIKELIEST = 20  # first tokens


def probability(first: Sequence[tuple[str, float]], answer: str) -> float:
    """How likely a judge's reply begins with the answer: the mass of the first tokens that are it, numbers as words or
    digits, or the beginning of an answer of several words or tokens."""
    true = official.evalai(answer)
    total = 0.0
    for token, logprob in first:
        said = official.evalai(token)
        if said and (said == true or (len(said) > 1 and true.startswith(said))):
            total += exp(logprob)
    return min(1.0, total)


def _geneval2(file: Path, tools: Tools) -> Benchmark:
    judge, rows = tools.need_judge("geneval2"), files.rows(file)
    ask, judged = tools.rubric("geneval2", SOFT_ASK), tools.judged("geneval2")
    for n, row in enumerate(rows, 1):
        where = f"{file} line {n}"
        files.field(row, ("prompt",), where)
        asked = files.field(row, ("vqa_list",), where, list)
        if not asked or not all(isinstance(p, list) and len(p) == 2 for p in asked):
            raise ValueError(f"{where}: vqa_list must be a list of [question, answer], not {asked!r}")

    def items(seed: int, size: int) -> list[Item]:
        return [
            _item("geneval2", str(r.get("category", "all")), f"{i:05d}", r["prompt"], seed,
                  {"vqa_list": r["vqa_list"]}, f"{i:05d}.png")
            for i, r in enumerate(rows)
        ]  # fmt: skip

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        likely = [
            probability(judge.ask(ask.replace("{question}", q), [image], logprobs=LIKELIEST, max_tokens=4).first, a)
            for q, a in item.reference["vqa_list"]
        ]
        wrong = [q for (q, _), p in zip(item.reference["vqa_list"], likely, strict=True) if p < 0.5]
        gm = prod(likely) ** (1 / len(likely))
        return Verdict(not wrong, "; ".join(wrong), {"gm": gm}, sum(likely) / len(likely))

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        gm = {"": ([o.verdict.parts.get("gm", 0.0) for o in outcomes], [o.item.cluster for o in outcomes])}
        arithmetic = f"geneval2@soft-tifa-am{judged}"
        found = {f"{arithmetic}/overall": grades(outcomes).times(100)}
        found |= {f"{arithmetic}/{k}": grades(of).times(100) for k, of in by_category(outcomes).items() if k != "all"}
        return found | {f"geneval2@soft-tifa-gm{judged}/overall": macro(gm, graded=True).times(100)}

    def layout(folder: Path, outcomes: Sequence[Outcome]) -> None:
        write_flat(folder, outcomes)
        disk.write_text(
            folder / "images.json", json.dumps({o.item.prompt: o.item.place for o in outcomes if o.picture})
        )

    return Benchmark(
        "geneval2", "draw", items, judge.of(work), scores, scorer=judge.stamp | {"ask": ask}, layout=layout
    )


# --- printed text -----------------------------------------------------------------------------------------------------

READ_ASK = "Write down all text in this picture, exactly as it is, and nothing else. If there is none, write NONE."


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


def read_back(said: str, true: str) -> dict[str, float]:
    """How much of a text a reader found: ``words`` is the share of its words, ``similarity`` 1 - edit distance / length
    of the whole, both in lower case without punctuation."""
    a, b = ("".join(c if c.isalnum() else " " for c in t.lower()).split() for t in (said, true))
    left, found = list(a), 0
    for word in b:
        if word in left:
            left.remove(word)
            found += 1
    whole = " ".join(a), " ".join(b)
    near = 1 - short_answers.edit_distance(*whole) / max(len(whole[0]), len(whole[1]), 1)
    return {"words": found / len(b), "similarity": near}


def _text(file: Path, tools: Tools) -> Benchmark:
    rows, judge = files.rows(file), tools.judge
    for n, row in enumerate(rows, 1):
        files.field(row, ("prompt",), f"{file} line {n}")
        if not any(c.isalnum() for c in files.field(row, ("text",), f"{file} line {n}")):
            raise ValueError(f"{file} line {n}: the text {row['text']!r} has no letter to read")
    reader = f"[{judge.model}]" if judge else "[tesseract]"

    def items(seed: int, size: int) -> list[Item]:
        return [
            _item(
                "text",
                str(r.get("category", "all")),
                f"{i:05d}",
                r["prompt"],
                seed,
                {"text": str(r["text"])},
                f"{i:05d}.png",
            )  # fmt: skip  # noqa: E501
            for i, r in enumerate(rows)
        ]

    def work(item: Item, image: PIL.Image.Image) -> Verdict:
        said = judge.ask(READ_ASK, [image]).text if judge else tesseract(image)
        parts = read_back("" if said.strip() == "NONE" else said, item.reference["text"])
        return Verdict(parts["words"] == 1, f"reads {' '.join(said.split())!r}", parts, parts["words"])

    def scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
        near = {"": ([o.verdict.parts.get("similarity", 0.0) for o in outcomes], [o.item.cluster for o in outcomes])}
        return {
            f"text@words{reader}/overall": grades(outcomes),
            f"text@whole{reader}/overall": share(outcomes),
            f"text@edit-similarity{reader}/overall": macro(near, graded=True),
        }

    judging = judge.of(work) if judge else each(work)
    return Benchmark("text", "draw", items, judging, scores, scorer={"reader": reader}, layout=write_flat)


_KINDS: dict[str, Callable[[Path, Tools], Benchmark]] = {
    "dpg": _dpg,
    "wise": partial(_wise, verified=False),
    "wise-verified": partial(_wise, verified=True),
    "geneval2": _geneval2,
    "text": _text,
}


def benchmark(name: str, file: Path | None, tools: Tools) -> Benchmark:
    """The benchmark of that name with the user's file."""
    assert file is not None
    return _KINDS[name](file, tools)
