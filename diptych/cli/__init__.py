"""The command line. Nothing heavy is imported until a verb runs: ``diptych --help`` does not load torch.

Exit codes: 0 done, 2 bad configuration, data or input, 3 out of memory, 4 interrupted but checkpointed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OK, BAD, MEMORY, INTERRUPTED = 0, 2, 3, 4
_EVALUATE = (
    "diptych evaluate bagel/tiny mini --limit 4 --out runs/check",
    "diptych evaluate bagel/tiny geneval=evaluation_metadata.jsonl --no-score --layout images",
    "diptych evaluate folder:images geneval=evaluation_metadata.jsonl",
    "diptych evaluate http://localhost:8000/v1 vqa-mini --remote-model NAME",
    "diptych evaluate runs/mine wise=data --judge Qwen3.5-35B-A3B --judge-url http://localhost:8001/v1 --cache judged",
    "diptych evaluate runs/mine lmms-eval:pope,mmbench_en_dev --limit 8",
    "diptych evaluate list",
    "diptych evaluate score runs/check",
    "diptych evaluate compare runs/check runs/other --json",
    "diptych evaluate read geneval=results.jsonl",
    "diptych evaluate distance drawn/ photos/ --features efflite0",
    "torchrun --nproc-per-node 2 -m diptych evaluate runs/mine mini --out runs/check",
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.call(arguments) or OK
    except (ValueError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            hint = "lower limits.tokens (--set stages.0.limits.tokens=1024) or the picture size, or use fewer workers"
            print(f"out of memory: {error}\ntry: {hint}", file=sys.stderr)
            return MEMORY
        raise
    except Exception as error:  # whatever trains may have been asked to stop: train, resume, study, demo
        loop = sys.modules.get("diptych.training.loop")
        if loop is None or not isinstance(error, loop.Interrupted):
            raise
        print(error, file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    top = argparse.ArgumentParser(
        prog="diptych",
        description="Unified multimodal models: networks that read pictures and draw them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="first steps:\n  diptych demo\n  diptych generate bagel/tiny 'a red circle left of a blue star'\n"
        "  diptych train bagel/tiny --steps 500 --run runs/mine",
    )
    top.add_argument("--version", action="version", version=_version())
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable, help: str, *examples: str, into: Any = None) -> argparse.ArgumentParser:
        p = (into or verbs).add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="examples:\n" + "\n".join(f"  {e}" for e in examples),
        )
        p.set_defaults(call=run)
        return p

    p = verb("demo", _demo, "see the shipped model work, train one from scratch, read the report", "diptych demo", "diptych demo --minutes 10 --out report.html")  # fmt: skip  # noqa: E501
    p.add_argument("--minutes", type=float, default=5.0, help="budget of the training (default: 5)")
    p.add_argument("--steps", type=int, help="train this many steps instead of a budget of minutes")
    p.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (default: report.html)")
    p.add_argument("--run", dest="folder", type=Path, help="run folder (default: a new one under runs/)")
    p.add_argument("--limit", type=int, default=4, help="items per category in the evaluations (default: 4)")
    p.add_argument("--seed", type=int, default=0)

    p = verb("train", _train, "train a recipe (a name or a .json/.yaml file)", "diptych train bagel/tiny --steps 500", "diptych train runs/mine/recipe.json --run runs/again --seed 1", "diptych train bagel/tiny --set stages.0.train.vision=1e-3", "diptych train iomm/tiny --data images=FOLDER", "torchrun --nproc-per-node 2 -m diptych train bagel/tiny --run runs/two")  # fmt: skip  # noqa: E501
    p.add_argument("recipe", help="a name that `diptych recipes` lists, or a file")
    p.add_argument("--model", help="go on from this model (a folder or shipped name) in place of the recipe's own")
    p.add_argument("--steps", type=int, help="cut or stretch all stages to this many steps, in proportion")
    p.add_argument("--run", dest="folder", type=Path, help="run folder (default: a new one under runs/)")
    p.add_argument("--seed", type=int, help="seed of weights, data order and noise")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="read a data set of the recipe from a plain folder of pictures, without words")  # fmt: skip  # noqa: E501
    p.add_argument("--encoded", metavar="FOLDER", help="data sets that `diptych data precompute` wrote stand in for their originals")  # fmt: skip  # noqa: E501
    p.add_argument("--set", dest="override", action="append", default=[], metavar="PATH=VALUE", help="change any leaf of the recipe")  # fmt: skip  # noqa: E501
    p.add_argument("--json", action="store_true", help="print {run, release} as JSON at the end")
    _watched(p)
    _device(p)

    p = verb("plan", _plan, "what a recipe will need before it is launched: memory, work, time, cost", "diptych plan bagel/tiny --device cpu", "diptych plan mine.yaml --gpus 8 --gpu h100 --price 2.5", "diptych plan mine.yaml --gpus 8 --memory 24 --set engine.shard=full --set engine.recompute=full")  # fmt: skip  # noqa: E501
    p.add_argument("recipe", help="a name that `diptych recipes` lists, or a file")
    p.add_argument("--model", help="go on from this model's settings in place of the recipe's own")
    p.add_argument("--gpus", type=int, default=1, help="processes in all (default: 1)")
    p.add_argument("--nodes", type=int, default=1, help="machines that share them (default: 1)")
    p.add_argument("--gpu", default="h100", help="3090, 4090, 5090, a10, l4, l40s, a100-40, a100, h100 (default), h200, b200")  # fmt: skip  # noqa: E501
    p.add_argument("--memory", type=float, help="GiB of one device (default: the GPU's)")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default: 0.4)")
    p.add_argument("--price", type=float, default=0.0, help="of one device for an hour")
    p.add_argument("--steps", type=int, help="cut or stretch all stages to this many steps, in proportion")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--encoded", metavar="FOLDER", help="data sets that `diptych data precompute` wrote")
    p.add_argument("--set", dest="override", action="append", default=[], metavar="PATH=VALUE", help="change any leaf of the recipe")  # fmt: skip  # noqa: E501
    p.add_argument("--json", action="store_true")
    _device(p)

    p = verb("resume", _resume, "go on with a run from its last checkpoint", "diptych resume runs/mine")
    p.add_argument("folder", metavar="RUN", type=Path)
    p.add_argument("--json", action="store_true", help="print {run, release} as JSON at the end")
    _watched(p)
    _device(p)

    p = verb("generate", _generate, "draw pictures of a prompt", "diptych generate bagel/tiny 'two blue stars' -n 4 --seed 7", "diptych generate bagel/tiny 'a cat' --size 64x64 --out cat.png")  # fmt: skip  # noqa: E501
    _model(p)
    p.add_argument("prompt")
    _draw(p)

    p = verb("edit", _edit, "change a picture by instruction", "diptych edit bagel/tiny scene.png 'make the star blue'")
    _model(p)
    p.add_argument("image", type=Path)
    p.add_argument("instruction")
    _draw(p)
    p.add_argument("--image-guidance", dest="image_guidance_scale", type=float, help="guidance on the source picture")

    p = verb(
        "ask", _ask, "ask a question about a picture", "diptych ask bagel/tiny scene.png 'how many stars are there?'"
    )
    _model(p)
    p.add_argument("image", type=Path)
    p.add_argument("question")
    _say(p)

    p = verb("chat", _chat, "talk in the terminal; /image PATH shows a picture, /draw PROMPT draws, /quit ends", "diptych chat bagel/tiny")  # fmt: skip  # noqa: E501
    _model(p)
    p.add_argument("--out", type=Path, default=Path("pictures"), help="where /draw saves (default: pictures/)")
    _say(p, json_too=False)

    p = verb("serve", _serve, "serve models: OpenAI's endpoints and a web page", "diptych serve bagel/tiny", "diptych serve bagel/tiny runs/mine --port 8080 --runs runs", "diptych serve bagel/tiny --host 0.0.0.0 --api-key-file keys.txt --rate 60")  # fmt: skip  # noqa: E501
    p.add_argument("models", nargs="+", metavar="MODEL", help="names, model, run or published folders, or org/name")
    p.add_argument("--base", help="the model whose files are taken where a published folder lacks them")
    _device(p)
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as published)")
    p.add_argument("--quantize", choices=["int8"], help="round the weights of the blocks to eight bits")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that may use the server, one a line (default: everybody may)")  # fmt: skip  # noqa: E501
    p.add_argument("--slots", type=int, default=16, help="requests that run together (default: 16)")
    p.add_argument("--queue", type=int, default=64, help="requests that may wait (default: 64)")
    p.add_argument("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    p.add_argument("--grace", type=float, default=30.0, help="seconds to finish in when told to end (default: 30)")
    p.add_argument("--rate", type=float, help="requests a minute for each key, or address (default: no limit)")
    p.add_argument("--allow-host", action="append", default=[], metavar="HOST", help="fetch pictures by URL from this public host; * for any (default: none)")  # fmt: skip  # noqa: E501
    p.add_argument("--host-name", action="append", default=[], metavar="NAME", help="a name that reaches this server, beside localhost and its address (several: repeat it)")  # fmt: skip  # noqa: E501
    p.add_argument("--runs", type=Path, metavar="DIR", help="show the training runs in this folder")
    p.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    p.add_argument("--quiet", action="store_true", help="no line for every request")

    p = verb("evaluate", _evaluate, "score a model, or compare and read scores", *_EVALUATE)
    _model(p, other=_EVALUATED)
    p.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="names that `diptych evaluate list` shows; NAME=FILE where it needs your file; lmms-eval:TASK,TASK")  # fmt: skip  # noqa: E501
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, help="items per category")
    p.add_argument(
        "--out", dest="folder", type=Path, help="folder of items, scores and pictures; continues one that is there"
    )
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.add_argument("--size", type=int, help="pixels on a side (default: 64 for what ships, else the model's own)")
    _sampler(p)
    p.add_argument("-n", dest="pictures", type=int, help="pictures of each prompt, of geneval and dpg (default: 4)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the benchmark's own; 2048 with --thinking)")  # fmt: skip  # noqa: E501
    p.add_argument("--system", default="", metavar="TEXT", help="a system message before each question")
    p.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="reason in <think> tags before the answer")
    p.add_argument("--answer-temperature", type=float, default=0.0, help="of answers (default: 0)")
    p.add_argument("--batch-size", type=int, default=32, help="items, or requests, at once (default: 32)")
    p.add_argument("--no-score", action="store_true", help="only make the answers and pictures; `evaluate score` later")
    p.add_argument("--layout", type=Path, metavar="DIR", help="also write the pictures as official scripts read them")
    p.add_argument("--remote-model", default="", metavar="NAME", help="the model's name where MODEL is http://host/v1")
    p.add_argument("--judge", metavar="NAME", help="the judge's name: a model behind --judge-url")
    p.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible address; without it the cache is replayed")
    p.add_argument("--rubrics", type=Path, metavar="DIR", help="what judges are told, NAME.txt, in place of ours")
    p.add_argument("--cache", type=Path, metavar="DIR", help="keeps judges' replies and features of reference pictures")
    p.add_argument("--detector", help="GenEval: Mask2Former, a folder or org/name")
    p.add_argument("--clip", help="GenEval: CLIP, a folder or org/name")
    p.add_argument("--features", help="fid, distance: efflite0 (default), inception, or its TorchScript file")
    p.add_argument("--tasks", metavar="DIR", help="lmms-eval: a folder of your own task files")

    p = verb("report", _report, "write evaluations as one page and as Markdown tables", "diptych report runs/mine/evaluate", "diptych report runs/a runs/b --out compared.html")  # fmt: skip  # noqa: E501
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `evaluate --out` wrote")
    p.add_argument("--out", type=Path, default=Path("report.html"), help="the page; its tables go beside it, .md")
    p.add_argument("--per-category", type=int, default=6, help="pictures or questions of each category (default: 6)")

    p = verb(
        "study",
        _study,
        "run a paper's table in miniature",
        "diptych study sgt-proxies --seeds 0",
        "diptych study sgt-ratio --steps 300 --limit 24",
        "diptych study iomm-recipes --seeds 0 --steps 400 --limit 24",
        "diptych study synergen-stages --seeds 0",
        "diptych study cheers-detail --seeds 0 --limit 24",
    )
    p.add_argument("study", help="sgt-proxies, sgt-ratio, sgt-amount, iomm-components, iomm-recipes, iomm-mask, iomm-tuning, synergen-folding, synergen-unfolded, synergen-stages, cheers-detail, cheers-pixels, cheers-merge or cheers-cascade")  # fmt: skip  # noqa: E501
    p.add_argument("--model", help="where every arm starts (default: the study's own, bagel/tiny, iomm/tiny or cheers/tiny; synergen's make theirs)")  # fmt: skip  # noqa: E501
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of every arm for each (default: 0 1 2)"
    )
    p.add_argument("--steps", type=int, help="steps of every arm (default: the study's own)")
    p.add_argument("--limit", type=int, help="items per category of the evaluation")
    p.add_argument("--run", type=Path, help="folder of the runs; goes on with one that is there (default: runs/STUDY)")
    p.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the page and plot")

    p = verb("analyze", _analyze, "look inside a model: separability of features, attention to pictures, attention to words, what reading and drawing share, gates of detail", "diptych analyze bagel/tiny separability --data emoji/fruit --at vision projector layer.5", "diptych analyze runs/mine attention --against bagel/tiny --rows question --out analysis", "diptych analyze bagel/tiny keywords --prompt 'a red cat left of a dog' --words object=cat,dog colour=red", "diptych analyze synergen/tiny similarity", "diptych analyze synergen/tiny locality --data shapes/draw", "diptych analyze cheers/tiny gates --prompt 'a red circle' --steps 20")  # fmt: skip  # noqa: E501
    _model(p)
    p.add_argument("probe", choices=list(_ANALYZE_OPTIONS))
    p.add_argument("--against", metavar="MODEL", help="compare with this model: the change, in percent by layer")
    p.add_argument("--out", type=Path, default=Path("analysis"), help="folder to write (default: analysis/)")
    p.add_argument(
        "-n",
        type=int,
        help="pictures of each class (40), requests (32), prompts (8); similarity 200, locality 32 pictures",
    )
    p.add_argument("--data", help="separability: a set of look-alikes (default: emoji/fruit) or a folder with one sub-folder a class; attention: a data set of questions (default: shapes/ask); similarity, locality: one of drawings (shapes/draw)")  # fmt: skip  # noqa: E501
    p.add_argument("--size", type=int, help="pixels on a side of embedded pictures (default: what the model draws)")
    p.add_argument("--at", nargs="+", metavar="POINT", help="separability: parts (vision) and layers (layer.0)")
    p.add_argument("--catalog", help="attention: YAML file that says where your own data sets are")
    p.add_argument("--rows", choices=["answer", "question"], help="attention: queries are the token that predicts the answer (default), or the question's words")  # fmt: skip  # noqa: E501
    p.add_argument("--markers", action="store_true", help="attention: markers count with their text or picture")
    p.add_argument(
        "--prompt", action="append", help="keywords, gates: what to draw; may be given again (default: shapes)"
    )
    p.add_argument("--words", nargs="+", metavar="CLASS=WORD,...", help="keywords: the classes (default: the vocabulary of shapes)")  # fmt: skip  # noqa: E501
    p.add_argument(
        "--steps", type=int, help="keywords: how many steps to look at (default: 4); gates: how many to draw in (20)"
    )
    p.add_argument("--published", action="store_true", help="attention, keywords: add what SGT's code computes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", action="store_true", help="print files and numbers as JSON")

    p = verb("models", _models, "list models with their parameter counts", "diptych models --json")
    p.add_argument("--json", action="store_true")

    p = verb("recipes", _recipes, "list recipes, or print one as JSON", "diptych recipes", "diptych recipes bagel/tiny")
    p.add_argument("recipe", nargs="?")
    p.add_argument("--json", action="store_true")

    data = verb(
        "data", lambda a: data.print_help(), "check, show and prepare data sets", "diptych data check my_data.yaml"
    )
    kinds = data.add_subparsers(metavar="VERB")
    p = verb("check", _data_check, "validate every row of a catalog", "diptych data check my_data.yaml", into=kinds)
    p.add_argument("catalog", type=Path)
    p.add_argument("--limit", type=int, help="rows per data set")
    p.add_argument("--json", action="store_true")
    p = verb("show", _data_show, "draw a contact sheet of samples with their laid-out segments", "diptych data show shapes/draw emoji/scenes --out sheet.png", "diptych data show my_set --catalog my_data.yaml", into=kinds)  # fmt: skip  # noqa: E501
    p.add_argument("names", nargs="+", metavar="NAME", help="data sets: embedded, or of the catalog")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--layout", default="bagel/tiny", help="model whose layout is shown (default: bagel/tiny)")
    p.add_argument("-n", type=int, default=4, help="samples per data set")
    p.add_argument("--size", type=int, default=64, help="pixels on a side of embedded pictures")
    p.add_argument("--out", type=_picture, default=Path("sheet.png"))
    p = verb("prepare", _data_prepare, "fetch and build a data set that does not ship", "diptych data prepare stamps", "diptych data prepare stamps --source ~/tuxpaint/stamps", into=kinds)  # fmt: skip  # noqa: E501
    p.add_argument("name", choices=["stamps"])
    p.add_argument("--source", type=Path, help="an unpacked folder of stamps (default: the Debian package)")
    p.add_argument("--out", type=Path, help="destination (default: the folder that the data set reads)")

    p = verb("convert", _data_convert, "write another project's training data as rows of ours", "diptych data convert llava instruct.json mine.jsonl --images coco", "diptych data convert bagel-edit 'edits/*.parquet' edits.jsonl", into=kinds)  # fmt: skip  # noqa: E501
    p.add_argument("format", help="llava, bagel-t2i, bagel-edit, bagel-sft, omnigen2 or cheers")
    p.add_argument("source", type=Path, help="a file, a folder or a pattern")
    p.add_argument("out", type=Path, help="the jsonl to write; pictures held as bytes go to OUT-images/")
    p.add_argument("--images", type=Path, help="the folder that the catalog will name: absolute paths become relative to it")  # fmt: skip  # noqa: E501
    p.add_argument("--json", action="store_true")
    p = verb("shard", _data_shard, "write data sets as shuffled webdataset shards", "diptych data shard cats dogs --catalog my_data.yaml --out shards", "diptych data shard shapes/draw --limit 5000 --out shards", into=kinds)  # fmt: skip  # noqa: E501
    _named(p)
    p.add_argument("--out", type=Path, default=Path("shards"), help="folder to write, one folder a data set (default: shards/)")  # fmt: skip  # noqa: E501
    p.add_argument("--rows", type=int, default=1000, help="rows of a shard (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the order; -1 keeps the order (default: 0)")
    p = verb("stats", _data_stats, "lengths, kinds of tokens and shapes of pictures, as a model lays them out", "diptych data stats shapes/draw shapes/ask", "diptych data stats cats --catalog my_data.yaml --layout bagel/7b-mot", into=kinds)  # fmt: skip  # noqa: E501
    _named(p, 1000)
    p.add_argument("--layout", default="bagel/tiny", help="model whose layout is counted (default: bagel/tiny)")
    p = verb("bench", _data_bench, "how fast the loader of a recipe delivers, and how full its rows are", "diptych data bench bagel/tiny --workers 0 1 2", "diptych data bench bagel/tiny --against runs/mine", into=kinds)  # fmt: skip  # noqa: E501
    p.add_argument("recipe", help="a name that `diptych recipes` lists, or a file")
    p.add_argument("--rows", type=int, default=50, help="rows to wait for (default: 50)")
    p.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="numbers of workers to try (default: 0 1)")
    p.add_argument("--against", type=Path, metavar="RUN", help="compare with what this run's trainer consumed")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--encoded", metavar="FOLDER", help="data sets that `diptych data precompute` wrote")
    p.add_argument("--set", dest="override", action="append", default=[], metavar="PATH=VALUE", help="change any leaf of the recipe")  # fmt: skip  # noqa: E501
    p.add_argument("--json", action="store_true")
    p = verb("precompute", _data_precompute, "encode the pictures of a recipe's data sets once, with its frozen encoders", "diptych data precompute bagel/tiny --limit 2000 --out encoded", "diptych data precompute mine.yaml --catalog data.yaml --data photos --dtype bf16", "torchrun --nproc-per-node 8 -m diptych data precompute mine.yaml --out encoded", into=kinds)  # fmt: skip  # noqa: E501
    p.add_argument("recipe", help="a name that `diptych recipes` lists, or a file")
    p.add_argument("--model", help="the model whose encoders are used, in place of the recipe's own")
    p.add_argument("--data", nargs="+", metavar="NAME", help="which data sets (default: all of the recipe's)")
    p.add_argument("--limit", type=int, help="rows per data set (embedded ones are endless)")
    p.add_argument("--encoders", nargs="+", metavar="NAME", help="which of the family's encoders (default: all)")
    p.add_argument("--out", type=Path, default=Path("encoded"), help="folder to write (default: encoded/)")
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of what is kept (default: as computed)")
    p.add_argument("--batch", type=int, default=16, help="pictures of one shape encoded together (default: 16)")
    p.add_argument("--shard", type=int, default=1000, help="rows of a shard (default: 1000)")
    p.add_argument("--workers", type=int, default=0, help="processes that read and resize (default: 0)")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--set", dest="override", action="append", default=[], metavar="PATH=VALUE", help="change any leaf of the recipe")  # fmt: skip  # noqa: E501
    p.add_argument("--json", action="store_true", help="print what was done by data set as JSON")
    _device(p)

    p = verb("doctor", _doctor, "what this machine can do: devices, dtypes, attention, extras", "diptych doctor --json")
    p.add_argument("--json", action="store_true")

    p = verb("export", _export, "write a model: safetensors, config.json and tokenizer.json, or as its family publishes it", "diptych export runs/mine model --dtype bf16", "diptych export runs/mine model --format published", "diptych export bagel/tiny parts --format hf")  # fmt: skip  # noqa: E501
    _model(p, use=False)
    p.add_argument("folder", type=Path)
    p.add_argument("--format", choices=["diptych", "published", "hf"], default="diptych", help="files and names; hf: the language and vision parts for transformers (default: diptych)")  # fmt: skip  # noqa: E501
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16; as stored in other formats")
    p.add_argument("--force", action="store_true", help="overwrite files of the same names, keep all others")
    return top


def _watched(p: argparse.ArgumentParser) -> None:
    p.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace so many steps into RUN/trace.json")
    p.add_argument("--track", choices=["trackio", "wandb"], help="log there too")


def _named(p: argparse.ArgumentParser, limit: int | None = None) -> None:
    p.add_argument("names", nargs="+", metavar="NAME", help="data sets: embedded, or of the catalog")
    p.add_argument("--catalog", help="YAML file that says where your own data sets are")
    p.add_argument("--limit", type=int, default=limit, help=f"rows per data set (default: {limit or 'all'})")
    p.add_argument("--size", type=int, default=64, help="pixels on a side of embedded pictures (default: 64)")
    p.add_argument("--json", action="store_true")


def _version() -> str:
    from diptych import __version__

    return f"diptych {__version__}"


def _device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")


_EVALUATED = (
    ", or http://host:port/v1, or folder:DIR of pictures made elsewhere. Or one of these words instead, which load no "
    "model: list (every benchmark), score RUN (verdicts again), compare RUN RUN, read KIND=FILE (what other harnesses "
    "wrote), distance DRAWN REAL; a model's folder of such a name is ./list"
)


def _model(p: argparse.ArgumentParser, use: bool = True, other: str = "") -> None:
    what = "a name that `diptych models` lists, a model, run or published folder, or org/name"
    p.add_argument("model", help=what + other)
    p.add_argument("--base", help="the model whose files are taken where a published folder lacks them")
    _device(p)
    if use:
        p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as published)")
        p.add_argument("--quantize", choices=["int8"], help="round the weights of the blocks to eight bits")


def _say(p: argparse.ArgumentParser, json_too: bool = True) -> None:
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=0)
    if json_too:
        p.add_argument("--json", action="store_true")


def _sampler(p: argparse.ArgumentParser) -> None:
    """How pictures are drawn; a model takes those that its sampler has."""
    p.add_argument("--steps", dest="num_inference_steps", type=int, help="steps of a flow")
    p.add_argument("--guidance", dest="guidance_scale", type=float, help="guidance on the words")
    p.add_argument("--temperature", type=float, help="of drawn codes (SynerGen-VL)")
    p.add_argument("--top-k", type=int, help="draw among so many likeliest codes")
    p.add_argument("--top-p", type=float, help="draw among the likeliest codes that hold this share")


def _draw(p: argparse.ArgumentParser) -> None:
    p.add_argument("-n", type=int, default=1, help="how many pictures; picture i has seed SEED + i")
    p.add_argument("--size", type=_size, help="WIDTHxHEIGHT in pixels")
    _sampler(p)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", type=_picture, default=Path("picture.png"), help="file; several pictures get -0, -1 ... appended"
    )
    p.add_argument("--json", action="store_true", help="print files and effective parameters as JSON")


def _picture(text: str) -> Path:
    """A file to write a picture to: refused before it is drawn, not after."""
    if Path(text).suffix.lower() not in (endings := (".png", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"{text!r} is no picture file; its name must end in {', '.join(endings)}")
    return Path(text)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 64x64")
    return int(width), int(height)


def _load(a: argparse.Namespace):
    from diptych.generation.engine import load

    return load(a.model, a.device, a.dtype, a.base, a.quantize)


def _table(title: str, head: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def _demo(a: argparse.Namespace) -> None:
    from diptych.studies.demo import demo

    demo(a.minutes, a.steps, a.out, a.folder, a.limit, a.seed)


def _finish_run(a: argparse.Namespace, release: Path) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        if a.json:
            print(json.dumps({"run": str(release.parent), "release": str(release)}))
        else:
            print(f"done: {release}\ntry:  diptych generate {release.parent} 'a red circle'")


def _train(a: argparse.Namespace) -> None:
    from diptych.recipes.run import train

    _finish_run(
        a,
        train(
            a.recipe,
            a.folder,
            steps=a.steps,
            seed=a.seed,
            catalog=a.catalog,
            override=_pairs(a.override, "--set", "PATH=VALUE"),
            device=a.device,
            model=a.model,
            encoded=a.encoded,
            folders=_pairs(a.data, "--data", "NAME=FOLDER"),
            profile=a.profile,
            track=a.track,
        ),
    )


def _pairs(items: list[str], option: str, form: str) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign:
            raise ValueError(f"{option} takes {form}, not {item!r}")
        pairs[key] = value
    return pairs


def _plan(a: argparse.Namespace) -> int:
    import torch

    from diptych.recipes.run import configured, stage_sources
    from diptych.training.plan import GIB, GPUS, plan

    if a.gpu not in GPUS:
        raise ValueError(f"unknown GPU {a.gpu!r}; choose from {', '.join(GPUS)}")
    device = "cpu" if a.device == "cpu" else "cuda"
    rate, room = GPUS[a.gpu][0] * 1e12, a.memory or GPUS[a.gpu][1]
    if device == "cpu":
        from diptych.machine.devices import matmul_rate

        rate, room = matmul_rate(torch.float32) * 1e9, a.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB  # fmt: skip  # noqa: E501
    recipe = configured(
        a.recipe,
        model=a.model,
        steps=a.steps,
        catalog=a.catalog,
        encoded=a.encoded,
        override=_pairs(a.override, "--set", "PATH=VALUE"),
    )
    needs = plan(recipe, stage_sources, gpus=a.gpus, nodes=a.nodes, device=device, peak=rate, mfu=a.mfu, price=a.price)
    used = [n.host * a.gpus / a.nodes if device == "cpu" else n.total for n in needs]
    fits = max(used) <= room * GIB
    if a.json:
        print(json.dumps({"fits": fits, "memory": room, "stages": [n.to_json() for n in needs]}))
        return OK if fits else BAD
    what = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "saving", "process", "total", "host")  # fmt: skip  # noqa: E501
    _table(f"{recipe.name}: GiB of each of {a.gpus} processes", ["", *[n.stage for n in needs]], [[k, *(f"{getattr(n, k) / GIB:.2f}" for n in needs)] for k in what])  # fmt: skip  # noqa: E501
    for n, stage in zip(needs, recipe.stages, strict=True):
        cost = f", {n.cost:.0f} in all" if a.price else ""
        print(f"{n.stage}: {n.tokens} tokens a row, {n.flops / 1e12:.3g} TFLOP a step, {n.step_seconds:.3g} s a step at {a.mfu:.0%} of the peak, {n.seconds / 3600:.3g} h for {stage.steps} steps{cost}")  # fmt: skip  # noqa: E501
    print(f"{'fits' if fits else 'does not fit'}: {max(used) / GIB:.2f} of {room:.0f} GiB")
    if not fits:
        print("try: --set engine.shard=full (more processes), --set engine.recompute=full, --set engine.offload=true,\n     --set precision=bf16, or fewer stages.N.limits.tokens")  # fmt: skip  # noqa: E501
    return OK if fits else BAD


def _resume(a: argparse.Namespace) -> None:
    from diptych.recipes.run import resume

    _finish_run(a, resume(a.folder, device=a.device, profile=a.profile, track=a.track))


def _generate(a: argparse.Namespace) -> None:
    engine = _load(a)
    _save_pictures(a, engine.generate(a.prompt, a.n, a.size, a.seed, **_settings(a, engine)))


def _edit(a: argparse.Namespace) -> None:
    engine = _load(a)
    _save_pictures(a, engine.edit(a.image, a.instruction, a.n, a.size, a.seed, **_settings(a, engine)))


SETTINGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "image_guidance_scale": "--image-guidance",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
}


def _settings(a: argparse.Namespace, engine: Any) -> dict[str, Any]:
    """The settings of drawing that were given; the rest is the model's own. Raises ``ValueError`` for one that its
    sampler does not have."""
    given = {name: value for name in SETTINGS if (value := getattr(a, name, None)) is not None}
    known = vars(engine.settings({}))
    if unknown := [flag for name, flag in SETTINGS.items() if name in given and name not in known]:
        its = [flag for name, flag in SETTINGS.items() if name in known and hasattr(a, name)]
        raise ValueError(f"{engine.name} does not draw by {', '.join(unknown)}; it takes {', '.join(its) or 'none'}")
    return given


def _save_pictures(a: argparse.Namespace, pictures) -> None:
    files = []
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pictures.images):
        file = a.out if len(pictures.images) == 1 else a.out.with_stem(f"{a.out.stem}-{i}")
        image.save(file)
        files.append(str(file))
    if a.json:
        print(json.dumps({"files": files, "seed": pictures.seed, "parameters": dict(pictures.parameters)}))
    else:
        print("\n".join(files))


def _ask(a: argparse.Namespace) -> None:
    answer = _load(a).ask(a.image, a.question, a.max_new_tokens, a.temperature, a.seed)
    print(json.dumps({"text": answer.text, "finish_reason": answer.finish_reason, "parameters": dict(answer.parameters)}) if a.json else answer.text)  # fmt: skip  # noqa: E501


def _chat(a: argparse.Namespace) -> None:
    from diptych.core.sample import Image, Message, Text
    from diptych.data.decoding import open_picture
    from diptych.generation.events import ImageDone, TextDelta

    engine, messages, shown, drawn = _load(a), [], [], 0
    print(f"{engine.name}: type a message; /image PATH shows a picture, /draw PROMPT draws one, /new, /quit")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/new":
            messages, shown = [], []
        elif command == "/image":
            try:
                shown.append(Image(open_picture(Path(rest), rest)))
                print(f"(showing {rest}; now ask)")
            except (ValueError, OSError) as error:
                print(f"error: {error}")
        elif command == "/draw":
            print(_numbered(a.out, drawn, engine.generate(rest, seed=a.seed + drawn).images[0]))
            drawn += 1
        elif command.startswith("/"):
            print(f"unknown command {command}; there are /image, /draw, /new, /quit")
        else:
            messages.append(Message("user", (*shown, Text(line))))
            shown, said, text = [], [], ""
            for event in engine.stream(messages, a.max_new_tokens, a.temperature, seed=a.seed):
                if isinstance(event, TextDelta):
                    text += event.text
                    print(event.text, end="", flush=True)
                if isinstance(event, ImageDone):
                    said, text = [*said, Text(text), Image(event.image, "target")], ""
                    print(f"\n{_numbered(a.out, drawn, event.image)}")
                    drawn += 1
            print()
            messages.append(Message("assistant", (*said, Text(text))))


def _numbered(folder: Path, number: int, image: Any) -> Path:
    """The file of a chat's picture, written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"picture-{number:03d}.png"
    image.save(file)
    return file


def _serve(a: argparse.Namespace) -> None:
    try:
        from diptych.serving.options import Options
        from diptych.serving.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"serving needs the package {error.name}: pip install 'diptych[serve]'") from error
    from diptych.generation.engine import load

    keys: tuple[str, ...] = ()
    if a.api_key_file:
        lines = a.api_key_file.read_text().split("\n")
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not keys:
            raise ValueError(f"{a.api_key_file} holds no key; write one a line")
    options = Options(
        keys, a.slots, a.queue, a.timeout, a.grace, a.rate, frozenset(a.allow_host), a.runs, a.log_prompts, a.quiet,
        tuple(a.host_name),
    )  # fmt: skip

    def load_all() -> list:
        engines = [load(name, a.device, a.dtype, a.base, a.quantize) for name in a.models]
        for engine in engines:
            if Path(engine.name).is_dir():  # clients see what the folder is called, not where it is
                folder = Path(engine.name).resolve()
                engine.name = folder.parent.name if folder.name == "release" else folder.name
        names.extend(e.name for e in engines)
        return engines

    names: list[str] = []

    def announce(url: str) -> None:
        print(f"{', '.join(names)} at {url}  (Ctrl-C ends)", flush=True)

    serve(load_all, options, a.host, a.port, announce)


def _evaluate(a: argparse.Namespace) -> None:
    if a.model in (words := {"list": _benchmarks, "score": _score, "compare": _compare, "read": _read, "distance": _distance}):  # fmt: skip  # noqa: E501
        return words[a.model](a)
    from diptych.evaluation import harness, remote
    from diptych.evaluation.benchmarks.table import resolve
    from diptych.evaluation.card import Answering
    from diptych.machine.processes import processes

    with processes() as (rank, _):
        if a.model.startswith(("http://", "https://")):
            engine: Any = remote.Endpoint(a.model, a.remote_model, _key())
        elif a.model.startswith("folder:"):
            engine = remote.Pictures(a.model.removeprefix("folder:"))
        else:
            engine = _load(a)
        changed = _settings(a, engine)
        tools, progress = _tools(a), not a.json
        settings = engine.settings(changed) if changed else None
        result = harness.evaluate(
            engine, a.benchmarks, seed=a.seed, limit=a.limit, folder=a.folder, size=a.size, settings=settings,
            answering=Answering(a.max_new_tokens, a.system, a.thinking, a.answer_temperature), batch_size=a.batch_size,
            tools=tools, score=not a.no_score, progress=progress,
        )  # fmt: skip
        if rank == 0:
            if a.layout:
                own = [b for b in a.benchmarks if not b.startswith("lmms-eval:")]
                for folder in harness.write_layout(a.layout, result, resolve(own, tools)[0]):
                    print(folder, file=sys.stderr)
            _show_result(a, result)


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "none")


def _tools(a: argparse.Namespace) -> Any:
    from diptych.evaluation.benchmarks.table import Tools
    from diptych.evaluation.judges.judge import Judge

    if a.judge_url and not a.judge:
        raise ValueError("--judge-url needs --judge NAME: the judge stands in every score's name")
    judge = Judge(a.judge, a.judge_url, a.cache, _key()) if a.judge else None
    given = {"detector": a.detector, "clip": a.clip, "features": a.features}
    from diptych.machine.devices import pick_device

    device = str(pick_device(a.device))
    more = {k: v for k, v in given.items() if v}
    same = {"rubrics": a.rubrics, "cache": a.cache, "pictures": a.pictures, "lmms_tasks": a.tasks}
    return Tools(judge=judge, device=device, **same, **more)


def _show_result(a: argparse.Namespace, result: Any) -> None:
    if a.json:
        print(json.dumps(result.to_json()))
    elif a.no_score:
        print(f"made, not scored: diptych evaluate score {a.folder}" if a.folder else "made, and gone: --out keeps it")
    else:
        _show_scores(str(result.card["model"]), result.scores, result.baselines)
        if result.failures:
            print(f"{result.failures} items failed; they count as wrong", file=sys.stderr)


def _show_scores(title: str, scores: Any, baselines: Any = None) -> None:
    rows = []
    for name, s in scores.items():
        beside = "  ".join(f"{k} {v:.2f}" for k, v in (baselines or {}).get(name, {}).items())
        rows.append([name, f"{s.value:.3f}", f"{s.low:.3f} .. {s.high:.3f}", s.n, beside])
    _table(title, ["score", "value", "95 % interval", "n", "to compare with"], rows)


def _benchmarks(a: argparse.Namespace) -> None:
    from diptych.evaluation.benchmarks.table import GROUPS, TABLE

    if a.json:
        print(json.dumps({name: {"file": entry.file, "what": entry.what} for name, entry in TABLE.items()}))
        return
    rows = [[name, "several", ", ".join(members)] for name, members in GROUPS.items()]
    _table("benchmarks", ["name", "your file", "what"], rows + [[n, e.file, e.what] for n, e in TABLE.items()])


def _score(a: argparse.Namespace) -> None:
    from diptych.evaluation.benchmarks.table import resolve
    from diptych.evaluation.harness import rescore, write_layout
    from diptych.machine.processes import processes

    if not a.benchmarks:
        raise ValueError("score needs the folder of an evaluation: diptych evaluate score RUN [BENCHMARK ...]")
    run, *names = a.benchmarks
    tools = _tools(a)
    with processes() as (rank, _):
        result = rescore(run, names, tools, progress=not a.json)
        if rank == 0:
            if a.layout:
                asked = list(dict.fromkeys(result.card["asked"].values()))
                write_layout(a.layout, result, resolve(names or asked, tools)[0])
            _show_result(a, result)


def _compare(a: argparse.Namespace) -> None:
    from diptych.evaluation.compare import compare

    if len(a.benchmarks) != 2:
        raise ValueError(f"compare takes the folders of two evaluations, not {len(a.benchmarks)}")
    found = compare(*a.benchmarks)
    if a.json:
        print(json.dumps({name: d.to_json() for name, d in found.items()}))
        return
    rows = [
        [name, f"{d.a:.3f}", f"{d.b:.3f}", f"{d.score.value:+.3f}", f"{d.score.low:+.3f} .. {d.score.high:+.3f}",
         f"{d.p:.4f}", f"{d.better} / {d.worse}", d.score.n]
        for name, d in found.items()
    ]  # fmt: skip
    head = ["benchmark", "A", "B", "B - A", "95 % interval", "p", "B better / worse", "n"]
    _table(f"A {a.benchmarks[0]}   B {a.benchmarks[1]}", head, rows)


def _read(a: argparse.Namespace) -> None:
    from diptych.evaluation.other_results import read

    scores: dict = {}
    for one in a.benchmarks:
        kind, sign, file = one.partition("=")
        if not sign:
            raise ValueError(f"read takes KIND=FILE, such as geneval=results.jsonl, not {one!r}")
        scores |= read(kind, file)
    if not scores:
        raise ValueError("read takes KIND=FILE, such as geneval=results.jsonl")
    _show_only(a, "read", scores)


def _distance(a: argparse.Namespace) -> None:
    from diptych.evaluation.benchmarks.distances import compare_folders

    if len(a.benchmarks) != 2:
        raise ValueError(f"distance takes two folders, drawn and reference pictures, not {len(a.benchmarks)}")
    _show_only(a, " against ".join(a.benchmarks), compare_folders(*a.benchmarks, _tools(a)))


def _show_only(a: argparse.Namespace, title: str, scores: Any) -> None:
    if a.json:
        print(json.dumps({"scores": {name: s.to_json() for name, s in scores.items()}}))
    else:
        _show_scores(title, scores)


def _report(a: argparse.Namespace) -> None:
    from diptych.evaluation.harness import load_result
    from diptych.evaluation.page import write_markdown, write_report
    from diptych.evaluation.report import sections

    if a.per_category < 1:
        raise ValueError(f"per-category must be at least 1, not {a.per_category}")
    names = [run.name if run.is_absolute() else str(run) for run in a.runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in a.runs]
    results = {name: load_result(run) for name, run in zip(names, a.runs)}
    made = sections(results, per_category=a.per_category)
    named = ", ".join(dict.fromkeys(str(r.card["model"]) for r in results.values()))
    print(write_report(a.out, made, f"Evaluation of {named}", " · ".join(results)))
    print(write_markdown(a.out.with_suffix(".md"), made, f"Evaluation of {named}"))


_ANALYZE_OPTIONS = {
    "separability": {"data", "size", "at"},
    "attention": {"data", "size", "catalog", "rows", "markers", "published"},
    "keywords": {"prompt", "words", "steps", "published"},
    "gates": {"prompt", "steps"},
    "similarity": {"data", "size", "catalog"},
    "locality": {"data", "size", "catalog"},
}


def _analyze(a: argparse.Namespace) -> None:
    mine, unset = _ANALYZE_OPTIONS[a.probe], (None, False)
    if foreign := sorted(o for o in set().union(*_ANALYZE_OPTIONS.values()) - mine if getattr(a, o) not in unset):
        raise ValueError(f"{a.probe} has no option --{', --'.join(foreign)}; it has --{', --'.join(sorted(mine))}")
    if a.prompt and a.n is not None:
        raise ValueError("-n is how many prompts of shapes to draw; yours are given by --prompt")
    for option in ("n", "steps", "size"):
        if (value := getattr(a, option)) is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, not {value}")
    if a.against == a.model:
        raise ValueError(f"{a.model} cannot be compared with itself")
    from diptych.analysis import run
    from diptych.generation.engine import load

    models = {a.model: _load(a).model}
    if a.against:
        models[a.against] = load(a.against, a.device, a.dtype).model
    size = a.size or run.size(models[a.model])
    found = _PROBES[a.probe](a, models, size)
    files = [str(f) for f in found.write(a.out)]
    print(json.dumps({"files": files, **found.numbers}) if a.json else "\n".join(files))


def _separability(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import run, separability

    what = a.data or "emoji/fruit"
    mine = what not in separability.SETS and Path(what).is_dir()
    data = separability.folder(what, a.n) if mine else separability.labelled(what, a.n or 40, size, a.seed)
    return run.run_separability(models, data, what, a.at, a.seed)


def _attention(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import run
    from diptych.data.catalog import sources

    what = a.data or "shapes/ask"
    source = sources([what], catalog=a.catalog, size=size, split="test")[what]
    samples = [source[i] for i in range(min(a.n or 32, len(source)))]
    return run.run_attention(models, samples, what, a.rows or "answer", a.markers, a.published)


def _keywords(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import keywords, run

    words = keywords.shapes_words()
    if a.words:
        named = [item.partition("=") for item in a.words]
        if wrong := [name for name, _, some in named if not (name and some)]:
            raise ValueError(f"--words takes CLASS=WORD,WORD ..., not {', '.join(map(repr, wrong))}")
        words = {name: frozenset(some.lower().split(",")) for name, _, some in named}
    prompts = a.prompt or keywords.shapes_prompts(a.n or 8, a.seed)
    steps = 4 if a.steps is None else a.steps
    return run.run_keywords(models, prompts, words, "yours" if a.prompt else "shapes", steps, a.seed, a.published)


def _similarity(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import run

    return run.run_similarity(models, *_drawings(a, size, 200))


def _locality(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import run

    return run.run_locality(models, *_drawings(a, size, 32))


def _drawings(a: argparse.Namespace, size: int, n: int) -> tuple[list, str]:
    """The first samples of a data set of drawings, and its name."""
    from diptych.data.catalog import sources

    what = a.data or "shapes/draw"
    source = sources([what], catalog=a.catalog, size=size, split="test")[what]
    return [source[i] for i in range(min(a.n or n, len(source)))], what


def _gates(a: argparse.Namespace, models: Any, size: int) -> Any:
    from diptych.analysis import keywords, run

    prompts = a.prompt or keywords.shapes_prompts(a.n or 8, a.seed)
    return run.run_gates(models, prompts, "yours" if a.prompt else "shapes", a.steps or 20, a.seed)


_PROBES = {
    "separability": _separability,
    "attention": _attention,
    "keywords": _keywords,
    "gates": _gates,
    "similarity": _similarity,
    "locality": _locality,
}


def model_rows() -> list[dict[str, Any]]:
    """Every named model with its parameter counts, taken on the meta device; None where what it needs is missing."""
    from diptych.models import store
    from diptych.models import table as table_
    from diptych.parts.tokenizer import Tokenizer

    def counts(size: Any, name: str) -> tuple[int | None, int | None]:
        try:
            model = store.create(size.family, table_.config(name), Tokenizer.tiny(), "meta")
        except ValueError:  # an extra that is not installed; whoever asks for the model is told
            return None, None
        return sum(p.numel() for p in model.parameters()), model.activated_parameters()

    rows = []
    for name, size in table_.SIZES.items():
        shipped = bool(size.folder and (table_.SHIPPED / size.folder / "config.json").is_file())
        parameters, activated = counts(size, name)
        rows.append(
            {
                "name": name,
                "family": size.family,
                "parameters": parameters,
                "activated_parameters": activated,
                "shipped": shipped,
                "source": size.source,
            }
        )
    return rows


def _study(a: argparse.Namespace) -> None:
    from diptych.studies.run import study

    print(study(a.study, a.run or Path("runs") / a.study, a.out, a.model, a.seeds, a.steps, a.limit))


def _models(a: argparse.Namespace) -> None:
    rows = model_rows()
    if a.json:
        print(json.dumps(rows))
        return
    counted = ("parameters", "activated_parameters")
    show = [
        [
            r["name"], r["family"], *("needs diptych[hf]" if r[k] is None else f"{r[k]:,}" for k in counted),
            "yes" if r["shipped"] else "", r["source"],
        ]
        for r in rows
    ]  # fmt: skip
    _table("models", ["name", "family", "parameters", "activated", "ships", "source"], show)


def _recipes(a: argparse.Namespace) -> None:
    from diptych import recipes

    if a.recipe:
        print(recipes.find(a.recipe).to_json())
        return
    found = {name: recipes.find(name) for name in recipes.RECIPES}
    if a.json:
        print(json.dumps([{"name": n, "family": r.model["family"], "steps": r.steps} for n, r in found.items()]))
        return
    rows = [[n, r.model["family"], r.steps, ", ".join(s.name for s in r.stages)] for n, r in found.items()]
    _table("recipes", ["name", "family", "steps", "stages"], rows)


def _data_check(a: argparse.Namespace) -> int:
    from diptych.data.check import check

    report = check(a.catalog, a.limit)
    print(json.dumps(report.to_json()) if a.json else report)
    return OK if report.ok else BAD


def _data_show(a: argparse.Namespace) -> None:
    from diptych.data.catalog import sources
    from diptych.data.sheet import show
    from diptych.models import store
    from diptych.models import table as table_
    from diptych.parts.tokenizer import Tokenizer

    size = table_.SIZES.get(a.layout)
    if not size:
        raise ValueError(f"unknown model {a.layout!r}; choose from {', '.join(table_.SIZES)}")
    model = store.create(size.family, table_.config(a.layout), Tokenizer.tiny(), "meta")
    show(
        sources(a.names, catalog=a.catalog, size=a.size),
        model.lay_out,
        model.tokenizer.decode,
        a.n * len(a.names),
        a.out,
    )
    print(a.out)


def _data_prepare(a: argparse.Namespace) -> None:
    from diptych.data.worlds import stamps

    counts = stamps.prepare(a.out, a.source)
    print("\n".join(f"{number:6d}  {what}" for what, number in counts.items()))


def _data_convert(a: argparse.Namespace) -> int:
    from diptych.data.convert import convert

    told = convert(a.format, a.source, a.out, a.images)
    if a.json:
        print(json.dumps(vars(told)))
    else:
        for line in told.skipped:
            print(f"skipped {line}")
        print(f"{a.out}: {told.rows} rows, {told.pictures} pictures, {len(told.skipped)} skipped")
    return OK if told.rows else BAD


def _data_shard(a: argparse.Namespace) -> None:
    from diptych.data.catalog import sources
    from diptych.data.mixture import First
    from diptych.data.shards import shard

    told = {}
    for name, source in sources(a.names, catalog=a.catalog, size=a.size).items():
        source = First(source, min(a.limit, len(source))) if a.limit else source
        told[name] = shard(source, a.out / name, rows=a.rows, seed=None if a.seed < 0 else a.seed)
    if a.json:
        print(json.dumps(told))
        return
    rows = [[n, t["rows"], t["pictures"], t["shards"], len(t["skipped"])] for n, t in told.items()]
    _table(str(a.out), ["data set", "rows", "pictures", "shards", "skipped"], rows)
    for row, why in (item for t in told.values() for item in t["skipped"].items()):
        print(f"skipped {row}: {why}")


def _data_stats(a: argparse.Namespace) -> None:
    from diptych.data.catalog import sources
    from diptych.data.shards import stats
    from diptych.models import store
    from diptych.models import table as table_
    from diptych.parts.tokenizer import Tokenizer

    config = table_.config(a.layout)
    model = store.create(table_.SIZES[a.layout].family, config, Tokenizer.tiny(), "meta")
    found = {n: s.to_json() for n, s in stats(sources(a.names, a.catalog, a.size), model.lay_out, a.limit).items()}
    if a.json:
        print(json.dumps(found))
        return
    head = ("rows", "bad", "tokens", "p5", "p50", "p95", "longest", "supervised")
    _table(a.layout, ["data set", *head], [[n, *(f"{t.get(k, 0):g}" for k in head)] for n, t in found.items()])
    for name, told in found.items():
        for row, why in told["skipped"].items():
            print(f"skipped {row}: {why}")
        for what in ("kinds", "shapes"):
            most = max(told[what].values(), default=1)
            for label, number in list(told[what].items())[:12]:
                print(f"{name}  {label:<18} {number:>9}  {'█' * round(40 * number / most)}")


def _data_bench(a: argparse.Namespace) -> None:
    from dataclasses import replace

    from diptych.data.shards import speed
    from diptych.models import configs, store
    from diptych.recipes.run import configured, stage_sources
    from diptych.training.log import consumption
    from diptych.training.rows import stage_loader

    recipe = configured(
        a.recipe, catalog=a.catalog, encoded=a.encoded, override=_pairs(a.override, "--set", "PATH=VALUE")
    )
    name, config = configs.config_from_json(recipe.model)
    model = store.create(name, config, device="meta")
    consumed = None
    if a.against:
        consumed = consumption(a.against)
    rows = []
    for stage in recipe.stages:
        for workers in a.workers:
            loader = stage_loader(replace(recipe, workers=workers), stage, model, stage_sources)
            told = speed(loader, a.rows)
            row = {"stage": stage.name, "workers": workers, **told.to_json()}
            rows.append(row | ({"times_consumed": told.tokens_per_second / consumed} if consumed else {}))
    if not a.json:
        _table(
            recipe.name, list(rows[0]), [[f"{v:.4g}" if isinstance(v, float) else v for v in r.values()] for r in rows]
        )
    print(json.dumps({"benchmark": "data", "recipe": recipe.name, "rows": rows}))


def _data_precompute(a: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from diptych.machine.devices import pick_device
    from diptych.recipes.run import precompute

    for option in ("limit", "batch", "shard"):
        if (value := getattr(a, option)) is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, not {value}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(a.device)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" and world > 1 else device
    with Progress(console=Console(stderr=True), disable=a.json or rank > 0, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, rows: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=rows)
            bar.update(tasks[name], completed=done)

        told = precompute(
            a.recipe, a.out, data=a.data, limit=a.limit, model=a.model, catalog=a.catalog,
            override=_pairs(a.override, "--set", "PATH=VALUE"), device=device, progress=progress,
            encoders=a.encoders, dtype=a.dtype, batch=a.batch, shard=a.shard, workers=a.workers, rank=rank, world=world,
        )  # fmt: skip
    if a.json:
        print(json.dumps(told))
        return
    rows = [[n, t["rows"], t["pictures"], f"{t['bytes'] / 2**20:.1f}", len(t["skipped"])] for n, t in told.items()]
    _table(str(a.out), ["data set", "rows", "pictures", "MiB", "skipped"], rows)
    for row, why in (item for t in told.values() for item in t["skipped"].items()):
        print(f"skipped {row}: {why}")


def _doctor(a: argparse.Namespace) -> None:
    from diptych.machine.doctor import report

    found = report()
    if a.json:
        print(json.dumps(found))
        return
    _table("doctor", ["what", "found"], [[k, v] for k, v in found.items()])


def _export(a: argparse.Namespace) -> None:
    from diptych.models import store

    folder = store.export(a.model, a.folder, a.format, a.dtype, a.base, a.force)
    if a.format == "hf":
        print("\n".join(str(f) for f in sorted(folder.iterdir())))
        return
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{a.folder}: {size / 2**20:.1f} MiB")
