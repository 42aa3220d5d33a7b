"""Vision-language models of transformers behind our calls: the same numbers from folders in their own format."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace

import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, user
from diptych.models import configs, store
from diptych.models.iomm import Config
from diptych.parts.attention import documents
from diptych.parts.images import SizeRule, to_tensor
from diptych.parts.mllm import Mllm, MllmConfig, Template
from diptych.training import build
from diptych.training.recipe import Recipe, Stage
from tests.support import tiny
from tests.support.published import qwen2
from tests.support.tolerances import LOGITS

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = 307  # the id that stands for a picture's token in transformers' own input


def internvl() -> transformers.PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [32, 32],
        "patch_size": [4, 4],
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config)


def qwen25vl() -> transformers.PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        tie_word_embeddings=True,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {"internvl": internvl, "qwen2_5_vl": qwen25vl}
SEE = SizeRule(longest=32, shortest=8, stride=8)


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request, tmp_path_factory):
    """A random model as transformers writes it, with Qwen2's tokenizer files beside it."""
    torch.manual_seed(0)
    theirs = MODELS[request.param]()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    qwen2().save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def config(folder) -> MllmConfig:
    markers = Template(image=("<|vision_start|>", "<|vision_end|>"))
    return replace(MllmConfig.of(folder, SEE), template=markers)


@pytest.fixture(scope="module")
def model(folder):
    """IOMM around the folder's reader."""
    small = replace(Config.tiny(), **{n: getattr(tiny.iomm(), n) for n in ("dit", "autoencoder", "queries")})
    made = store.create("iomm", replace(small, mllm=config(folder)), qwen2())
    made.initialise(0)
    made.mllm.load_pretrained(folder)
    return tiny.shake_only(made, "adapter", "dit", "connector").eval()


def asked(width: int, height: int) -> Sample:
    picture = tiny.picture(3, width, height)
    return Sample("s", (user("how many stars are there?", Image(picture), "and squares?"),))


@torch.no_grad()
def expected(theirs, laid, pixels: PIL.Image.Image) -> torch.Tensor:
    """Scores of transformers' own forward for a sequence with one picture."""
    ids = torch.tensor([[IMAGE if i < 0 else i for s in laid.segments for i in s.ids]])
    image = (to_tensor(pixels, pixels.size)[None] / 255.0).float()
    if theirs.config.model_type == "internvl":
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN as MEAN
        from transformers.image_utils import IMAGENET_DEFAULT_STD as STD

        image = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return theirs(input_ids=ids, pixel_values=image).logits[0]
    processor = transformers.Qwen2VLImageProcessor(
        do_resize=False, patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=4096
    )
    made = processor(images=[pixels], return_tensors="pt")
    types = (ids == IMAGE).int()
    return theirs(
        input_ids=ids,
        pixel_values=made["pixel_values"],
        image_grid_thw=made["image_grid_thw"],
        mm_token_type_ids=types,
    ).logits[0]


@pytest.mark.parametrize("size", [(32, 32), (32, 16), (16, 32)])
def test_scores_are_those_of_transformers(model, theirs, size):
    if theirs.config.model_type == "internvl" and size != (32, 32):
        pytest.skip("InternVL sees one size")
    sample = asked(*size)
    laid = model.lay_out(sample)
    with torch.no_grad():
        s = model._embed(pack([laid]), Noise())
        logits = model.mllm.logits(model.mllm(s.x, s.positions, documents(s.columns)))
    assert torch.allclose(logits, expected(theirs, laid, next(sample.images()).pixels), rtol=0, atol=LOGITS)
    [context] = model.extend([model.open()], [laid])
    assert torch.allclose(context.logits, logits[-1], rtol=0, atol=LOGITS)
    grid = next(s.grid for s in laid.segments if s.kind == Kind.VISION)
    assert context.position == len(laid) - (grid[0] * grid[1] - max(grid) if "qwen" in theirs.config.model_type else 0)


def test_a_recipe_takes_its_reader_and_tokenizer_from_a_folder(folder, model):
    row = configs.config_to_json("iomm", model.config)
    stage = Stage("s", 1, {"dit": 1e-3}, {"shapes/draw": 1.0}, {"image": 1.0, "text": 0.0})
    made = build.build(Recipe("test", row, (stage,), init={"mllm": f"transformers:{folder}"}))
    assert len(made.tokenizer) == len(qwen2())
    for name, tensor in model.mllm.state_dict().items():
        assert torch.equal(made.mllm.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="module 'dit' of iomm is no decoder"):
        build.build(Recipe("test", row, (stage,), init={"dit": f"transformers:{folder}"}))


def test_a_reader_stored_in_bf16_is_read_in_float32(theirs, tmp_path):
    deepcopy(theirs).to(torch.bfloat16).save_pretrained(tmp_path)
    made = Mllm(config(tmp_path))
    made.load_pretrained(tmp_path)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert torch.equal(made.embed(torch.tensor([3])), theirs.get_input_embeddings().weight[3:4].bfloat16().float())


@pytest.mark.parametrize("damage", ["a weight", "the tower", "half"])
def test_a_reader_that_is_not_whole_is_refused(folder, damage, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        gone = "layers.0.self_attn.q_proj.weight" if damage == "a weight" else "vis"
        save_file({n: t for n, t in load_file(file).items() if gone not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be read as" if damage == "half" else "it lacks .*(q_proj|vis)"):
        Mllm(config(folder)).load_pretrained(tmp_path)


@pytest.mark.parametrize("path, value", [("text_config.rms_norm_eps", 1e-2), ("rope_theta", 10.0), ("vision", None)])
def test_a_reader_with_other_settings_is_refused(folder, path, value):
    """Equal shapes do not make an equal forward."""
    row = deepcopy(config(folder).model)
    if path == "rope_theta":
        where = row["text_config"]
        where["rope_parameters"] = where["rope_parameters"] | {"rope_theta": value}
        told = r"text_config.rope_parameters.rope_theta is \S+ there, 10.0 here"
    elif path == "vision":
        name = "vision_feature_layer" if row["model_type"] == "internvl" else "vision_config.fullatt_block_indexes"
        (row if "." not in name else row["vision_config"])[name.rpartition(".")[2]] = -2 if "." not in name else [0]
        told = name
    else:
        row["text_config"]["rms_norm_eps"] = value
        told = r"text_config.rms_norm_eps is \S+ there, 0.01 here"
    with pytest.raises(ValueError, match=f"has other settings than the model: .*{told}"):
        Mllm(replace(config(folder), model=row)).load_pretrained(folder)


def test_what_is_saved_loads_again(model, tmp_path):
    store.save(model, tmp_path / "m")
    again = store.load(tmp_path / "m")
    laid = model.lay_out(asked(32, 32))
    a, b = (m.extend([m.open()], [laid])[0].logits for m in (model, again))
    assert torch.equal(a, b)


def test_bad_readers_are_refused(folder, tmp_path, model):
    with pytest.raises(ValueError, match="unknown model_type 'bert'.*internvl"):
        MllmConfig({"model_type": "bert"})
    with pytest.raises(ValueError, match="cannot be read as a vision-language model"):
        MllmConfig.of(tmp_path)
    wider = config(folder).model | {"text_config": config(folder).model["text_config"] | {"intermediate_size": 64}}
    with pytest.raises(ValueError, match="has other settings .*: text_config.intermediate_size is 48 there, 64 here"):
        Mllm(replace(config(folder), model=wider)).load_pretrained(folder)
    sliding = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8, "layer_types": None}
    text = config(folder).model["text_config"] | sliding
    wide = config(folder).model["vision_config"] | {"image_size": [64, 32]}
    if config(folder).model["model_type"] == "internvl":
        with pytest.raises(ValueError, match="square grids of patches, not 16 x 8"):
            Mllm(replace(config(folder), model=config(folder).model | {"vision_config": wide}))
    with pytest.raises(ValueError, match="sliding-window"):
        Mllm(replace(config(folder), model=config(folder).model | {"text_config": text}))


def test_sizes_keep_to_the_towers_patches():
    row = qwen25vl().config.to_dict()
    with pytest.raises(ValueError, match="multiples of 8 pixels, not 12"):
        Mllm(MllmConfig(row, see=SizeRule(32, 8, 12)))
