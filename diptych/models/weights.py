"""Key maps between published checkpoints and ours: pure data, read in both directions, strict in both.

A map is a tuple of ``Rule``: a pattern of their names and the pattern (or patterns) of ours. In a pattern ``*`` is one
part of a dotted name and ``**`` any number of them; the n-th star of one side is the n-th star of the other. Maps are
joined with ``+``::

    state = load(BAGEL + FLUX_AUTOENCODER, theirs, model.state_dict())
    theirs = export(BAGEL, model.state_dict())

A decoder on its own: ``TEXT`` (Qwen2, Qwen3, Llama) or ``internlm2(config)``, with ``decoder_config`` for the sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.decoder import DecoderConfig

State = Mapping[str, Tensor]


def _same(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Their tensor is our tensors. ``split`` turns theirs into ours and ``join`` ours into theirs.

    ``optional``: a checkpoint may lack it, since the model computes it. ``alias`` names another of their tensors that
    this one repeats where the model ties the two (a head): it is checked and then left out, and ``repeated`` writes it
    again. ``ignored`` tensors (old rotary tables) are dropped.
    """

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    join: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _same
    optional: bool = False
    alias: str | None = None
    ignored: bool = False
    repeated: bool = False


Rules = tuple[Rule, ...]


def rules(names: Mapping[str, str], **options: Any) -> Rules:
    """One rule for each pair of names."""
    return tuple(Rule(theirs, (ours,), **options) for theirs, ours in names.items())


def within(rules: Rules, theirs: str = "", ours: str = "") -> Rules:
    """The same rules for a module that stands under a prefix on either side."""
    return tuple(
        replace(
            r,
            theirs=theirs + r.theirs,
            ours=tuple(ours + name for name in r.ours),
            alias=None if r.alias is None else theirs + r.alias,
        )
        for r in rules
    )


@dataclass(frozen=True)
class Step:
    """One tensor of theirs and the names of ours that it becomes (none: it only repeats ``rule.alias``)."""

    theirs: str
    rule: Rule
    ours: tuple[str, ...]

    def apply(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Our tensors. Raises ``ValueError`` where one that is to repeat another differs from it."""
        tensor = read(self.theirs)
        if self.ours:
            return dict(zip(self.ours, self.rule.split((tensor,)), strict=True))
        assert self.rule.alias is not None
        if not tensor.is_meta and not torch.equal(tensor, read(self.rule.alias)):
            raise ValueError(f"{self.theirs} differs from {self.rule.alias}, but the config ties them")
        return {}


def plan(rules: Rules, state: State, expected: State) -> tuple[list[Step], list[str], list[str]]:
    """How ``state`` becomes exactly the names and shapes of ``expected``; either may be on the meta device.

    The steps in order, the names of ours that the checkpoint may lack and does, and a line for every missing, unknown
    and misshapen tensor."""
    steps: list[Step] = []
    wrong: list[str] = []
    made: set[str] = set()
    for name in sorted(state):
        found = _match(rules, name, lambda r: (r.theirs,))
        if found is None:
            wrong.append(f"unknown {name}")
            continue
        rule, stars = found
        if rule.ignored:
            continue
        if rule.alias is not None and rule.ours[0] not in expected:
            if rule.alias in state:
                steps.append(Step(name, rule, ()))
            continue
        ours = tuple(_fill(pattern, stars) for pattern in rule.ours)
        if extra := [n for n in ours if n not in expected]:
            wrong.append(f"unknown {name}" + ("" if extra == [name] else f" (ours would be {', '.join(extra)})"))
            continue
        try:
            parts = rule.split((state[name].to("meta"),))
        except EinopsError:
            wrong.append(f"{name} has shape {tuple(state[name].shape)}, which does not divide into {', '.join(ours)}")
            continue
        for own, tensor in zip(ours, parts, strict=True):
            if tensor.shape != expected[own].shape:
                into = "" if own == name else f"gives {own} shape {tuple(tensor.shape)}, not "
                into = into or f"has shape {tuple(tensor.shape)}, the config says "
                wrong.append(f"{name} {into}{tuple(expected[own].shape)}")
            elif tensor.is_floating_point() != expected[own].is_floating_point():
                wrong.append(f"{name} is {tensor.dtype}, not {expected[own].dtype}")
        made.update(ours)
        steps.append(Step(name, rule, ours))
    lacking = []
    for own in sorted(expected.keys() - made):
        found = _match(rules, own, lambda r: r.ours)
        if found is None:
            wrong.append(f"{own}: the map has no rule for this tensor of ours")
        elif found[0].optional:
            lacking.append(own)
        elif (name := _fill(found[0].theirs, found[1])) not in state:
            wrong.append(f"missing {name}" + ("" if name == own else f" (ours: {own})"))
    return steps, lacking, wrong


def load(rules: Rules, state: State, expected: State) -> dict[str, Tensor]:
    """Our state dict made of theirs, with exactly the names and shapes of ``expected`` (a model's ``state_dict()``,
    which may be on the meta device). Tensors that a checkpoint may lack are taken from ``expected``.

    Raises ``ValueError`` listing every missing, unknown and misshapen tensor.
    """
    steps, lacking, wrong = plan(rules, state, expected)
    raise_all(wrong, "the checkpoint does not fit the model")
    out = {name: expected[name] for name in lacking}
    for step in steps:
        out |= step.apply(state.__getitem__)
    return {name: out[name] for name in expected}


def names(rules: Rules, state: Iterable[str]) -> list[str]:
    """Which of our names the map has a rule for."""
    return [n for n in state if _match(rules, n, lambda r: r.ours)]


def export(rules: Rules, state: State) -> dict[str, Tensor]:
    """Their state dict made of ours; the inverse of ``load`` (what may be lacking is written, aliases are not).

    Raises ``ValueError`` listing every tensor that the map does not know and every incomplete group.
    """
    out: dict[str, Tensor] = {}
    wrong: list[str] = []
    for own in state:
        found = _match(rules, own, lambda r: r.ours)
        if found is None:
            wrong.append(f"unknown {own}")
            continue
        rule, stars = found
        name = _fill(rule.theirs, stars)
        if name in out:
            continue
        ours = [_fill(pattern, stars) for pattern in rule.ours]
        if missing := [n for n in ours if n not in state]:
            wrong.append(f"missing {', '.join(missing)} for {name}")
            continue
        out[name] = rule.join(tuple(state[n] for n in ours))[0]
    raise_all(wrong, "the model does not fit the map")
    copies = {r.theirs: out[r.alias] for r in rules if r.repeated and r.alias in out and r.theirs not in out}
    return out | {name: tensor.clone() for name, tensor in copies.items()}


def _match(rules: Rules, name: str, side: Callable[[Rule], Iterable[str]]) -> tuple[Rule, tuple[str, ...]] | None:
    for rule in rules:
        for pattern in side(rule):
            if found := _regex(pattern).fullmatch(name):
                return rule, found.groups()
    return None


@cache
def _regex(pattern: str) -> re.Pattern:
    """``*``: one part of a dotted name; ``**``: one or more."""
    pieces = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]+)", "**": "(.+)"}.get(p) or re.escape(p) for p in pieces))


def _fill(pattern: str, stars: Iterable[str]) -> str:
    values = iter(stars)
    return re.sub(r"\*\*|\*", lambda _: next(values), pattern)


def raise_all(wrong: list[str], what: str) -> None:
    """Raises ``ValueError`` with the first twenty lines of what is wrong, if anything is."""
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{what}:\n  " + "\n  ".join(wrong[:20]) + more)


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
"""A decoder with one route from Qwen2, Qwen3 or Llama (``transformers`` names)."""


def internlm2(config: DecoderConfig) -> Rules:
    """A decoder from InternLM2, whose wqkv groups rows by key/value head: its G queries, its key, its value
    (specs: SynerGen-VL 9.2)."""
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
    ``dynamic`` (InternLM2's) does not, up to ``max_position_embeddings``; longer texts are nobody's here."""
    rope = rope or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return kind not in ("default", "dynamic") or any(isinstance(value, Mapping) for value in rope.values())


# ---- vision -----------------------------------------------------------------------------------------------------

_VISION = {
    "embeddings.patch_embedding.bias": "patch_embedding.bias",
    "embeddings.position_embedding.weight": "position_embedding.weight",
    "encoder.layers.**": "layers.**",
    "post_layernorm.*": "post_layernorm.*",
}


def siglip(patch: int, prefix: str = "vision_model.", pooling: bool = False) -> Rules:
    """A vision encoder from transformers' SigLIP: the patch convolution becomes a linear layer over (row, column,
    channel). Without ``pooling`` the head is left out, so only encoders without one export as they came."""
    return within(
        rules(_VISION)
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
"""The autoencoder of a family from FLUX's or BAGEL's ``ae.safetensors``: module names are as published."""


FLUX2_AUTOENCODER: Rules = (
    *rules({"encoder.**": "encoder.**", "decoder.**": "decoder.**", "bn.running_*": "bn.running_*"}),
    Rule("bn.num_batches_tracked", ("bn.num_batches_tracked",), lambda w: (w[0].long(),)),
)
"""FLUX.2's autoencoder as a module of its own; some exporters cast even the number of batches that it saw."""


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


def count(state: Iterable[str], pattern: str) -> int:
    """How many different values the star of a pattern has among the names (``layers.*``: the number of layers)."""
    start = pattern.partition("*")[0]
    return len({name[len(start) :].partition(".")[0] for name in state if name.startswith(start)})


def side(state: State, name: str) -> int | None:
    """The side of a square position table (rows, width), or None where the checkpoint lacks it. Raises ``ValueError``
    for a table whose rows are not a square."""
    if name not in state:
        return None
    rows = len(state[name])
    if isqrt(rows) ** 2 != rows:
        raise ValueError(f"{name} has {rows} rows, which is not a square table")
    return isqrt(rows)


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
    within(TEXT, "language_model.", "decoder.")
    + within(rules(_DRAW), "language_model.model.layers.*.", "decoder.layers.*.")
    + within(rules(_VISION), "vit_model.vision_model.", "vision.")
    + rules(_GLUE)
    + rules(_TABLES, optional=True)  # the published trainer drops them, for they are computed
)
"""BAGEL and SGT-BAGEL from ``ema.safetensors`` (specs: SGT 3.6); ``ae.safetensors`` is ``FLUX_AUTOENCODER``."""


# ---- Cheers -----------------------------------------------------------------------------------------------------

_STAGE = {
    "diffusion_head_a.*.attn.o_proj.weight": "layers.*.o_proj.weight",
    "diffusion_head_a.*.attn.*.weight": "layers.*.attn.*.weight",
    "diffusion_head_a.*.adaLN_modulation.1.*": "layers.*.modulation.*",
    "diffusion_head_a.*.**": "layers.*.**",
    "diffusion_head_b.norm_final.weight": "final.norm.weight",
    "diffusion_head_b.adaLN_modulation.1.*": "final.modulation.*",
    "diffusion_head_b.linear.*": "final.linear.*",
}


def cheers(patch: int) -> Rules:
    """Cheers from ``model.safetensors`` (specs: Cheers 3), whose language head repeats the embedding."""
    language = tuple(
        replace(r, theirs=r.theirs.replace("model.", "model.language_model.", 1))
        if r.alias is None
        else replace(r, alias="model.language_model.embed_tokens.weight", repeated=True)
        for r in TEXT
    )
    return (
        within(language, ours="decoder.")
        + within(siglip(patch, "model.vision_representation.", pooling=True), ours="vision.")
        + within(FLUX2_AUTOENCODER, "model.vae_model.", "autoencoder.")
        + within(FLUX2_AUTOENCODER, "model.vae_decoder_projector.", "pixel_decoder.")
        + rules({"model.und_projector.**": "projector.**", "model.hi_gate.**": "gate.**"})
        + rules({"model.time_embed.mlp_1.**": "coarse.time.mlp.**", "model.time_embed.mlp_2.**": "fine.time.mlp.**"})
        + within(rules(_STAGE), "model.gen_projector.", "coarse.")
        + within(rules(_STAGE), "model.hi_projector.", "fine.")
    )
