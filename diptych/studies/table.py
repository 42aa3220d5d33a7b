"""The table of studies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.models import store
from diptych.recipes import cheers, iomm, sgt, synergen
from diptych.studies.copying import copying
from diptych.studies.drawing import drawing
from diptych.studies.study import Study, _trained
from diptych.training.recipe import Recipe


def _iomm(**changes: Any) -> Callable[[int], Recipe]:
    return lambda steps: iomm.tiny(**changes, tokens=1280).with_steps(steps)


def _reader(how: tuple) -> Callable[[int], Recipe]:
    return lambda steps: synergen.reader(steps, *how)


def _words(folder: Path) -> str:
    """Trains the language model that the stages start from; returns its model's folder. What transformers reads of it
    stands beside the run."""
    release, words = _trained(synergen.words(), folder / "run"), folder / "words"
    if not words.exists():
        store.export(release, words, "hf")
    return str(release)


def _on_words(recipe: Recipe, model: str) -> Recipe:
    words = Path(model).parent.parent / "words" / "language"
    return replace(recipe, init=recipe.init | {"decoder": f"transformers:{words}"})


def _cheers(**changes: Any) -> Callable[[int], Recipe]:
    return lambda steps: cheers.tiny(tokens=768, **changes).with_steps(steps)


def _begun(*modules: str) -> Callable[[Recipe, str], Recipe]:
    """Arms begin with these modules of the model, which they train on; the rest begins anew in all of them."""
    return lambda recipe, model: replace(recipe, init=recipe.init | dict.fromkeys(modules, model))


BESIDE = {"model": "cheers/tiny", "measure": drawing, "steps": 200}


READER = {"takes": ("mllm", "autoencoder"), "model": "iomm/tiny", "measure": drawing}


STUDIES = {
    "sgt-proxies": Study(
        "What is drawn beside the questions (SGT, table 1.3)",
        {arm: (lambda steps, proxy=proxy: sgt.tiny(proxy, steps=steps)) for arm, proxy in sgt.ARMS.items()},
        "none",
    ),
    "sgt-ratio": Study(
        "Segmentation to questions, by samples (SGT, table 1.5)",
        {
            f"{a}:{b}": (lambda steps, ratio=a / b: sgt.tiny(ratio=ratio, steps=steps))
            for a, b in ((1, 2), (1, 1), (2, 1), (4, 1))
        },
        "2:1",
    ),
    "sgt-amount": Study(
        "How many segmentation pictures there are (SGT, table 1.5)",
        {
            str(n): (lambda steps, amount=n: sgt.tiny("segment" if amount else None, amount=amount, steps=steps))
            for n in (0, 200, 2000, 20_000)
        },
        "0",
    ),
    "iomm-components": Study(
        "What joins reader and generator (IOMM, figure 2b), beside controls of the adapter's size",
        {
            "raw": _iomm(masked=0.0, changes={"adapter": "none"}),
            "raw + block": _iomm(masked=0.0, changes={"adapter": "none", "connector_layers": 1}),
            "static queries": _iomm(masked=0.0, changes={"adapter": "static"}),
            "static queries + block": _iomm(masked=0.0, changes={"adapter": "static", "connector_layers": 1}),
            "residual queries": _iomm(masked=0.0),
            "residual queries + mask": _iomm(),
        },
        "raw",
        **READER,
    ),
    "iomm-recipes": Study(
        "Pre-training and tuning on pictures alone, on pairs, on a mix (IOMM, table 9)",
        {f"{a} to {b}": _iomm(pretrain=a, tune=b) for a in ("pair", "image") for b in ("image", "pair", "mix")},
        "pair to mix",
        **READER,
    ),
    "iomm-mask": Study(
        "The share of a picture's tokens that is masked (IOMM, figure 4b), and what is copied",
        {f"r = {r}": _iomm(masked=r) for r in (0.0, 0.25, 0.45, 0.65, 0.85, 0.95)},
        "r = 0.0",
        **READER | {"measure": lambda engine: drawing(engine) | copying(engine)},
    ),
    "iomm-tuning": Study(
        "Mixed tuning of another family (IOMM, table 2)",
        {kind: (lambda steps, kind=kind: iomm.tuning(kind, steps=steps)) for kind in ("image", "pair", "mix")}
        | {"mix, LoRA": lambda steps: iomm.tuning(steps=steps, rank=4)},
        "pair",
    ),
    "synergen-folding": Study(
        "Detail at equal length: 36 tokens of a small picture, 32 folded ones of a large one (SynerGen-VL, table 6)",
        {arm: _reader(how) for arm, how in synergen.READERS.items()},
        "24 px 1x1",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-unfolded": Study(
        "The same pixels with and without folding (SynerGen-VL, table 6, control)",
        {arm: _reader(how) for arm, how in synergen.UNFOLDED.items()},
        "64 px 2x4",
        model=None,
        steps=1500,
        benchmarks=("glyphs-read",),
    ),
    "synergen-stages": Study(
        "Two stages beside a language model (SynerGen-VL, table 7)",
        {arm: (lambda steps, how=how: synergen.miniature(steps, **how)) for arm, how in synergen.ARMS.items()},
        "S1+S2 full",
        model=_words,
        fill=_on_words,
        steps=500,
        benchmarks=("words", "glyphs-say", "glyphs-draw"),
    ),
    "cheers-detail": Study(
        "What the fine stage is given: gated detail, all of it, or none at equal parameters (Cheers, table 5)",
        {"gated": _cheers(), "ungated": _cheers(detail="added"), "none": _cheers(detail="none")},
        "gated",
        fill=_begun("decoder", "vision", "projector", "coarse"),
        **BESIDE,
    ),
    "cheers-pixels": Study(
        "Latents decoded to pixels before the vision encoder, or read as they are (Cheers, table 6)",
        {"pixels": _cheers(), "latents": _cheers(**cheers.without_pixels())},
        "pixels",
        fill=_begun("decoder"),
        **BESIDE,
    ),
    "cheers-merge": Study(
        "Tokens of a picture at equal resolution (Cheers, section 2)",
        {"2x2: 16 tokens": _cheers(), "1x1: 64 tokens": _cheers(merge=1)},
        "2x2: 16 tokens",
        fill=_begun("decoder", "vision", "fine", "gate"),
        **BESIDE,
    ),
    "cheers-cascade": Study(
        "Two stages with detail between them, or one",
        {"cascade": _cheers(), "one stage": _cheers(head_layers=(2, 0))},
        "cascade",
        fill=_begun("decoder", "vision", "projector"),
        **BESIDE,
    ),
}
