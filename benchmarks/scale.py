"""Training steps of one size on one device under every engine: tokens/s, MFU, peak memory, and what the plan said.

python benchmarks/scale.py                                  # a CPU, small
python benchmarks/scale.py --device cuda --width 1024 --layers 16   # about 300 M parameters a route
torchrun --nproc-per-node 8 benchmarks/scale.py --device cuda --width 1024 --layers 16 --shard
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import finish
from training import wider

from diptych import models, recipes
from diptych.recipes.run import stage_sources
from diptych.train import loop
from diptych.train.plan import GIB, plan
from diptych.train.recipe import Engine, Limits, Optimizer, Recipe

STEPS = 13  # MFU is there from the eleventh on


def arms(device: str, shard: bool) -> dict[str, tuple[str, Engine]]:
    how = "full" if shard else "none"
    found = {"fp32": ("fp32", Engine(shard=how)), "fp32 recomputed": ("fp32", Engine(shard=how, recompute="full"))}
    if device == "cuda":
        found |= {
            "bf16": ("bf16", Engine(shard=how)),
            "bf16 selective": ("bf16", Engine(shard=how, recompute="selective")),
            "bf16 recomputed": ("bf16", Engine(shard=how, recompute="full")),
            "bf16 compiled": ("bf16", Engine(shard=how, compile="inductor")),
        }
    return found


def one(file: str, run: str, device: str) -> None:
    """In a process of its own, so that its peak is its own."""
    loop.train(Recipe.load(file), run, stage_sources, device, show=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(*a.one, a.device)
        return
    base = recipes.find("bagel/tiny")
    stage = replace(base.stages[0], steps=STEPS, optimizer=Optimizer("adamw"), limits=Limits(a.tokens, 256), ema=None)
    base = replace(base, model=models.config_to_json("bagel", wider(a.width, a.layers)), stages=(stage,), workers=1, checkpoint_every=10**9)  # fmt: skip  # noqa: E501
    world, rank, rows = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)), []
    where = (
        Path(os.environ.get("DIPTYCH_BENCH", tempfile.gettempdir()))
        / f"scale-{os.environ.get('MASTER_PORT', os.getpid())}"
    )
    where.mkdir(exist_ok=True)
    for arm, (precision, engine) in arms(a.device, a.shard).items():
        recipe = replace(base, precision=precision, engine=engine)
        file, run = where / f"{arm}.json".replace(" ", "-"), where / arm.replace(" ", "-")
        if rank == 0:
            file.write_text(recipe.to_json())
        command = [sys.executable, __file__, "--device", a.device, "--one", str(file), str(run)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{arm}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        if rank:
            continue
        logged = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()][2:]
        seconds = sorted(r["seconds"] for r in logged)[len(logged) // 2]
        tokens = sum(r["tokens_per_second"] * r["seconds"] for r in logged) / len(logged)
        need = plan(recipe, stage_sources, gpus=world, device="cpu" if a.device == "cpu" else "cuda")[0]
        planned = need.host if a.device == "cpu" else need.total
        rows.append(
            {
                "arm": arm, "processes": world, "tokens/s": world * tokens / seconds, "mfu": logged[-1].get("mfu", 0.0),
                "memory GiB": logged[-1]["memory"], "planned GiB": planned / GIB,
                "data wait": sum(r["data_wait"] for r in logged) / len(logged),
            }
        )  # fmt: skip
    if rank == 0:
        counted = models.create("bagel", wider(a.width, a.layers), device="meta")
        finish(
            "scale",
            rows,
            parameters=sum(p.numel() for p in counted.parameters()),
            device=a.device,
            cuda=torch.version.cuda,
        )


if __name__ == "__main__":
    main()
