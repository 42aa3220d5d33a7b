"""Evaluation in three steps over a folder, each of which continues where it stopped.

::

    card.json     the settings: nothing made under other settings may join this folder
    items.jsonl   what the model made, one line per finished item     <- needs the model
    pictures/     the pictures it drew, PNG
    scores.jsonl  the verdict on each item                            <- needs the items only
    summary.json  scores with intervals, baselines, failures, card

A line is written when its item is finished; a last line cut off by a crash is dropped and its item made again. An item
that the model refuses stays in the count as wrong, with the reason; no blank picture or empty answer replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL
import PIL.Image
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from diptych.core.sample import Sample
from diptych.data.render import rgb
from diptych.evaluate import glyphs, mini
from diptych.evaluate.mini import GROUPS
from diptych.evaluate.scores import Baselines, Benchmark, Item, Outcome, Score, Verdict

BENCHMARKS = {**mini.BENCHMARKS, **glyphs.BENCHMARKS}
MAX_NEW_TOKENS = 48
TEMPERATURE = 0.0


@runtime_checkable
class Engine(Protocol):
    """What can be evaluated: ``diptych.generate.engine.Engine``, or whatever answers and draws like it."""

    model: Any
    name: str

    def answers(
        self, samples: Sequence[Sample], max_new_tokens: int, temperature: float, seed: int, batch_size: int
    ) -> list: ...

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: tuple[int, int] | None,
        settings: Any,
        batch_size: int,
    ) -> list: ...


@dataclass(frozen=True)
class Result:
    """Scores by name, what to compare them with, the sampling card, and every outcome.

    ``failures`` counts the items for which the model gave nothing: they are wrong in every score.
    """

    scores: Mapping[str, Score]
    baselines: Baselines
    card: Mapping[str, Any]
    failures: int
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict:
        """One JSON object: scores (name -> value, low, high, n), baselines, failures, items, card."""
        return {
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "baselines": {name: {k: round(v, 6) for k, v in row.items()} for name, row in self.baselines.items()},
            "failures": self.failures,
            "items": len(self.outcomes),
            "card": dict(self.card),
        }


def evaluate(
    engine: Engine,
    benchmarks: Sequence[str] = ("mini",),
    seed: int = 0,
    limit: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    size: int = 64,
    settings: Any = None,
    batch_size: int = 32,
) -> Result:
    """The scores of a model on benchmarks, with intervals, baselines and the settings that produced them.

    ``limit`` keeps the first so many items of each category; ``folder`` keeps everything and lets a stopped evaluation
    go on (default: a temporary one); ``size`` is the side of the pictures in pixels; ``settings`` replaces the model's
    own settings. A progress bar goes to a terminal's stderr unless ``progress`` is false. Raises ``ValueError``
    for an unknown benchmark, and for a folder that was made with other settings.
    """
    chosen = _choose(benchmarks)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for every item")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    items = {b.name: _cut(b.items(seed, size), limit) for b in chosen}
    settings = settings or engine.model.settings
    card = sampling_card(engine, chosen, items, seed, limit, size, settings)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _run(engine, chosen, items, card, settings, size, batch_size, Path(temporary), progress)
    return _run(engine, chosen, items, card, settings, size, batch_size, Path(folder), progress)


def _choose(names: Sequence[str]) -> list[Benchmark]:
    names = [names] if isinstance(names, str) else names
    choices = (*GROUPS, *BENCHMARKS)
    if unknown := [n for n in names if n not in choices]:
        raise ValueError(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(choices)}")
    if not names:
        raise ValueError(f"no benchmark named; choose from {', '.join(choices)}")
    return [BENCHMARKS[n] for n in dict.fromkeys(m for name in names for m in GROUPS.get(name, (name,)))]


def _cut(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None:
        return items
    taken: Counter[str] = Counter()
    kept = []
    for item in items:
        taken[item.category] += 1
        if taken[item.category] <= limit:
            kept.append(item)
    return kept


def _run(
    engine: Engine,
    benchmarks: list[Benchmark],
    items: Mapping[str, list[Item]],
    card: dict,
    settings: Any,
    size: int,
    batch_size: int,
    folder: Path,
    progress: bool,
) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    card = _agree(folder, card)
    seed = card["seed"]
    with _bar(progress) as bar:
        for benchmark in benchmarks:
            made = _finished(folder, {i.id for i in items[benchmark.name]})
            task = bar.add_task(benchmark.name, total=len(items[benchmark.name]), completed=len(made))
            for chunk in _chunks(items[benchmark.name], batch_size):
                todo = [item for item in chunk if item.id not in made]
                if todo:
                    rows = _make(engine, benchmark, todo, seed, size, settings, batch_size, folder, bool(made))
                    _append(folder / "items.jsonl", rows)
                    made |= {row["id"]: row for row in rows}
                    bar.advance(task, len(rows))
    outcomes = score(folder, benchmarks, items)
    scores: dict[str, Score] = {}
    baselines: Baselines = {}
    for benchmark in benchmarks:
        scores |= benchmark.scores([o for o in outcomes if o.item.benchmark == benchmark.name])
        baselines |= benchmark.baselines(items[benchmark.name], size)
    result = Result(scores, baselines, card, sum(o.error is not None for o in outcomes), tuple(outcomes))
    _replace(folder / "summary.json", json.dumps(result.to_json(), indent=2) + "\n")
    return result


# --- step one: what the model makes -----------------------------------------------------------------------------------


def _make(
    engine: Engine,
    benchmark: Benchmark,
    items: list[Item],
    seed: int,
    size: int,
    settings: Any,
    batch_size: int,
    folder: Path,
    worked: bool,
) -> list[dict]:
    """The lines of these items. One that the model refuses gets its reason; if nothing has ``worked`` yet and it
    refuses them all, the fault is not the items': the ``ValueError`` goes to the user."""

    def attempt(some: list[Item]) -> list[dict]:
        samples = [item.sample for item in some]
        if benchmark.task == "answer":
            answers = engine.answers(samples, MAX_NEW_TOKENS, TEMPERATURE, seed, batch_size)
            return [
                _row(item, len(some), a.parameters, text=a.text, finish_reason=a.finish_reason)
                for item, a in zip(some, answers, strict=True)
            ]
        pictures = engine.draw(samples, [item.seed for item in some], (size, size), settings, batch_size)
        rows = []
        for item, picture in zip(some, pictures, strict=True):
            file = f"pictures/{item.id}.png"
            _save(picture.image, folder / file)
            rows.append(_row(item, len(some), picture.parameters, file=file))
        return rows

    try:
        return attempt(items)
    except ValueError as refusal:
        rows, first = [], refusal
    for item in items:
        try:
            rows += attempt([item])
        except ValueError as refusal:
            rows.append(_row(item, 1, {}, error=str(refusal)))
    if not worked and all("error" in row for row in rows):
        raise first
    return rows


def _row(item: Item, batch: int, parameters: Mapping[str, Any], **made: str) -> dict:
    row = {"id": item.id, "benchmark": item.benchmark, "category": item.category, "prompt": item.prompt}
    return row | {"seed": item.seed, **made, "batch": batch, "parameters": dict(parameters)}


def _save(image: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    image.convert("RGB").save(part, "PNG")
    os.replace(part, path)


def _finished(folder: Path, ids: set[str]) -> dict[str, dict]:
    """The finished lines of these items; a line whose picture is gone is not finished."""
    rows = {row["id"]: row for row in _read(folder / "items.jsonl") if row["id"] in ids}
    return {k: row for k, row in rows.items() if "file" not in row or (folder / row["file"]).is_file()}


def _chunks(items: list[Item], n: int) -> Iterator[list[Item]]:
    """Always cut at the same places, so that a run that goes on makes the batches that an unbroken one makes."""
    return (items[i : i + n] for i in range(0, len(items), n))


# --- step two: verdicts -----------------------------------------------------------------------------------------------


def score(folder: Path, benchmarks: Sequence[Benchmark], items: Mapping[str, Sequence[Item]]) -> list[Outcome]:
    """The outcome of every item, judged from the folder alone; verdicts already in ``scores.jsonl`` are kept.

    Delete ``scores.jsonl`` to judge again. Raises ``ValueError`` when an item is not finished.
    """
    known = {row["id"]: row for row in _read(folder / "scores.jsonl")}
    outcomes = []
    for benchmark in benchmarks:
        of = items[benchmark.name]
        made = _finished(folder, {i.id for i in of})
        if missing := [i.id for i in of if i.id not in made]:
            raise ValueError(f"{len(missing)} items of {benchmark.name} are not finished, first {missing[0]}")
        for chunk in _chunks(list(of), 64):
            rows = []
            for item in chunk:
                row = made[item.id]
                image = None
                if "file" in row:
                    with PIL.Image.open(folder / row["file"]) as opened:
                        image = opened.convert("RGB")
                if item.id in known and known[item.id]["made"] == _hash(row, image):
                    old = known[item.id]
                    verdict = Verdict(old["ok"], old["reason"], old["parts"])
                else:
                    verdict = _judge(benchmark, item, row, image)
                    rows.append({"id": item.id, "made": _hash(row, image), **asdict(verdict)})
                outcomes.append(Outcome(item, verdict, row.get("text"), image, row.get("error")))
            _append(folder / "scores.jsonl", rows)
    return outcomes


def _judge(benchmark: Benchmark, item: Item, row: Mapping[str, Any], image: PIL.Image.Image | None) -> Verdict:
    if "error" in row:
        return Verdict(False, f"failed: {row['error']}")
    if benchmark.judge_image is not None and image is not None:
        if image.width != image.height:
            return Verdict(False, f"the picture is {image.width}x{image.height}, not square")
        return benchmark.judge_image(item, image)
    assert benchmark.judge_text is not None
    return benchmark.judge_text(item, row["text"])


def _hash(row: Mapping[str, Any], image: PIL.Image.Image | None) -> str:
    """What a verdict was about: an item made again is judged again."""
    made = row.get("text", row.get("error", "")).encode() if image is None else rgb(image).tobytes()
    return hashlib.sha256(made).hexdigest()[:16]


# --- the sampling card ------------------------------------------------------------------------------------------------


def sampling_card(
    engine: Engine,
    benchmarks: Sequence[Benchmark],
    items: Mapping[str, Sequence[Item]],
    seed: int,
    limit: int | None,
    size: int,
    settings: Any,
) -> dict:
    """Everything that moves a score and is not the model's doing, and which model it was; JSON-able."""
    parameter = next(engine.model.parameters())
    device = parameter.device.type
    if device == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(parameter.device)})"
    card = {
        "model": engine.name,
        "family": engine.model.family,
        "weights": _fingerprint(engine.model),
        "seed": seed,
        "seeds": "one per picture, from (seed, item id)",
        "limit": limit,
        "size": [size, size],
        "settings": asdict(settings),
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": TEMPERATURE,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": device,
        "versions": _versions(),
        "prompts": {b.name: _prompts_hash(items[b.name]) for b in benchmarks},
        "pictures_per_prompt": {b.name: b.pictures_per_prompt for b in benchmarks if b.task == "draw"},
        "items": {b.name: len(items[b.name]) for b in benchmarks},
    }
    return json.loads(json.dumps(card))


def _fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and 64 of its values: other weights, other hash."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("diptych")
    except metadata.PackageNotFoundError:
        own = "not installed"
    ours = {"diptych": own, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {"numpy": np.__version__, "pillow": PIL.__version__}


def _prompts_hash(items: Sequence[Item]) -> str:
    rows = [[i.id, i.category, i.prompt, i.seed, i.reference] for i in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _agree(folder: Path, card: dict) -> dict:
    """The card of this folder, with benchmarks that it did not name before; raises when any field differs."""
    path = folder / "card.json"
    if path.is_file():
        old = json.loads(path.read_text("utf-8"))
        for name, value in _flat(card).items():
            known = _flat(old)
            if name in known and known[name] != value:
                raise ValueError(
                    f"{folder} was made with {name} = {known[name]!r}, not {value!r}; use another folder: "
                    "two settings are not mixed in one"
                )
        per_benchmark = {k: {**old[k], **card[k]} for k in ("prompts", "pictures_per_prompt", "items")}
        card = card | per_benchmark
    elif (folder / "items.jsonl").exists():
        raise ValueError(f"{folder} holds items.jsonl without its card.json; use another folder")
    _replace(path, json.dumps(card, indent=2) + "\n")
    return card


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[dict]:
    """The rows of a jsonl file. A last line without its end is cut off the file; raises for any other broken line."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def _append(path: Path, rows: Sequence[dict]) -> None:
    if rows:
        with path.open("ab") as file:
            file.write("".join(json.dumps(row, default=_plain) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"an engine's parameters must be JSON, not {value!r}")


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))
