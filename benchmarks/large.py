"""A published model of full size on this processor: seconds to load it, for a word and for a guided step, and memory.

The folder has random bfloat16 weights under the published names. It is written shard by shard, so that no more than a
shard is in memory, and deleted at the end.

    python benchmarks/large.py                                    # BAGEL-7B-MoT, 28 GB, int8
    python benchmarks/large.py --model cheers/1.5b --quantize none
    python benchmarks/large.py --layers 14                        # BAGEL-7B-MoT at half its depth
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import torch
from common import finish
from safetensors.torch import save_file

from diptych.models import store, table
from diptych.models.published.folder import mapped_names
from diptych.models.published.key_map import export
from diptych.parts.tokenizer import Tokenizer

SHARD = 2**31  # bytes


def write(folder: Path, name: str, layers: int | None) -> float:
    """Writes a published folder with random weights; returns its size in GiB."""
    config = table.config(name)
    if layers:
        config = replace(config, decoder=replace(config.decoder, num_hidden_layers=layers))
    family, generator, size = table.SIZES[name].family, torch.Generator().manual_seed(0), 0
    model = store.create(family, config, Tokenizer.tiny(), "meta")
    state, layout = model.state_dict(), table.published_format(family)
    for stem, rules in layout.weights.items():
        shapes = export(rules(config), {n: state[n] for n in mapped_names(rules(config), state)})
        for rule in rules(config):  # a tied head may be left out
            if rule.repeated:
                shapes.pop(rule.published, None)
        index, shard, held = {}, {}, 0
        for tensor_name, shape in shapes.items():
            shard[tensor_name] = torch.randn(shape.shape, generator=generator).mul_(0.02).to(torch.bfloat16)
            held += shard[tensor_name].nbytes
            if held >= SHARD or tensor_name == list(shapes)[-1]:
                file = f"{stem}-{len(set(index.values())) + 1:05d}.safetensors"
                save_file(shard, folder / file)
                index |= dict.fromkeys(shard, file)
                size, shard, held = size + held, {}, 0
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file, row in layout.describe(config).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(row))
    tokenizer = folder / layout.tokenizer
    tokenizer.mkdir(exist_ok=True)
    model.tokenizer.save(tokenizer, split=True)
    return size / 2**30


def measure(folder: Path, quantize: str | None, pixels: int, words: int) -> dict[str, float]:
    """Wall and processor seconds of loading, of a word and of a guided step, and the most memory held (GiB)."""
    from diptych.generation.engine import Engine
    from diptych.models.sizes import Sizes

    Sizes.allow = lambda self, width, height: True  # random weights were trained on no size

    def timed(work):
        start, cpu = perf_counter(), process_time()
        result = work()
        return result, perf_counter() - start, process_time() - cpu

    model, load, load_cpu = timed(lambda: store.load(folder, quantize=quantize))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    engine, row = Engine(model), {"load s": load, "load CPU s": load_cpu, "RSS after loading GiB": loaded}
    question = "What is this?"
    for _ in range(2):  # the first answer reads the weights from the disk
        _, few, few_cpu = timed(lambda: engine.chat(question, max_new_tokens=1))
        _, many, many_cpu = timed(lambda: engine.chat(question, max_new_tokens=1 + words))
    row |= {"word s": (many - few) / words, "word CPU s": (many_cpu - few_cpu) / words}
    steps = {}
    for n in (1, 3):
        steps[n] = timed(lambda n=n: engine.generate(question, 1, (pixels, pixels), num_inference_steps=n))[1:]
    row |= {f"guided step s at {pixels} px": (steps[3][0] - steps[1][0]) / 2}
    row |= {"guided step CPU s": (steps[3][1] - steps[1][1]) / 2}
    return row | {"peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bagel/7b-mot", help="a named size with a published layout")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all)")
    parser.add_argument("--quantize", default="int8", choices=("int8", "none"))
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--words", type=int, default=4)
    parser.add_argument("--where", default=None, help="where the folder is written (default: the system's)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the measuring process
    args = parser.parse_args()
    quantize = None if args.quantize == "none" else args.quantize
    if args.folder:
        print(json.dumps(measure(Path(args.folder), quantize, args.pixels, args.words)))
        return
    with tempfile.TemporaryDirectory(dir=args.where) as folder:
        size = write(Path(folder), args.model, args.layers)
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {"model": args.model, "weights": args.quantize, "file GiB": size, **json.loads(out.splitlines()[-1])}
    finish("large", [{"what": k, "value": v} for k, v in row.items()], **row)


if __name__ == "__main__":
    main()
