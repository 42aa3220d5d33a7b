"""Reads the result files of other evaluation tools."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from diptych.core import intervals
from diptych.evaluation import files
from diptych.evaluation.benchmarks import aggregate
from diptych.evaluation.benchmarks import geneval as geneval_module
from diptych.evaluation.judges import replies
from diptych.evaluation.lmms import read_lmms
from diptych.evaluation.scores import Score, macro

# --- reading what others write ----------------------------------------------------------------------------------------


def read_vlmevalkit(file: Path) -> dict[str, Score]:
    """The numbers of a VLMEvalKit score file (csv, tsv, xlsx): ``STEM@vlmevalkit/COLUMN``, or .../ROW/COLUMN."""
    rows = _rows(file)
    scores = {}
    for row in rows:
        texts = [v for v in row.values() if isinstance(v, str) and not _float(v)]
        for column, value in row.items():
            number = _float(value)
            if number is not None and column and not column.startswith("Unnamed"):
                at = f"{texts[0]}/" if texts and len(rows) > 1 else ""
                scores[f"{file.stem}@vlmevalkit/{at}{column}"] = Score(number, number, number, 0)
    if not scores:
        raise ValueError(f"{file} holds no numbers")
    return scores


def _float(value: Any) -> float | None:
    try:
        return float(value) if value not in (None, "") and math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def _rows(file: Path) -> list[dict]:
    if file.suffix == ".xlsx":
        try:
            import openpyxl
        except ImportError as error:
            raise ValueError(f"{file.name} needs openpyxl: pip install openpyxl") from error
        try:
            head, *rest = openpyxl.load_workbook(file, read_only=True).active.iter_rows(values_only=True)
        except (BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no table of Excel: {error}") from error
        return [dict(zip(map(str, head), row, strict=False)) for row in rest]
    return files.table(file)


def read_wise(file: Path) -> dict[str, Score]:
    """WISE's legacy scores of its jsonl (prompt_id, consistency, realism, aesthetic_quality)."""
    groups: dict[str, tuple[list[float], list[str]]] = {}
    for n, row in enumerate(files.rows(file), 1):
        where, low = f"{file} line {n}", {k.lower(): v for k, v in row.items()}
        id = files.field(low, ("prompt_id", "id"), where, int)
        marks = [files.field(low, (k,), where, float) for k in ("consistency", "realism")]
        marks.append(files.field(low, ("aesthetic_quality", "aesthetic quality", "aesthetic"), where, float))
        name = next((k for k, last in aggregate.WISE_IDS.items() if 1 <= id <= last), None)
        if name is None or not all(0 <= m <= 2 for m in marks):
            raise ValueError(f"{where}: prompt {id} with marks {marks}; ids are 1 to 1000, marks 0 to 2")
        values, ids = groups.setdefault(name, ([], []))
        values.append(aggregate.wiscore(*marks))
        ids.append(str(id))
    if not groups:
        raise ValueError(f"{file} has no rows")
    scores = {f"wise@legacy[official]/{k}": macro({k: v}, graded=True) for k, v in groups.items()}
    if set(groups) != set(aggregate.WISE):
        return scores
    overall = macro(groups, weights=[aggregate.WISE[k] for k in groups], graded=True)
    return {"wise@legacy[official]/overall": overall} | scores


def read_dpg(file: Path) -> dict[str, Score]:
    """The numbers of DPG-Bench's ``_results.txt``: lines that end in "NAME: NUMBER"."""
    numbers = re.findall(
        r"^\s*([A-Za-z][\w \-/().]*?)\s*[:=]\s*(-?\d+(?:\.\d+)?)\s*%?\s*$", file.read_text("utf-8"), re.M
    )
    scores = {}
    for name, value in numbers:
        key = re.sub(r"\W+", "-", name.strip().lower()).strip("-")
        key = "overall" if "dpg" in key else key
        scores[f"dpg@official[mplug]/{key}"] = Score(float(value), float(value), float(value), 0)
    if not scores:
        raise ValueError(f"{file} has no line of a name and a number")
    return scores


def read_gedit(file: Path) -> dict[str, Score]:
    """GEdit's overall marks of its csv files: one file, or a folder of one for each task."""
    groups: dict[str, dict[str, tuple[list[float], list[str]]]] = {}
    for part in sorted(file.glob("*.csv")) if file.is_dir() else [file]:
        for n, row in enumerate(_rows(part), 1):
            where = f"{part} row {n}"
            sc = files.field(row, ("sementics_score", "semantics_score", "SC", "sc"), where, float)
            pq = files.field(row, ("quality_score", "PQ", "pq"), where, float)
            if not (0 <= sc <= 10 and 0 <= pq <= 10):
                raise ValueError(f"{where}: the marks are {sc:g} and {pq:g}; they are from 0 to 10")
            language = files.field(row, ("instruction_language", "language"), where)
            task = row.get("task_type") or part.stem
            for subset in ("full", "intersection"):
                if subset == "full" or str(row.get("intersection_exist")).lower() in ("true", "1"):
                    for name, value in (("O", math.sqrt(sc * pq)), ("SC", sc), ("PQ", pq)):
                        unit = groups.setdefault(f"gedit_{language}@{subset}[official]/{name}", {})
                        values, ids = unit.setdefault(task, ([], []))
                        values.append(value / 10)
                        ids.append(str(n))
    if not groups:
        raise ValueError(f"{file} has no rows")
    return {name: macro(unit, graded=True).times(10) for name, unit in groups.items()}


def read_imgedit(file: Path) -> dict[str, Score]:
    """ImgEdit's numbers of any of its three files: by type, by key (needs no more), or the judge's replies by key."""
    raw = files.load(file)
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{file} is not an object of marks")
    if isinstance(next(iter(raw.values())), str):
        marks = {k: replies.named_marks(files.field(raw, (k,), str(file)), 3, 1, 5) for k in raw}
        if unread := [k for k, v in marks.items() if v is None]:
            raise ValueError(f"{file}: {len(unread)} replies cannot be read, first {unread[0]}")
        raw = {k: round(sum(v.values()) / 3, 2) for k, v in marks.items() if v}
    numbers = {k: files.field(raw, (k,), str(file), float) for k in raw}
    if {k.lower() for k in numbers} >= set(aggregate.IMGEDIT):
        types = {k.lower(): v for k, v in numbers.items()}
        value = aggregate.imgedit(types)
        scores = {f"imgedit@basic[official]/{k}": Score(types[k], types[k], types[k], 0) for k in aggregate.IMGEDIT}
        return {"imgedit@basic[official]/overall": Score(value, value, value, 0)} | scores
    return {"imgedit@basic[official]/items": Score(*intervals.mean(list(numbers.values())), len(numbers))}


READERS: dict[str, Callable[[Path], dict[str, Score]]] = {
    "geneval": geneval_module.read_results,
    "wise": read_wise,
    "dpg": read_dpg,
    "gedit": read_gedit,
    "imgedit": read_imgedit,
    "lmms-eval": read_lmms,
    "vlmevalkit": read_vlmevalkit,
}


def read(kind: str, file: str | Path) -> dict[str, Score]:
    """The scores in a file that another harness wrote. Raises ``ValueError`` for an unknown kind or another file."""
    if kind not in READERS:
        raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(READERS)}")
    if not Path(file).exists():
        raise ValueError(f"there is no file {str(file)!r}")
    try:
        return READERS[kind](Path(file))
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{file} is no {kind} file: {error}") from error
