"""What the kept prefix saves an IOMM training step: time and peak memory against the plain way, in one run.

Plain: the frozen language model runs over the condition and its queries at once, with gradient. Kept: the condition
runs without gradient, its keys and values stay, and the queries alone run with gradient (models/iomm.py). Both give the
same condition and the same gradients (tests/test_iomm.py); the difference here is printed too.

    python benchmarks/iomm_prefix.py [--width 256] [--layers 8] [--prefix 280] [--queries 64] [--samples 4]
"""

import argparse
import resource
import subprocess
import sys
from dataclasses import replace

import torch
from common import best, finish

from diptych import models
from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.core.sample import Sample, assistant, user
from diptych.data.embedded import source
from diptych.models.iomm import Config
from diptych.parts.attention import Recorded, documents


def build(width: int, layers: int, queries: int):
    """IOMM with the tiny reader's classes at another size, frozen."""
    c = Config.tiny()
    model = c.mllm.model
    text = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    row = model | {"text_config": model["text_config"] | text}
    made = models.create("iomm", replace(c, mllm=replace(c.mllm, model=row), queries=queries))
    made.initialise(0)
    made.mllm.requires_grad_(False)
    return made.train()


def rows(model, samples: int, prefix: int):
    """Prompts of ``prefix`` words and a picture each."""
    made = []
    for i in range(samples):
        sample = source("shapes/draw")[i]
        words = (" a red circle left of a blue star" * prefix).split()[: prefix // 2]
        made.append(Sample(f"s{i}", (user(" ".join(words)), assistant(*sample.messages[-1].parts))))
    return pack([model.lay_out(s) for s in made])


def kept(model, batch):
    with torch.no_grad():
        s = model._embed(batch, Noise())
        attend = Recorded(documents(s.columns))
        states = model.mllm(s.x, s.positions, attend)
    return model._condition(batch, s, states, attend.memory)


def plain(model, batch):
    return model.reference(batch, Noise())


WAYS = {"kept": kept, "plain": plain}


def step(model, batch, way: str) -> None:
    model.zero_grad(set_to_none=True)
    condition, valid = WAYS[way](model, batch)
    (condition.square() * valid[..., None]).mean().backward()


def main() -> None:
    p = argparse.ArgumentParser()
    for name, value in (("width", 256), ("layers", 8), ("prefix", 280), ("queries", 64), ("samples", 4)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--way", choices=list(WAYS), help="one way only; prints what it added to the peak, in MiB")
    a = p.parse_args()
    torch.manual_seed(0)
    model = build(a.width, a.layers, a.queries)
    batch = rows(model, a.samples, a.prefix)
    if a.way:  # a process of its own, so that one way's peak does not hide the other's
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(model, batch, a.way)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    seconds = {way: best(lambda way=way: step(model, batch, way), repeat=3) for way in WAYS}
    again = [sys.executable, *sys.argv, "--way"]
    memory = {w: float(subprocess.run([*again, w], capture_output=True, text=True, check=True).stdout) for w in WAYS}
    (one, valid), (other, _) = (way(model, batch) for way in WAYS.values())
    table = [{"way": w, "seconds a step": seconds[w], "memory over the weights (MiB)": memory[w]} for w in WAYS]
    finish(
        "the kept prefix",
        table,
        tokens=sum(batch.lengths) // len(batch.lengths),
        queries=a.queries,
        faster=seconds["plain"] / seconds["kept"],
        memory=memory["plain"] / memory["kept"],
        difference=float((one - other)[valid].abs().max()),
    )


if __name__ == "__main__":
    main()
