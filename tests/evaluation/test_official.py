"""Official rules against golden tables (``golden/*.jsonl``): the first line of each names the program that computed the
values; the others are rows of (reply, answer, official value). docs/evaluation.md prints the counts of differences."""

import json
from pathlib import Path

import pytest

from diptych.core.sample import Sample
from diptych.evaluation.benchmarks import aggregate, captions, questions
from diptych.evaluation.judges import official, replies, short_answers
from diptych.evaluation.scores import Item, Outcome, Verdict

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {"A": "red", "B": "dark red", "C": "a blue circle", "D": "7"}


def golden(name):
    source, *rows = map(json.loads, (GOLDEN / f"{name}.jsonl").read_text("utf-8").splitlines())
    assert source["source"] and len(rows) >= 40
    return rows


def letter(value):
    return value if value in OPTIONS else None


def on_options(choose):
    return lambda row: choose(row["reply"], OPTIONS)


def own_letter(row):
    return replies.choice(row["reply"], OPTIONS) or ""


def on_reply(read):
    return lambda row: read(row["reply"])


def on_answers(grade):
    return lambda row: round(grade(row["reply"], row["answers"]), 6)


RULES = {  # table: (the official rule, the library's own reading, on how many rows they differ)
    "mme": (on_reply(official.mme), on_reply(replies.yes_no), 32),
    "pope": (on_reply(official.pope), on_reply(replies.yes_no), 22),
    "mmbench": (on_options(official.mmbench), on_options(replies.choice), 31),
    "mmmu_choice": (on_options(official.mmmu_choice), on_options(replies.choice), 39),
    "mmmu_open": (on_answers(official.mmmu_open), on_answers(short_answers.relaxed), 35),
    "seedbench": (on_reply(lambda r: letter(official.first_letter(r))), on_options(replies.choice), 53),
    "cv_bench_letter": (on_reply(official.cv_bench), own_letter, 54),
    "mmvp_letter": (on_reply(official.mmvp), own_letter, 49),
    "realworldqa": (lambda r: official.realworldqa(r["reply"], r["answers"][0]), on_answers(short_answers.relaxed), 5),
    "evalai": (on_reply(official.evalai), None, 0),
    "vqa": (on_answers(official.vqa_accuracy), on_answers(short_answers.vqa_accuracy), 50),
    "vqav2": (on_answers(lambda r, a: official.vqa_accuracy(r, a, official.vqav2)), None, 0),
    "anls": (on_answers(official.anls), on_answers(short_answers.anls), 14),
    "relaxed": (on_answers(official.relaxed), on_answers(short_answers.relaxed), 3),
    "ocrbench": (
        lambda r: official.ocrbench(r["reply"], r["answers"], r["formula"]),
        lambda r: short_answers.contains(r["reply"], r["answers"], r["formula"]),
        39,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_official_values(name):
    rule, own, differing = RULES[name]
    rows = golden(name)
    assert [r for r in rows if rule(r) != r["value"]] == []
    if own is not None:
        assert sum(own(r) != r["value"] for r in rows) == differing


def test_popes_authors_read_the_first_sentence():
    """Written down from their evaluate.py, not computed with it."""
    for reply, value in (
        ("Yes", True),
        ("No", False),
        ("no, there is", False),
        ("It is not there", False),
        ("Yes. No dog.", True),
        ("maybe", True),
        ("NO", True),
        ("nothing", True),
        ("", True),
        ("there is no dog. yes", False),
        ("No.", False),
        ("Not", True),
    ):
        assert official.pope_authors(reply) is value, reply


# --- scores of many replies -------------------------------------------------------------------------------------------


def outcome(id, category, cluster, right, reference=(), text=None):
    item = Item(id, "b", category, "q", Sample(id, ()), 0, cluster, {"answer": "yes", **dict(reference)})
    return Outcome(item, Verdict(bool(right), "", {"official": float(right)}), text)


def values(scores):
    return {k.partition("@official/")[2]: s.value for k, s in scores.items()}


def test_cv_bench_scores():
    for row in golden("cv_bench"):
        outcomes = [outcome(str(i), "x", str(i), right, {"source": s}) for i, (s, right) in enumerate(row["items"])]
        scores = values(questions._cvbench_scores("b", ["official"], outcomes))
        assert scores["overall"] == pytest.approx(row["value"], abs=1e-6)
        assert aggregate.cv_bench(scores["ADE20K"], scores["COCO"], scores["Omni3D"]) == pytest.approx(
            row["value"], abs=1e-6
        )


def test_mmvp_scores():
    for row in golden("mmvp"):
        outcomes = [outcome(str(i), "all", str(i // 2), r, {"pair": str(i // 2)}) for i, r in enumerate(row["right"])]
        scores = values(questions._mmvp_scores("b", ["official"], outcomes))
        assert scores["pairs"] == pytest.approx(row["value"], abs=1e-6)
        assert scores["accuracy"] == pytest.approx(row["accuracy"], abs=1e-6)


def test_hallusion_scores():
    for row in golden("hallusion"):
        outcomes = [
            outcome(
                str(i),
                category,
                str(i),
                right,
                {"subcategory": sub, "set_id": group, "figure_id": figure, "question": question},
            )
            for i, (category, sub, group, figure, question, right) in enumerate(row["items"])
        ]
        scores = values(questions._hallusion_scores({"official": "b@official"}, outcomes))
        assert scores == pytest.approx({k: row[k] for k in ("aAcc", "fAcc", "qAcc")}, abs=1e-6)


def test_mme_scores():
    for row in golden("mme_total"):
        outcomes = [
            outcome(f"{i}/{k}", "color", str(i), right)
            for i, picture in enumerate(row["pictures"])
            for k, right in enumerate(picture)
        ]
        scores = values(questions._mme_scores({"official": "b@official"}, outcomes))
        assert scores["color"] == pytest.approx(row["value"], abs=1e-4)


def test_cider():
    assert all(" ".join(captions.words(r["text"])) == r["value"] for r in golden("ptb"))
    rows = golden("cider")
    for number in {r["set"] for r in rows}:
        some = [r for r in rows if r["set"] == number]
        cider = captions.Cider({str(i): r["answers"] for i, r in enumerate(some)})
        assert [cider(str(i), r["reply"]) for i, r in enumerate(some)] == pytest.approx(
            [r["value"] for r in some], abs=1e-5
        )
        outcomes = [
            outcome(str(i), "all", str(i), 1, {"answers": r["answers"]}, r["reply"]) for i, r in enumerate(some)
        ]
        [score] = captions.scores("b", outcomes).values()
        assert score.value == pytest.approx(some[0]["corpus"], abs=1e-5) and 0 <= score.low <= score.high <= 10
