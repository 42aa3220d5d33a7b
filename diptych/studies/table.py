"""The table of studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.generation.engine import Engine
from diptych.machine import disk
from diptych.models import store
from diptych.models.published.transformers import write_transformers
from diptych.recipes import cheers, iomm, sgt, synergen
from diptych.studies.copying import copying
from diptych.studies.drawing import drawing
from diptych.studies.study import Arm, Study, train_or_resume
from diptych.training.recipe import Recipe

# --- SGT --------------------------------------------------------------------------------------------------------------


def _sgt(proxy: str | None = "segment", **changes: Any) -> Arm:
    return lambda steps: sgt.tiny(proxy, **changes, steps=steps)


# --- IOMM -------------------------------------------------------------------------------------------------------------


def _iomm(**changes: Any) -> Arm:
    return lambda steps: iomm.tiny(**changes, tokens=1280).with_steps(steps)


def _iomm_tuning(kind: iomm.Kind = "mix", **changes: Any) -> Arm:
    return lambda steps: iomm.tuning(kind, steps=steps, **changes)


def _iomm_study(
    title: str, arms: Mapping[str, Arm], base: str, measure: Callable[[Engine], dict[str, float]] = drawing
) -> Study:
    """Arms that keep the reader and the autoencoder of ``iomm/tiny`` and train the rest anew."""
    return Study(title, arms, base, takes=("mllm", "autoencoder"), model="iomm/tiny", measure=measure)


def _drawing_and_copying(engine: Engine) -> dict[str, float]:
    return drawing(engine) | copying(engine)


# --- SynerGen-VL ------------------------------------------------------------------------------------------------------


def _reader(settings: tuple) -> Arm:
    return lambda steps: synergen.reader(steps, *settings)


def _synergen_stages(changes: Mapping[str, Any]) -> Arm:
    return lambda steps: synergen.miniature(steps, **changes)


def _language_model(folder: Path) -> str:
    """Trains the language model that the two-stage arms start from and returns its released model's folder. It is also
    exported for transformers, to ``folder/words``."""
    release, words = train_or_resume(synergen.words(), folder / "run"), folder / "words"
    if not words.exists():
        disk.write_folder(words, lambda into: write_transformers(store.load(release), into, None))
    return str(release)


def _on_language_model(recipe: Recipe, model: str) -> Recipe:
    """The recipe with its decoder initialised from the export of ``_language_model``."""
    words = Path(model).parent.parent / "words" / "language"
    return replace(recipe, init=recipe.init | {"decoder": f"transformers:{words}"})


def _reader_study(title: str, arms: Mapping[str, tuple], base: str) -> Study:
    """Arms that read digits, trained from random weights."""
    recipes = {arm: _reader(settings) for arm, settings in arms.items()}
    return Study(title, recipes, base, model=None, steps=1500, benchmarks=("glyphs-read",))


# --- Cheers -----------------------------------------------------------------------------------------------------------


def _cheers(**changes: Any) -> Arm:
    return lambda steps: cheers.tiny(tokens=768, **changes).with_steps(steps)


def _cheers_study(title: str, arms: Mapping[str, Arm], base: str, *modules: str) -> Study:
    """Arms that start with these modules of ``cheers/tiny`` and train all of them; the others are initialised anew."""

    def fill(recipe: Recipe, model: str) -> Recipe:
        return replace(recipe, init=recipe.init | dict.fromkeys(modules, model))

    return Study(title, arms, base, fill=fill, model="cheers/tiny", measure=drawing, steps=200)


# ----------------------------------------------------------------------------------------------------------------------

STUDIES = {
    "sgt-proxies": Study(
        "What is drawn beside the questions (SGT, comparison of proxy tasks)",
        {arm: _sgt(proxy) for arm, proxy in sgt.ARMS.items()},
        "none",
    ),
    "sgt-ratio": Study(
        "Segmentation to questions, by samples (SGT, mixing ratio)",
        {f"{a}:{b}": _sgt(ratio=a / b) for a, b in ((1, 2), (1, 1), (2, 1), (4, 1))},
        "2:1",
    ),
    "sgt-amount": Study(
        "How many segmentation pictures there are (SGT, data scaling)",
        {str(n): _sgt("segment" if n else None, amount=n) for n in (0, 200, 2000, 20_000)},
        "0",
    ),
    "iomm-components": _iomm_study(
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
    ),
    "iomm-recipes": _iomm_study(
        "Pre-training and tuning on pictures alone, on pairs, on a mix (IOMM, table 9)",
        {f"{a} to {b}": _iomm(pretrain=a, tune=b) for a in ("pair", "image") for b in ("image", "pair", "mix")},
        "pair to mix",
    ),
    "iomm-mask": _iomm_study(
        "The share of a picture's tokens that is masked (IOMM, figure 4b), and how much is copied",
        {f"r = {r}": _iomm(masked=r) for r in (0.0, 0.25, 0.45, 0.65, 0.85, 0.95)},
        "r = 0.0",
        _drawing_and_copying,
    ),
    "iomm-tuning": Study(
        "Mixed tuning of another family (IOMM, table 2)",
        {
            "image": _iomm_tuning("image"),
            "pair": _iomm_tuning("pair"),
            "mix": _iomm_tuning("mix"),
            "mix, LoRA": _iomm_tuning("mix", rank=4),
        },
        "pair",
    ),
    "synergen-folding": _reader_study(
        "Detail at equal length: 36 tokens of a small picture, 32 folded ones of a large one (SynerGen-VL, table 6)",
        synergen.READERS,
        "24 px 1x1",
    ),
    "synergen-unfolded": _reader_study(
        "The same pixels with and without folding (SynerGen-VL, table 6, control)", synergen.UNFOLDED, "64 px 2x4"
    ),
    "synergen-stages": Study(
        "Two stages beside a language model (SynerGen-VL, table 7)",
        {arm: _synergen_stages(changes) for arm, changes in synergen.ARMS.items()},
        "S1+S2 full",
        model=_language_model,
        fill=_on_language_model,
        steps=500,
        benchmarks=("words", "glyphs-say", "glyphs-draw"),
    ),
    "cheers-detail": _cheers_study(
        "Detail in the fine stage: gated, ungated, or none at equal parameters (Cheers, table 5)",
        {"gated": _cheers(), "ungated": _cheers(detail="added"), "none": _cheers(detail="none")},
        "gated",
        *("decoder", "vision", "projector", "coarse"),
    ),
    "cheers-pixels": _cheers_study(
        "Latents decoded to pixels before the vision encoder, or read as they are (Cheers, table 6)",
        {"pixels": _cheers(), "latents": _cheers(**cheers.without_pixels())},
        "pixels",
        "decoder",
    ),
    "cheers-merge": _cheers_study(
        "Tokens of a picture at equal resolution (the 2x2 merge of Cheers)",
        {"2x2: 16 tokens": _cheers(), "1x1: 64 tokens": _cheers(merge=1)},
        "2x2: 16 tokens",
        *("decoder", "vision", "fine", "gate"),
    ),
    "cheers-cascade": _cheers_study(
        "Two stages with detail between them, or one",
        {"cascade": _cheers(), "one stage": _cheers(head_layers=(2, 0))},
        "cascade",
        *("decoder", "vision", "projector"),
    ),
}
