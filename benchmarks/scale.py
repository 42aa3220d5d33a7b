"""Training steps of every family on one device under every engine: tokens/s, MFU, peak memory, and what the plan said.

Beside them ``plain``: the family's trunk as a loop over transformers (Qwen3 of the same sizes; for IOMM, whose reader
it is frozen, with diffusers' SD3 transformer) on the same rows, padded to the longest document instead of packed. It
has one route, no autoencoder and no vision encoder, so it does less.

    python benchmarks/scale.py                          # a CPU, small
    python benchmarks/scale.py --tiny                   # every arm, in this process: proves the script
    python benchmarks/scale.py --device cuda --large    # about 300 M parameters of every family
    torchrun --nproc-per-node 8 benchmarks/scale.py --device cuda --large --shard
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import finish
from torch.utils.flop_counter import FlopCounterMode
from training import wider

from diptych import recipes
from diptych.core.batch import Batch
from diptych.machine.devices import matmul_rate
from diptych.models import configs, store, table
from diptych.parts.decoder import DecoderConfig
from diptych.parts.dit import DitConfig
from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.log import memory, read_metrics
from diptych.training.plan import GIB, plan
from diptych.training.recipe import EngineConfig, Limits, Optimizer, Recipe
from diptych.training.rows import stage_loader

STEPS = 13  # MFU is there from the eleventh on
SKIPPED = 2  # steps that warm up
SIZES = {  # (width, layers): --tiny, the default, --large (256 to 330 M parameters)
    "bagel": ((64, 2), (192, 6), (1024, 12)),
    "cheers": ((64, 2), (192, 6), (1024, 23)),
    "synergen": ((64, 2), (192, 6), (1024, 12)),
    "iomm": ((64, 2), (128, 6), (1024, 6)),
}


def config(family: str, width: int, layers: int) -> Any:
    """The tiny config of a family with a wider, deeper trunk."""
    tiny = table.config(f"{family}/tiny")
    if family == "bagel":
        return wider(width, layers)
    if family == "iomm":
        model = deepcopy(tiny.mllm.model)
        model["text_config"] |= {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": max(2, width // 64),
            "num_key_value_heads": max(1, width // 128),
        }
        heads = max(2, width // 64)
        side = width // heads // 2
        dit = DitConfig("double", width, layers, heads, (0, side, side))
        return replace(tiny, mllm=replace(tiny.mllm, model=model), dit=dit)
    return replace(tiny, decoder=wide(tiny.decoder, width, layers))


def wide(decoder: DecoderConfig, width: int, layers: int) -> DecoderConfig:
    heads = max(2, width // 64)
    return replace(
        decoder,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
    )


def sized(family: str, width: int, layers: int, tokens: int, workers: int) -> Recipe:
    """The last stage of the family's tiny recipe, on fresh weights."""
    base = recipes.find(f"{family}/tiny")
    stage = replace(
        base.stages[-1],
        steps=STEPS,
        optimizer=Optimizer("adamw"),
        ema=None,
        limits=Limits(tokens, max(1, tokens // 16)),
    )
    made = configs.config_to_json(family, config(family, width, layers))
    return replace(base, model=made, stages=(stage,), init={}, workers=workers, checkpoint_every=10**9)


def arms(device: str, shard: bool, tiny: bool) -> dict[str, tuple[str, EngineConfig] | None]:
    """(precision, engine) of each; None: the plain loop. ``eager`` is what the others are compared with."""
    how = "full" if shard else "none"
    eager = "bf16" if device == "cuda" else "fp32"
    found: dict[str, tuple[str, EngineConfig] | None] = {"eager": (eager, EngineConfig(shard=how))}
    found["recomputed"] = (eager, EngineConfig(shard=how, recompute="full"))
    if device == "cuda" or tiny:
        found["selective"] = (eager, EngineConfig(shard=how, recompute="selective"))
        found["compiled"] = (eager, EngineConfig(shard=how, compile="inductor" if device == "cuda" else "aot_eager"))
    if device == "cuda":
        found["fp32"] = ("fp32", EngineConfig(shard=how))
    return found | ({} if shard else {"plain": None})


# ---- the plain loop -------------------------------------------------------------------------------------------------


def plain_words(decoder: DecoderConfig, device: str) -> tuple[torch.nn.Module, Callable[[Batch], tuple[Any, int]]]:
    """(Qwen3 of these sizes; a row's documents -> its loss, its tokens)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        n: getattr(decoder, n)
        for n in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "tie_word_embeddings",
        )
    }
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=decoder.width, use_cache=False)).to(device)

    def step(batch: Batch) -> tuple[Any, int]:
        mask = padded(batch.lengths, device)
        ids = torch.randint(decoder.vocab_size, mask.shape, device=device)
        labels = ids.masked_fill(~mask, -100)
        return model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss, sum(batch.lengths)

    return model, step


def plain_pictures(made: Any, device: str) -> tuple[torch.nn.Module, Callable[[Batch], tuple[Any, int]]]:
    """(SD3's transformer of the generator's sizes; a row's documents -> its loss, its tokens): the reader's language
    model reads every document without gradient, a picture is drawn for each."""
    from diffusers import SD3Transformer2DModel
    from transformers import Qwen2Config, Qwen2Model

    d, text = made.dit, {k: v for k, v in made.mllm.model["text_config"].items() if k != "model_type"}
    reader = Qwen2Model(Qwen2Config(**text, use_cache=False)).to(device).requires_grad_(False)
    features = made.autoencoder.latent_channels * made.latent_patch**2
    side = made.size[0] // made.stride
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=features,
        num_layers=d.layers,
        attention_head_dim=d.hidden_size // d.heads,
        num_attention_heads=d.heads,
        qk_norm="rms_norm",
        joint_attention_dim=text["hidden_size"],
        caption_projection_dim=d.hidden_size,
        pooled_projection_dim=text["hidden_size"],
        out_channels=features,
        pos_embed_max_size=2 * side,
    ).to(device)

    def step(batch: Batch) -> tuple[Any, int]:
        mask = padded(batch.lengths, device)
        with torch.no_grad():
            ids = torch.randint(text["vocab_size"], mask.shape, device=device)
            seen = reader(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        x = torch.randn(len(mask), features, side, side, device=device)
        t = torch.rand(len(mask), device=device)
        out = model(x, encoder_hidden_states=seen, pooled_projections=seen[:, -1], timestep=1000 * t).sample
        return (out.float() - x).square().mean(), sum(batch.lengths)

    return model, step


def padded(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    """Which places of (documents, longest) hold something."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def plain(recipe: Recipe, run: Path, device: str, precision: str) -> None:
    """The same rows through the plain loop; leaves the lines that ``loop.train`` leaves."""
    family, made = configs.config_from_json(recipe.model)
    model, work = plain_pictures(made, device) if family == "iomm" else plain_words(made.decoder, device)
    ours = store.create(family, made, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    stage = recipe.stages[0]
    rows = iter(stage_loader(recipe, stage, ours, stage_sources))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def step() -> int:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss, tokens = work(next(rows).batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
        return tokens

    run.mkdir()
    with FlopCounterMode(display=False) as counter:
        tokens = step()
    each, lines = counter.get_total_flops() / tokens, []
    for _ in range(STEPS):
        start = time.perf_counter()
        tokens = step()
        seconds = time.perf_counter() - start
        lines.append(
            {"seconds": seconds, "tokens_per_second": tokens / seconds, "data_wait": 0.0, "memory": memory(device)}
        )
    rate = matmul_rate(dtype, device, n=768 if device == "cpu" else 8192) * 1e9
    lines[-1]["mfu"] = each * lines[-1]["tokens_per_second"] / rate
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


# ---- everything -----------------------------------------------------------------------------------------------------


def one(file: Path, run: Path, device: str, arm: str) -> None:
    """One arm: in a process of its own, its peak is its own."""
    recipe = Recipe.load(file)
    if arm == "plain":
        plain(recipe, run, device, recipe.precision)
    else:
        loop.train(recipe, run, stage_sources, device, show=False)


def measure(recipe: Recipe, arm: str, where: Path, device: str, here: bool) -> dict[str, Any] | None:
    """A row of the table; None in other processes than the first, and (told on stderr) where the arm failed. Run
    ``here``, in this process, it costs no start, and its memory is that of all before it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = f"{recipe.model['family']}-{arm}"
    file, run = where / f"{name}.json", where / name
    if rank == 0:
        file.write_text(recipe.to_json())
    if here:
        one(file, run, device, arm)
    else:
        command = [sys.executable, __file__, "--device", device, "--one", str(file), str(run), arm]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
            return None
    if rank:
        return None
    logged = read_metrics(run)[SKIPPED:]
    seconds = sorted(r["seconds"] for r in logged)[len(logged) // 2]
    tokens = sum(r["tokens_per_second"] * r["seconds"] for r in logged) / len(logged)
    planned = None
    if arm != "plain":
        need = plan(recipe, stage_sources, gpus=world, device=device)[0]
        planned = (need.host if device == "cpu" else need.total) / GIB
    return {
        "family": recipe.model["family"],
        "arm": arm,
        "processes": world,
        "tokens/s": world * tokens / seconds,
        "mfu": logged[-1].get("mfu", 0.0),
        "memory GiB": logged[-1]["memory"],
        "planned GiB": planned,
        "data wait": sum(r["data_wait"] for r in logged) / len(logged),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--arms", nargs="+", help="some of them (default: all that the device has)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--large", action="store_true", help="about 300 M parameters")
    parser.add_argument("--tokens", type=int, help="of a row (default: 16384 with --large, 512 with --tiny, else 4096)")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        one(Path(a.one[0]), Path(a.one[1]), a.device, a.one[2])
        return 0
    size = 0 if a.tiny else 2 if a.large else 1
    tokens = a.tokens or (512, 4096, 16384)[size]
    known = arms(a.device, a.shard, a.tiny)
    if unknown := [arm for arm in a.arms or () if arm not in known]:
        parser.error(f"unknown arm {unknown[0]!r}; choose from {', '.join(known)}")
    where = Path(os.environ.get("DIPTYCH_BENCH", tempfile.gettempdir()))
    where /= f"scale-{os.environ.get('MASTER_PORT', os.getpid())}"
    where.mkdir(exist_ok=True)
    rows, parameters, failed = [], {}, 0
    for family in a.families:
        base = sized(family, *SIZES[family][size], tokens, 0 if a.tiny else 2 if a.large else 1)
        made = store.create(*configs.config_from_json(base.model), device="meta")
        parameters[family] = sum(p.numel() for p in made.parameters())
        for arm in a.arms or known:
            precision, engine = known[arm] or known["eager"]
            row = measure(replace(base, precision=precision, engine=engine), arm, where, a.device, a.tiny)
            failed += row is None
            rows += [row] if row else []
    if os.environ.get("RANK", "0") != "0":
        return 0
    shutil.rmtree(where)
    for row in rows:
        eager = next((r["tokens/s"] for r in rows if (r["family"], r["arm"]) == (row["family"], "eager")), float("nan"))
        row["of eager"] = row["tokens/s"] / eager
    finish("scale", rows, parameters=parameters, device=a.device, cuda=torch.version.cuda)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
