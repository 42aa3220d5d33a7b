"""The published folder of BAGEL: key map and JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isqrt
from typing import Any

from diptych.models.bagel import EDITS, Config, position_tables
from diptych.models.published.folder import Json, PublishedFormat, States
from diptych.models.published.key_map import Rules, count_matches, prefixed, rules, table_side
from diptych.models.published.parts import FLUX_AUTOENCODER, TEXT, VISION, decoder_config, flux_config
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.flow import TimeDraw
from diptych.parts.images import SizeRule
from diptych.parts.vision import VisionConfig

# ---- published folders ------------------------------------------------------------------------------------------

_LLM, _VIT, _GELU = "llm_config.json", "vit_config.json", "gelu_pytorch_tanh"


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")


def published_config(json: Json, states: States) -> Config:
    """The Config of a published folder. Where the JSON files are silent or differ from the weights, the tensors decide:
    q/k norm, an untied head, the number of vision layers (one less than the file says), both position tables (64 and
    the encoder's own side where they are not stored) and the autoencoder.

    Raises ``ValueError`` for settings that this family does not compute."""
    llm, vit, more = json[_LLM], json[_VIT], json.get("config.json", {})
    ema, coder = states["ema"], more.get("vae_config", {})
    text = decoder_config({"model_type": "qwen2", **llm})
    normed = any(name.endswith(".q_norm.weight") for name in ema)
    tied = text.tie_word_embeddings and "language_model.lm_head.weight" not in ema
    text = replace(
        text,
        qk_norm=normed or bool(llm.get("qk_norm", True)),
        tie_word_embeddings=tied,
        routes=2,
        routed=("attention", "norms", "mlp"),
    )
    errors = [f"{_VIT}: {name} must be a number, not {vit.get(name)!r}" for name in _SIZES if not _is_size(vit, name)]
    acts = {f"{_VIT}: hidden_act": vit.get("hidden_act"), "config.json: connector_act": more.get("connector_act")}
    errors += [f"{name} {act!r} is not supported" for name, act in acts.items() if act not in (None, _GELU)]
    if errors:
        raise ValueError("; ".join(errors))
    vision = VisionConfig(**{n: vit[n] for n in _SIZES}, layer_norm_eps=vit.get("layer_norm_eps", 1e-6))
    if count_matches(ema, "vit_model.vision_model.encoder.layers.*") != vision.num_hidden_layers:
        vision = replace(vision, num_hidden_layers=vision.num_hidden_layers - 1)
    names = {"scale": "scale_factor", "shift": "shift_factor"}
    autoencoder = flux_config(states["ae"], **{field: coder[n] for field, n in names.items() if n in coder})
    features = ema["vae2llm.weight"].shape[-1] if "vae2llm.weight" in ema else 4 * autoencoder.latent_channels
    patch = max(1, isqrt(features // autoencoder.latent_channels))
    stride, most = patch * autoencoder.downsample, table_side(ema, "latent_pos_embed.pos_embed") or 64
    seen = table_side(ema, "vit_pos_embed.pos_embed") or vision.side
    longest, shortest = seen * vision.patch_size, min(seen, 16) * vision.patch_size
    return Config(
        text,
        vision,
        autoencoder,
        latent_patch=patch,
        latent_side=most,
        vision_side=None if seen == vision.side else seen,
        stretch=bool(more.get("interpolate_pos", False)),
        times=TimeDraw(shift=more.get("timestep_shift", 1.0)),
        see=SizeRule(longest=longest, shortest=shortest, stride=vision.patch_size, over="ratio"),
        draw=SizeRule(longest=most * stride, shortest=(most + 1) // 2 * stride, stride=stride, over="ratio"),
        size=(most * stride, most * stride),
        reading="inferencer",
        edits=EDITS,
    )


def _is_size(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int) and row[name] > 0


def published_files(c: Config) -> dict[str, dict]:
    """The JSON files of a published folder, the inverse of ``published_config``: Qwen2's sizes, SigLIP's with the layer
    that is not used, and a config.json for settings that are not the default."""
    llm = {
        n: v for n, v in asdict(c.decoder).items() if n not in ("qkv_bias", "routes", "routed") and v is not None
    } | {"model_type": "qwen2", "hidden_act": "silu", "layer_module": "Qwen2MoTDecoderLayer"}
    vit = {n: getattr(c.vision, n) for n in (*_SIZES, "layer_norm_eps")} | {
        "num_hidden_layers": c.vision.num_hidden_layers + 1,
        "model_type": "siglip_vision_model",
        "hidden_act": _GELU,
    }
    more: dict[str, Any] = {"interpolate_pos": True} if c.stretch else {}
    if (c.autoencoder.scale, c.autoencoder.shift) != (AutoencoderConfig.scale, AutoencoderConfig.shift):
        more["vae_config"] = {"scale_factor": c.autoencoder.scale, "shift_factor": c.autoencoder.shift}
    return {_LLM: llm, _VIT: vit} | ({"config.json": {"model_type": "bagel", **more}} if more else {})


PUBLISHED = PublishedFormat(
    weights={"ema": lambda c: BAGEL, "ae": lambda c: FLUX_AUTOENCODER},
    json=(_LLM, _VIT),
    optional=("config.json",),
    config=published_config,
    describe=published_files,
    unstored=("times", "see", "draw", "size", "reading", "markers_in_text", "settings", "edits"),
    computed=position_tables,
)


# ---- BAGEL ------------------------------------------------------------------------------------------------------

_DRAW = {  # the copies that serve latent tokens
    "self_attn.q_proj_moe_gen.*": "self_attn.1.q_proj.*",
    "self_attn.k_proj_moe_gen.*": "self_attn.1.k_proj.*",
    "self_attn.v_proj_moe_gen.*": "self_attn.1.v_proj.*",
    "self_attn.q_norm_moe_gen.*": "self_attn.1.q_norm.*",
    "self_attn.k_norm_moe_gen.*": "self_attn.1.k_norm.*",
    "self_attn.o_proj_moe_gen.*": "o_proj.1.*",
    "mlp_moe_gen.*.weight": "mlp.1.*.weight",
    "input_layernorm_moe_gen.*": "input_layernorm.1.*",
    "post_attention_layernorm_moe_gen.*": "post_attention_layernorm.1.*",
}

_GLUE = {
    "language_model.model.norm_moe_gen.weight": "decoder.norm.1.weight",
    "connector.fc1.*": "projector.fc1.*",
    "connector.fc2.*": "projector.fc2.*",
    "time_embedder.mlp.*.*": "time.mlp.*.*",
    "vae2llm.*": "latent_in.*",
    "llm2vae.*": "latent_out.*",
    "vit_model.vision_model.embeddings.patch_embedding.weight": "vision.patch_embedding.weight",
}

_TABLES = {"latent_pos_embed.pos_embed": "latent_positions", "vit_pos_embed.pos_embed": "vision_positions"}

BAGEL: Rules = (
    prefixed(TEXT, "language_model.", "decoder.")
    + prefixed(rules(_DRAW), "language_model.model.layers.*.", "decoder.layers.*.")
    + prefixed(rules(VISION), "vit_model.vision_model.", "vision.")
    + rules(_GLUE)
    + rules(_TABLES, optional=True)  # the published trainer drops them, since they are computed
)
