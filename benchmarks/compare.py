"""Compares two results of one benchmark and fails on regressions beyond noise.

A result is what a benchmark printed: its last line, one JSON object. Rows are matched by their settings; of each,
numbers that say how fast (tokens/s, GFLOP/s, times_consumed ...) must not fall and numbers that say how much it takes
(s, ms, seconds, GiB, wait) must not rise by more than the tolerance. Give several files of a side (from repeated runs)
and their best counts: on a busy machine the best of three is what the code can do.

    python benchmarks/training.py > before.txt; git switch mine; python benchmarks/training.py > after.txt
    python benchmarks/compare.py before.txt after.txt
    python benchmarks/compare.py --before a1.txt a2.txt --after b1.txt b2.txt --tolerance 0.05
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

MORE = re.compile(r"(/s\b|per_second|share|rate|mfu|fill|times)", re.I)  # more is better
LESS = re.compile(r"(\bs\b|\bms\b|seconds|time|GiB|memory|wait|bytes|peak)", re.I)


def read(file: Path) -> dict[str, Any]:
    """The last JSON line of a file. Raises ``ValueError`` where there is none."""
    for line in reversed(file.read_text().splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise ValueError(f"{file} ends with no line of JSON")


def better(name: str) -> int:
    """1 where more of it is better, -1 where less is, 0 for settings."""
    return 1 if MORE.search(name) else -1 if LESS.search(name) else 0


def rows(results: list[dict[str, Any]]) -> dict[tuple, dict[str, float]]:
    """Settings of a row -> the best of each of its numbers."""
    out: dict[tuple, dict[str, float]] = {}
    for result in results:
        for row in result.get("rows", [result]):
            numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and better(k)}
            key = tuple((k, str(v)) for k, v in row.items() if k not in numbers and not isinstance(v, float))
            mine = out.setdefault(key, {})
            for k, v in numbers.items():
                mine[k] = v if k not in mine else max(mine[k], v) if better(k) > 0 else min(mine[k], v)
    return out


def compare(before: list[dict], after: list[dict], tolerance: float) -> tuple[list[list[str]], list[str]]:
    """(a table of changes, the regressions). Raises ``ValueError`` when the benchmarks differ or share no row."""
    names = {r.get("benchmark") for r in before + after}
    if len(names) != 1:
        raise ValueError(f"these are results of different benchmarks: {', '.join(sorted(map(str, names)))}")
    old, new = rows(before), rows(after)
    if not old.keys() & new.keys():
        raise ValueError("the two results have no row in common")
    table, worse = [], []
    for key in old:
        label = " ".join(f"{k}={v}" for k, v in key)
        if key not in new:
            worse.append(f"{label}: is missing after")
            continue
        for name, was in old[key].items():
            now = new[key].get(name, float("nan"))
            change = now - was if "wait" in name else (now - was) / abs(was) if was else 0.0  # waits are shares of time
            bad = not change * better(name) >= -tolerance
            table.append([label, name, f"{was:.4g}", f"{now:.4g}", f"{change:+.1%}", "worse" if bad else ""])
            if bad:
                worse.append(f"{label}: {name} {was:.4g} -> {now:.4g} ({change:+.1%})")
    return table, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="one before and one after")
    parser.add_argument("--before", nargs="+", type=Path, default=[])
    parser.add_argument("--after", nargs="+", type=Path, default=[])
    parser.add_argument("--tolerance", type=float, default=0.1, help="what counts as noise (default: 0.1 = 10 %%)")
    a = parser.parse_args()
    if len(a.files) == 2:
        a.before, a.after = a.files[:1], a.files[1:]
    if not a.before or not a.after:
        parser.error("give two files, or --before and --after")
    try:
        table, worse = compare([read(f) for f in a.before], [read(f) for f in a.after], a.tolerance)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in table:
        print("  ".join(f"{cell:<12}" for cell in line).rstrip())
    print("\n".join(["", *worse, f"{len(worse)} regressions beyond {a.tolerance:.0%}"]))
    print(json.dumps({"regressions": worse, "compared": len(table)}))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
