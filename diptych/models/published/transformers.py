"""A model's language and vision parts in the format of transformers: ``language/`` and ``vision/``, each with
config.json and model.safetensors.

Every family that uses ``parts.decoder`` or ``parts.vision`` has them. Of a routed decoder the copies for text are
written. The image generation parts have no class in transformers; ``--format published`` writes the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.models.protocol import Trainable
from diptych.models.published.key_map import export
from diptych.models.published.parts import TEXT, siglip
from diptych.models.release import README, write_tensors
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.routed import Routed
from diptych.parts.vision import VisionConfig, VisionEncoder


def write_transformers(model: Trainable, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes the language and vision parts of a model and a README. ``dtype`` None keeps the tensors' dtypes.

    Raises ``ValueError`` for a model that has neither part."""
    parts: list[str] = []

    def write(kind: str, state: dict[str, torch.Tensor], config: dict[str, Any], load: str) -> Path:
        into = folder / kind
        into.mkdir()
        tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in state.items()}
        stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        (into / "config.json").write_text(json.dumps(config | {"dtype": stored}, indent=1))
        write_tensors(into / "model.safetensors", tensors)
        parts.append(f"- `{load}`\n")
        return into

    if decoder := _one(model, Decoder):
        state, config = language_model(decoder)
        config |= {"bos_token_id": _id(model, "<|im_start|>"), "eos_token_id": _id(model, "<|im_end|>")}
        into = write("language", state, config, 'transformers.AutoModelForCausalLM.from_pretrained("language")')
        model.tokenizer.save(into)
        named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        named = {k: v for k, v in named.items() if _id(model, v) is not None}
        tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
        (into / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1))
    if vision := _one(model, VisionEncoder):
        state, config = vision_model(vision)
        write("vision", state, config, 'transformers.SiglipVisionModel.from_pretrained("vision")')
    if not parts:
        raise ValueError(f"family {model.family!r} has neither a decoder nor a vision encoder that transformers knows")
    (folder / "README.md").write_text(README.format(family=model.family, parts="".join(parts)))


def language_model(decoder: Decoder) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and config.json of the decoder's first route: Qwen3 where queries and keys are normed, else Qwen2
    (with biases) or Llama (without)."""
    c = decoder.config
    other_routes = tuple(
        f"{name}.{i}." for name, m in decoder.named_modules() if isinstance(m, Routed) for i in range(1, len(m))
    )
    state = export(TEXT, {k: v for k, v in decoder.state_dict().items() if not k.startswith(other_routes or ("\0",))})
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if kind == "qwen3" and c.qkv_bias:  # transformers' switch also gives the output projection a bias: zero
        for i in range(c.num_hidden_layers):
            state[f"model.layers.{i}.self_attn.o_proj.bias"] = state["model.norm.weight"].new_zeros(c.hidden_size)
    return state, _language_config(c, kind)


def _language_config(c: DecoderConfig, kind: str) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return (
        {n: getattr(c, n) for n in names}
        | {
            "architectures": [{"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[kind] + "ForCausalLM"],
            "model_type": kind,
            "head_dim": c.width,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "rope_theta": c.rope_theta,  # where transformers is older
        }
        | ({"attention_bias": c.qkv_bias} if kind != "qwen2" else {})
    )


def vision_model(vision: VisionEncoder) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and config.json of a SigLIP encoder, with its pooling head where it has one."""
    c: VisionConfig = vision.config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "image_size",
        "layer_norm_eps",
    )
    config = {n: getattr(c, n) for n in names} | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": c.pooling,
    }
    return export(siglip(c.patch_size, pooling=c.pooling), vision.state_dict()), config


def _one(model: nn.Module, kind: type) -> Any:
    return next((m for m in model.modules() if isinstance(m, kind)), None)


def _id(model: Trainable, token: str) -> int | None:
    return model.tokenizer.inner.token_to_id(token)
