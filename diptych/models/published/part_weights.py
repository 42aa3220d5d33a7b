"""Fills one part of a model from weights that are published on their own: a language model, a vision encoder or an
autoencoder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from diptych.models.published.folder import SearchPath, Tensors, read_json
from diptych.models.published.key_map import Rule, Rules, conversions, raise_all
from diptych.models.published.parts import (
    FLUX2_AUTOENCODER,
    autoencoder_kl,
    decoder_config,
    decoder_rules,
    kl_config,
    siglip,
)
from diptych.parts.autoencoder import LatentDecoder
from diptych.parts.decoder import Decoder
from diptych.parts.vision import VisionEncoder

DIFFUSERS = "diffusion_pytorch_model"  # stem of the weights of diffusers


def read_language_model(decoder: Decoder, folder: Path) -> None:
    """Fills a decoder from a folder of transformers (Qwen2, Qwen3, Llama, InternLM2); where a layer has
    several FFNs, each becomes a copy of the published one.

    Raises ``ValueError`` where sizes differ and for every missing, unknown and misshapen tensor."""
    if not (folder / "config.json").is_file() or not (path := SearchPath((folder,)).weights("model")):
        raise ValueError(f"{folder} is no language model of transformers: it lacks config.json or model.safetensors")
    hf, c = read_json(folder / "config.json"), decoder.config
    published = replace(decoder_config(hf), routes=c.routes, routed=c.routed)
    errors = [
        f"{f.name} is {getattr(published, f.name)} there, {getattr(c, f.name)} here"
        for f in fields(c)
        if getattr(published, f.name) != getattr(c, f.name) and (f.name != "head_dim" or published.width != c.width)
    ]
    raise_all(errors, f"{folder} does not fit the decoder")
    _fill(decoder, Tensors(path), decoder_rules(hf, c.copies("mlp")), f"{folder} does not fit the decoder")


def read_vision_encoder(vision: VisionEncoder, folder: Path) -> None:
    """Fills a vision encoder from a folder of transformers: SigLIP with its text tower or without.

    Raises ``ValueError`` where sizes differ and for every missing, unknown and misshapen tensor."""
    if not (folder / "config.json").is_file() or not (path := SearchPath((folder,)).weights("model")):
        raise ValueError(f"{folder} is no encoder of transformers: it lacks config.json or model.safetensors")
    hf, c = read_json(folder / "config.json"), vision.config
    published = hf.get("vision_config", hf)
    errors = [
        f"{n} is {published[n]} there, {getattr(c, n)} here"
        for n in ("num_attention_heads", "patch_size", "image_size", "layer_norm_eps")
        if published.get(n, getattr(c, n)) != getattr(c, n)
    ]
    fixed = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    errors += [f"{n} must be {v!r}, not {published[n]!r}" for n, v in fixed.items() if published.get(n, v) != v]
    raise_all(errors, f"{folder} does not fit the encoder")
    tensors = Tensors(path)
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in tensors.shapes) else ""
    text_tower = tuple(Rule(name, (), ignored=True) for name in ("text_model.**", "logit_scale", "logit_bias"))
    _fill(vision, tensors, siglip(c.patch_size, prefix, c.pooling) + text_tower, f"{folder} does not fit the encoder")


def read_autoencoder(autoencoder: LatentDecoder, path: Path) -> None:
    """Fills an autoencoder, or its decoding half, from ``ae.safetensors`` of FLUX or FLUX.2 (the file, or its folder)
    or from a ``vae/`` folder of diffusers (``AutoencoderKL``).

    Raises ``ValueError`` for other sizes and constants and for every missing, unknown and misshapen tensor."""
    c, rules = autoencoder.config, FLUX2_AUTOENCODER
    if not c.statistics:
        rules = tuple(rule for rule in rules if not rule.published.startswith("bn."))
    if (kl := path / "config.json").is_file() and (weights := SearchPath((path,)).weights(DIFFUSERS)):
        published = kl_config(read_json(kl))
        errors = [
            f"{f.name} is {getattr(published, f.name)} there, {getattr(c, f.name)} here"
            for f in fields(c)
            if getattr(published, f.name) != getattr(c, f.name)
        ]
        raise_all(errors, f"{path} does not fit the autoencoder")
        file, rules = weights, autoencoder_kl(len(c.multipliers))
    else:
        file = path if path.is_file() else path / "ae.safetensors"
        if not file.is_file():
            raise ValueError(
                f"{path} is no autoencoder: neither a safetensors file nor a folder with ae.safetensors nor a vae/ "
                "folder of diffusers"
            )
    decoder_only = not any(n.startswith("encoder.") for n in autoencoder.state_dict())
    unused = (Rule("encoder.**", (), ignored=True),) if decoder_only else ()
    _fill(autoencoder, Tensors(file), unused + rules, f"{path} does not fit the autoencoder")


def _fill(module: nn.Module, tensors: Tensors, rules: Rules, summary: str) -> None:
    """Copies the published tensors into the module; ``summary`` begins the message of an error."""
    state = module.state_dict()
    steps, _, errors = conversions(rules, tensors.shapes, state)
    raise_all(errors, summary)
    with torch.no_grad():
        for step in steps:
            for name, tensor in step.apply(tensors.read).items():
                state[name].copy_(tensor)
