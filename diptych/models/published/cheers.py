"""The published folder of Cheers: key map and JSON files."""

from __future__ import annotations

from dataclasses import replace

from diptych.models.cheers import Config
from diptych.models.published.folder import Json, PublishedFormat, States
from diptych.models.published.key_map import Rules, count_matches, prefixed, rules
from diptych.models.published.parts import FLUX2_AUTOENCODER, TEXT, decoder_config, siglip
from diptych.parts.autoencoder import AutoencoderConfig
from diptych.parts.vision import VisionConfig

# ---- published folders ------------------------------------------------------------------------------------------

_VAE = {"resolution": 512, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 32}


_DEFAULTS = {  # of the published classes, which the stored config.json leaves out
    "text_config": {"num_hidden_layers": 28, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    "vision_representation_config": {"layer_norm_eps": 1e-6, "num_channels": 3, "hidden_act": "gelu_pytorch_tanh"},
    "vae_encoder_config": _VAE,
    "vae_decoder_config": _VAE,
}


_SIGLIP = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"}


def published_config(json: Json, states: States) -> Config:
    """The Config of a published folder. What config.json leaves out has the default of the published classes; the
    layers of the two stages of the head, which the classes fix at 7 and 3, are counted in the weights.

    Raises ``ValueError`` for settings that this family does not compute."""
    row = json["config.json"]
    text, vit, enc, dec = ({**default, **row.get(name, {})} for name, default in _DEFAULTS.items())
    errors = [f"vision_representation_config lacks {name}" for name in sorted(_SIGLIP - vit.keys())]
    fixed = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    errors += [
        f"vision_representation_config: {n} must be {v!r}, not {vit[n]!r}" for n, v in fixed.items() if vit[n] != v
    ]
    names = ("resolution", "ch", "ch_mult", "num_res_blocks", "z_channels")
    errors += [f"vae_encoder_config and vae_decoder_config differ in {n}" for n in names if enc[n] != dec[n]]
    if enc["ch"] != 4 * enc["z_channels"]:
        errors.append(
            f"vae_decoder_config: ch {enc['ch']} must be 4 x z_channels {enc['z_channels']}, as the head's width"
        )
    if errors:
        raise ValueError("config.json: " + "; ".join(errors))
    size = enc["resolution"]
    return Config(
        decoder_config(text | {"model_type": "qwen2"}),
        VisionConfig(**{n: vit[n] for n in _SIGLIP}, layer_norm_eps=vit["layer_norm_eps"], pooling=True),
        AutoencoderConfig(
            channels=enc["ch"],
            multipliers=tuple(enc["ch_mult"]),
            blocks=enc["num_res_blocks"],
            latent_channels=enc["z_channels"],
            statistics=True,
            fold=2,
            quant=True,
        ),
        head_layers=(
            count_matches(states["model"], "model.gen_projector.diffusion_head_a.*") or 7,
            count_matches(states["model"], "model.hi_projector.diffusion_head_a.*") or 3,
        ),
        size=(size, size),
        published_quirks=("repeated_positions",),
    )


def published_files(c: Config) -> dict[str, dict]:
    """The config.json of a published folder, the inverse of ``published_config``, with nothing left out. Raises
    ``ValueError`` for a model that was trained without what every published model does."""
    if "repeated_positions" not in c.published_quirks:
        raise ValueError(
            "the published code repeats positions in the fine stage; published_quirks of this model do not"
        )
    d, v, a = c.decoder, c.vision, c.autoencoder
    text = {
        n: getattr(d, n)
        for n in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
        )
    }
    vit = {n: getattr(v, n) for n in (*sorted(_SIGLIP), "layer_norm_eps")}
    vae = {
        "resolution": c.size[0],
        "ch": a.channels,
        "ch_mult": list(a.multipliers),
        "num_res_blocks": a.blocks,
        "z_channels": a.latent_channels,
    }
    auto = {"AutoConfig": "configuration_umm.UMMConfig", "AutoModelForCausalLM": "modeling_umm.UMMModel"}
    row = {
        "architectures": ["Cheers"],
        "auto_map": auto,
        "model_type": "umm",
        "text_config": text | {"hidden_act": "silu", "use_sliding_window": False},
        "vision_representation_config": _DEFAULTS["vision_representation_config"] | vit | {"num_patches": v.side**2},
        "vae_encoder_config": vae | {"in_channels": 3},
        "vae_decoder_config": vae | {"in_channels": 3, "out_ch": 3},
    }
    return {"config.json": row}


PUBLISHED = PublishedFormat(
    weights={"model": lambda c: cheers(c.vision.patch_size)},
    json=("config.json",),
    matches=lambda json: json["config.json"].get("model_type") == "umm",
    config=published_config,
    describe=published_files,
    unstored=("times", "settings", "published_quirks", "sizes"),
    float32=("*.bn.*",),
    remote_code="the .py files, the processor's files and generation_config.json of ai9stars/Cheers",
)


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
    """Cheers from ``model.safetensors``, whose language head repeats the embedding."""
    language = tuple(
        replace(r, published=r.published.replace("model.", "model.language_model.", 1))
        if r.alias is None
        else replace(r, alias="model.language_model.embed_tokens.weight", repeated=True)
        for r in TEXT
    )
    return (
        prefixed(language, native="decoder.")
        + prefixed(siglip(patch, "model.vision_representation.", pooling=True), native="vision.")
        + prefixed(FLUX2_AUTOENCODER, "model.vae_model.", "autoencoder.")
        + prefixed(FLUX2_AUTOENCODER, "model.vae_decoder_projector.", "pixel_decoder.")
        + rules({"model.und_projector.**": "projector.**", "model.hi_gate.**": "gate.**"})
        + rules({"model.time_embed.mlp_1.**": "coarse.time.mlp.**", "model.time_embed.mlp_2.**": "fine.time.mlp.**"})
        + prefixed(rules(_STAGE), "model.gen_projector.", "coarse.")
        + prefixed(rules(_STAGE), "model.hi_projector.", "fine.")
    )
