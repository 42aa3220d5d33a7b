"""What a plan says is what a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diptych import cli, recipes
from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.models import configs, store
from diptych.recipes.run import stage_sources
from diptych.training import plan as planning
from diptych.training.plan import GIB, plan
from diptych.training.recipe import EngineConfig, Limits
from tests.support import tiny


def wide(**changes):
    """Wide enough that its activations are most of what the process holds."""
    c = tiny.bagel()
    decoder = replace(c.decoder, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)
    row = configs.config_to_json("bagel", replace(c, decoder=replace(decoder, num_key_value_heads=2)))
    base = tiny.recipe(
        steps=2, checkpoint_every=1, limits=Limits(tokens=4096, pictures=320), optimizer=tiny.Optimizer("adamw")
    )
    return replace(base, model=row, **changes)


HELD = "print(next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')) * 1024)"
RUN = f"""
import sys
from diptych.recipes.run import stage_sources
from diptych.training import loop
from diptych.training.recipe import Recipe
loop.train(Recipe.load(sys.argv[1]), sys.argv[2], stage_sources, show=False)
{HELD}
"""


def peak(recipe, tmp_path):
    """Bytes that a process really held at most; getrusage would count the process that began it too."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    command = [sys.executable, "-c", RUN, str(tmp_path / "recipe.json"), str(tmp_path / "run")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process held")
def test_the_memory_planned_is_the_memory_taken_within_15_percent(tmp_path):
    recipe = wide()
    need = plan(recipe, stage_sources, device="cpu")[0]
    small = tiny.recipe(steps=2, checkpoint_every=1)
    little = plan(small, stage_sources, device="cpu")[0]
    base = peak(small, tmp_path / "small") - little.total - little.saving  # libraries
    planned = need.total + need.saving + base
    assert need.activations > 0.3 * planned, "the comparison should not be of libraries"
    assert peak(recipe, tmp_path) == pytest.approx(planned, rel=0.15)


def test_what_is_counted():
    need = plan(wide(), stage_sources, device="cpu")[0]
    made = store.create("bagel", configs.config_from_json(wide().model)[1], device="meta")
    all_, frozen = (sum(p.numel() for p in m.parameters()) for m in (made, made.autoencoder))
    buffers = sum(b.numel() * b.element_size() for b in made.buffers())
    assert need.weights == 4 * all_ + buffers
    half = plan(wide(precision="bf16", engine=EngineConfig(frozen="bf16")), stage_sources, device="cpu")[0]
    assert half.weights == need.weights, "the autoencoder, all that is frozen here, stays in float32"
    assert need.gradients == need.average == 4 * (all_ - frozen) and need.optimizer == 8 * (all_ - frozen)
    assert need.total == need.weights + need.gradients + need.optimizer + need.average + need.activations
    less = plan(wide(engine=EngineConfig(recompute="full")), stage_sources, device="cpu")[0]
    some = plan(wide(engine=EngineConfig(recompute="selective")), stage_sources, device="cpu")[0]
    assert less.activations < some.activations < need.activations and less.flops > some.flops >= need.flops
    shards = plan(wide(engine=EngineConfig(shard="full")), stage_sources, gpus=4, device="cpu")[0]
    assert 4 * shards.optimizer == pytest.approx(need.optimizer, rel=0.01) and shards.gathered > 0
    hybrid = plan(wide(engine=EngineConfig(shard="hybrid")), stage_sources, gpus=4, nodes=2, device="cpu")[0]
    assert hybrid.optimizer == pytest.approx(2 * shards.optimizer, rel=0.01)


def test_the_work_planned_is_the_work_done():
    from torch.utils.flop_counter import FlopCounterMode

    made = tiny.model("bagel")
    with FlopCounterMode(display=False) as real:
        losses = made(pack([made.lay_out(s) for s in tiny.samples()], 2), Noise())
        sum(t.sum for t in losses.values()).backward()
    from diptych.training.plan import Hollow, fused

    hollow = store.create("bagel", tiny.bagel(), device="meta")
    with Hollow(hollow) as counted, fused():
        losses = hollow(pack([hollow.lay_out(s) for s in tiny.samples()], 2), Noise())
        sum(t.sum for t in losses.values()).backward()
    done = real.get_flop_counts()["Global"]
    products = {op: n for op, n in counted.flops.items() if "attention" not in str(op)}  # torch counts none on a CPU
    assert products == {op: n for op, n in done.items() if "attention" not in str(op)}
    assert 0 < counted.flops.total() - sum(products.values()) < 0.2 * counted.flops.total()
    assert next(hollow.parameters()).grad.is_meta and not torch.is_inference_mode_enabled()


def test_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "recipe.json"
    file.write_text(tiny.recipe().to_json())
    assert cli.main(["plan", str(file), "--gpus", "8", "--gpu", "a100", "--price", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["memory"] == 80 and told["stages"][0]["cost"] > 0
    assert cli.main(["plan", str(file), "--memory", "0.0001"]) == 2
    assert "does not fit" in (out := capsys.readouterr().out) and "engine.recompute=full" in out
    assert cli.main(["plan", str(file), "--gpus", "8", "--nodes", "3"]) == 2
    assert cli.main(["plan", str(file), "--gpu", "abacus"]) == 2
    assert (
        "8 processes do not divide among 3 machines" in (err := capsys.readouterr().err)
        and "unknown GPU 'abacus'" in err
    )


STATE = {  # GiB of weights, gradients and optimizer; activations of rows of 1024-pixel pictures: benchmarks/presets.py
    "sgt/bagel-24gb": (16.27, 3.18),
    "sgt/bagel-80gb": (32.39, 6.71),
    "iomm/b-24gb": (8.25, 1.29),
    "iomm/b-80gb": (34.38, 5.18),
    "cheers/1.5b-24gb": (11.56, 0.75),
    "cheers/1.5b-80gb": (37.38, 25.81),
    "synergen/tune-24gb": (8.56, 5.89),
    "synergen/tune-80gb": (54.09, 11.48),
    "sgt/omnigen2-24gb": (9.06, 1.84),
    "sgt/omnigen2-80gb": (19.52, 6.24),
}


def test_every_preset_is_here_and_documented():
    assert STATE.keys() == {n for n in recipes.RECIPES if n.endswith("gb")}
    assert {n.partition("/")[0] for n in STATE} == {"sgt", "iomm", "cheers", "synergen"}
    told = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for name, (state, activations) in STATE.items():
        line = next(x for x in told.splitlines() if x.startswith(f"| `{name}`"))
        assert line.endswith(f"| {state:.1f} | {activations:.1f} | {state + activations:.1f} |"), line


@pytest.mark.parametrize("name", STATE)
def test_presets_fit_their_memory(name):
    """What is held is counted here; what a row computes with takes long to count, and was counted before."""
    pytest.importorskip("peft")
    state, activations = STATE[name]
    recipe, room = recipes.find(name), int(name[-4:-2]) * GIB
    stage = recipe.stages[-1]
    work = planning._Work(int(activations * GIB), 0, 0.0)
    need = planning._memory(planning._prepared(recipe, stage), recipe, stage, work, 1, 1, "cuda")
    assert need["total"] - need["activations"] == pytest.approx(state * GIB, rel=0.01)
    assert need["total"] < 0.95 * room, "CUDA itself and fragments take the rest"
