"""Cost of a guided denoising step of Cheers: operations of the published size at 512 pixels, counted by part on the
meta device, with and without sharing the tokenizer between both branches; seconds of the tiny size.

    python benchmarks/cheers_cost.py [--pixels 512] [--words 64]
"""

import argparse
from contextlib import contextmanager
from dataclasses import replace

import torch
from common import best, finish
from torch.utils.flop_counter import FlopCounterMode

from diptych.models import store, table
from diptych.models.cheers import Cheers, Config
from diptych.models.protocol import NOTHING, TEXT, Context, Drawing
from diptych.parts.attention import Cache

PARTS = {  # told -> (module, what of it a step calls)
    "pixel decoder": ("pixel_decoder", "decode"),
    "patches": ("vision", "embed"),
    "SigLIP2": ("vision", "features"),
    "projector": ("projector", "forward"),
    "decoder": ("decoder", "forward"),
    "coarse stage": ("coarse", "forward"),
    "gate": ("gate", "forward"),
    "fine stage": ("fine", "forward"),
}


def drawing(model: Cheers, pixels: int, words: int, branches: int) -> Drawing:
    """A picture about to be drawn after a prompt of ``words`` tokens, of which nothing is computed."""
    c = model.config.decoder
    cache = Cache(c.num_hidden_layers, c.num_key_value_heads, c.width, torch.float32, model.device).reserve(0, words)
    sides = [(NOTHING, 1.0), (TEXT, model.settings.guidance_scale)][:branches]
    contexts = tuple(Context(cache, words, words, private=()) for _ in sides)
    side = pixels // model.config.autoencoder.downsample
    noise = torch.zeros(model.config.autoencoder.features, side, side, device=model.device)
    settings = replace(model.settings, guidance_interval=(0.0, 1.0))
    return model.begin(noise, contexts, dict(sides), (pixels, pixels), settings)


@contextmanager
def unshared(model: Cheers):
    """As the published code does it: the tokenizer runs once for each branch."""
    see = model._see

    def twice(z):
        see(z)
        return see(z)

    model._see = twice
    yield
    del model._see


def operations(model: Cheers, pixels: int, words: int, branches: int) -> dict[str, float]:
    """GFLOP of one step by part, and of all of it (a multiplication and an addition are two)."""
    d, counted = drawing(model, pixels, words, branches), dict.fromkeys(PARTS, 0.0)
    counter = FlopCounterMode(display=False)

    def watch(told, call):
        def watched(*args):
            before = counter.get_total_flops()
            out = call(*args)
            counted[told] += (counter.get_total_flops() - before) / 1e9
            return out

        return watched

    for told, (module, method) in PARTS.items():
        part = model.get_submodule(module)
        setattr(part, method, watch(told, getattr(part, method)))
    with counter:
        model.step([d])
    for module, method in PARTS.values():
        delattr(model.get_submodule(module), method)
    return counted | {"all": counter.get_total_flops() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--words", type=int, default=64, help="tokens of the prompt")
    a = parser.parse_args()
    model = store.create("cheers", table.config("cheers/1.5b"), device="meta")
    plain = operations(model, a.pixels, a.words, 1)
    shared = operations(model, a.pixels, a.words, 2)
    with unshared(model):
        apart = operations(model, a.pixels, a.words, 2)
    rows = [
        {"part": part, "one branch, GFLOP": plain[part], "guided": shared[part], "guided, not shared": apart[part]}
        for part in plain
    ]
    tiny = store.create("cheers", Config.tiny())
    tiny.initialise(0)
    tiny.eval()
    d = drawing(tiny, 64, 12, 2)
    seconds = {"guided": best(lambda: tiny.step([d]))}
    with unshared(tiny):
        seconds["guided, not shared"] = best(lambda: tiny.step([d]))
    rows.append({"part": "tiny, seconds a step", "one branch, GFLOP": "", **seconds})
    saved = 1 - shared["all"] / apart["all"]
    finish("cheers_cost", rows, pixels=a.pixels, words=a.words, guided_tflop=shared["all"] / 1e3, saved=saved)


if __name__ == "__main__":
    main()
