"""Other people's harnesses: we drive lmms-eval, are a model in lmms-eval and VLMEvalKit, and read what they and the
official scripts write.

``diptych evaluate MODEL lmms-eval:pope,mmbench_en_dev`` runs the package's own tasks with its own parsing; the scores
come back as ``pope@lmms-eval/METRIC``. How to install it without torchvision: docs/evaluation.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import ImageFile

from diptych.core import intervals
from diptych.core.sample import Image, Message, Sample, Text
from diptych.evaluation import files
from diptych.evaluation.card import DEFAULT, THINKING_TOKENS, Answering, identity
from diptych.evaluation.judges.replies import spoken
from diptych.evaluation.scores import Item, Outcome, Score, Verdict
from diptych.machine import disk, processes

SAMPLE = ("task", "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash")
MAX_NEW_TOKENS = 1024  # where a task names no length

# --- lmms-eval --------------------------------------------------------------------------------------------------------


def messages(raw: Sequence[Mapping]) -> tuple[Message, ...]:
    """lmms-eval's chat messages (role; content of text and image parts) as ours; a system's text goes before the
    user's. Raises ``ValueError`` for video and sound."""
    conversation: list[Message] = []
    before: list[Text | Image] = []
    for m in raw:
        parts: list[Text | Image] = []
        content = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
        for p in content:
            if p["type"] == "text":
                parts.append(Text(p["text"]))
            elif p["type"] == "image":
                parts.append(Image(files.picture(p["url"])))
            else:
                raise ValueError(f"a message holds {p['type']!r}; this model reads text and pictures")
        if m["role"] == "system":
            before += parts
        else:
            conversation.append(Message(m["role"], (*before, *parts)))
            before = []
    return tuple(conversation)


@dataclass(frozen=True)
class Generation:
    """How a request of lmms-eval is answered: its ``generation_kwargs``, and what the user set in their place."""

    max_new_tokens: int
    temperature: float
    top_p: float
    until: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], answering: Answering) -> Generation:
        """The settings of a request. ``do_sample`` false means temperature 0, true without a temperature 1. Raises
        ``ValueError`` for beams, which are not offered."""
        if int(settings.get("num_beams") or 1) > 1:
            raise ValueError(f"num_beams is {settings['num_beams']}; answers are sampled or greedy, not searched for")
        sample = settings.get("do_sample")
        temperature = float(settings.get("temperature") or (1.0 if sample else 0.0))
        until = settings.get("until") or ()
        default = THINKING_TOKENS if answering.thinking else MAX_NEW_TOKENS
        return cls(
            answering.max_new_tokens or int(settings.get("max_new_tokens") or default),
            answering.temperature or (0.0 if sample is False else temperature),
            float(settings.get("top_p") or 1.0),
            tuple(t for t in ((until,) if isinstance(until, str) else until) if t),
        )

    def cut(self, text: str) -> str:
        """The text up to the first stop string."""
        return text[: min((at for stop in self.until if (at := text.find(stop)) >= 0), default=len(text))]


def lmms_model(engine: Any, batch_size: int = 8, answering: Answering = DEFAULT) -> Any:
    """The engine as an lmms-eval chat model; its task dictionary is filled by ``simple_evaluate``. ``answering`` takes
    the place of what tasks say of length and temperature where it is set. Raises ``ValueError`` without the package."""
    base = _lmms("lmms_eval.api.model").lmms

    class Diptych(base):  # type: ignore[misc]  # lmms-eval has no types
        """Answers through ``Engine.answers``; likelihoods are not offered."""

        is_simple = False
        device = "cpu"  # where lmms-eval puts the counts that processes exchange

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            alike: dict[Generation, list[int]] = {}
            for i, request in enumerate(requests):
                alike.setdefault(Generation.of(request.args[2], answering), []).append(i)
            out = [""] * len(requests)
            for generation, members in alike.items():
                nucleus = {} if generation.top_p == 1 else {"top_p": generation.top_p}
                for some in (members[k : k + batch_size] for k in range(0, len(members), batch_size)):
                    samples = [self._sample(requests[i], i) for i in some]
                    answers = engine.answers(
                        samples, generation.max_new_tokens, generation.temperature, 0, batch_size, **nucleus
                    )
                    for i, answer in zip(some, answers, strict=True):
                        out[i] = generation.cut(spoken(answer.text) if answering.thinking else answer.text)
                        self.cache_hook.add_partial("generate_until", requests[i].args[:2], out[i])
            return out

        def _sample(self, request: Any, i: int) -> Sample:
            _, to_messages, _, doc, task, split = request.args
            turns = messages(to_messages(self.task_dict[task][split][doc]))
            if answering.instruction:
                turns = (replace(turns[0], parts=(Text(answering.instruction), *turns[0].parts)), *turns[1:])
            return Sample(f"{task}/{doc}/{i}", turns)

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            raise ValueError("this model offers no likelihoods; choose tasks that generate (such as pope, not *_ppl)")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
            raise ValueError("this model offers no rounds of questions; choose another task")

    return Diptych()


def lmms_manager(tasks: Sequence[str], folder: Path | None, include: str | None = None) -> Any:
    """What lmms-eval finds tasks with; None where the folder has the results of all. ``include`` is a folder of the
    user's own task files. Raises ``ValueError`` without the package and for an unknown task."""
    missing = [t for t in tasks if folder is None or not lmms_results(folder, t).is_file()]
    if not missing:
        return None
    with _whole_pictures():
        manager = _lmms("lmms_eval.tasks").TaskManager("ERROR", include_path=include)
    for task in missing:
        if task not in manager.all_tasks:
            near = [t for t in manager.all_tasks if task.split("_")[0] in t][:8]
            raise ValueError(f"lmms-eval has no task {task!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    return manager


def lmms_results(folder: Path, task: str) -> Path:
    """Where an evaluation keeps a task's results."""
    return folder / "lmms-eval" / f"{task}.json"


def _lmms_samples(results: Path) -> Path:
    return results.with_name(f"{results.stem}_samples.jsonl")


def run_lmms(
    engine: Any,
    tasks: Sequence[str],
    folder: Path,
    manager: Any,
    limit: int | None = None,
    batch_size: int = 8,
    answering: Answering = DEFAULT,
) -> None:
    """Runs lmms-eval's tasks. FOLDER/lmms-eval keeps a task's results and samples; a task that is there must be of the
    same model, limit and ``answering``, and is not run. Under torchrun lmms-eval shares a task's requests among the
    processes, and the first writes the results."""
    rank, world = processes.place()
    backend = {"distributed_executor_backend": "torchrun"} if world > 1 else {}
    who = identity(engine) | {"limit": limit, "answering": asdict(answering)}
    for task in tasks:
        file = lmms_results(folder, task)
        there = file.is_file()
        processes.gather(None)  # every process has looked before the first one writes
        if there:
            if (stored := files.load(file)["card"]) != who:
                differs = next(k for k in who if stored.get(k) != who[k])
                raise ValueError(f"{file} was made with {differs} = {stored.get(differs)!r}; use another folder")
        else:
            with _whole_pictures():
                done = _lmms("lmms_eval.evaluator").simple_evaluate(
                    model=lmms_model(engine, batch_size, answering),
                    tasks=[task],
                    limit=limit,
                    batch_size=1,
                    log_samples=True,
                    task_manager=manager,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                    **backend,
                )
            if rank:
                continue
            samples = [{"task": part} | row for part, rows in done["samples"].items() for row in rows]
            lines = "".join(json.dumps(row, default=str) + "\n" for row in samples)
            disk.write_text(_lmms_samples(file), lines)
            kept = {k: done.get(k) for k in ("results", "versions", "n-samples")} | {"card": who}
            disk.write_text(file, json.dumps(kept, indent=1, default=str))


@contextmanager
def _whole_pictures() -> Iterator[None]:
    """Some of its tasks have Pillow read cut-off pictures as grey, everywhere in the process; not ours, afterwards."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_lmms(file: Path) -> dict[str, Score]:
    """The numbers of an lmms-eval results file, as ``TASK@lmms-eval/METRIC``; intervals from its standard errors."""
    raw = files.load(file)
    scores = {}
    for task, row in files.field(raw, ("results",), str(file), dict).items():
        if not isinstance(row, dict):
            raise ValueError(f"{file}: the results of {task} are {row!r}, not an object")
        counts = raw.get("n-samples", {}).get(task) or {}
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if (
                not comma
                or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered"))
                or type(value) not in (int, float)
            ):
                continue
            error = next((e for s in ("_stderr", "_stderr_clt") if _number(e := row.get(f"{metric}{s},{kind}"))), None)
            at = "" if kind == "none" else f"[{kind}]"
            n = int(counts.get("effective") or row.get("samples") or 0)
            scores[f"{task}@lmms-eval{at}/{metric}"] = Score(float(value), *_interval(float(value), error, n), n)
    if not scores:
        raise ValueError(f"{file} holds no results of lmms-eval")
    return scores


def _interval(value: float, error: float | None, n: int) -> tuple[float, float]:
    """The 95 % interval of a value with a standard error: Wilson's for one in [0, 1], of as many independent items as
    have that error, or of ``n`` where it is 0; the value alone where no error is known."""
    if error is None:
        return value, value
    if not 0 <= value <= 1:
        return value - intervals.Z * error, value + intervals.Z * error
    count = round(value * (1 - value) / error**2) if error else n
    return intervals.wilson(value * max(count, 1), max(count, 1))[1:]


def read_lmms_samples(file: Path) -> list[Outcome]:
    """The samples beside a results file as outcomes of ``TASK@lmms-eval``, one category for each part of the task:
    what was asked, said and wanted, graded by the first of the task's metrics that is a number of each sample. None
    where no metric is, or the file has gone."""
    beside = _lmms_samples(file)
    outcomes: list[Outcome] = []
    rows = files.rows(beside) if beside.is_file() else []
    grades = [{key: g for key, value in row.items() if (g := _grade(key, value)) is not None} for row in rows]
    metric = next((key for key in (grades[0] if grades else ()) if all(key in grade for grade in grades)), None)
    if metric is None:
        return outcomes
    for number, (row, grade) in enumerate(zip(rows, grades, strict=True), 1):
        where, name = f"{beside} line {number}", f"{file.stem}@lmms-eval"
        question, *_ = files.field(row, ("arguments",), where, list) or [""]
        reply, *_ = files.field(row, ("filtered_resps",), where, list) or [""]
        part, target = str(row.get("task", file.stem)), str(row.get("target"))
        id, prompt = f"{part}-{files.field(row, ('doc_id',), where)}", str(question)
        sample = Sample(id, (Message("user", (Text(prompt),)),))
        item = Item(id, name, part, prompt, sample, 0, id, {"answer": target})
        reason = "" if grade[metric] >= 1 else f"expected {target!r}"
        verdict = Verdict(grade[metric] >= 1, reason, {metric: grade[metric]}, grade[metric])
        outcomes.append(Outcome(item, verdict, str(reply)))
    return outcomes


def _grade(key: str, value: Any) -> float | None:
    """The number that a metric gives a sample."""
    number = value.get("score") if isinstance(value, dict) else value
    if key in SAMPLE or number is None or not _number(number):
        return None
    return float(number)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _lmms(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"lmms-eval cannot be used ({error}); docs/evaluation.md says how to install it") from error


# --- VLMEvalKit -------------------------------------------------------------------------------------------------------


class VLMEvalKitModel:
    """A model of VLMEvalKit: ``generate(message, dataset)`` of [{"type": "text" | "image", "value": ...}].

    In its ``vlmeval/config.py``: ``"bagel-tiny": partial(VLMEvalKitModel, "bagel/tiny")``.
    """

    is_api, INTERLEAVE, allowed_types = False, True, ("text", "image")

    def __init__(self, model: Any, max_new_tokens: int = 512, **load: Any) -> None:
        if isinstance(model, (str, Path)):
            from diptych.generation.engine import load as open_model

            model = open_model(model, **load)
        self.engine, self.max_new_tokens = model, max_new_tokens
        self.dump: Callable[..., Any] | None = None

    def set_dump_image(self, dump: Callable[..., Any]) -> None:
        """VLMEvalKit says how it writes a data set's pictures."""
        self.dump = dump

    def use_custom_prompt(self, dataset: str) -> bool:
        """The data sets' own prompts are used."""
        return False

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a text, or to texts and pictures (paths, PIL pictures) in order."""
        parts = [{"type": "text", "value": message}] if isinstance(message, str) else message
        rows = [{"type": "text", "value": p} if isinstance(p, str) else p for p in parts]
        return self.generate_inner(rows, dataset)

    def generate_inner(self, message: Sequence[Mapping], dataset: str | None = None) -> str:
        """The answer to a list of {"type", "value"}. Raises ``ValueError`` for what is neither text nor picture."""
        parts: list[Text | Image] = []
        for p in message:
            if p["type"] == "text":
                parts.append(Text(p["value"]))
            elif p["type"] == "image":
                parts.append(Image(files.picture(p["value"])))
            else:
                raise ValueError(f"a message holds {p['type']!r}; this model reads text and pictures")
        sample = Sample("vlmevalkit", (Message("user", tuple(parts)),))
        return self.engine.answers([sample], self.max_new_tokens, 0.0, 0, 1)[0].text
