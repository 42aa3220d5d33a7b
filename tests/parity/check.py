#!/usr/bin/env python3
"""Compares a family with a folder of recorded numbers: ``python tests/parity/check.py bagel FOLDER``.

Prints the largest difference of every tensor and which tensors nothing was compared with. Exits 1 where one is beyond
its tolerance (1e-4 absolute and relative, 1e-3 along optimiser steps, ids and masks exactly), 2 for a bad call.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FAMILIES = ("bagel", "bagel-inferencer", "cheers", "omnigen2")


def main(arguments: list[str] | None = None) -> int:
    """Runs every stage of a family's comparison and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", action="append", help="only these stages")
    a = parser.parse_args(arguments)
    if not (a.folder / "config.json").is_file():
        parser.error(f"{a.folder} holds no config.json")
    from tests.parity.compare import Folder

    family = importlib.import_module(f"tests.parity.{a.family.replace('-', '_')}")
    folder = Folder(a.folder, family.WEIGHTS)
    begun = time.perf_counter()
    for name, stage in family.STAGES.items():
        if not a.stage or name in a.stage:
            before = len(folder.rows)
            stage(folder)
            print(f"\n{name}: {len(folder.rows) - before} comparisons")
            for row in folder.rows[before:]:
                wanted = f"<= {row.tolerance:g}" if row.tolerance else "exact"
                print(f"  {'ok  ' if row.ok else 'FAIL'} {row.difference:9.2e} {wanted:>9}  {row.name}")
    unused, failed = folder.unused(), folder.failures()
    print(f"\nnot used: {len(unused)} of {len(folder.tensors)} tensors")
    print("".join(f"  {name}\n" for name in unused), end="")
    worst = max((r.difference for r in folder.rows if r.tolerance), default=0.0)
    seconds = time.perf_counter() - begun
    print(f"{len(folder.rows)} comparisons, {len(failed)} beyond tolerance, largest {worst:.2e}, {seconds:.1f} s")
    for row in failed:
        print(f"FAIL {row.name}: {row.difference:.2e}")
    return 1 if failed or not folder.rows else 0


if __name__ == "__main__":
    sys.exit(main())
