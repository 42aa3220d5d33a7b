"""Complete runs, data only: the table of names, and how one is found."""

from __future__ import annotations

import importlib
from pathlib import Path

from diptych.core.errors import nearest
from diptych.training.recipe import Recipe

RECIPES = {
    "bagel/tiny": "diptych.recipes.tiny:bagel",
    "bagel/tiny-world": "diptych.recipes.tiny:bagel_world",
    "bagel/tiny-reward": "diptych.recipes.rewarded:bagel_tiny",
    "bagel/tiny-answers": "diptych.recipes.rewarded:bagel_answers",
    "bagel/reward-lora": "diptych.recipes.rewarded:bagel_lora",
    "cheers/tiny-reward": "diptych.recipes.rewarded:cheers_tiny",
    "iomm/tiny-reward": "diptych.recipes.rewarded:iomm_tiny",
    "omnigen2/tiny-reward": "diptych.recipes.rewarded:omnigen2_tiny",
    "synergen/tiny-reward": "diptych.recipes.rewarded:synergen_tiny",
    "autoencoder/tiny": "diptych.recipes.tiny:autoencoder",
    "autoencoder/tiny-world": "diptych.recipes.tiny:autoencoder_world",
    "sgt/tiny": "diptych.recipes.sgt:tiny",
    "iomm/tiny": "diptych.recipes.iomm:tiny",
    "iomm/reader": "diptych.recipes.iomm:reader",
    "iomm/b": "diptych.recipes.iomm:b",
    "iomm/l": "diptych.recipes.iomm:l",
    "iomm/xl": "diptych.recipes.iomm:xl",
    "iomm/b-pair-pair": "diptych.recipes.iomm:b_pair_pair",
    "iomm/b-pair-mix": "diptych.recipes.iomm:b_pair_mix",
    "iomm/b-pair-image": "diptych.recipes.iomm:b_pair_image",
    "iomm/b-image-pair": "diptych.recipes.iomm:b_image_pair",
    "iomm/b-image-image": "diptych.recipes.iomm:b_image_image",
    "iomm/b-1024": "diptych.recipes.iomm:b_1024",
    "iomm/l-1024": "diptych.recipes.iomm:l_1024",
    "iomm/tuning": "diptych.recipes.iomm:tuning",
    "iomm/bagel": "diptych.recipes.iomm:bagel",
    "iomm/bagel-lora": "diptych.recipes.iomm:bagel_lora",
    "sgt/bagel": "diptych.recipes.sgt:bagel",
    "cheers/tiny": "diptych.recipes.cheers:tiny",
    "cheers/1.5b": "diptych.recipes.cheers:b1_5",
    "autoencoder/vq-tiny": "diptych.recipes.synergen:tokenizer",
    "synergen/tiny": "diptych.recipes.synergen:tiny",
    "synergen/qwen2-0.5b": "diptych.recipes.synergen:qwen2",
    "synergen/qwen2-0.5b-full": "diptych.recipes.synergen:qwen2_full",
    "synergen/qwen2-0.5b-s1": "diptych.recipes.synergen:qwen2_stage1",
    "synergen/qwen2-0.5b-s2": "diptych.recipes.synergen:qwen2_stage2",
    "synergen/qwen2-0.5b-folded": "diptych.recipes.synergen:qwen2_folded",
    "synergen/stage1": "diptych.recipes.synergen:stage1",
    "synergen/stage2": "diptych.recipes.synergen:stage2",
    "synergen/tune": "diptych.recipes.synergen:tune",
    "omnigen2/tiny": "diptych.recipes.omnigen2:tiny",
    "omnigen2/tune": "diptych.recipes.omnigen2:tune",
    "omnigen2/tune-lora": "diptych.recipes.omnigen2:tune_lora",
    "sgt/omnigen2": "diptych.recipes.omnigen2:sgt",
    "sgt/omnigen2-published": "diptych.recipes.omnigen2:sgt_published",
    "sgt/bagel-24gb": "diptych.recipes.presets:bagel_24gb",
    "sgt/bagel-80gb": "diptych.recipes.presets:bagel_80gb",
    "iomm/b-24gb": "diptych.recipes.presets:iomm_24gb",
    "iomm/b-80gb": "diptych.recipes.presets:iomm_80gb",
    "cheers/1.5b-24gb": "diptych.recipes.presets:cheers_24gb",
    "cheers/1.5b-80gb": "diptych.recipes.presets:cheers_80gb",
    "synergen/tune-24gb": "diptych.recipes.presets:synergen_24gb",
    "synergen/tune-80gb": "diptych.recipes.presets:synergen_80gb",
    "sgt/omnigen2-24gb": "diptych.recipes.presets:omnigen2_24gb",
    "sgt/omnigen2-80gb": "diptych.recipes.presets:omnigen2_80gb",
}


def find(name_or_file: str | Path) -> Recipe:
    """The recipe of a name in the table or of a .json or .yaml file. Raises ``ValueError`` listing the names."""
    if str(name_or_file) in RECIPES:
        module, function = RECIPES[str(name_or_file)].split(":")
        return getattr(importlib.import_module(module), function)()
    path = Path(name_or_file)
    if path.is_file():
        return Recipe.load(path)
    choices = f"{', '.join(RECIPES)}{nearest(name_or_file, RECIPES)}"
    raise ValueError(f"no recipe {str(name_or_file)!r}: not a file, and the names are {choices}")
