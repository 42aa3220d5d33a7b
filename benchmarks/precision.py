"""A training step of a recipe in float32 and in bfloat16: processor seconds of forward, backward and optimizer.

Both arms start from the same weights, take the same row and run in turns on one thread.

    python benchmarks/precision.py [bagel/tiny] [--rounds 5] [--tokens 4096]
"""

import argparse
from dataclasses import replace
from statistics import median
from time import process_time

import torch
from common import finish

from diptych import recipes
from diptych.core.losses import combine
from diptych.core.noise import Noise
from diptych.machine.devices import fastest_precision, matmul_rate
from diptych.recipes.run import stage_sources
from diptych.training import optim
from diptych.training.build import build
from diptych.training.parameters import freeze, select
from diptych.training.rows import stage_loader


def prepared(recipe, stage):
    """(model, optimizers) of an arm."""
    model = build(recipe)
    rates, parts = select(model, stage.train), freeze(model, stage.train)
    optimizers = optim.build(model, parts, rates, stage.optimizer, recipe.precision)
    optim.set_rates(optimizers, 1e-2)
    return model, optimizers


def step(model, optimizers, batch, stage, precision: str, number: int) -> tuple[list[float], float]:
    """(processor seconds of forward, backward and optimizer; the loss) of one step."""
    times = [process_time()]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = combine(model(batch, Noise(0, number)), stage.loss, model.counts(batch))
    times.append(process_time())
    loss.backward()
    times.append(process_time())
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    times.append(process_time())
    return [b - a for a, b in zip(times, times[1:], strict=False)], float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="bagel/tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="tokens of the row (default: the recipe's)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = replace(recipes.find(args.recipe), workers=0)
    stage = recipe.stages[0]
    if args.tokens:
        stage = replace(stage, limits=replace(stage.limits, tokens=args.tokens))
    arms = {p: prepared(replace(recipe, precision=p), stage) for p in ("fp32", "bf16")}
    with stage_loader(recipe, stage, arms["fp32"][0], stage_sources).running() as rows:
        batch = next(iter(rows)).batch
    taken, losses = {p: [] for p in arms}, {}
    for number in range(args.rounds + 1):
        for precision, arm in arms.items():
            seconds, losses[precision] = step(*arm, batch, stage, precision, number)
            if number:  # the first step warms up
                taken[precision].append(seconds)
    rows = [
        {
            "precision": p,
            **{f"{part} s": median(t[i] for t in times) for i, part in enumerate(("forward", "backward", "optimizer"))},
            "step s": median(map(sum, times)),
            "last loss": losses[p],
        }
        for p, times in taken.items()
    ]
    ratio = median(sum(a) / sum(b) for a, b in zip(taken["fp32"], taken["bf16"], strict=True))
    rates = {p: matmul_rate(dtype) for p, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    finish(
        "precision",
        rows,
        recipe=args.recipe,
        tokens=sum(batch.lengths),
        speedup=ratio,
        auto=fastest_precision(),
        gflops=rates,
    )


if __name__ == "__main__":
    main()
