"""A tiny random model of every family that publishes folders, written as the family publishes it.

A new family is one line in ``CONFIGS``.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, trainers

from diptych.models import bagel, store
from diptych.models.protocol import UnifiedModel
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.decoder import DecoderConfig
from diptych.parts.images import SizeRule
from diptych.parts.tokenizer import QWEN2, Tokenizer
from diptych.parts.vision import VisionConfig
from tests.support.tiny import shake

MARKERS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


def bagel_config(width: int = 32, layers: int = 2, vocab_size: int = 320) -> bagel.Config:
    """Sizes that a published BAGEL folder can say."""
    return bagel.Config(
        DecoderConfig(
            vocab_size, width, 48, layers, 4, 2, qk_norm=True, routes=2, routed=("attention", "norms", "mlp")
        ),
        VisionConfig(32, 48, 2, 2, patch_size=14, image_size=112),
        AutoencoderConfig(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=4),
        latent_side=16,
        see=SizeRule(longest=112, shortest=112, stride=14, over="ratio"),
        draw=SizeRule(longest=128, shortest=64, stride=8, over="ratio"),
        size=(128, 128),
        reading="inferencer",
        edits=bagel.EDITS,
    )


CONFIGS = {"bagel": bagel_config}


def qwen2(vocab_size: int = 300) -> Tokenizer:
    """A small vocabulary that splits text as Qwen2's does, with its markers at the end."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["a red circle left of two blue squares", "how many stars are there?"] * 4, trainer)
    inner.add_special_tokens([tokenizers.AddedToken(m, special=True) for m in MARKERS])
    inner.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    return Tokenizer(inner)


def model(family: str, seed: int = 0, **sizes) -> UnifiedModel:
    """A random model in float32 with nothing left at zero."""
    torch.manual_seed(seed)
    made = store.create(family, CONFIGS[family](**sizes), qwen2())
    made.initialise(seed)
    return shake(made, seed + 1).eval()


def write(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The folder of a random model, the autoencoder in float32 as published."""
    made = model(family, seed)
    state = {k: v if k.startswith("autoencoder.") else v.to(dtype) for k, v in made.state_dict().items()}
    store.save(made, folder, state, published=True)
    return folder
