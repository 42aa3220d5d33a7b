"""The table of benchmarks, by name; what a name brings along is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from diptych.core.errors import nearest
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.scores import Benchmark


@dataclass(frozen=True)
class Tools:
    """External scorers: the judge model, detector, CLIP, feature network, and where to load them from."""

    judge: Judge | None = None
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    features: str = "efflite0"  # or "inception", or a TorchScript file of Inception
    rubrics: Path | None = None  # a folder of a judge's instructions, NAME.txt, in place of ours
    cache: Path | None = None  # of the statistics of reference pictures
    device: str = "cpu"
    pictures: int | None = None  # of each prompt; None: what the benchmark is defined with
    lmms_tasks: str | None = None  # a folder of the user's own task files for lmms-eval

    def need_judge(self, name: str) -> Judge:
        """The judge. Raises ``ValueError`` saying how to name one."""
        if self.judge is None:
            raise ValueError(
                f"{name} needs a judge: --judge MODEL with --judge-url http://host:port/v1, or --cache FOLDER of "
                "an earlier one"
            )
        return self.judge

    def rubric(self, name: str, ours: str) -> str:
        """A judge's instructions: the user's NAME.txt, else ours."""
        if self.rubrics is None:
            return ours
        file = self.rubrics / f"{name}.txt"
        if not file.is_file():
            raise ValueError(f"{self.rubrics} has no {file.name}; it must hold the instructions of every judge asked")
        return file.read_text("utf-8")

    def judged(self, name: str) -> str:
        """How a score says who judged and by whose instructions: "[gpt-4.1]", "[gpt-4.1, our rubric]"."""
        return f"[{self.need_judge(name).model}{'' if self.rubrics else ', our rubric'}]"


@dataclass(frozen=True)
class Entry:
    """A row of the table: the benchmark's module, whether it needs a file of the user's, and one line about it."""

    module: str
    file: Literal["none", "optional", "required"]
    what: str


def _mini(module: str, what: str) -> Entry:
    return Entry(module, "none", what)


TABLE: dict[str, Entry] = {
    "geneval-mini": _mini("shapes", "drawing: GenEval's six tags in the shapes world, strict rules"),
    "geneval-emoji": _mini("miniatures", "drawing: scenes of emoji, judged by a small recogniser that ships"),
    "vqa-mini": _mini("shapes", "questions about shapes"),
    "caption-mini": _mini("shapes", "captions of shapes"),
    "cvbench-mini": _mini("miniatures", "multiple choice: count, relation, depth order, distance"),
    "pope-mini": _mini("miniatures", "yes or no: is it there? random, popular and adversarial"),
    "ocr-mini": _mini("miniatures", "reading small words"),
    "edit-mini": _mini("shapes", "edits: the instruction done, the rest kept"),
    "compose-mini": _mini("miniatures", "two references in one picture, each at its place"),
    "seg-mini": _mini("miniatures", "label pictures: mean overlap of regions and boundaries"),
    "geneval-dev": _mini("shapes", "as geneval-mini, other prompts: to choose settings with"),
    "canvas-draw": _mini("canvases", "drawing shapes on a named ground: plain, gradient, checkers, noise"),
    "canvas-read": _mini("canvases", "questions about pictures of 32 to 512 pixels and on every kind of ground"),
    "canvas-edit": _mini("canvases", "edits of pictures of 64 to 128 pixels on every kind of ground"),
    "emoji-scenes": _mini("canvases", "questions about scenes of one to six emoji"),
    "talk-mini": _mini("canvases", "the last question of a conversation, and the same question alone"),
    "glyphs-read": _mini("glyphs", "reading a small number, as a whole and by digit, and naming a shape"),
    "glyphs-say": _mini("glyphs", "naming a large digit and its ground"),
    "glyphs-draw": _mini("glyphs", "drawing a digit on a ground, read back by the nearest true picture"),
    "words": _mini("glyphs", "facts, sums and reversals: what a language model may lose"),
    "geneval": Entry("geneval", "optional", "GenEval, natively; FILE is the official evaluation_metadata.jsonl"),
    "geneval2": Entry("geneval2", "required", "GenEval 2: soft TIFA with a judge; FILE has prompt and vqa_list"),
    "dpg": Entry("dpg", "required", "DPG-Bench with a judge; FILE is dpg_bench.csv"),
    "wise": Entry("wise", "required", "WISE, legacy weights, with a judge; a FILE or a folder of JSON"),
    "wise-verified": Entry("wise", "required", "WISE_Verified, one binary score; a FILE or a folder of JSON"),
    "text": Entry("printed_text", "required", "text rendering read back; FILE has prompt and text, one row a line"),
    "fid": Entry(
        "distances", "required", "FID, KID, precision, recall; FOLDER of pictures and prompts.jsonl, or MJHQ's"
    ),
    "clipscore": Entry("clipscore", "required", "CLIPScore of prompts and pictures; FILE has a prompt a line"),
    "gedit": Entry("gedit", "required", "GEdit-Bench with a judge; FILE.jsonl of its rows"),
    "imgedit": Entry("imgedit", "required", "ImgEdit-Bench, basic suite, with a judge; FILE is its JSON"),
    "mcq": Entry("questions", "required", "multiple choice, each question once; VLMEvalKit's TSV, jsonl, parquet …"),
    "mcq-circular": Entry("questions", "required", "multiple choice, right only in every rotation of the options"),
    "yesno": Entry("questions", "required", "yes or no: accuracy, precision, recall, F1, yes-ratio; POPE's jsonl"),
    "mmmu": Entry("questions", "required", "MMMU: multiple choice and open questions; TSV, jsonl or parquet"),
    "seed": Entry("questions", "required", "SEED-Bench, pictures only; its JSON or TSV"),
    "cvbench": Entry("questions", "required", "CV-Bench: half 2D, half 3D; jsonl or parquet"),
    "mmvp": Entry("questions", "required", "MMVP: pairs of questions that are both right; Questions.csv"),
    "hallusion": Entry("questions", "required", "HallusionBench: aAcc, fAcc, qAcc; its JSON"),
    "mme": Entry("questions", "required", "MME: accuracy and accuracy+ of its 14 subtasks; TSV or jsonl"),
    "vqa": Entry("questions", "required", "short answers: VQA accuracy over annotators; jsonl"),
    "vqav2": Entry("questions", "required", "VQAv2: VQA accuracy by its own evaluation; its JSON or jsonl"),
    "anls": Entry("questions", "required", "short answers: normalised edit similarity (DocVQA); jsonl"),
    "relaxed": Entry("questions", "required", "charts: relaxed accuracy, 5 %; jsonl"),
    "contains": Entry("questions", "required", "OCRBench: the reply contains an answer; TSV, JSON or jsonl"),
    "captions": Entry("questions", "required", "captions of pictures: CIDEr-D; rows of image and captions"),
}
GROUPS = {
    "mini": (
        "geneval-mini",
        "geneval-emoji",
        "vqa-mini",
        "caption-mini",
        "cvbench-mini",
        "pope-mini",
        "ocr-mini",
        "edit-mini",
        "seg-mini",
    ),
    "world": ("canvas-draw", "canvas-read", "canvas-edit", "emoji-scenes", "talk-mini"),
}
LMMS = "lmms-eval:"


def resolve(names: Sequence[str | Benchmark], tools: Tools) -> tuple[list[Benchmark], dict[str, str]]:
    """The benchmarks of these names, each once, and how each was asked for. Raises ``ValueError`` for an unknown name,
    a missing file, and a file for what takes none."""
    names = [names] if isinstance(names, str) else names
    choices = (*GROUPS, *TABLE)
    if not names:
        raise ValueError(f"no benchmark named; choose from {', '.join(choices)}")
    benchmarks: dict[str, Benchmark] = {}
    asked: dict[str, str] = {}
    for one in names:
        if isinstance(one, Benchmark):
            benchmarks[one.name] = one
            continue
        name, sign, file = one.partition("=")
        if name not in choices:
            raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(choices)}{nearest(name, choices)}")
        for member in GROUPS.get(name, (name,)):
            entry = TABLE[member]
            if sign and (entry.file == "none" or name in GROUPS):
                raise ValueError(f"{name} ships with the package and takes no file; you gave {file!r}")
            if entry.file == "required" and not file:
                raise ValueError(f"{name} needs your file, {name}=FILE: {entry.what}")
            if file and not Path(file).exists():
                raise ValueError(f"{name}={file}: there is no such file")
            benchmark = _made(member, entry, file, tools)
            if benchmarks.get(benchmark.name, benchmark) is not benchmark and asked[benchmark.name] != one:
                raise ValueError(f"{one} and {asked[benchmark.name]} would both be called {benchmark.name}")
            benchmarks[benchmark.name] = benchmark
            asked[benchmark.name] = member if entry.file == "none" else one
    return list(benchmarks.values()), asked


def _made(name: str, entry: Entry, file: str, tools: Tools) -> Benchmark:
    module = import_module(f"diptych.evaluation.benchmarks.{entry.module}")
    if entry.file == "none":
        benchmarks: Mapping[str, Benchmark] = module.BENCHMARKS
        return benchmarks[name]
    return module.benchmark(name, Path(file) if file else None, tools)
