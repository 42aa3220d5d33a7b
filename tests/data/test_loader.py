"""Packed rows: the same for any number of workers and ranks, exactly resumable, full, honest about bad samples."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from dataclasses import dataclass, fields
from itertools import islice

import PIL.Image
import pytest
import torch

from diptych.core.batch import Batch
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.core.tensors import NONE
from diptych.data.loader import Loader, Row, merge_states
from diptych.data.mixture import bits
from diptych.data.workers import read_ahead
from tests.support.loading import make_loader


@dataclass(frozen=True)
class Words:
    """Samples whose one text says how long they are; some draw a picture; some are bad."""

    name: str
    length: int = 2**40
    low: int = 20
    high: int = 60
    pictures: bool = False
    bad: int = 0  # every bad-th row cannot be read
    long: int = 0  # every long-th row is longer than any budget

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if self.bad and index % self.bad == 0:
            raise ValueError(f"{self.name}.jsonl:{index + 1}: picture is truncated")
        n = self.low + bits(self.name, index) % (self.high - self.low + 1)
        n = 10_000 if self.long and index % self.long == 0 else n
        picture = [Image(PIL.Image.new("RGB", (4, 4), (index % 256, 0, 0)), "target")] if self.pictures else []
        return Sample(str(index), (user(f"{n} {index}"), assistant("yes", *picture)))


def lay_out(sample: Sample, drop: frozenset[str] = frozenset()) -> Layout:
    """A toy family: as many words as the text says, then four tokens a picture."""
    segments = []
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Image):
                pixels = torch.full((3, 4, 4), part.pixels.getpixel((0, 0))[0], dtype=torch.uint8)
                segments.append(Segment(Kind.NOISED, (NONE,) * 4, image=pixels, grid=(2, 2), full=True, route=1))
            elif isinstance(part, Text) and part.loss:
                segments.append(Segment(Kind.TEXT, (1, 2), targets=(2, NONE)))
            elif "text" not in drop:
                n, index = map(int, part.text.split())
                segments.append(Segment(Kind.TEXT, (index % 97,) * n))
    return Layout(sample.id, tuple(segments))


SOURCES = {"plain": Words("plain", 37), "drawn": Words("drawn", pictures=True)}
DATA = (SOURCES, {"plain": 1.0, "drawn": 2.0}, lay_out)
PLAN = {"tokens": 256, "pictures": 4, "routes": 2, "seed": 3, "streams": 4, "dropout": {"text": 0.3}}


def first(loader: Loader, n: int) -> list[Row]:
    return list(islice(loader, n))


def columns(batch: Batch) -> list:
    """Everything in a batch, tensors as bytes."""

    def flat(value):
        if isinstance(value, torch.Tensor):
            return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
        if isinstance(value, tuple):
            return tuple(map(flat, value))
        if hasattr(value, "__dataclass_fields__"):
            return tuple(flat(getattr(value, f.name)) for f in fields(value))
        return value

    return flat(batch)


def same(a: list[Row], b: list[Row]) -> bool:
    return [(r.index, columns(r.batch), r.stats) for r in a] == [(r.index, columns(r.batch), r.stats) for r in b]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What every other way of loading must give."""
    return first(make_loader(*DATA, **PLAN), 24)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(rows, workers):
    assert same(first(make_loader(*DATA, **PLAN, workers=workers), 24), rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_rows(rows, workers):
    halves = [first(make_loader(*DATA, **PLAN, rank=r, world=2, workers=workers), 12) for r in range(2)]
    assert same([row for pair in zip(*halves, strict=True) for row in pair], rows)


def test_resumes_behind_every_row(rows):
    loader, states = make_loader(*DATA, **PLAN), []
    for _ in islice(loader, 12):
        states.append(json.dumps(loader.state_dict()))
    for at, state in enumerate(states, start=1):
        again = make_loader(*DATA, **PLAN)
        again.load_state_dict(json.loads(state))
        assert same(first(again, 9), rows[at : at + 9])


def test_a_state_speaks_of_what_was_handed_out_and_fits_any_number_of_workers(rows):
    loader = make_loader(*DATA, **PLAN, workers=2)  # two workers run ahead of the consumer
    assert same(first(loader, 5), rows[:5])
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["rows"] == 5
    for workers in (0, 2):
        again = make_loader(*DATA, **PLAN, workers=workers)
        again.load_state_dict(state)
        assert same(first(again, 8), rows[5:13])


def test_iterating_again_continues(rows):
    loader = make_loader(*DATA, **PLAN)
    assert same(first(loader, 5) + first(loader, 5), rows[:10])


def test_resumes_with_another_number_of_ranks(rows):
    ranks = [make_loader(*DATA, **PLAN, rank=r, world=2) for r in range(2)]
    for loader in ranks:
        first(loader, 3)
    alone = [loader.state_dict() for loader in ranks]
    one = make_loader(*DATA, **PLAN)
    with pytest.raises(ValueError, match=r"the state lacks streams \[1, 3\]; merge the states of all ranks first"):
        one.load_state_dict(alone[0])
    one.load_state_dict(json.loads(json.dumps(merge_states(alone))))
    assert same(first(one, 6), rows[6:12])
    four = make_loader(*DATA, **PLAN, rank=1, world=4)
    with pytest.raises(ValueError, match="6 rows do not divide among 4 ranks"):
        four.load_state_dict(merge_states(alone))


def test_ranks_at_different_rows_do_not_merge():
    ranks = [make_loader(*DATA, **PLAN, rank=r, world=2) for r in range(2)]
    first(ranks[0], 1)
    with pytest.raises(ValueError, match=r"differ in 'rows': \[2, 0\]"):
        merge_states([loader.state_dict() for loader in ranks])
    with pytest.raises(ValueError, match="no states to merge"):
        merge_states([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3 when the state was saved and is 4 now"),
        ({"tokens": 300}, "tokens was 256"),
        ({"streams": 8}, "streams was 4"),
        ({"dropout": {}}, "dropout was"),
    ],
)
def test_another_plan_is_refused(change, message):
    with pytest.raises(ValueError, match=f"cannot resume: {message}"):
        make_loader(*DATA, **PLAN | change).load_state_dict(make_loader(*DATA, **PLAN).state_dict())


def test_grown_data_are_refused():
    grown = {"plain": Words("plain", 38), "drawn": SOURCES["drawn"]}
    with pytest.raises(ValueError, match="data set 'plain' had 37 rows when the state was saved and has 38 now"):
        make_loader(grown, *DATA[1:], **PLAN).load_state_dict(make_loader(*DATA, **PLAN).state_dict())


def test_a_finite_set_is_visited_once_per_epoch():
    """Over all streams, no row comes a second time before every row came once (up to what waits in the streams)."""
    loader = make_loader({"a": Words("a", 400)}, {"a": 1}, lay_out, tokens=256, pictures=0, streams=4, ahead=4)
    seen: list[str] = []
    for row in loader:
        seen += row.batch.samples
        if len(seen) >= 1200:
            break
    counts = [seen.count(f"a/{i}") for i in range(400)]
    assert sum(counts) == len(seen) and min(counts) >= 2 and max(counts) <= 4


@pytest.mark.parametrize(("low", "high"), [(20, 60), (16, 600)])
def test_rows_are_full(low, high):
    loader = make_loader({"a": Words("a", low=low, high=high)}, {"a": 1}, lay_out, tokens=2048, pictures=0, streams=4)
    fills = [row.stats.fill for row in islice(loader, 40)]
    assert sum(fills) / len(fills) >= 0.95
    assert min(fills) >= 0.9


def test_budgets_hold_and_stats_are_right(rows):
    for index, row in enumerate(rows):
        batch, stats = row.batch, row.stats
        assert row.index == index
        assert len(batch) == sum(batch.lengths) == stats.tokens <= PLAN["tokens"]
        assert stats.fill == stats.tokens / PLAN["tokens"]
        assert stats.pictures == sum(len(g.owners) for g in batch.pictures) <= PLAN["pictures"]
        assert stats.target_words == len(batch.samples) == sum(stats.samples.values())
        assert all(s.split("/")[0] in SOURCES for s in batch.samples)
        assert stats.samples == {n: sum(s.startswith(n) for s in batch.samples) for n in stats.samples}
        assert not stats.skipped


def test_mixture_weights_reach_the_rows():
    loader = make_loader(SOURCES, {"plain": 1, "drawn": 3}, lay_out, tokens=512, pictures=64, routes=2, streams=4)
    counts = {"plain": 0, "drawn": 0}
    for row in islice(loader, 80):
        for name, n in row.stats.samples.items():
            counts[name] += n
    assert abs(counts["drawn"] / sum(counts.values()) - 0.75) < 0.05


def test_padding():
    for row in first(make_loader(*DATA, **PLAN, pad_to=256), 3):
        assert len(row.batch) == 256 and int((row.batch.document != NONE).sum()) == row.stats.tokens


def test_a_condition_can_be_dropped_only_together_with_another():
    """``image|text`` is a share of the samples that lost their text, and of no others."""

    def dropped(dropout):
        total = Counter()
        for row in first(make_loader(*DATA, **PLAN | {"dropout": dropout}), 24):
            total.update(row.stats.dropped)
        return total

    text = dropped({"text": 0.5})["text"]
    assert dropped({"text": 0.5, "image|text": 1.0}) == {"text": text, "image": text}
    half = dropped({"text": 0.5, "image|text": 0.5})
    assert half["text"] == text and 0 < half["image"] < text
    assert dropped({"text": 0.0, "image|text": 1.0}) == {}


def test_dropout_is_for_samples_with_a_target_and_belongs_to_the_draw(rows):
    dropped = drawn = 0
    for row in rows:
        dropped += row.stats.dropped.get("text", 0)
        drawn += row.stats.samples.get("drawn", 0)
        for name, n in zip(row.batch.samples, row.batch.lengths, strict=True):
            assert n > 6 or name.startswith("drawn/")  # 2 words + 4 picture tokens: the prompt is gone
    assert drawn > 60 and abs(dropped / drawn - 0.3) < 0.15
    always = first(make_loader(*DATA, **PLAN | {"dropout": {"text": 1.0, "image": 0.0}}), 4)
    for row in always:
        assert row.stats.dropped.get("text", 0) == row.stats.samples.get("drawn", 0)
        assert "image" not in row.stats.dropped


def test_bad_samples_are_skipped_and_named(caplog):
    sources = {"a": Words("a", 40, bad=8)}
    plan = {"tokens": 256, "pictures": 0, "streams": 2, "skip_limit": 5}
    loader = make_loader(sources, {"a": 1}, lay_out, **plan)
    with caplog.at_level(logging.WARNING, logger="diptych.data"):
        rows = first(loader, 20)
    named = {f"a/{i}": f"a.jsonl:{i + 1}: picture is truncated" for i in range(0, 40, 8)}
    assert dict(loader.skipped) == named
    assert {n: why for row in rows for n, why in row.stats.skipped.items()} == named
    assert sorted(r.getMessage() for r in caplog.records) == sorted(f"skipped {n}: {why}" for n, why in named.items())
    assert not any(s.removeprefix("a/") in {"0", "8", "16", "24", "32"} for row in rows for s in row.batch.samples)
    assert loader.state_dict()["skipped"] == named
    assert same(first(make_loader(sources, {"a": 1}, lay_out, **plan, workers=2), 20), rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_skip_limit(workers):
    loader = make_loader(
        {"a": Words("a", 40, bad=4)},
        {"a": 1},
        lay_out,
        tokens=256,
        pictures=0,
        streams=2,
        skip_limit=6,
        workers=workers,
    )
    with pytest.raises(ValueError, match=r"7 bad samples, and the limit is 6:\n  a/\d+: a.jsonl:\d+: pic") as error:
        first(loader, 100)
    assert str(error.value).count("truncated") == 5 and "and 2 more" in str(error.value)


def test_a_set_of_bad_samples_ends(caplog):
    loader = make_loader(
        {"a": Words("a", 3, bad=1)}, {"a": 1}, lay_out, tokens=256, pictures=0, streams=1, skip_limit=50
    )
    with pytest.raises(ValueError, match="3 bad samples in 51 draws"):
        first(loader, 1)


def test_samples_beyond_a_budget_are_bad():
    loader = make_loader({"a": Words("a", 40, long=20)}, {"a": 1}, lay_out, tokens=256, pictures=0, streams=1)
    first(loader, 20)
    assert loader.skipped["a/20"] == "sample 'a/20' has 10002 tokens; a row has room for 256"
    assert set(loader.skipped) == {"a/0", "a/20"}
    none = make_loader(SOURCES, {"drawn": 1}, lay_out, tokens=256, pictures=0, routes=2, skip_limit=0)
    with pytest.raises(ValueError, match="has 1 pictures; a row has room for 0"):
        first(none, 1)


def broken(sample: Sample, drop: frozenset[str] = frozenset()) -> Layout:
    raise KeyError("no such marker")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_lay_out_raises_names_the_sample(workers):
    loader = make_loader({"a": Words("a", 1)}, {"a": 1}, broken, tokens=256, pictures=0, streams=1, workers=workers)
    with pytest.raises(KeyError) as error:
        first(loader, 1)
    told = str(error.value) + "".join(getattr(error.value, "__notes__", []))
    assert "no such marker" in told and "while laying out sample 'a/0' (row 0 of data set 'a')" in told


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    first(make_loader(*DATA, **PLAN, workers=1), 2)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"pictures": -1}, "pictures must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"streams": 6, "workers": 4}, "multiple of world x workers = 1 x 4, not 6; the next that fits is 8"),
        ({"world": 3, "streams": 16}, "3 x 1, not 16; the next that fits is 18"),
        ({"rank": 1}, r"rank 1 is outside 0\.\.0"),
        ({"dropout": {"words": 0.1}}, "unknown condition 'words' in dropout; choose from text, image"),
        ({"dropout": {"text": 0.1, "words|text": 0.1}}, r"unknown condition 'words' in dropout \('words\|text'\)"),
        ({"dropout": {"image|text": 0.1}}, r"the dropout of 'image\|text' needs one of 'text'"),
        ({"dropout": {"text": 1.5}}, r"dropout of 'text' is 1.5; it must lie in \[0, 1\]"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make_loader(*DATA, **PLAN | change)


def test_wrong_names():
    with pytest.raises(ValueError, match=r"unknown data sets \['dog'\]; choose from plain, drawn"):
        make_loader(SOURCES, {"dog": 1}, lay_out, tokens=8, pictures=0)


def test_a_share_of_bad_samples_is_allowed():
    """About a tenth is bad: a share of a fifth goes on for ever and keeps few reasons, a twentieth stops."""
    source = {"a": Words("a", 4000, bad=10)}
    how = {"tokens": 256, "pictures": 0, "streams": 2}
    loader = make_loader(source, {"a": 1}, lay_out, **how, skip_limit=0.2)
    first(loader, 200)
    assert loader.state_dict()["skips"]["events"] > 100 >= len(loader.skipped)
    with pytest.raises(ValueError, match=r"\d+ bad samples in \d+ draws, and the limit is 5.000% of them"):
        first(make_loader(source, {"a": 1}, lay_out, **how, skip_limit=0.05), 400)
    with pytest.raises(ValueError, match="a share between 0 and 1, not 1.5"):
        make_loader(source, {"a": 1}, lay_out, **how, skip_limit=1.5)


def test_grown_data_are_all_visited_once_more():
    """After it has grown a data set begins an epoch: every row comes once before one comes twice, in all streams."""
    how = {"tokens": 256, "pictures": 0, "streams": 4, "ahead": 1}
    loader = make_loader({"a": Words("a", 50)}, {"a": 1}, lay_out, **how)
    first(loader, 4)
    grown = make_loader({"a": Words("a", 400)}, {"a": 1}, lay_out, **how)
    grown.load_state_dict(loader.state_dict(), grown=True)
    waiting = {(s["pending"][0][1]) for s in loader.state_dict()["streams"].values() if s["pending"]}
    seen = [name for row in first(grown, 12) for name in row.batch.samples]
    fresh = seen[len(waiting) :]
    assert len(set(fresh)) >= len(fresh) - len(waiting) and max(int(n.rpartition("/")[2]) for n in fresh) >= 50
    again = make_loader({"a": Words("a", 400)}, {"a": 1}, lay_out, **how)
    again.load_state_dict(grown.state_dict())
    assert same(first(again, 8), first(grown, 8))


class Unpicklable(torch.utils.data.IterableDataset):
    """Its second item cannot go to another process."""

    def __iter__(self):
        yield 1
        yield lambda: 2


def test_an_item_that_cannot_be_pickled_raises_and_does_not_hang():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"), read_ahead(Unpicklable(), 1) as items:
        assert next(items) == 1
        next(items)


def test_a_temporary_folder_too_long_for_sockets_is_named(monkeypatch):
    monkeypatch.setattr("diptych.data.workers.get_temp_dir", lambda: "/" + "long" * 30)
    with (
        pytest.raises(ValueError, match="set TMPDIR to a shorter folder, or workers to 0"),
        read_ahead(Unpicklable(), 1),
    ):
        pass


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield 1


@pytest.mark.parametrize("error", [EOFError, RuntimeError, ConnectionResetError])
def test_whatever_breaks_when_a_worker_is_killed_is_its_death(error):
    """The pipe breaks before the system has the exit code, and DataLoader's handler of SIGCHLD raises at any moment."""
    for _ in range(5):
        with pytest.raises(ChildProcessError, match="SIGKILL"), read_ahead(Endless(), 2) as items:
            next(items)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            raise error
