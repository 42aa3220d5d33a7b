"""The published folders of OmniGen2: key maps and JSON files.

``OmniGen2/OmniGen2`` holds ``transformer/``, ``mllm/``, ``vae/``, ``scheduler/`` and ``processor/``.
``Two-hot/SGT-Gen2`` holds ``transformer/transformer/`` and ``transformer/text_encoder/`` and takes the other files from
the first; it can be read and not written.
"""

from __future__ import annotations

from typing import Any

from diptych.models.omnigen2 import Config
from diptych.models.published.folder import Json, PublishedFormat, States
from diptych.models.published.key_map import Rule, Rules, count_matches, prefixed, raise_all, rules
from diptych.models.published.parts import FIXED_KL, autoencoder_kl, kl_config, whole_number
from diptych.parts.images import AreaRule
from diptych.parts.mllm import MllmConfig
from diptych.parts.mllm_sizes import qwen_template
from diptych.parts.reference_dit import ReferenceDitConfig

INDEX, TRANSFORMER, MLLM, VAE = "model_index.json", "transformer/config.json", "mllm/config.json", "vae/config.json"
SCHEDULER, PROCESSOR = "scheduler/scheduler_config.json", "processor/preprocessor_config.json"
OTHERS = (
    "mllm/generation_config.json",
    *(f"processor/{name}.json" for name in ("chat_template", "added_tokens", "special_tokens_map", "tokenizer_config")),
)

# ---- settings ---------------------------------------------------------------------------------------------------

_FIELDS = {  # keys of transformer/config.json -> fields of the config, with the defaults of the published class
    "hidden_size": ("hidden_size", 2304),
    "num_layers": ("layers", 26),
    "num_refiner_layers": ("refiners", 2),
    "num_attention_heads": ("heads", 24),
    "num_kv_heads": ("kv_heads", 8),
    "axes_dim_rope": ("axes", (32, 32, 32)),
    "axes_lens": ("axes_lens", (300, 512, 512)),
    "text_feat_dim": ("text_width", 1024),
    "multiple_of": ("multiple_of", 256),
    "ffn_dim_multiplier": ("multiplier", None),
    "norm_eps": ("norm_eps", 1e-5),
    "timestep_scale": ("timestep_scale", 1.0),
}


def published_config(json: Json, states: States) -> Config:
    """The Config of a published folder. Raises ``ValueError`` for settings that this family does not compute, or that
    contradict the weights."""
    _check_against_weights(json, states)
    return Config(
        mllm=reader(json),
        dit=transformer(json[TRANSFORMER]),
        autoencoder=kl_config(json[VAE], VAE),
        latent_patch=whole_number(json[TRANSFORMER], "patch_size", 2),
        time_shift="v1" if json.get(SCHEDULER, {}).get("dynamic_time_shift", True) else "none",
        files={n: dict(json[n]) for n in (*JSON, *OPTIONAL) if n in json},
    )


_DIT_STEM, _READER_STEM, _VAE_STEM = "transformer/diffusion_pytorch_model", "mllm/model", "vae/diffusion_pytorch_model"
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.embed_tokens.weight",
)
_SIDES = (  # a setting of a JSON file that is the side of one of these tensors
    (TRANSFORMER, "hidden_size", _DIT_STEM, ("x_embedder.weight",), 0),
    (TRANSFORMER, "text_feat_dim", _DIT_STEM, ("time_caption_embed.caption_embedder.0.weight",), 0),
    (MLLM, "hidden_size", _READER_STEM, _EMBEDDINGS, 1),
    (MLLM, "vocab_size", _READER_STEM, _EMBEDDINGS, 0),
    (VAE, "latent_channels", _VAE_STEM, ("decoder.conv_in.weight",), 1),
)
_COUNTS = (  # a setting that counts the tensors of one of these patterns
    (TRANSFORMER, "num_layers", _DIT_STEM, ("layers.*.attn.to_q.weight",)),
    (TRANSFORMER, "num_refiner_layers", _DIT_STEM, ("noise_refiner.*.attn.to_q.weight",)),
    (
        MLLM,
        "num_hidden_layers",
        _READER_STEM,
        tuple(e.replace("embed_tokens", "layers.*.input_layernorm") for e in _EMBEDDINGS),
    ),
)


def _check_against_weights(json: Json, states: States) -> None:
    """Raises ``ValueError`` with a line for every setting that the tensors contradict."""
    measured = [
        (file, key, tensors[name].shape[axis])
        for file, key, stem, names, axis in _SIDES
        for tensors in (states.get(stem, {}),)
        for name in names
        if name in tensors and axis < tensors[name].dim()
    ]
    measured += [
        (file, key, max(count_matches(states.get(stem, {}), pattern) for pattern in patterns))
        for file, key, stem, patterns in _COUNTS
    ]
    latents = json[VAE].get("latent_channels")
    measured += [(TRANSFORMER, "in_channels", latents)] if type(latents) is int else []
    raise_all(
        [
            f"{file}: {key} is {value}, but the weights have {number}"
            for file, key, number in measured
            if type(value := json[file].get(key)) is int and value != number and number
        ],
        "the JSON files contradict the weights",
    )


def transformer(row: Any) -> ReferenceDitConfig:
    """The diffusion transformer of ``transformer/config.json``."""
    errors = []
    if row.get("out_channels") not in (None, row.get("in_channels", 16)):
        errors.append(f"out_channels {row['out_channels']} must be in_channels {row.get('in_channels', 16)} or null")
    values: dict[str, Any] = {}
    for key, (name, default) in _FIELDS.items():
        value = row.get(key, default)
        if isinstance(default, tuple):
            if not (isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) is int for v in value)):
                errors.append(f"{key} must be three whole numbers, not {value!r}")
                continue
            value = tuple(value)
        elif isinstance(value, bool) or not isinstance(value, type(default) if type(default) is int else (int, float)):
            if value is not None or default is not None:
                errors.append(f"{key} must be a number, not {value!r}")
                continue
        values[name] = value
    if errors:
        raise ValueError(f"{TRANSFORMER}: {'; '.join(errors)}")
    try:
        return ReferenceDitConfig(**values)
    except ValueError as error:
        raise ValueError(f"{TRANSFORMER}: {error}") from error


def reader(json: Json) -> MllmConfig:
    """The reader of ``mllm/config.json``, with the pixel limits of the processor."""
    row, limits = json[MLLM], json.get(PROCESSOR, {})
    if row.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"{MLLM}: model_type {row.get('model_type')!r} is not supported; there is qwen2_5_vl")
    vision = row.get("vision_config", {})
    stride = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    size = limits.get("size") or {}
    least = limits.get("min_pixels") or size.get("shortest_edge") or 4 * stride**2
    most = limits.get("max_pixels") or size.get("longest_edge") or 1280 * stride**2
    return MllmConfig(dict(row), qwen_template(), AreaRule(least, most, stride))


def published_files(c: Config) -> dict[str, dict]:
    """The JSON files of a published folder, the inverse of ``published_config``. Keys of the files that were read
    and that the config does not determine keep their values."""
    a, kept = c.autoencoder, c.files
    sizes = {key: getattr(c.dit, name) for key, (name, _) in _FIELDS.items()}
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()}
    see = c.mllm.see
    pixels = {"min_pixels": see.least, "max_pixels": see.most} if isinstance(see, AreaRule) else {}
    widths = [a.channels * m for m in a.multipliers]
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "layers_per_block": a.blocks,
        "latent_channels": a.latent_channels,
        "norm_num_groups": a.groups,
        "scaling_factor": a.scale,
        "shift_factor": a.shift,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    rows: dict[str, dict] = {
        INDEX: _COMPONENTS,
        TRANSFORMER: {
            "_class_name": "OmniGen2Transformer2DModel",
            "patch_size": c.latent_patch,
            "in_channels": a.latent_channels,
            "out_channels": None,
        }
        | sizes,
        MLLM: c.mllm.model,
        VAE: FIXED_KL | vae,
        SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
        | {"dynamic_time_shift": c.time_shift != "none"},
        PROCESSOR: {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"} | pixels,
    }
    return {name: {**kept.get(name, {}), **rows.get(name, {})} for name in (*rows, *kept)}


_COMPONENTS = {
    "_class_name": "OmniGen2Pipeline",
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# ---- key maps ---------------------------------------------------------------------------------------------------

_ATTENTION = {
    "attn.to_q.weight": "q_proj.weight",
    "attn.to_k.weight": "k_proj.weight",
    "attn.to_v.weight": "v_proj.weight",
    "attn.to_out.0.weight": "out_proj.weight",
    "attn.norm_q.weight": "q_norm.weight",
    "attn.norm_k.weight": "k_norm.weight",
    "feed_forward.linear_1.weight": "gate_proj.weight",
    "feed_forward.linear_2.weight": "down_proj.weight",
    "feed_forward.linear_3.weight": "up_proj.weight",
    "norm2.weight": "norms.after.weight",
    "ffn_norm1.weight": "norms.mlp_before.weight",
    "ffn_norm2.weight": "norms.mlp_after.weight",
}
_BLOCK = _ATTENTION | {"norm1.linear.*": "modulation.*", "norm1.norm.weight": "norms.before.weight"}
_STACKS = {"noise_refiner": "picture_refiner", "ref_image_refiner": "reference_refiner", "layers": "layers"}

DIT: Rules = (
    rules(
        {
            "x_embedder.*": "enter.*",
            "ref_image_patch_embedder.*": "enter_reference.*",
            "image_index_embedding": "reference_index",
            "time_caption_embed.timestep_embedder.linear_1.*": "time.mlp.0.*",
            "time_caption_embed.timestep_embedder.linear_2.*": "time.mlp.2.*",
            "time_caption_embed.caption_embedder.0.weight": "condition_norm.weight",
            "time_caption_embed.caption_embedder.1.*": "condition_in.*",
            "norm_out.linear_1.*": "modulation.*",
            "norm_out.linear_2.*": "leave.*",
        }
    )
    + prefixed(
        rules(_ATTENTION | {"norm1.weight": "norms.before.weight"}), "context_refiner.*.", "condition_refiner.*."
    )
    + tuple(rule for a, b in _STACKS.items() for rule in prefixed(rules(_BLOCK), f"{a}.*.", f"{b}.*."))
)
"""``transformer/``: the diffusion transformer."""

READER: Rules = (
    rules({f"model.{n}": f"model.language_model.{n}" for n in ("embed_tokens.weight", "layers.**", "norm.weight")})
    + rules({"visual.**": "model.visual.**"})
    + rules({"model.language_model.**": "model.language_model.**", "model.visual.**": "model.visual.**"})
    + rules({"language_model.**": "model.language_model.**"})
    + (Rule("lm_head.weight", ("lm_head.weight",), alias="model.embed_tokens.weight"),)
)
"""``mllm/``: the names of transformers 4.51.3, which are also written, of later versions and of SGT's files."""

JSON = (TRANSFORMER, MLLM, VAE)
OPTIONAL = (INDEX, SCHEDULER, PROCESSOR, *OTHERS)

PUBLISHED = PublishedFormat(
    weights={
        _DIT_STEM: lambda c: prefixed(DIT, native="dit."),
        _READER_STEM: lambda c: prefixed(READER, native="mllm."),
        _VAE_STEM: lambda c: prefixed(autoencoder_kl(len(c.autoencoder.multipliers)), native="autoencoder."),
    },
    json=JSON,
    optional=OPTIONAL,
    matches=lambda json: json[TRANSFORMER].get("_class_name") == "OmniGen2Transformer2DModel",
    config=published_config,
    describe=published_files,
    unstored=(
        "files",
        "times",
        "source",
        "sources",
        "draw",
        "size",
        "settings",
        "edits",
        "system",
        "dropped_system",
        "labels",
    ),
    tokenizer="processor",
    adapters=("transformer", _DIT_STEM),
    other_stems={
        _DIT_STEM: ("transformer/transformer/diffusion_pytorch_model",),
        _READER_STEM: ("transformer/text_encoder/model",),
    },
)
