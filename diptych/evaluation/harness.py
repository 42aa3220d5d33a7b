"""Evaluation in three steps over a folder; each step continues where it stopped.

::

    card.json     the settings; an evaluation with other settings is refused in this folder
    items.jsonl   answers and drawings, one line for each finished item   <- needs the model
    pictures/     the drawings, PNG
    scores.jsonl  the verdict on each item                                <- needs the items only
    summary.json  scores with intervals, baselines, failures and the card, of the last benchmarks evaluated

A line is written when its item is finished. A last line that a crash cut off is dropped, and its item is made again. An
item that the model refuses counts as wrong, with the reason; no blank picture or empty answer replaces it.

Under torchrun every process takes every n-th batch of the generation and of the scoring. The files and the scores equal
those of one process. With a ``Share`` a process takes every n-th batch and waits for nobody: it writes
items.I.jsonl and scores.I.jsonl, and ``rescore`` merges the files of all shards.
"""

from __future__ import annotations

import hashlib
import html
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import PIL.Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diptych.core.sample import Message, Sample, Text, user
from diptych.data.canvas import rgb
from diptych.data.decoding import open_picture
from diptych.evaluation import card as cards
from diptych.evaluation import files
from diptych.evaluation.benchmarks.table import LMMS, Tools, resolve
from diptych.evaluation.card import Answering
from diptych.evaluation.judges.judge import Judge, Unreachable
from diptych.evaluation.judges.replies import spoken
from diptych.evaluation.remote import Endpoint, PictureFolder
from diptych.evaluation.scores import UNJUDGED, Baselines, Benchmark, Item, Outcome, Score, Verdict
from diptych.generation import engine as generation
from diptych.machine import disk, processes

LAYOUT = "layout.json"  # of a folder with official layouts: the list of those that were written


@runtime_checkable
class Evaluable(Protocol):
    """The interface of what can be evaluated: a ``diptych.generation.engine.Engine``, an ``Endpoint``, a
    ``PictureFolder``, or a class of your own. ``model`` is a network, or a dataclass with ``family`` and
    ``settings``."""

    model: Any
    name: str

    def answers(
        self, samples: Sequence[Sample], max_new_tokens: int, temperature: float, seed: int, batch_size: int
    ) -> list:
        """One ``Answer`` per sample, whose last message is the user's, in order."""

    def draw(
        self,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: tuple[int, int] | None,
        settings: Any,
        batch_size: int,
    ) -> list:
        """One ``Picture`` per sample, each with its own seed; ``size`` is (width, height), None the default."""


@dataclass(frozen=True, repr=False)
class Result:
    """Scores by name, baselines to compare them with, the sampling card, the scorers, and every outcome.

    ``failures`` counts the items that the model refused or whose judge's reply could not be parsed; they are wrong in
    every score. A notebook shows the table of scores.
    """

    scores: Mapping[str, Score]
    baselines: Baselines
    card: Mapping[str, Any]
    failures: int
    outcomes: tuple[Outcome, ...]
    scorers: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        model, items = self.card.get("model", "?"), len(self.outcomes)
        return f"Result({model!r}, {len(self.scores)} scores of {items} items, {self.failures} failures)"

    def _repr_html_(self) -> str:
        cells = [("score", "value", "95 % interval", "n")]
        cells += [(k, f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", str(s.n)) for k, s in self.scores.items()]
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<p>{html.escape(repr(self))}</p><table>{rows}</table>"

    def to_json(self) -> dict:
        """One JSON object: scores (name -> value, low, high, n), baselines, failures, items, card, scorers."""
        return {
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "baselines": {name: {k: round(v, 6) for k, v in row.items()} for name, row in self.baselines.items()},
            "failures": self.failures,
            "items": len(self.outcomes),
            "card": dict(self.card),
            "scorers": dict(self.scorers or {}),
        }


@dataclass(frozen=True)
class _Work:
    """One evaluation: its benchmarks and items, its folder and card, and the place of this process among all."""

    folder: Path
    benchmarks: list[Benchmark]
    items: Mapping[str, list[Item]]
    sides: Mapping[str, int | None]
    card: dict
    rank: int
    world: int
    bar: Progress
    shard: bool = False  # a share of its own, without the other processes

    def file(self, stem: str) -> Path:
        """The jsonl file that this process appends to."""
        return self.folder / (f"{stem}.jsonl" if self.world == 1 else f"{stem}.{self.rank}.jsonl")

    def rows(self, stem: str) -> list[dict]:
        """The rows that are there: the merged ones and, of a shard, its own."""
        files_here = [self.folder / f"{stem}.jsonl"] + ([self.file(stem)] if self.shard and self.world > 1 else [])
        return [row for file in files_here for row in files.read(file, "id")]

    def chunks(self, benchmark: Benchmark, n: int) -> Iterator[list[Item]]:
        """This process's batches. Their boundaries are fixed, so a resumed run makes the batches of an unbroken one."""
        items = self.items[benchmark.name]
        return (items[i : i + n] for i in range(self.rank * n, len(items), n * self.world))

    def join(self, stem: str) -> None:
        """Waits for every process, then merges their files into one. A shard neither waits nor merges."""
        if self.shard:
            return
        processes.gather(None)
        if self.rank == 0:
            files.merge(self.folder / f"{stem}.jsonl", [i.id for b in self.benchmarks for i in self.items[b.name]])
        processes.gather(None)


@dataclass(frozen=True)
class Share:
    """Share ``index`` of ``count`` of an evaluation, written into ``folder``, which all shares have in common. They
    need the same arguments of ``evaluate``, ``batch_size`` included."""

    folder: str | Path
    index: int
    count: int


def evaluate(
    engine: Evaluable,
    benchmarks: str | Sequence[str | Benchmark] = ("mini",),
    *,
    seed: int = 0,
    limit: int | None = None,
    folder: str | Path | Share | None = None,
    size: int | None = None,
    settings: Any = None,
    answering: Answering = cards.DEFAULT,
    batch_size: int = 32,
    tools: Tools | None = None,
    score: bool = True,
    progress: bool = True,
) -> Result:
    """The scores of a model on benchmarks, with 95 % intervals, baselines and the settings that produced them.

    A benchmark is a name ("mini", "geneval"), a name with the user's files ("wise=FOLDER"), a ``Benchmark``, or tasks
    of lmms-eval ("lmms-eval:pope,mmbench_en_dev").

    ``limit``       keeps the first items of each category
    ``folder``      keeps everything and continues a stopped evaluation (default: a temporary folder); a ``Share``
                    makes and judges its share alone and returns outcomes without scores: ``rescore`` merges
    ``size``        side of the pictures in pixels (default: 64 for what ships, else the model's own)
    ``settings``    replaces the model's own sampler settings
    ``answering``   longest answer, system text, thinking and temperature
    ``batch_size``  items in a batch, or requests to a server at once
    ``tools``       the judge, detector, CLIP and feature network that score
    ``score``       False stops when every answer and picture is made
    ``progress``    shows a progress bar on a terminal's stderr

    Raises ``ValueError`` for an unknown benchmark, and for a folder that was made with other settings.
    """
    tools = tools or Tools()
    names = [benchmarks] if isinstance(benchmarks, str) else benchmarks
    tasks = [t for n in names if isinstance(n, str) and n.startswith(LMMS) for t in n.removeprefix(LMMS).split(",")]
    native = [n for n in names if not (isinstance(n, str) and n.startswith(LMMS))]
    chosen, asked = resolve(native, tools) if native or not tasks else ([], {})
    for name, value in (("limit", limit), ("batch_size", batch_size), ("size", size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1, or None for the default")
    shard = (folder.index, folder.count) if isinstance(folder, Share) else None
    folder = folder.folder if isinstance(folder, Share) else folder
    if shard and tasks:
        raise ValueError("lmms-eval's tasks are not evaluated in shards")
    if tasks:  # before anything is made
        from diptych.evaluation import lmms

        manager = lmms.lmms_manager(tasks, Path(folder) if folder else None, tools.lmms_tasks)
    sides = {b.name: size or b.side for b in chosen}
    items = {b.name: _cut(b, b.items(seed, sides[b.name] or 0), limit) for b in chosen}
    if isinstance(engine, PictureFolder):
        engine.expect([item for b in chosen if b.task == "draw" for item in items[b.name]])
    if isinstance(engine, Endpoint) and answering.thinking is not None:
        engine = engine.with_thinking(answering.thinking)
    recorded = settings or engine.model.settings  # without ``settings`` the model chooses by request
    card = cards.sampling_card(engine, asked, chosen, items, sides, seed, limit, answering, recorded)
    with _folder_or_temporary(folder) as where:
        with _opened(where, chosen, items, sides, card, progress, shard) as work:
            maker = _Maker(work, engine, settings, answering, batch_size)
            for benchmark in chosen:
                maker.make(benchmark)
            work.join("items")
            result = _unscored(work) if not score else _judged(work, batch_size) if shard else _scored(work)
            if tasks:
                lmms.run_lmms(engine, tasks, work.folder, manager, limit, batch_size, answering)
                result = result if work.rank else _joined(work, result, tasks)
        if folder is None:  # the pictures do not outlive the folder
            result = replace(result, outcomes=tuple(replace(o, picture=o.image) for o in result.outcomes))
        return result


def _joined(work: _Work, result: Result, tasks: Iterable[str]) -> Result:
    """The result with the scores and samples of lmms-eval's tasks, which are also added to the folder's files."""
    from diptych.evaluation import lmms

    scores, outcomes = dict(result.scores), list(result.outcomes)
    for task in tasks:
        file = lmms.lmms_results(work.folder, task)
        scores |= lmms.read_lmms(file)
        outcomes += (some := lmms.read_lmms_samples(file))
        if some:
            work.card["prompts"][some[0].item.benchmark] = cards.prompts_hash([o.item for o in some])
            items = [_row(o.item, 1, {}, text=o.text or "") for o in some]
            for stem, rows in ("items", items), ("scores", [{"id": o.item.id, **asdict(o.verdict)} for o in some]):
                known = {row["id"] for row in files.read(work.folder / f"{stem}.jsonl")}
                files.append(work.folder / f"{stem}.jsonl", [row for row in rows if row["id"] not in known])
    cards.write(work.folder, work.card)
    result = replace(result, scores=scores, outcomes=tuple(outcomes))
    disk.write_text(work.folder / "summary.json", json.dumps(result.to_json(), indent=2) + "\n")
    return result


def rescore(
    folder: str | Path,
    benchmarks: Sequence[str | Benchmark] = (),
    tools: Tools | None = None,
    progress: bool = True,
) -> Result:
    """Scores the items in the folder of an evaluation again, without its model, also with another judge.

    ``benchmarks`` default to those of the folder. Raises ``ValueError`` for a folder with other prompts."""
    folder = Path(folder)
    old = cards.load(folder)
    names = benchmarks or list(dict.fromkeys(old["asked"].values()))
    chosen, _ = resolve(names, tools or Tools()) if names else ([], {})
    sizes = {b.name: old["size"].get(b.name, "") for b in chosen}
    sides = {name: None if isinstance(size, str) else size[0] for name, size in sizes.items()}
    items = {b.name: _cut(b, b.items(old["seed"], sides[b.name] or 0), old["limit"]) for b in chosen}
    for b in chosen:
        same = b.name not in old["prompts"] or cards.prompts_hash(items[b.name]) == old["prompts"][b.name]
        if b.name not in old["prompts"] or not same:
            raise ValueError(f"{folder} was not made with the prompts of {b.name}; it has {', '.join(old['prompts'])}")
    with _opened(folder, chosen, items, sides, old, progress) as work:
        result = _scored(work)
        tasks = [] if benchmarks or work.rank else sorted(f.stem for f in folder.glob("lmms-eval/*.json"))
        return _joined(work, result, tasks) if tasks else result


def load_result(folder: str | Path) -> Result:
    """The result of a finished evaluation, read from its folder; nothing is judged. Where the benchmark's files are
    gone, the outcomes lack the pictures that the model was shown. Raises ``ValueError`` where there are no scores."""
    folder = Path(folder)
    card, file = cards.load(folder), folder / "summary.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not scored yet: diptych evaluate score {folder}")
    summary = files.load(file)
    known: dict[str, Item] = {}
    for name, asked in card["asked"].items():
        try:  # the judge is not asked, but benchmarks need one
            [benchmark], _ = resolve([asked], Tools(judge=Judge("none", cache=folder)))
        except ValueError:
            continue
        size = card["size"].get(name, "")
        known |= {i.id: i for i in benchmark.items(card["seed"], 0 if isinstance(size, str) else size[0])}
    verdicts = {row["id"]: row for row in files.read(folder / "scores.jsonl")}
    outcomes = []
    for row in files.read(folder / "items.jsonl"):
        if row["id"] in verdicts:
            sample = Sample(row["id"], (user(row["prompt"]),))
            item = Item(
                row["id"], row["benchmark"], row["category"], row["prompt"], sample, row["seed"], row["cluster"], {}
            )
            outcomes.append(_outcome(folder, known.get(row["id"], item), row, verdicts[row["id"]]))
    scores = {name: Score(**score) for name, score in summary["scores"].items()}
    more = summary["baselines"], summary["card"], summary["failures"], tuple(outcomes), summary["scorers"]
    return Result(scores, *more)


def _outcome(folder: Path, item: Item, row: Mapping[str, Any], scored: Mapping[str, Any]) -> Outcome:
    """The outcome of an item from its row in ``items.jsonl`` and its row in ``scores.jsonl``."""
    verdict = Verdict(scored["ok"], scored["reason"], scored["parts"], scored.get("value"), scored.get("failed", False))
    return Outcome(item, verdict, row.get("text"), folder / row["file"] if "file" in row else None, row.get("error"))


def _cut(benchmark: Benchmark, items: list[Item], limit: int | None) -> list[Item]:
    """The first ``limit`` items (or whole clusters) of each category. Raises ``ValueError`` for two items of one id."""
    seen: dict[str, dict[str, None]] = {}  # category -> ids or clusters in order
    kept = []
    for item in items:
        units = seen.setdefault(item.category, {})
        units.setdefault(item.cluster if benchmark.whole else item.id)
        if limit is None or len(units) <= limit:
            kept.append(item)
    if len({item.id for item in kept}) != len(kept):
        twice = next(id for id, n in Counter(i.id for i in kept).items() if n > 1)
        raise ValueError(f"{benchmark.name} has two items called {twice}")
    return kept


@contextmanager
def _folder_or_temporary(folder: str | Path | None) -> Iterator[Path]:
    """The folder, or a temporary one that every process shares."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(processes.gather(temporary)[0])
        processes.gather(None)


@contextmanager
def _opened(
    folder: Path,
    benchmarks: list[Benchmark],
    items: Mapping[str, list[Item]],
    sides: Mapping[str, int | None],
    card: dict,
    progress: bool,
    shard: tuple[int, int] | None = None,
) -> Iterator[_Work]:
    """Opens the folder of an evaluation: checks the card against the one that is there, and merges the files that the
    processes of a stopped run left."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = shard or processes.place()
    card = cards.agree(folder, card)
    processes.gather(None)
    if rank == 0 or shard:
        cards.write(folder, card)
    with _bar(progress and (rank == 0 or bool(shard))) as bar:
        work = _Work(folder, benchmarks, items, sides, card, rank, world, bar, shard is not None)
        for stem in ("items", "scores"):
            work.join(stem)
        yield work


# --- step one: answers and pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """Makes what is missing of an evaluation: answers and pictures, batch by batch, each written when it is there."""

    work: _Work
    engine: Evaluable
    settings: Any
    answering: Answering
    batch_size: int

    def make(self, benchmark: Benchmark) -> None:
        """Makes what is missing of a benchmark. An item that the model refuses gets the reason. Where the model refuses
        every item of the first batch, or a server is gone, the ``ValueError`` is raised: no item is at fault."""
        work, engine = self.work, self.engine
        outputs = _finished(work, {i.id for i in work.items[benchmark.name]})
        ready_made = isinstance(engine, PictureFolder) and benchmark.task == "draw"  # ``expect`` has seen some of them
        worked = ready_made or any("error" not in row for row in outputs.values())
        todo = [[i for i in chunk if i.id not in outputs] for chunk in work.chunks(benchmark, self.batch_size)]
        task = work.bar.add_task(benchmark.name, total=sum(map(len, todo)))
        for some in filter(None, todo):
            rows, refusal = (self._each if isinstance(engine, Endpoint) else self._together)(benchmark, some)
            if refusal and not worked and all("error" in row for row in rows):
                raise refusal
            worked = worked or any("error" not in row for row in rows)
            files.append(work.file("items"), rows)
            work.bar.advance(task, len(rows))

    def _together(self, benchmark: Benchmark, items: list[Item]) -> tuple[list[dict], ValueError | None]:
        """Rows of items that are made in one batch, or one by one where the batch is refused; the first refusal."""
        try:
            return self._attempt(benchmark, items), None
        except Unreachable:
            raise
        except ValueError as first:
            rows = []
            for item in items:
                try:
                    rows += self._attempt(benchmark, [item])
                except Unreachable:
                    raise
                except ValueError as refusal:
                    rows.append(_row(item, 1, {}, error=str(refusal)))
            return rows, first

    def _each(self, benchmark: Benchmark, items: list[Item]) -> tuple[list[dict], ValueError | None]:
        """Rows of items that are requested from a server at the same time, and the first refusal. Where the server is
        gone or the user interrupts, the replies that have come are written to a part file; the next run merges it."""
        pool = ThreadPoolExecutor(self.batch_size)
        requests = []
        try:
            for item in items:
                requests.append(pool.submit(self._attempt, benchmark, [item]))
            for request in requests:
                if isinstance(request.exception(), Unreachable):
                    request.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            done = [r for r in requests if r.done() and not r.cancelled() and not r.exception()]
            part = self.work.folder / f"items.{self.work.rank}.jsonl"
            files.append(part, [row for r in done for row in r.result()])
            raise
        pool.shutdown()
        rows, first = [], None
        for item, request in zip(items, requests, strict=True):
            try:
                rows += request.result()
            except ValueError as refusal:
                first = first or refusal
                rows.append(_row(item, 1, {}, error=str(refusal)))
        return rows, first

    def _attempt(self, benchmark: Benchmark, items: list[Item]) -> list[dict]:
        """Rows of items that the model answers or draws together."""
        work = self.work
        samples = [item.sample.map_images(lambda i: replace(i, image=files.picture(i.image))) for item in items]
        if benchmark.task == "answer":
            if instruction := self.answering.instruction:
                system = Message("system", (Text(instruction),))
                samples = [replace(sample, messages=(system, *sample.messages)) for sample in samples]
            tokens, temperature = self.answering.tokens(benchmark), self.answering.temperature
            answers = self.engine.answers(samples, tokens, temperature, work.card["seed"], self.batch_size)
            return [
                _row(item, len(items), a.parameters, text=a.text, finish_reason=a.finish_reason)
                for item, a in zip(items, answers, strict=True)
            ]
        side = work.sides[benchmark.name]
        seeds = [item.seed for item in items]
        options: dict[str, Any] = {}
        if self.answering.thinking and isinstance(self.engine, generation.Engine):
            options["think"] = self.engine.thinking(True)
        size = (side, side) if side else None
        pictures = self.engine.draw(samples, seeds, size, self.settings, self.batch_size, **options)
        rows = []
        for item, picture in zip(items, pictures, strict=True):
            file = f"pictures/{item.id}.png"
            files.save(picture.image, work.folder / file)
            rows.append(_row(item, len(items), picture.parameters, file=file))
        return rows


def _row(item: Item, batch: int, parameters: Mapping[str, Any], **output: str) -> dict:
    row = {"id": item.id, "benchmark": item.benchmark, "category": item.category, "prompt": item.prompt}
    return row | {"seed": item.seed, "cluster": item.cluster, **output, "batch": batch, "parameters": dict(parameters)}


def _finished(work: _Work, ids: set[str]) -> dict[str, dict]:
    """The rows of the finished items by id; an item whose picture file is gone is not finished."""
    rows = {row["id"]: row for row in work.rows("items") if row["id"] in ids}
    return {k: row for k, row in rows.items() if "file" not in row or (work.folder / row["file"]).is_file()}


# --- step two: verdicts -----------------------------------------------------------------------------------------------


def _scored(work: _Work) -> Result:
    """Judges every item from the folder alone and computes the scores. A verdict in ``scores.jsonl`` is kept where the
    answer or picture and the scorer are the same. Raises ``ValueError`` for an item that is not finished."""
    outputs: dict[str, dict] = {}
    for benchmark in work.benchmarks:
        items = work.items[benchmark.name]
        done = _finished(work, {i.id for i in items})
        if missing := [i.id for i in items if i.id not in done]:
            raise ValueError(f"{len(missing)} items of {benchmark.name} are not finished, first {missing[0]}")
        outputs |= done
    known = {row["id"]: row for row in files.read(work.folder / "scores.jsonl")}
    for benchmark in work.benchmarks:
        task = work.bar.add_task(f"scoring {benchmark.name}", total=len(work.items[benchmark.name]))
        for chunk in work.chunks(benchmark, 64):
            _judge(work, benchmark, chunk, outputs, known)
            work.bar.advance(task, len(chunk))
    work.join("scores")
    known = {row["id"]: row for row in files.read(work.folder / "scores.jsonl")}
    outcomes: list[Outcome] = []
    scores: dict[str, Score] = {}
    baselines: Baselines = {}
    for benchmark in work.benchmarks:
        some = [_outcome(work.folder, i, outputs[i.id], known[i.id]) for i in work.items[benchmark.name]]
        scores |= benchmark.scores(some)
        baselines |= benchmark.baselines(work.items[benchmark.name], work.sides[benchmark.name] or 0)
        outcomes += some
    scorers = {b.name: dict(b.scorer) for b in work.benchmarks if b.scorer}
    failures = sum(o.verdict.failed for o in outcomes)
    result = Result(scores, baselines, work.card, failures, tuple(outcomes), scorers)
    if work.rank == 0:
        disk.write_text(work.folder / "summary.json", json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _judged(work: _Work, batch_size: int) -> Result:
    """Judges the items of this shard; their outcomes, without scores."""
    known = {row["id"]: row for row in work.rows("scores")}
    outputs: dict[str, dict] = {}
    items = list[Item]()
    for benchmark in work.benchmarks:
        outputs |= _finished(work, {i.id for i in work.items[benchmark.name]})
        task = work.bar.add_task(f"scoring {benchmark.name}", total=len(work.items[benchmark.name]) // work.world)
        for chunk in work.chunks(benchmark, batch_size):
            _judge(work, benchmark, chunk, outputs, known)
            work.bar.advance(task, len(chunk))
            items += chunk
    known = {row["id"]: row for row in work.rows("scores")}
    outcomes = [_outcome(work.folder, item, outputs[item.id], known[item.id]) for item in items]
    return Result({}, {}, work.card, sum(o.verdict.failed for o in outcomes), tuple(outcomes))


def _unscored(work: _Work) -> Result:
    """The outcomes of the items that are finished, without verdicts and scores."""
    outputs = {row["id"]: row for row in work.rows("items")}
    every = [item for items in work.items.values() for item in items if not work.shard or item.id in outputs]
    outcomes = tuple(
        replace(_outcome(work.folder, i, outputs[i.id], asdict(UNJUDGED)), verdict=UNJUDGED) for i in every
    )
    return Result({}, {}, work.card, sum(o.error is not None for o in outcomes), outcomes)


def _judge(
    work: _Work, benchmark: Benchmark, items: list[Item], outputs: Mapping[str, dict], known: Mapping[str, dict]
) -> None:
    """Writes the verdicts that these items lack, or whose answer, picture or scorer has changed."""
    rows, waiting, judged, hashes = [], [], [], {}
    for item in items:
        row = outputs[item.id]
        image = None
        if "file" in row:
            image = open_picture(work.folder / row["file"])
        hashes[item.id] = _hash(benchmark, row, image)
        if item.id in known and known[item.id]["made"] == hashes[item.id]:
            continue
        if "error" in row:
            verdict = Verdict(False, f"failed: {row['error']}", {}, benchmark.worst or None, True)
            rows.append({"id": item.id, "made": hashes[item.id], **asdict(verdict)})
        else:
            waiting.append(item)
            judged.append(spoken(row["text"]) if image is None else image)
    if waiting:
        for item, verdict in zip(waiting, benchmark.judge(waiting, judged), strict=True):
            rows.append({"id": item.id, "made": hashes[item.id], **asdict(verdict)})
    order = {item.id: i for i, item in enumerate(items)}
    files.append(work.file("scores"), sorted(rows, key=lambda row: order[row["id"]]))


def _hash(benchmark: Benchmark, row: Mapping[str, Any], image: PIL.Image.Image | None) -> str:
    """A hash of the answer or picture and of the scorer: where either changes, the item is judged again."""
    output = row.get("text", row.get("error", "")).encode() if image is None else rgb(image).tobytes()
    scorer = json.dumps(benchmark.scorer, sort_keys=True).encode() if benchmark.scorer else b""
    return hashlib.sha256(output + scorer).hexdigest()[:16]


def write_layout(folder: str | Path, result: Result, benchmarks: Sequence[Benchmark]) -> list[Path]:
    """Writes each benchmark's pictures as its official scorer reads them, into FOLDER/NAME. Returns the folders.

    FOLDER/layout.json lists them. Raises ``ValueError`` for a FOLDER/NAME that holds files and is not in that list."""
    wanted = {b.name: b.layout for b in benchmarks if b.layout is not None}
    check_layout(folder, benchmarks)
    index = Path(folder) / LAYOUT
    disk.write_text(index, json.dumps(sorted({*(files.load(index) if index.is_file() else ()), *wanted})))
    for name, layout in wanted.items():
        layout(Path(folder) / name, [o for o in result.outcomes if o.item.benchmark == name])
    return [Path(folder) / name for name in wanted]


def check_layout(folder: str | Path, benchmarks: Sequence[Benchmark]) -> None:
    """Raises ``ValueError`` where ``write_layout`` would write among files of others or write nothing."""
    if not any(b.layout for b in benchmarks):
        raise ValueError("--layout: the official scorers of these benchmarks read no pictures")
    index = Path(folder) / LAYOUT
    listed = files.load(index) if index.is_file() else []
    if not isinstance(listed, list):
        raise ValueError(f"{index} was not written by `diptych evaluate --layout`; name another folder")
    for place in (Path(folder) / b.name for b in benchmarks if b.layout is not None and b.name not in listed):
        disk.check_folder(place)
        if place.is_dir() and any(place.iterdir()):
            raise ValueError(f"{place} holds files that `diptych evaluate --layout` did not write; name another folder")


def _bar(progress: bool) -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))
