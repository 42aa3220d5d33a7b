"""Whole training steps (optimizer, data, logging) against the matrix-product peak measured in the same run.

Model FLOPs are 6 x activated parameters x tokens (decoder and vision by the tokens that they see) plus attention and
the frozen autoencoder's forward; Muon's own products are counted as overhead, not as work.

    python benchmarks/training.py [--steps 8]
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import finish

from diptych import recipes
from diptych.machine.devices import matmul_rate
from diptych.models import configs
from diptych.models.bagel import Config
from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.log import read_metrics
from diptych.training.recipe import Optimizer


def wider(width: int, layers: int) -> Config:
    """The tiny config with a wider, deeper decoder."""
    tiny = Config.tiny()
    heads = width // 64
    d = replace(
        tiny.decoder,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
    )
    return replace(tiny, decoder=d)


def flops_per_row(config: Config, tokens: float, pictures_seen: float, pictures_drawn: float, length: float) -> float:
    """Training FLOPs of one packed row."""
    d, v, ae = config.decoder, config.vision, config.autoencoder
    per_token = (
        d.hidden_size * d.width * (2 * d.num_attention_heads + 2 * d.num_key_value_heads)
        + 3 * d.hidden_size * d.intermediate_size
    )
    attention = 12 * d.num_hidden_layers * d.num_attention_heads * d.width * length * tokens
    vision = (
        6
        * 16
        * pictures_seen
        * (v.num_hidden_layers * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size))
    )
    encode = 0.0 if ae.kind == "identity" else 9e7 * pictures_drawn
    return 6 * d.num_hidden_layers * per_token * tokens + attention + vision + encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    rows = []
    for width, layers, optimizer in ((192, 6, "muon"), (256, 6, "adamw"), (384, 8, "adamw"), (512, 8, "adamw")):
        for precision in ("fp32", "bf16"):
            if precision == "bf16" and (width > 256 or matmul_rate(torch.bfloat16, n=256) < matmul_rate(torch.float32)):
                continue
            recipe = recipes.find("bagel/tiny")
            config = Config.tiny() if width == 192 else wider(width, layers)
            stage = replace(recipe.stages[0], optimizer=Optimizer(optimizer), steps=steps + 2)
            recipe = replace(
                recipe,
                model=configs.config_to_json("bagel", config),
                stages=(stage,),
                precision=precision,
                checkpoint_every=10**9,
            )
            peak = matmul_rate(torch.float32, n=1024, seconds=1.0)
            with tempfile.TemporaryDirectory() as folder:
                loop.train(recipe, Path(folder) / "run", stage_sources, show=False)
                logged = read_metrics(Path(folder) / "run")[2:]
            seconds = min(r["seconds"] for r in logged)
            tokens = sum(r["tokens_per_second"] * r["seconds"] for r in logged) / len(logged)
            drawn = sum(r["count/image"] for r in logged) / len(logged) / 16
            seen = sum(r["images_per_second"] * r["seconds"] for r in logged) / len(logged) - drawn
            rate = flops_per_row(config, tokens, seen, drawn, 32) / seconds / 1e9
            wait = sum(r["data_wait"] for r in logged) / len(logged)
            rows.append(
                {
                    "width": width,
                    "layers": layers,
                    "optimizer": optimizer,
                    "precision": precision,
                    "tokens/s": tokens / seconds,
                    "GFLOP/s": rate,
                    "share of fp32 peak": rate / peak,
                    "data wait": wait,
                    "fill": sum(r["fill"] for r in logged) / len(logged),
                    "memory GiB": logged[-1]["memory"],
                }
            )
    finish("training", rows, fp32_peak=peak)


if __name__ == "__main__":
    main()
