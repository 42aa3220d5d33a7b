"""Our decoder against transformers' Qwen2, Qwen3 and Llama, and against InternLM2 made from a Llama."""

import pytest
import torch
import transformers

from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.models.published.key_map import export, load
from diptych.models.published.parts import TEXT, decoder_config, decoder_rules
from diptych.parts.attention import Cache, Cached, Dense, Packed
from diptych.parts.decoder import Decoder
from diptych.parts.norms import RMSNorm

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HF = {
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_theta": 5e5}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-wide-heads": ("Llama", {"head_dim": 12}),
}
LENGTHS = (9, 1, 14, 5)


def published(name: str):
    """A random model of transformers with nothing left at zero or one."""
    family, more = HF[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**SIZES | more, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours_from(state, config: dict) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(decoder_config(config))
    decoder.load_state_dict(load(decoder_rules(config), state, decoder.state_dict()), assign=True)
    return decoder.eval()


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def row(ids: list[torch.Tensor]):
    return pack([Layout(str(i), (Segment(Kind.TEXT, tuple(x.tolist())),)) for i, x in enumerate(ids)], pad_to=16)


@torch.no_grad()
def reference(model, ids: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(x[None]).logits[0] for x in ids])


@pytest.mark.parametrize("backend", [Packed, Dense])
@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_packed_row_equals_one_by_one(name, backend):
    theirs = published(name)
    ours, ids = ours_from(theirs.state_dict(), theirs.config.to_dict()), documents()
    batch = row(ids)
    states = ours(ours.embed_tokens(batch.ids), batch.positions, backend(batch))
    expected = reference(theirs, ids)
    torch.testing.assert_close(ours.logits(states)[: len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HF)
@torch.no_grad()
def test_cached_decode_equals_full_forward(name):
    """Two contexts of unequal length: a prompt in one piece, then word by word."""
    theirs = published(name)
    ours = ours_from(theirs.state_dict(), theirs.config.to_dict())
    ids, c = [documents()[0], documents()[2]], ours.config
    caches = [Cache(c.num_hidden_layers, c.num_key_value_heads, c.width, torch.float32, "cpu") for _ in ids]
    rows: list[list[torch.Tensor]] = [[], []]
    at = 0
    for n in (4, 1, 1, 3):
        batch = row([x[at : at + n] for x in ids])
        used = sum(batch.lengths)
        caches = [cache.reserve(at, n) for cache in caches]
        attend = Cached(caches, [at, at], batch)
        states = ours(ours.embed_tokens(batch.ids[:used]), batch.positions[:used] + at, attend)
        for own, part in zip(rows, ours.logits(states).split([n, n]), strict=True):
            own.append(part)
        at += n
    for own, x in zip(rows, ids, strict=True):
        torch.testing.assert_close(torch.cat(own), reference(theirs, [x[:at]]), atol=1e-5, rtol=1e-5)


def to_internlm2(state: dict) -> dict:
    """A Llama state dict under InternLM2's names, q, k and v packed row by row for each key/value head."""
    heads, groups = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    width, per = SIZES["hidden_size"] // heads, heads // groups
    out = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for theirs, name in names.items():
            out[f"{at}{name}.weight"] = state[f"{at}{theirs}.weight"]
        q, k, v = (state[f"{at}self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for g in range(groups):
            rows += [q[(g * per + j) * width : (g * per + j + 1) * width] for j in range(per)]
            rows += [k[g * width : (g + 1) * width], v[g * width : (g + 1) * width]]
        out[f"{at}attention.wqkv.weight"] = torch.cat(rows)
    return out


INTERNLM2 = SIZES | {"model_type": "internlm2", "bias": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}


@torch.no_grad()
def test_internlm2():
    theirs, ids = published("llama"), documents()
    theirs.config.rms_norm_eps = 1e-6
    for module in theirs.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-6
    packed = to_internlm2(theirs.state_dict())
    ours, batch = ours_from(packed, INTERNLM2), row(ids)
    states = ours(ours.embed_tokens(batch.ids), batch.positions, Packed(batch))
    expected = reference(theirs, ids)
    torch.testing.assert_close(ours.logits(states)[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    same(export(decoder_rules(INTERNLM2), ours.state_dict()), packed)


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", HF)
def test_round_trip(name):
    theirs = published(name)
    state = {n: t for n, t in theirs.state_dict().items() if not (name.endswith("tied") and n == "lm_head.weight")}
    same(export(TEXT, ours_from(theirs.state_dict(), theirs.config.to_dict()).state_dict()), state)


def test_load_lists_every_difference():
    theirs = published("qwen2")
    config, state = theirs.config.to_dict(), dict(theirs.state_dict())
    state["model.extra"] = torch.zeros(1)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.self_attn.q_norm.weight"] = torch.ones(8)
    state["model.norm.weight"] = torch.ones(49)
    with pytest.raises(ValueError) as caught:
        ours_from(state, config)
    text = str(caught.value)
    assert "unknown model.extra" in text
    assert "missing model.layers.1.mlp.up_proj.weight" in text
    assert "unknown model.layers.2.self_attn.q_norm.weight" in text
    assert "model.norm.weight gives norm.0.weight shape (49,), not (48,)" in text
    assert text.count("\n") == 4


def test_tied_head_must_be_equal():
    theirs = published("qwen2-tied")
    state = dict(theirs.state_dict()) | {"lm_head.weight": torch.zeros(96, 48)}
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        ours_from(state, theirs.config.to_dict())
    without = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    ours_from(without, theirs.config.to_dict())


def test_untied_head_may_not_be_missing():
    theirs = published("llama")
    state = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        ours_from(state, theirs.config.to_dict())


def test_export_is_strict():
    theirs = published("llama")
    state = ours_from(theirs.state_dict(), theirs.config.to_dict()).state_dict()
    with pytest.raises(ValueError, match=r"unknown stranger"):
        export(TEXT, dict(state) | {"stranger": torch.zeros(1)})
    del state["layers.0.self_attn.0.k_proj.weight"]
    with pytest.raises(
        ValueError, match=r"missing layers.0.self_attn.0.k_proj.weight for model.layers.0.attention.wqkv"
    ):
        export(decoder_rules(INTERNLM2), state)


def test_wqkv_of_a_wrong_size_is_named():
    packed = to_internlm2(published("llama").state_dict())
    packed["model.layers.1.attention.wqkv.weight"] = torch.zeros(79, 48)
    with pytest.raises(ValueError, match=r"model.layers.1.attention.wqkv.weight has shape \(79, 48\)"):
        ours_from(packed, INTERNLM2)


def test_decoder_config_reads_old_and_new_rope():
    old = SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    new = {k: v for k, v in old.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    assert decoder_config(old) == decoder_config(new)
    assert (
        decoder_config(old).rope_theta == 1e6
        and decoder_config(old).qkv_bias
        and decoder_config(old).tie_word_embeddings
    )
    assert decoder_config(SIZES | {"model_type": "llama"}).rope_theta == 10000
    dynamic = INTERNLM2 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}  # plain up to max_position_embeddings
    assert decoder_config(dynamic) == decoder_config(INTERNLM2)
    qwen3 = decoder_config(SIZES | {"model_type": "qwen3"})
    assert (qwen3.width, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)


@pytest.mark.parametrize(
    "kind, more, named",
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ("internlm2", {"bias": False, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("internlm2", {}, "bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_unsupported_settings_are_named(kind, more, named):
    with pytest.raises(ValueError, match=rf"does not support {named}="):
        decoder_config(SIZES | {"model_type": kind} | more)


def test_unknown_family_and_missing_sizes():
    with pytest.raises(ValueError, match=r"unknown model_type 'gpt2'; choose from qwen2, qwen3, llama, internlm2"):
        decoder_config({"model_type": "gpt2"})
    with pytest.raises(ValueError, match=r"lacks hidden_size"):
        decoder_config({k: v for k, v in SIZES.items() if k != "hidden_size"} | {"model_type": "llama"})


@pytest.mark.parametrize("shape", [(7, 32), (5, 3, 8), (1, 16)])
def test_the_gradient_of_the_norm_is_that_of_its_formula(shape):
    generator = torch.Generator().manual_seed(0)
    x, gain, grad = (torch.randn(n, generator=generator) for n in (shape, shape[-1:], shape))
    norm = RMSNorm(shape[-1], 1e-3)
    norm.weight.data = gain
    x = x.requires_grad_()
    y, wide = norm(x), x.detach().double().requires_grad_()
    exact_gain = gain.double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * exact_gain
    got = (y, *torch.autograd.grad(y, (x, norm.weight), grad))
    expected = (exact, *torch.autograd.grad(exact, (wide, exact_gain), grad.double()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), y, rtol=1e-6, atol=1e-6)
