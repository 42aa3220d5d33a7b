"""Key maps of published language models, vision encoders and autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diptych.models.published.key_map import Rule, Rules, State, count_matches, prefixed, rules
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.decoder import DecoderConfig

# ---- decoders ---------------------------------------------------------------------------------------------------

_HEAD = (Rule("lm_head.weight", ("lm_head.weight",), alias="model.embed_tokens.weight"),)

_LAYER = {
    "self_attn.q_proj.*": "self_attn.0.q_proj.*",
    "self_attn.k_proj.*": "self_attn.0.k_proj.*",
    "self_attn.v_proj.*": "self_attn.0.v_proj.*",
    "self_attn.q_norm.*": "self_attn.0.q_norm.*",
    "self_attn.k_norm.*": "self_attn.0.k_norm.*",
    "self_attn.o_proj.*": "o_proj.0.*",
    "mlp.*.weight": "mlp.0.*.weight",
    "input_layernorm.*": "input_layernorm.0.*",
    "post_attention_layernorm.*": "post_attention_layernorm.0.*",
}

TEXT: Rules = (
    rules({"model.embed_tokens.weight": "embed_tokens.weight", "model.norm.weight": "norm.0.weight"})
    + _HEAD
    + prefixed(rules(_LAYER), "model.layers.*.", "layers.*.")
    + (Rule("model.layers.*.self_attn.rotary_emb.inv_freq", (), ignored=True),)
)


def internlm2(config: DecoderConfig) -> Rules:
    """A decoder from InternLM2, whose wqkv groups rows by key/value head: its G queries, its key, its value."""
    K, D = config.num_key_value_heads, config.width
    G = config.num_attention_heads // K

    def split(packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grouped = rearrange(packed[0], "(K g D) d -> K g D d", K=K, g=G + 2, D=D)
        return tuple(rearrange(x, "K g D d -> (K g D) d") for x in grouped.split([G, 1, 1], 1))

    def join(qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grouped = torch.cat([rearrange(x, "(K g D) d -> K g D d", K=K, D=D) for x in qkv], 1)
        return (rearrange(grouped, "K g D d -> (K g D) d"),)

    qkv = tuple(f"layers.*.self_attn.0.{name}_proj.weight" for name in "qkv")
    layer = {
        "attention.wo.weight": "o_proj.0.weight",
        "feed_forward.w1.weight": "mlp.0.gate_proj.weight",
        "feed_forward.w3.weight": "mlp.0.up_proj.weight",
        "feed_forward.w2.weight": "mlp.0.down_proj.weight",
        "attention_norm.weight": "input_layernorm.0.weight",
        "ffn_norm.weight": "post_attention_layernorm.0.weight",
    }
    return (
        rules({"model.tok_embeddings.weight": "embed_tokens.weight", "model.norm.weight": "norm.0.weight"})
        + (Rule("output.weight", ("lm_head.weight",), alias="model.tok_embeddings.weight"),)
        + (Rule("model.layers.*.attention.wqkv.weight", qkv, split, join),)
        + prefixed(rules(layer), "model.layers.*.", "layers.*.")
        + (Rule("model.layers.*.attention.rotary_emb.inv_freq", (), ignored=True),)
    )


DECODERS = ("qwen2", "qwen3", "llama", "internlm2")


def decoder_rules(hf_config: Mapping[str, Any], mlps: int = 1) -> Rules:
    """The key map of a checkpoint with this ``config.json``. Where the native decoder has several ``mlps`` a layer,
    each becomes a copy of the published one; exporting writes the first."""
    config = decoder_config(hf_config)
    key_map = internlm2(config) if hf_config["model_type"] == "internlm2" else TEXT
    return key_map if mlps == 1 else tuple(_copied(r, mlps) for r in key_map)


def _copied(rule: Rule, mlps: int) -> Rule:
    if not any(".mlp.0." in name for name in rule.native):
        return rule
    [name] = rule.native
    native = tuple(name.replace(".mlp.0.", f".mlp.{i}.") for i in range(mlps))
    return replace(rule, native=native, split=lambda tensors: tensors * mlps, join=lambda tensors: tensors[:1])


def decoder_config(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Sizes of a decoder from the ``config.json`` of a Qwen2, Qwen3, Llama or InternLM2 checkpoint.

    Raises ``ValueError`` naming every setting that this decoder does not compute: rope scaling, windows, other biases
    and activations.
    """
    c, kind = hf_config, hf_config.get("model_type")
    if kind not in DECODERS:
        raise ValueError(f"unknown model_type {kind!r}; choose from {', '.join(DECODERS)}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in sizes if name not in c]:
        raise ValueError(f"the {kind} config lacks {', '.join(missing)}")
    if errors := [f"{n}={c[n]!r}" for n in (*sizes, "num_key_value_heads") if not isinstance(c.get(n) or 1, int)]:
        raise ValueError(f"the {kind} config must have whole numbers, not {', '.join(errors)}")
    rope = {"rope_theta": c.get("rope_theta"), **(c.get("rope_parameters") or {})}
    unsupported = {
        "rope_scaling": _scaled(c.get("rope_scaling")),
        "rope_parameters": _scaled(rope),
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1,
        "use_sliding_window": bool(c.get("use_sliding_window")),
        "layer_types": bool(set(c.get("layer_types") or ()) - {"full_attention"}),
        "hidden_act": c.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(c.get("attention_bias")),
        "bias": kind == "internlm2" and bool(c.get("bias", True)),  # InternLM2's own default is True
        "mlp_bias": bool(c.get("mlp_bias")),
    }
    if errors := [f"{name}={c.get(name, rope.get(name))!r}" for name, bad in unsupported.items() if bad]:
        raise ValueError(f"the decoder does not support {', '.join(errors)} of this {kind} config")
    return DecoderConfig(
        **{name: c[name] for name in sizes},
        num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        # Qwen3 fixes the width of a head at 128 where the config does not say it (transformers' default).
        head_dim=c.get("head_dim") or (128 if kind == "qwen3" else None),
        rms_norm_eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"] or 10000.0,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
    )


def _scaled(rope: Mapping[str, Any] | None) -> bool:
    """Whether rope settings ask for more than one plain base frequency (a mapping per layer type also does).
    ``dynamic`` (InternLM2's) only changes positions past ``max_position_embeddings``, which is unsupported."""
    rope = rope or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return kind not in ("default", "dynamic") or any(isinstance(value, Mapping) for value in rope.values())


# ---- vision -----------------------------------------------------------------------------------------------------

VISION = {
    "embeddings.patch_embedding.bias": "patch_embedding.bias",
    "embeddings.position_embedding.weight": "position_embedding.weight",
    "encoder.layers.**": "layers.**",
    "post_layernorm.*": "post_layernorm.*",
}


def siglip(patch: int, prefix: str = "vision_model.", pooling: bool = False) -> Rules:
    """A vision encoder from transformers' SigLIP: the patch convolution becomes a linear layer over (row, column,
    channel). Without ``pooling`` the head is left out, so exporting loses it."""
    return prefixed(
        rules(VISION)
        + (
            Rule(
                "embeddings.patch_embedding.weight",
                ("patch_embedding.weight",),
                lambda w: (rearrange(w[0], "o c p q -> o (p q c)"),),
                lambda w: (rearrange(w[0], "o (p q c) -> o c p q", p=patch, q=patch),),
            ),
            *(rules({"head.**": "head.**"}) if pooling else (Rule("head.**", (), ignored=True),)),
        ),
        prefix,
    )


# ---- autoencoders -----------------------------------------------------------------------------------------------

FLUX_AUTOENCODER: Rules = rules({"encoder.**": "autoencoder.encoder.**", "decoder.**": "autoencoder.decoder.**"})


FLUX2_AUTOENCODER: Rules = (
    *rules({"encoder.**": "encoder.**", "decoder.**": "decoder.**", "bn.running_*": "bn.running_*"}),
    Rule("bn.num_batches_tracked", ("bn.num_batches_tracked",), lambda w: (w[0].long(),)),
)


def flux_config(state: State, **constants: Any) -> AutoencoderConfig:
    """Sizes of FLUX's autoencoder from the names and shapes of the tensors of ``ae.safetensors``, since no config file
    has them. ``constants`` are ``scale`` and ``shift``. A size whose tensor is missing is the published one."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    default = AutoencoderConfig(**constants)
    channels = shape.get("encoder.conv_in.weight", (default.channels,))[0]
    widths = [
        shape[name][0]
        for i in range(count_matches(state, "encoder.down.*"))
        if (name := f"encoder.down.{i}.block.0.conv1.weight") in shape
    ]
    latent = shape.get("decoder.conv_in.weight", (0, default.latent_channels))[1]
    return replace(
        default,
        channels=channels,
        multipliers=tuple(width // channels for width in widths) or default.multipliers,
        blocks=count_matches(state, "encoder.down.0.block.*") or default.blocks,
        latent_channels=latent,
        posterior=shape.get("encoder.conv_out.weight", (2 * latent,))[0] != latent,
    )


FIXED_KL = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "latents_mean": None,
    "latents_std": None,
}
"""The settings of diffusers' ``AutoencoderKL`` that FLUX's autoencoder requires."""


def kl_config(row: Any, where: str = "config.json") -> AutoencoderConfig:
    """FLUX.1's autoencoder of the ``config.json`` of a ``vae/`` folder (diffusers' ``AutoencoderKL``)."""
    errors = [f"{n} must be {v!r}, not {row[n]!r}" for n, v in FIXED_KL.items() if n in row and row[n] != v]
    widths = row.get("block_out_channels")
    if not (isinstance(widths, list) and widths and all(type(w) is int and w % widths[0] == 0 for w in widths)):
        errors.append(f"block_out_channels must be multiples of the first, not {widths!r}")
    if errors:
        raise ValueError(f"{where}: {'; '.join(errors)}")
    assert isinstance(widths, list)
    return AutoencoderConfig(
        channels=widths[0],
        multipliers=tuple(w // widths[0] for w in widths),
        blocks=whole_number(row, "layers_per_block", 2),
        latent_channels=whole_number(row, "latent_channels", 16),
        groups=whole_number(row, "norm_num_groups", 32),
        scale=row.get("scaling_factor", AutoencoderConfig.scale),
        shift=row.get("shift_factor") or 0.0,
    )


def whole_number(row: Any, key: str, default: int) -> int:
    """A positive whole number of a JSON object. Raises ``ValueError`` for another value."""
    value = row.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive whole number, not {value!r}")
    return value


def autoencoder_kl(levels: int) -> Rules:
    """FLUX's autoencoder (``parts.autoencoder.Autoencoder``) from the names of diffusers' ``AutoencoderKL``, which
    counts decoder levels the other way round and keeps the attention's 1x1 convolutions as linear layers."""

    def block(published: str, native: str) -> Rules:
        same = {f"{published}.{n}.*": f"{native}.{n}.*" for n in ("norm1", "conv1", "norm2", "conv2")}
        return rules(same | {f"{published}.conv_shortcut.*": f"{native}.nin_shortcut.*"})

    def linear(published: str, native: str) -> Rules:
        weight = Rule(
            f"{published}.weight",
            (f"{native}.weight",),
            lambda w: (w[0][:, :, None, None],),
            lambda w: (w[0][:, :, 0, 0],),
        )
        return (weight, *rules({f"{published}.bias": f"{native}.bias"}))

    out: Rules = ()
    for coder, direction in (("encoder", "down"), ("decoder", "up")):
        out += rules({f"{coder}.{n}.*": f"{coder}.{n}.*" for n in ("conv_in", "conv_out")})
        out += rules({f"{coder}.conv_norm_out.*": f"{coder}.norm_out.*"})
        for i in range(levels):
            level = i if direction == "down" else levels - 1 - i
            published, native = f"{coder}.{direction}_blocks.{i}", f"{coder}.{direction}.{level}"
            out += block(f"{published}.resnets.*", f"{native}.block.*")
            out += rules({f"{published}.{direction}samplers.0.conv.*": f"{native}.{direction}sample.conv.*"})
        for i in range(2):
            out += block(f"{coder}.mid_block.resnets.{i}", f"{coder}.mid.block_{i + 1}")
        published, native = f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1"
        out += rules({f"{published}.group_norm.*": f"{native}.norm.*"})
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            out += linear(f"{published}.{a}", f"{native}.{b}")
    return out
