"""Key maps of published language models, vision encoders and autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diptych.models.published.folder import Places, Tensors, read_json
from diptych.models.published.key_map import Rule, Rules, State, count, plan, raise_all, rules, within
from diptych.parts.autoencoder import AutoencoderConfig, LatentDecoder
from diptych.parts.decoder import Decoder, DecoderConfig
from diptych.parts.vision import VisionEncoder

# ---- parts that others publish alone ----------------------------------------------------------------------------


def read_language_model(decoder: Decoder, folder: Path) -> None:
    """Fills a decoder from a folder of transformers (Qwen2, Qwen3, Llama, InternLM2); every one of several FFNs a layer
    becomes a copy of theirs.

    Raises ``ValueError`` where sizes differ and for every missing, unknown and misshapen tensor."""
    if not (folder / "config.json").is_file() or not (path := Places((folder,)).weights("model")):
        raise ValueError(f"{folder} is no language model of transformers: it lacks config.json or model.safetensors")
    hf, mine = read_json(folder / "config.json"), decoder.config
    theirs = replace(decoder_config(hf), routes=mine.routes, routed=mine.routed)
    wrong = [
        f"{f.name} is {getattr(theirs, f.name)} there, {getattr(mine, f.name)} here"
        for f in fields(mine)
        if getattr(theirs, f.name) != getattr(mine, f.name) and (f.name != "head_dim" or theirs.width != mine.width)
    ]
    raise_all(wrong, f"{folder} does not fit the decoder")
    _fill(decoder, Tensors(path), decoder_rules(hf, mine.copies("mlp")), f"{folder} does not fit the decoder")


def read_vision_encoder(vision: VisionEncoder, folder: Path) -> None:
    """Fills a vision encoder from a folder of transformers: SigLIP with its text tower or without.

    Raises ``ValueError`` where sizes differ and for every missing, unknown and misshapen tensor."""
    if not (folder / "config.json").is_file() or not (path := Places((folder,)).weights("model")):
        raise ValueError(f"{folder} is no encoder of transformers: it lacks config.json or model.safetensors")
    hf, mine = read_json(folder / "config.json"), vision.config
    there = hf.get("vision_config", hf)
    wrong = [
        f"{n} is {there[n]} there, {getattr(mine, n)} here"
        for n in ("num_attention_heads", "patch_size", "image_size")
        if there.get(n, getattr(mine, n)) != getattr(mine, n)
    ]
    raise_all(wrong, f"{folder} does not fit the encoder")
    tensors = Tensors(path)
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in tensors.shapes) else ""
    words = tuple(Rule(name, (), ignored=True) for name in ("text_model.**", "logit_scale", "logit_bias"))
    _fill(vision, tensors, siglip(mine.patch_size, prefix, mine.pooling) + words, f"{folder} does not fit the encoder")


def read_autoencoder(coder: LatentDecoder, path: Path) -> None:
    """Fills an autoencoder, or its decoding half, from ``ae.safetensors`` of FLUX or FLUX.2: the file, or its folder.

    Raises ``ValueError`` for every missing, unknown and misshapen tensor."""
    file = path if path.is_file() else path / "ae.safetensors"
    if not file.is_file():
        raise ValueError(f"{path} is no autoencoder: neither a safetensors file nor a folder with ae.safetensors")
    own = coder.state_dict()
    spare = () if any(n.startswith("encoder.") for n in own) else (Rule("encoder.**", (), ignored=True),)
    _fill(coder, Tensors(file), spare + FLUX2_AUTOENCODER, f"{path} does not fit the autoencoder")


def _fill(module: nn.Module, tensors: Tensors, rules: Rules, told: str) -> None:
    own = module.state_dict()
    steps, _, wrong = plan(rules, tensors.shapes, own)
    raise_all(wrong, told)
    with torch.no_grad():
        for step in steps:
            for name, tensor in step.apply(tensors.read).items():
                own[name].copy_(tensor)


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
    + within(rules(_LAYER), "model.layers.*.", "layers.*.")
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

    own = tuple(f"layers.*.self_attn.0.{name}_proj.weight" for name in "qkv")
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
        + (Rule("model.layers.*.attention.wqkv.weight", own, split, join),)
        + within(rules(layer), "model.layers.*.", "layers.*.")
        + (Rule("model.layers.*.attention.rotary_emb.inv_freq", (), ignored=True),)
    )


DECODERS = ("qwen2", "qwen3", "llama", "internlm2")


def decoder_rules(hf_config: Mapping[str, Any], mlps: int = 1) -> Rules:
    """The key map that fits a checkpoint with this ``config.json``; where our decoder has several ``mlps`` a layer,
    each becomes a copy of theirs, and the first is what they get back."""
    config = decoder_config(hf_config)
    found = internlm2(config) if hf_config["model_type"] == "internlm2" else TEXT
    return found if mlps == 1 else tuple(_copied(r, mlps) for r in found)


def _copied(rule: Rule, mlps: int) -> Rule:
    if not any(".mlp.0." in own for own in rule.ours):
        return rule
    [own] = rule.ours
    ours = tuple(own.replace(".mlp.0.", f".mlp.{i}.") for i in range(mlps))
    return replace(rule, ours=ours, split=lambda theirs: theirs * mlps, join=lambda ours: ours[:1])


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
    if wrong := [f"{n}={c[n]!r}" for n in (*sizes, "num_key_value_heads") if not isinstance(c.get(n) or 1, int)]:
        raise ValueError(f"the {kind} config must have whole numbers, not {', '.join(wrong)}")
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
    if wrong := [f"{name}={c.get(name, rope.get(name))!r}" for name, bad in unsupported.items() if bad]:
        raise ValueError(f"the decoder does not support {', '.join(wrong)} of this {kind} config")
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
    channel). Without ``pooling`` the head is left out, so only encoders without one export as they came."""
    return within(
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
    """Sizes of FLUX's autoencoder, read off the tensors of ``ae.safetensors`` (names and shapes are enough), for no
    file says them; ``constants`` (scale, shift) are kept. Where a tensor lacks, the published size stands."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    default = AutoencoderConfig(**constants)
    channels = shape.get("encoder.conv_in.weight", (default.channels,))[0]
    widths = [
        shape[name][0]
        for i in range(count(state, "encoder.down.*"))
        if (name := f"encoder.down.{i}.block.0.conv1.weight") in shape
    ]
    latent = shape.get("decoder.conv_in.weight", (0, default.latent_channels))[1]
    return replace(
        default,
        channels=channels,
        multipliers=tuple(width // channels for width in widths) or default.multipliers,
        blocks=count(state, "encoder.down.0.block.*") or default.blocks,
        latent_channels=latent,
        posterior=shape.get("encoder.conv_out.weight", (2 * latent,))[0] != latent,
    )


def autoencoder_kl(levels: int) -> Rules:
    """FLUX's autoencoder (``parts.autoencoder.Autoencoder``) from the names of diffusers' ``AutoencoderKL``, which
    counts decoder levels the other way round and keeps the attention's 1x1 convolutions as linear layers."""

    def block(theirs: str, ours: str) -> Rules:
        same = {f"{theirs}.{n}.*": f"{ours}.{n}.*" for n in ("norm1", "conv1", "norm2", "conv2")}
        return rules(same | {f"{theirs}.conv_shortcut.*": f"{ours}.nin_shortcut.*"})

    def linear(theirs: str, ours: str) -> Rules:
        weight = Rule(
            f"{theirs}.weight",
            (f"{ours}.weight",),
            lambda w: (w[0][:, :, None, None],),
            lambda w: (w[0][:, :, 0, 0],),
        )
        return (weight, *rules({f"{theirs}.bias": f"{ours}.bias"}))

    out: Rules = ()
    for coder, theirs, ours in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        out += rules({f"{coder}.{n}.*": f"{coder}.{n}.*" for n in ("conv_in", "conv_out")})
        out += rules({f"{coder}.conv_norm_out.*": f"{coder}.norm_out.*"})
        for i in range(levels):
            level = i if ours == "down" else levels - 1 - i
            out += block(f"{coder}.{theirs}.{i}.resnets.*", f"{coder}.{ours}.{level}.block.*")
            sampler = {f"{coder}.{theirs}.{i}.{ours}samplers.0.conv.*": f"{coder}.{ours}.{level}.{ours}sample.conv.*"}
            out += rules(sampler)
        for i in range(2):
            out += block(f"{coder}.mid_block.resnets.{i}", f"{coder}.mid.block_{i + 1}")
        attention, own = f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1"
        out += rules({f"{attention}.group_norm.*": f"{own}.norm.*"})
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            out += linear(f"{attention}.{a}", f"{own}.{b}")
    return out
