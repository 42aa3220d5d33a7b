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
from pathlib import Path
from typing import Any

from PIL import ImageFile

from diptych.core import intervals
from diptych.core.sample import Image, Message, Sample, Text
from diptych.evaluation import files
from diptych.evaluation.card import identity
from diptych.evaluation.scores import Item, Outcome, Score, Verdict
from diptych.machine import disk

SAMPLE = ("task", "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash")

# --- lmms-eval --------------------------------------------------------------------------------------------------------


def messages(raw: Sequence[Mapping]) -> tuple[Message, ...]:
    """lmms-eval's chat messages (role; content of text and image parts) as ours; a system's text goes before the
    user's. Raises ``ValueError`` for video and sound."""
    found: list[Message] = []
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
            found.append(Message(m["role"], (*before, *parts)))
            before = []
    return tuple(found)


def lmms_model(engine: Any, batch_size: int = 8) -> Any:
    """The engine as an lmms-eval chat model; its task dictionary is filled by ``simple_evaluate``. Raises
    ``ValueError`` without the package."""
    base = _lmms("lmms_eval.api.model").lmms

    class Diptych(base):
        """Answers through ``Engine.answers``; likelihoods are not offered."""

        is_simple = False

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            alike: dict[tuple[int, float], list[int]] = {}
            for i, request in enumerate(requests):
                settings = request.args[2]
                key = int(settings.get("max_new_tokens", 64)), float(settings.get("temperature") or 0)
                alike.setdefault(key, []).append(i)
            out = [""] * len(requests)
            for (length, temperature), members in alike.items():
                for some in (members[k : k + batch_size] for k in range(0, len(members), batch_size)):
                    samples = [self._sample(requests[i], i) for i in some]
                    for i, answer in zip(
                        some, engine.answers(samples, length, temperature, 0, batch_size), strict=True
                    ):
                        out[i] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[i].args[:2], answer.text)
            return out

        def _sample(self, request: Any, i: int) -> Sample:
            _, to_messages, _, doc, task, split = request.args
            return Sample(f"{task}/{doc}/{i}", messages(to_messages(self.task_dict[task][split][doc])))

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
    engine: Any, tasks: Sequence[str], folder: Path, manager: Any, limit: int | None = None, batch_size: int = 8
) -> None:
    """Runs lmms-eval's tasks. FOLDER/lmms-eval keeps a task's results and samples; a task that is there must be of the
    same model and limit, and is not run."""
    who = identity(engine) | {"limit": limit}
    for task in tasks:
        file = lmms_results(folder, task)
        if file.is_file():
            if (made := files.load(file)["card"]) != who:
                differs = next(k for k in who if made.get(k) != who[k])
                raise ValueError(f"{file} was made with {differs} = {made.get(differs)!r}; use another folder")
        else:
            with _whole_pictures():
                done = _lmms("lmms_eval.evaluator").simple_evaluate(
                    model=lmms_model(engine, batch_size), tasks=[task], limit=limit, batch_size=1, log_samples=True,
                    task_manager=manager, bootstrap_iters=0, verbosity="ERROR",
                )  # fmt: skip
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
            error = next((e for s in ("_stderr", "_stderr_clt") if _number(e := row.get(f"{metric}{s},{kind}"))), 0.0)
            half = intervals.Z * float(error)
            at = "" if kind == "none" else f"[{kind}]"
            n = int(counts.get("effective") or row.get("samples") or 0)
            scores[f"{task}@lmms-eval{at}/{metric}"] = Score(float(value), value - half, value + half, n)
    if not scores:
        raise ValueError(f"{file} holds no results of lmms-eval")
    return scores


def read_lmms_samples(file: Path) -> list[Outcome]:
    """The samples beside a results file as outcomes of ``TASK@lmms-eval``, one category for each part of the task:
    what was asked, said and wanted, graded by the first of the task's metrics that is a number of each sample. None
    where no metric is, or the file has gone."""
    beside, found = _lmms_samples(file), []
    rows = files.rows(beside) if beside.is_file() else []
    grades = [{key: grade for key, value in row.items() if (grade := _grade(key, value)) is not None} for row in rows]
    metric = next((key for key in (grades[0] if grades else ()) if all(key in grade for grade in grades)), None)
    for number, (row, grade) in enumerate(zip(rows, grades, strict=True) if metric else (), 1):
        where, name = f"{beside} line {number}", f"{file.stem}@lmms-eval"
        asked, *_ = files.field(row, ("arguments",), where, list) or [""]
        said, *_ = files.field(row, ("filtered_resps",), where, list) or [""]
        part, wanted = str(row.get("task", file.stem)), str(row.get("target"))
        id, prompt = f"{part}-{files.field(row, ('doc_id',), where)}", str(asked)
        sample = Sample(id, (Message("user", (Text(prompt),)),))
        item = Item(id, name, part, prompt, sample, 0, id, {"answer": wanted})
        reason = "" if grade[metric] >= 1 else f"expected {wanted!r}"
        verdict = Verdict(grade[metric] >= 1, reason, {metric: grade[metric]}, grade[metric])
        found.append(Outcome(item, verdict, str(said)))
    return found


def _grade(key: str, value: Any) -> float | None:
    """The number that a metric gives a sample."""
    number = value.get("score") if isinstance(value, dict) else value
    return float(number) if key not in SAMPLE and _number(number) else None


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
