"""The parts that transformers can load give what ours give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from diptych import cli
from diptych.models.published.transformers import language_model, write_transformers
from diptych.parts.decoder import Decoder
from tests.support import tiny


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "parts"
    assert cli.main(["export", str(tiny_model), str(folder), "--format", "hf"]) == 0
    return folder


@torch.no_grad()
def test_language_and_vision_load_in_transformers_and_compute_the_same(exported, tiny_model):
    from diptych.models import store

    model = store.load(tiny_model)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(exported / "language", output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    ids = [model.markers["bos"], *model.tokenizer.encode("how many red stars are there?"), model.markers["eos"]]
    [context] = model.extend([model.open()], [model.reply(ids)])
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0, -1], context.logits, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "language")
    assert tokenizer("how many red stars?").input_ids == model.tokenizer.encode("how many red stars?")
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == model.markers["eos"]

    vision, told = transformers.SiglipVisionModel.from_pretrained(exported / "vision", output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    side = model.config.vision.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(vision(pixels).last_hidden_state, model.vision(pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"qk_norm": False}, {"qk_norm": False, "qkv_bias": False}, {"qkv_bias": False}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_every_arithmetic_has_its_class(change):
    torch.manual_seed(0)
    ours = Decoder(replace(tiny.bagel().decoder, vocab_size=64, **change))
    state, config = language_model(ours)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    from tests.parts.test_decoder_parity import Dense, row

    batch = row([ids[0]])
    expected = ours.logits(
        ours(ours.embed_tokens(batch.ids), batch.positions, Dense(batch), [len(batch)] + [0] * (ours.config.routes - 1))
    )
    torch.testing.assert_close(theirs.eval()(ids).logits[0], expected[:5], atol=1e-4, rtol=1e-4)


def test_a_model_without_such_parts_is_refused(tmp_path):
    from diptych.models import store, table

    model = store.create("autoencoder", table.config("autoencoder/tiny"))
    with pytest.raises(ValueError, match="'autoencoder' has neither a decoder nor a vision encoder"):
        write_transformers(model, tmp_path, None)
