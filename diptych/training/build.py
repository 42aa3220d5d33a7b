"""Builds the model that a recipe trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.models import configs, store
from diptych.models.protocol import Trainable
from diptych.models.published.part_weights import read_autoencoder, read_language_model, read_vision_encoder
from diptych.parts.autoencoder import AutoencoderConfig, LatentDecoder
from diptych.parts.decoder import Decoder, DecoderConfig, decoder_weights_from, with_fresh_rows
from diptych.parts.mllm import MllmConfig
from diptych.parts.tokenizer import Tokenizer
from diptych.parts.vision import VisionConfig, VisionEncoder
from diptych.training import lora
from diptych.training.parallel import sharded, share, spread
from diptych.training.parameters import by_part, ever_trained, narrow
from diptych.training.recipe import Recipe

FOREIGN = "transformers:"  # begins a source of ``init`` that transformers reads


def build(recipe: Recipe, device: str = "cpu", tokenizer: Tokenizer | None = None, resuming: bool = False) -> Trainable:
    """The recipe's model with fresh weights, and with the parts that ``init`` names taken from other models, or a
    decoder from a language model of transformers (whose tokenizer comes with it).

    With sharding, a model from a single folder or a checkpoint (``resuming``: no weights are filled in) is loaded shard
    by shard: peak host memory is the shard plus one full tensor. Fresh weights are drawn whole, then sharded."""
    name, config = configs.config_from_json(recipe.model)
    if tokenizer is None:
        tokenizer = _tokenizer(recipe, config)

    def prepare(model: Trainable, place: str | None = None) -> None:
        lora.inject(model, recipe.lora, recipe.seed)
        narrow(model, recipe.engine, ever_trained(model, recipe.stages))
        if place:
            model.to(place)  # narrow already: the device need not hold the whole in float32
        spread(model, recipe.engine, recipe.precision, device, ever_trained(model, recipe.stages))

    if sharded(recipe.engine) and resuming:
        model = store.create(name, config, tokenizer, "meta")
        prepare(model)
        return model.to_empty(device=device)
    whole_model = recipe.init.keys() == {"model"} and "#" not in recipe.init["model"] and not recipe.lora
    if sharded(recipe.engine) and whole_model:
        return store.load(recipe.init["model"], device, "fp32", prepare=prepare, share=share, config=config)
    with torch.random.fork_rng(devices=[]):  # what ``initialise`` leaves alone belongs to the seed too
        torch.manual_seed(recipe.seed)
        model = store.create(name, config, tokenizer)
    model.initialise(recipe.seed)
    for path, source in recipe.init.items():
        if source.startswith(FOREIGN):
            _foreign(model, path, name, source)
            continue
        where, _, other_path = source.partition("#")
        other = store.load(where)
        if path == "model":
            store.load_strict(model, other.state_dict(), source)
            continue
        module, origin = _module(model, path, name), _module(other, other_path or path, where)
        if isinstance(module, Decoder) and isinstance(origin, Decoder):
            weights = decoder_weights_from(origin, module)
        else:
            weights = {n: with_fresh_rows(n, t, module.state_dict().get(n)) for n, t in origin.state_dict().items()}
        store.load_strict(module, weights, f"{source}, taken over as {path!r},")
    prepare(model, device)
    return model


def _tokenizer(recipe: Recipe, config: Any) -> Tokenizer:
    """The tokenizer of the model that a recipe goes on from, or of the published decoder or reader inside it; else the
    tiny one. Autoencoders and vision encoders have none."""
    whole = recipe.init.get("model")
    kinds = {path: type(getattr(config, path, None)) for path, s in recipe.init.items() if s.startswith(FOREIGN)}
    able = [path for path, kind in kinds.items() if kind not in (AutoencoderConfig, VisionConfig)]
    first = next(iter(sorted(able, key=lambda path: kinds[path] not in (DecoderConfig, MllmConfig))), None)
    inner = recipe.init[first].removeprefix(FOREIGN) if first else None
    if whole:
        return store.search_path(whole).tokenizer()
    return Tokenizer.load(_folder(inner)) if inner else Tokenizer.tiny()


def _foreign(model: Trainable, path: str, name: str, source: str) -> None:
    module, where = _module(model, path, name), source.removeprefix(FOREIGN)
    readers: dict[type, Any] = {
        Decoder: read_language_model,
        VisionEncoder: read_vision_encoder,
        LatentDecoder: read_autoencoder,
    }
    for kind, read in readers.items():
        if isinstance(module, kind):
            read(module, _folder(where))
            return
    load: Any = getattr(module, "load_pretrained", None)
    if load is None:
        raise ValueError(
            f"init: module {path!r} of {name} is no decoder, vision encoder or autoencoder, nor one of transformers; "
            f"{source!r} cannot fill it"
        )
    load(where)


def _folder(where: str) -> Path:
    """The folder (or file) of this path, or of this ``org/name`` or ``org/name/PATH`` of the hub."""
    return Path(where) if Path(where).exists() else store.fetch(where)


def _module(model: Trainable, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(n for n, _ in model.named_children())
        raise ValueError(f"init: {name} has no module {path!r}; it has {known}, and what is inside them") from error


def copy(model: Trainable, weights: dict[str, torch.Tensor], precision: str) -> Trainable:
    """A model of its own with these weights; what is trained in bf16 is used in bf16."""
    clone = store.create(model.family, model.config, model.tokenizer, "meta")
    if precision == "bf16":
        parts = by_part(clone)
        lower = {n for part in parts.keys() - clone.frozen for n in parts[part]}
        weights = {n: w.to(torch.bfloat16) if n in lower else w for n, w in weights.items()}
    clone.load_state_dict(weights, assign=True)
    return clone.to(model.device).eval()
