"""Savings of the cached prefix in an IOMM training step: time, and memory for the backward.

Without the cache the frozen language model runs over the condition and its queries together, with gradient. With it the
condition runs without gradient, its keys and values are cached, and only the queries run with gradient
(models/iomm.py). Both give the same condition and gradients (tests/models/test_iomm.py); the difference is printed.

    python benchmarks/iomm_prefix.py [--width 256] [--layers 8] [--prefix 280] [--queries 64] [--samples 4]
"""

import argparse
from dataclasses import replace

import torch
from common import best, finish

from diptych.core.batch import pack
from diptych.core.noise import Noise
from diptych.core.sample import Sample, assistant, user
from diptych.data.worlds.embedded import source
from diptych.models import store
from diptych.models.iomm import Config
from diptych.parts.attention import Recorded, documents


def build(width: int, layers: int, queries: int):
    """IOMM with the tiny reader's classes at another size, frozen."""
    c = Config.tiny()
    model = c.mllm.model
    text = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    row = model | {"text_config": model["text_config"] | text}
    made = store.create("iomm", replace(c, mllm=replace(c.mllm, model=row), queries=queries))
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


def held(model, batch, way: str) -> float:
    """MiB of activations that one forward holds for its backward."""
    weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = WAYS[way](model, batch)
    del out
    return sum(n for place, n in storages.items() if place not in weights) / 2**20


def main() -> None:
    p = argparse.ArgumentParser()
    for name, value in (("width", 256), ("layers", 8), ("prefix", 280), ("queries", 64), ("samples", 4)):
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    torch.manual_seed(0)
    model = build(a.width, a.layers, a.queries)
    batch = rows(model, a.samples, a.prefix)
    seconds = {way: best(lambda way=way: step(model, batch, way), repeat=3) for way in WAYS}
    memory = {way: held(model, batch, way) for way in WAYS}
    (one, valid), (other, _) = (way(model, batch) for way in WAYS.values())
    finish(
        "the kept prefix",
        [{"way": w, "seconds a step": seconds[w], "held for the backward (MiB)": memory[w]} for w in WAYS],
        tokens=sum(batch.lengths) // len(batch.lengths),
        queries=a.queries,
        faster=seconds["plain"] / seconds["kept"],
        memory=memory["plain"] / memory["kept"],
        difference=float((one - other)[valid].detach().abs().max()),
    )


if __name__ == "__main__":
    main()
