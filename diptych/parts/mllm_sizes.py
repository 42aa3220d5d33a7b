"""Vision-language models by name: sizes in the field names of transformers, and Qwen's chat template."""

from __future__ import annotations

from diptych.parts.images import AreaRule
from diptych.parts.mllm import MllmConfig, Template


def qwen_template(roles: bool = True) -> Template:
    """Qwen's chat template; without ``roles``, turns have only their markers."""
    system, user, assistant = (f"<|im_start|>{name}\n" for name in ("system", "user", "assistant"))
    markers = ("<|vision_start|>", "<|vision_end|>")
    if roles:
        return Template(system, user, assistant, image=markers)
    start = "<|im_start|>"
    return Template(start, start, start, end="<|im_end|>", image=markers)


def qwen25_vl_3b() -> MllmConfig:
    """Qwen2.5-VL-3B; pictures have 256 to 1280 tokens of 28 x 28 pixels."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    row = {
        "model_type": "qwen2_5_vl",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vision_config": vision,
    }
    return MllmConfig(row, qwen_template(), AreaRule(256 * 28**2, 1280 * 28**2, 28))


def tiny_qwen25_vl(vocab_size: int) -> MllmConfig:
    """Qwen2.5-VL's classes with a decoder of width 128 and a tower of width 96; 16 pixels are a token."""
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": 128,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 64,
        "fullatt_block_indexes": [0, 2],
        "tokens_per_second": 2,
    }
    row = {
        "model_type": "qwen2_5_vl",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
        "tie_word_embeddings": True,
        "vision_config": vision,
    }
    return MllmConfig(row, qwen_template(roles=False), AreaRule(16**2, 128**2, 16))


def internvl3_2b() -> MllmConfig:
    """InternVL3-2B: InternViT-300M at 448 pixels, 256 tokens a picture, Qwen2.5-1.5B (D = 1536)."""
    vision = {
        "attention_bias": True,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 151674,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    }
    return MllmConfig(
        {"model_type": "internvl", "vision_config": vision, "text_config": text, "tie_word_embeddings": False}
    )


def tiny_internvl(vocab_size: int = 1024) -> MllmConfig:
    """InternVL's classes with a decoder of width 128 and a tower of width 96: 64 pixels are 16 tokens."""
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "image_size": [64, 64],
        "patch_size": [8, 8],
        "layer_scale_init_value": 1.0,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
    }
    return MllmConfig(
        {"model_type": "internvl", "vision_config": vision, "text_config": text, "tie_word_embeddings": True},
        qwen_template(roles=False),
    )
