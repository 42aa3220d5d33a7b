"""SynerGen-VL: what its paper (arXiv 2412.09604) fixes. The protocol suite tests the rest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.models import WordLevel

from diptych import recipes
from diptych.analysis import layers
from diptych.analysis import run as analyze
from diptych.analysis.keywords import keywords
from diptych.analysis.separability import points
from diptych.core.batch import pack
from diptych.core.layout import Kind, Layout, Segment
from diptych.core.noise import Noise
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import NONE
from diptych.data.loader import LoaderConfig, Stream
from diptych.data.mixture import Draw
from diptych.models import store, table
from diptych.models.synergen import Chat, Config, SynerGen
from diptych.parts.attention import documents
from diptych.parts.codes import Choice, CodeHead, CodeSettings
from diptych.parts.cross_entropy import linear_cross_entropy
from diptych.parts.decoder import DecoderConfig
from diptych.parts.fold import fold, unfold
from diptych.parts.images import SizeRule, Tiling, fit
from diptych.parts.tokenizer import Tokenizer
from diptych.training.parameters import by_part
from diptych.training.recipe import Optimizer
from tests.protocol.test_generation import begin, finish, read
from tests.protocol.test_losses import run, sums
from tests.support import tiny
from tests.support.tolerances import SUM

VISUAL = ("decoder.vision", "vision", "projector", "head", "special")


@pytest.fixture(scope="module")
def model() -> SynerGen:
    """A random model that tests share and must not change."""
    return tiny.shake(tiny.model("synergen")).requires_grad_(False)


@pytest.fixture
def fresh() -> SynerGen:
    return tiny.shake(tiny.model("synergen"))


# ---- folding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [(1, 1), (2, 2), (2, 4), (2, 8)])
def test_unfold_undoes_fold(ratio):
    grid = torch.arange(2 * 8 * 16).view(2, 8, 16)
    folded = fold(grid, ratio)
    assert folded.shape == (2, 128 // math.prod(ratio), math.prod(ratio))
    assert torch.equal(unfold(folded, (8, 16), ratio), grid)
    features = torch.stack([grid, -grid], -1)
    assert torch.equal(fold(features, ratio)[..., 1], -folded)
    rows, columns = 8 // ratio[0], 16 // ratio[1]
    for i, j in ((0, 0), (columns + 1 if rows > 1 else 1, folded.shape[2] - 1)):
        r, c, a, b = i // columns, i % columns, j // ratio[1], j % ratio[1]
        assert folded[0, i, j] == grid[0, r * ratio[0] + a, c * ratio[1] + b]


def test_folds_are_listed_as_in_figure_3():
    grid = torch.tensor([[123, 234, 456, 567], [987, 876, 765, 543], [112, 223, 334, 445], [211, 322, 433, 544]])
    assert fold(grid[None], (2, 2))[0].tolist() == [
        [123, 234, 987, 876],
        [456, 567, 765, 543],
        [112, 223, 211, 322],
        [334, 445, 433, 544],
    ]


def test_what_does_not_fold_is_named():
    with pytest.raises(ValueError, match="a grid of 8x12 tokens does not fold by 2x8"):
        fold(torch.zeros(1, 8, 12), (2, 8))
    with pytest.raises(ValueError, match="see.side 48x48 does not divide into tokens of 8x32 pixels"):
        replace(Config.tiny(), see=Tiling(48))
    with pytest.raises(ValueError, match="the head says 36 codes, the vq autoencoder has 1000"):
        replace(Config.tiny(), head=DecoderConfig(36, 24, 32, 2, 2, 1))
    for bad in ({"fold": (0, 1)}, {"fold": (-1, 1)}, {"size": (0, 64)}, {"embed_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1, not"):
            replace(Config.tiny(), **bad)


# ---- tiling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, six, twelve",
    [
        ((400, 400), ((1, 1), 1), ((1, 1), 1)),
        ((512, 512), ((1, 1), 1), ((1, 1), 1)),
        ((1024, 1024), ((2, 2), 5), ((2, 2), 5)),
        ((1280, 720), ((2, 1), 3), ((2, 1), 3)),
        ((800, 600), ((3, 2), 7), ((4, 3), 13)),
        ((640, 480), ((3, 2), 7), ((4, 3), 13)),
        ((2000, 500), ((4, 1), 5), ((4, 1), 5)),
        ((2480, 3508), ((2, 3), 7), ((2, 3), 7)),
        ((3000, 300), ((6, 1), 7), ((10, 1), 11)),
    ],
)
def test_tiles_of_the_published_rule(size, six, twelve):
    for most, (grid, tiles) in ((6, six), (12, twelve)):
        rule = Tiling(512, most, thumbnail=True)
        assert (rule.grid(*size), rule.count(*size)) == (grid, tiles)
        assert Tiling(512, most).count(*size) == grid[0] * grid[1]
    assert Tiling(512).count(*size) == 1


def test_tiles_are_cut_row_by_row_and_the_whole_comes_last():
    picture = tiny.picture(3, 96, 64)
    tiles = Tiling(32, 6, thumbnail=True)(picture)
    assert tiles.shape == (7, 3, 32, 32) and tiles.dtype == torch.uint8
    whole = fit(picture, (96, 64))
    assert torch.equal(tiles[4], whole[:, 32:, 32:64])
    assert torch.equal(tiles[6], Tiling(32)(picture)[0])


def test_a_drawn_picture_covers_its_square_and_is_cut_around_its_centre():
    wide = tiny.picture(4, 128, 64)
    assert torch.equal(fit(wide, (64, 64)), fit(wide, (128, 64))[:, :, 32:96])
    published = Config.b2().draw
    assert {published(w, h) for w, h in ((512, 512), (3000, 300), (100, 700), (1280, 720), (64, 64))} == {(512, 512)}


def test_documents_of_unequal_tile_counts_share_a_row(model):
    asked = [
        Sample(f"p{i}", (user(Image(tiny.picture(i, *size)), "what is there?"), assistant("two stars")))
        for i, size in enumerate([(32, 32), (64, 32), (96, 32), (32, 64)])
    ]
    laid = [model.lay_out(s) for s in asked]
    assert [s.image.shape[0] for x in laid for s in x.segments if s.image is not None] == [1, 3, 4, 3]
    alone = [sums(model, [x])["text"] for x in laid]
    assert sums(model, laid)["text"] == pytest.approx(sum(alone), rel=SUM)
    both = Sample("both", (user(Image(tiny.picture(0, 96, 32)), Image(tiny.picture(1, 32, 32)), "which?"),))
    assert [s.image.shape[0] for s in model.lay_out(both).segments if s.image is not None] == [1, 1]  # they share 3


# ---- layout -----------------------------------------------------------------------------------------------------


def test_pictures_to_understand_stand_before_the_question_and_drawn_ones_in_the_answer(model):
    words = model.tokenizer.encode
    start, end, (boi, eoi) = model.roles["user"], model.end, (model.boi, model.eoi)
    n = [NONE] * 8
    ids = [i for s in model.lay_out(tiny.ask()).segments for i in s.ids]
    question, answer = words("how many stars are there?"), words("two")
    assert ids == [*start, boi, *n, eoi, *question, *end, *start, *answer, *end]
    drawn = model.lay_out(tiny.draw())
    assert [i for s in drawn.segments for i in s.ids] == [
        *start,
        *words("a blue star"),
        *end,
        *start,
        boi,
        *n,
        eoi,
        *end,
    ]
    assert model.counts(pack([drawn], 2)) == {"text": 0.0, "image": 64.0}
    assert model.counts(pack([model.lay_out(tiny.ask())], 2)) == {"text": float(len(answer) + 1), "image": 0.0}
    [before, picture, _] = model.lay_out(tiny.draw()).segments[1:4]
    assert picture.kind == Kind.CODES and picture.route == 1 and before.route == 0 and picture.generated
    routes = pack([drawn], 2).routes
    assert len(routes[1]) == 8  # the markers are words


def test_chat_headers_carry_no_loss():
    config = replace(tiny.synergen(), chat=Chat(begin="<|endoftext|>"))
    made = store.create("synergen", config)
    laid = made.lay_out(tiny.say())
    ids = [i for s in laid.segments for i in s.ids]
    targets = [t for s in laid.segments for t in (s.targets or [NONE] * len(s))]
    template, words = made.tokenizer.encode_markup, made.tokenizer.encode
    header = template("<|im_start|>assistant\n")
    expected = [*template("<|endoftext|><|im_start|>user\n"), *words("hello"), *template("<|im_end|>\n"), *header]
    assert ids == [*expected, *words("a red circle"), *template("<|im_end|>\n")]
    told = [t for t in targets if t != NONE]
    assert told == [*words("a red circle"), made.end[0]]  # the answer and its end, no header, no newline
    assert targets.index(told[0]) == len(expected) - 1
    assert made.lay_out(Sample("q", (user("hello"), assistant()))).segments[-1].ids == tuple(header)


def test_an_answer_ends_with_a_special_token():
    words = Tokenizer(tokenizers.Tokenizer(WordLevel({"a": 0, "<unk>": 1, "user": 2}, unk_token="<unk>")))
    config = replace(tiny.synergen(), chat=Chat(role="{role}"))
    with pytest.raises(ValueError, match=r"chat.end '<\|im_end\|>\\n' must begin with a special token.*which has none"):
        store.create("synergen", config, words)
    made = store.create("synergen", config, words.adding(["<|im_end|>", "</s>"]))
    assert made.stop_ids == {3, 4}


def test_without_text_a_request_asks_for_a_random_image(model):
    words = model.tokenizer.encode
    free = [*words("Here is a random image"), model.uncond, *words(":")]
    laid = model.lay_out(tiny.draw(), frozenset({"text"}))
    assert list(laid.segments[0].ids) == [*model.roles["user"], *free, *model.end]
    assert laid.segments[1:] and laid.pictures == 1
    assert "random" in laid.describe(model.tokenizer.decode)


def test_one_request_in_ten_is_read_without_its_words():
    recipe = recipes.find("synergen/stage1")
    assert recipe.stages[0].dropout == {"text": 0.1}
    plan = LoaderConfig({}, 0, 1, 1, 1, 1, recipe.stages[0].dropout)
    stream = Stream.__new__(Stream)
    stream.plan, stream.mixture = plan, SimpleNamespace(stream=0)
    sample = tiny.draw()
    dropped = sum("text" in stream._drop(sample, Draw("drawings", i, i)) for i in range(10_000))
    assert abs(dropped / 10_000 - 0.10) < 0.01
    assert not any(stream._drop(tiny.ask(), Draw("captions", i, i)) for i in range(100))


# ---- experts ----------------------------------------------------------------------------------------------------


def hidden(model: SynerGen, visual: torch.Tensor) -> torch.Tensor:
    """Final states of the same embeddings when the marked tokens take the vision experts."""
    n = len(visual)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, model.config.decoder.hidden_size, generator=generator)
    batch = pack([Layout("x", (Segment(Kind.TEXT, (0,) * n),))])
    order = torch.cat([(~visual).nonzero()[:, 0], visual.nonzero()[:, 0]])
    counts = [int((~visual).sum()), int(visual.sum())]
    out = torch.empty_like(x)
    out[order] = model.decoder(x[order], batch.positions[order], documents(batch, order), counts)
    return out


@torch.no_grad()
def test_experts_begin_as_copies_of_the_text_ffns():
    made = tiny.model("synergen")
    masks = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = hidden(made, torch.zeros(12, dtype=torch.bool))
    for mask in (*masks, torch.ones(12, dtype=torch.bool)):
        assert torch.allclose(hidden(made, mask), plain, rtol=0, atol=1e-6)
    for layer in made.decoder.layers:
        for name, weight in layer.mlp[0].named_parameters():
            other = layer.mlp[1].get_parameter(name)
            assert torch.equal(weight, other) and weight.data_ptr() != other.data_ptr()
    tiny.shake(made)
    assert not torch.allclose(hidden(made, masks[0]), hidden(made, ~masks[0]), atol=1e-3)


def words_of(model: SynerGen) -> torch.Tensor:
    return read(model, model.lay_out(tiny.say()))[0].logits


def test_words_ignore_every_visual_parameter(fresh):
    before, parts = words_of(fresh), by_part(fresh)
    with torch.no_grad():
        for part in ("decoder.vision", "vision", "projector", "head"):
            for p in parts[part].values():
                p.add_(1.0)
    assert torch.equal(words_of(fresh), before)


def trained(model: SynerGen, name: str, steps: int = 3) -> dict[str, torch.Tensor]:
    """Trains what a published stage trains, with its optimizer, on rows of both tasks; returns the weights before."""
    before = {n: v.clone() for n, v in model.state_dict().items()}
    stage = recipes.find(name).stages[0]
    optimizer = replace(stage.optimizer, weight_decay=0.1)
    assert isinstance(optimizer, Optimizer)
    recipe = tiny.recipe(train={part: 1e-2 for part in stage.train}, optimizer=optimizer, dropout={})
    run(model, recipe, [tiny.samples()], steps)
    return before


def test_the_first_stage_leaves_the_language_path_bit_for_bit(fresh):
    told = words_of(fresh)
    before = trained(fresh, "synergen/stage1")
    assert torch.equal(words_of(fresh), told)
    moved = {n for n, v in fresh.state_dict().items() if not torch.equal(before[n], v)}
    parts = by_part(fresh)
    assert moved <= {n for part in VISUAL for n in parts[part]} and len(moved) > 10


def test_the_second_stage_moves_attention_too_and_nothing_else(fresh):
    before = trained(fresh, "synergen/stage2")
    parts, after = by_part(fresh), fresh.state_dict()
    for part, names in parts.items():
        moved = [n for n in names if not torch.equal(before[n], after[n])]
        assert bool(moved) == (part in (*VISUAL, "decoder.attention")), part
    assert not torch.equal(
        words_of(fresh), read(tiny.shake(tiny.model("synergen")), fresh.lay_out(tiny.say()))[0].logits
    )


def test_the_second_stage_reads_in_more_tiles_than_the_first_did(fresh, tmp_path):
    """Sharded processes load a folder under the recipe's settings, which need not be the folder's."""
    store.save(fresh, tmp_path / "first")
    config = replace(fresh.config, see=Tiling(32, 6, True))
    made = store.load(tmp_path / "first", config=config)
    assert made.config == config and all(torch.equal(p, q) for p, q in zip(made.parameters(), fresh.parameters()))
    with pytest.raises(ValueError, match="of family 'synergen', which has other settings"):
        store.load(tmp_path / "first", config=table.config("bagel/tiny"))


def test_a_row_of_words_still_gives_every_expert_a_gradient(fresh):
    batch = pack([fresh.lay_out(tiny.say())], 2)
    fresh(batch, Noise())["text"].sum.backward()
    for p in by_part(fresh)["decoder.vision"].values():
        assert p.grad is not None and not p.grad.any()


def test_a_drawn_token_goes_through_the_vision_experts_at_every_cached_step(fresh):
    drawing, again = begin(fresh), finish(fresh, begin(fresh))
    with torch.no_grad():
        for layer in fresh.decoder.layers:
            layer.mlp[0].down_proj.weight.mul_(-3)
    assert torch.equal(finish(fresh, drawing), again)  # its context was read before
    drawing = begin(fresh)
    expected = finish(fresh, drawing)
    with torch.no_grad():
        for layer in fresh.decoder.layers:
            layer.mlp[1].down_proj.weight.mul_(-3)
    assert not torch.equal(finish(fresh, drawing), expected)


# ---- codes ------------------------------------------------------------------------------------------------------


def taught(model: SynerGen, codes: torch.Tensor, prompt: str = "a blue star", drop=frozenset()) -> torch.Tensor:
    """Logits (folds, slots, K) of a picture of these codes (h, w) as training computes them."""
    picture = Image(None, "target", (32, 32), encoded={"autoencoder": codes[None]})
    laid = model.lay_out(Sample("p", (user(prompt), assistant(picture))), drop)
    assert any(s.encoded for s in laid.segments)
    seen = []
    handle = model.unfold.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(pack([laid], 2), Noise())
    handle.remove()
    return model.unfold.classifier(seen[0]).unflatten(0, (-1, model.config.codes_per_token))


def drawn(model: SynerGen, **settings) -> torch.Tensor:
    """The codes (h, w) that a drawing ends with."""
    drawing = begin(model, **settings)
    while not drawing.done:
        [drawing] = model.step([drawing])
    return unfold(drawing.state[None], (8, 8), model.config.fold)[0]


def test_greedy_drawing_is_the_argmax_of_training_at_every_slot(model):
    codes = drawn(model, temperature=0.0, guidance_scale=1.0)
    logits = taught(model, codes)
    assert torch.equal(logits.argmax(-1), fold(codes[None], model.config.fold)[0])
    assert len(codes.unique()) > 3


def test_guided_greedy_drawing_is_the_argmax_of_both_passes(model):
    g = 2.5
    codes = drawn(model, temperature=0.0, guidance_scale=g)
    told, free = taught(model, codes), taught(model, codes, drop=frozenset({"text"}))
    expected = (free + g * (told - free)).argmax(-1)
    assert torch.equal(expected, fold(codes[None], model.config.fold)[0])
    likely = [x.log_softmax(-1) for x in (told, free)]  # log-probabilities give the same distribution
    assert torch.equal((likely[1] + g * (likely[0] - likely[1])).argmax(-1), expected)
    assert not torch.equal(codes, drawn(model, temperature=0.0, guidance_scale=1.0))


def test_guidance_of_one_is_conditional(model):
    h = torch.randn(2, 3, model.config.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
    chance = torch.rand(3, model.config.codes_per_token, generator=torch.Generator().manual_seed(2))
    for temperature in (0.0, 1.0):
        one = [CodeSettings(guidance_scale=1.0, temperature=temperature)] * 3
        guided = model.unfold.sample(h, one, [(1.0, 1.0)] * 3, chance)
        assert torch.equal(guided, model.unfold.sample(h[:1], one, [(1.0,)] * 3, chance))


def test_any_scale_guides(model):
    sample = tiny.request(tiny.edit())
    for g, i, names in ((0.0, 1.0, ["text"]), (0.5, 1.0, ["text"]), (1.0, 3.0, ["text", "image"][1:]), (1.0, 1.0, [])):
        branches = model.branches(sample, replace(model.settings, guidance_scale=g, image_guidance_scale=i))
        assert list(branches.values())[1:] == [g if n == "text" else i for n in names]
    free = model.branches(tiny.request(tiny.draw()), replace(model.settings, guidance_scale=0.0))
    assert len(free) == 2  # a scale of 0 draws without the words


def test_codes_beyond_int16_are_kept(tmp_path):
    many = replace(tiny.synergen().autoencoder, levels=(8, 8, 8, 5, 5, 5), latent_channels=6)
    config = replace(tiny.synergen(), autoencoder=many, head=replace(tiny.synergen().head, vocab_size=64_000))
    made = store.create("synergen", config)
    made.initialise(0)
    images = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for p in made.autoencoder.parameters():
            p.mul_(4)
    codes = made.encode("autoencoder", images)
    assert torch.equal(codes.flatten(0, 1).long(), made.autoencoder.encode(images[0])) and int(codes.max()) > 2**15


@torch.no_grad()
def test_a_slot_depends_on_the_slots_before_it_alone(model):
    codes = torch.randint(0, 36, (8, 8), generator=torch.Generator().manual_seed(4))
    before = taught(model, codes)
    folds = fold(codes[None], model.config.fold)
    for i, j in ((0, 0), (2, 3), (5, 7)):
        changed = folds.clone()
        changed[0, i, j] = (changed[0, i, j] + 1) % 36
        after = taught(model, unfold(changed, (8, 8), model.config.fold)[0])
        differs = (after - before).abs().amax(-1) > 1e-5
        assert not differs[:i].any() and not differs[i, : j + 1].any()  # no earlier token, no earlier slot
        assert differs[i, j + 1 :].all() and (i == 7 or differs[i + 1 :].all())


def test_a_picture_that_comes_as_codes_is_the_picture(model):
    sample = tiny.draw()
    laid = model.lay_out(sample)
    pixels = next(s.image for s in laid.segments if s.image is not None)
    codes = model.encode("autoencoder", pixels[None])[0]
    assert codes.shape == (1, 8, 8) and codes.dtype == torch.int16
    given = replace(next(sample.images()), image=None, size=(32, 32), encoded={"autoencoder": codes})
    again = model.lay_out(replace(sample, messages=(sample.messages[0], assistant(given))))
    assert again.describe() == laid.describe() and sums(model, [again]) == sums(model, [laid])


def test_half_precision_sees_the_codes_that_drawing_sees(model):
    laid = pack([model.lay_out(tiny.draw(f"d{i}", i)) for i in range(16)], model.routes)
    [group] = laid.of(Kind.CODES)
    plain = model._codes(group)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model._codes(group), plain)


def test_codes_of_another_layout_are_refused(model):
    side = 32 // model.config.autoencoder.downsample
    for shape in ((2, side, side), (1, side // 2, 2 * side)):
        image = Image(None, "target", (32, 32), encoded={"autoencoder": torch.zeros(shape, dtype=torch.int16)})
        with pytest.raises(ValueError, match=f"encoded as {shape[0]} x {shape[1]} x {shape[2]} codes and is 1 x"):
            model.lay_out(Sample("s", (user("a star"), assistant(image))))


def test_what_is_dropped_leaves_the_tiles_of_other_pictures():
    made = store.create("synergen", replace(tiny.synergen(), see=Tiling(32, 3)))
    first, second = (Image(tiny.picture(i, 96, 32)) for i in (1, 2))
    drawn = assistant(Image(tiny.picture(3), "target"))
    sample = Sample("s", (user(first, "as this"), drawn, user(second, "what is it?"), assistant("a star")))
    drops = frozenset(), frozenset({"image"})
    seen = [[s.image.shape[0] for s in made.lay_out(sample, drop).segments if s.image is not None] for drop in drops]
    assert seen == [[1, 1, 1], [1, 1]]


def test_pictures_that_are_read_carry_loss_where_the_config_says_so(model):
    both = replace(tiny.synergen(), image_loss_on_und=True)
    made = store.create("synergen", both)
    made.load_state_dict(model.state_dict())
    wide = Sample("w", (user(Image(tiny.picture(1, 64, 32)), "what is there?"), assistant("two stars")))
    laid = [model.lay_out(wide), model.lay_out(tiny.draw())]
    assert made.counts(pack(laid, 2))["image"] == 64.0 * 4 and model.counts(pack(laid, 2))["image"] == 64.0
    assert sums(made, laid)["image"] > sums(model, laid)["image"]
    assert sums(made, laid)["text"] == sums(model, laid)["text"]


def test_no_gradient_reaches_another_document_or_a_later_token(fresh):
    """The embedded pictures of three documents; the loss is the middle one's."""
    seen = []
    fresh.visual_embed.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])

    def quiet(seed):
        return fresh.lay_out(Sample(f"n{seed}", (user(Image(tiny.picture(seed)), "a star"),)))

    fresh(pack([quiet(1), fresh.lay_out(tiny.ask(seed=2)), quiet(3)], 2), Noise())["text"].sum.backward()
    [tokens] = seen
    reached = tokens.grad.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [False, True, False]


# ---- the head and its loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 64])
def test_cross_entropy_in_chunks_is_cross_entropy(rows_at_a_time):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((23, 5), (11, 5)))
    targets = torch.randint(0, 11, (23,), generator=generator)
    ours, each = linear_cross_entropy(x, w, targets, rows_at_a_time)
    expected = F.cross_entropy(x @ w.T, targets, reduction="sum")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        each.double(), F.cross_entropy(x @ w.T, targets, reduction="none").detach(), rtol=1e-5, atol=1e-6
    )
    assert not each.requires_grad
    gradients = torch.autograd.grad(expected * 3, (x, w))
    for a, b in zip(torch.autograd.grad(ours * 3, (x, w)), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert float(linear_cross_entropy(x, w, targets)[0]) == pytest.approx(float(expected.detach()), rel=1e-5)
    frozen, _ = linear_cross_entropy(x, w.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(frozen * 3, x)[0], gradients[0], rtol=1e-4, atol=1e-5)


def test_cross_entropy_follows_autocast():
    x, w = torch.randn(9, 8).requires_grad_(), torch.randn(6, 8).requires_grad_()
    targets = torch.arange(9) % 6
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = linear_cross_entropy(x, w, targets)
    ours.backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    expected = F.cross_entropy((x.bfloat16() @ w.bfloat16().T).float(), targets, reduction="sum")
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_no_logits_exist_whole(monkeypatch):
    """The head's loss keeps no tensor of slots x codes for backward, but such of the states' and the table's size."""
    head = CodeHead(8, DecoderConfig(500, 8, 16, 1, 2, 2), 4)
    h, codes = torch.randn(64, 8, requires_grad=True), torch.randint(0, 500, (64, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        loss, _ = linear_cross_entropy(head(h, codes), head.classifier.weight, codes.flatten())
    assert max(kept) < 64 * 4 * 500 / 10
    loss.backward()
    logits = head.classifier(head(h, codes))
    torch.testing.assert_close(loss, F.cross_entropy(logits, codes.flatten(), reduction="sum"), rtol=1e-5, atol=0)


def test_choices_follow_their_settings():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    p = logits.exp()
    chance = (torch.arange(4000) + 0.5) / 4000

    def shares(**settings) -> list[float]:
        choice = Choice([CodeSettings(guidance_scale=1.0, **settings)] * 4000, torch.device("cpu"))
        chosen = choice(logits.expand(1, 4000, 4), chance)
        return (torch.bincount(chosen, minlength=4) / 4000).tolist()

    assert shares() == pytest.approx(p.tolist(), abs=1e-3)
    assert shares(temperature=2.0) == pytest.approx((logits / 2).softmax(-1).tolist(), abs=1e-3)
    assert shares(top_k=2) == pytest.approx([*(p[:2] / p[:2].sum()).tolist(), 0, 0], abs=1e-3)
    assert shares(top_p=0.7) == pytest.approx([*(p[:2] / p[:2].sum()).tolist(), 0, 0], abs=1e-3)
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    three = [CodeSettings(1.0, top_k=1), CodeSettings(1.0, temperature=0.0), CodeSettings(1.0)]
    mixed = Choice(three, torch.device("cpu"))
    assert mixed(logits.expand(1, 3, 4), torch.tensor([0.99, 0.99, 0.99])).tolist() == [0, 0, 3]
    for bad in ({"top_k": 0}, {"top_p": 0.0}, {"temperature": math.inf}, {"guidance_scale": -1.0}):
        with pytest.raises(ValueError, match="at least"):
            CodeSettings(**bad)


def test_a_choice_does_not_depend_on_the_settings_beside_it():
    logits = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(0)).expand(1, 3, 50)
    kinds, cpu = [CodeSettings(1.0), CodeSettings(1.0, top_k=5), CodeSettings(1.0, top_p=0.5)], torch.device("cpu")
    together = Choice(kinds, cpu)
    for chance in torch.linspace(0, 0.99, 20):
        alone = [int(Choice([kind], cpu)(logits[:, :1], chance[None])) for kind in kinds]
        assert together(logits, chance.expand(3)).tolist() == alone


# ---- sizes ------------------------------------------------------------------------------------------------------


def counted(name: str) -> tuple[dict[str, int], SynerGen]:
    made = store.create("synergen", table.config(name), device="meta")
    assert all(t.is_meta for t in made.parameters())
    return {part: sum(p.numel() for p in ps.values()) for part, ps in by_part(made).items()}, made


def test_published_size():
    """By part, in millions; the tokenizer is no part of the model."""
    counts, made = counted("synergen/2b")
    base = sum(counts[p] for p in ("decoder.text", "decoder.attention", "decoder.norms"))
    told = {base: 1889.1, counts["decoder.vision"]: 1208.0, counts["head"]: 385.9, counts["projector"]: 71.4}
    assert all(round(n / 1e6, 1) == millions for n, millions in told.items())
    assert made.visual_embed.tok.weight.numel() == 32768 * 2048 and made.visual_embed.pos.numel() == 4096 * 2048
    assert counts["autoencoder"] == 0
    assert round(sum(counts.values()) / 1e9, 3) == 3.630
    assert round(made.activated_parameters() / 1e9, 3) == 2.422
    assert (made.config.fold, made.config.codes_per_token) == ((2, 8), 16)
    assert len(made.config.tiny().fold) == 2 and made._grid(512, 512) == (32, 8)


def test_the_ablations_size():
    counts, made = counted("synergen/qwen2-0.5b")
    base = sum(counts[p] for p in ("decoder.text", "decoder.attention", "decoder.norms"))
    told = {base: 494, counts["decoder.vision"]: 314, counts["head"]: 118}
    assert all(round(n / 1e6) == millions for n, millions in told.items())
    assert round(sum(counts.values()) / 1e9, 2) == 0.96
    assert made.decoder.lm_head is None and made._grid(256, 256) == (32, 32)


def test_the_shipped_size_fits():
    counts, _ = counted("synergen/tiny")
    assert 2 * sum(counts.values()) < 12e6


# ---- analyses ---------------------------------------------------------------------------------------------------


def test_a_picture_read_and_drawn_is_the_same_at_the_inputs_and_parts_later(model):
    pictures = [tiny.draw(f"d{i}", i, prompt) for i, prompt in enumerate(("a blue star", "two red squares", "a cross"))]
    found = layers.similarity(model, pictures)
    assert [r["layer"] for r in found] == [0, 1, 2, "norm"]
    assert found[0]["same"]["value"] == pytest.approx(1.0, abs=1e-5) and found[0]["centred"] == pytest.approx(
        1, abs=1e-5
    )
    assert found[2]["same"]["value"] < 0.99 and all(r["other"] < r["same"]["value"] for r in found)
    twin = [replace(s, messages=(user(layers.INSTRUCTION), s.messages[1])) for s in pictures]
    assert layers.similarity(model, twin)[2]["same"]["value"] != found[2]["same"]["value"]
    with pytest.raises(ValueError, match="does not ask for one picture in words"):
        layers.similarity(model, [tiny.ask(), tiny.ask()])
    wide = [tiny.draw(s.id, 7 + i, s.prompt, (64, 32)) for i, s in enumerate(pictures)]
    made = tiny.shake(store.create("synergen", replace(tiny.synergen(), draw=SizeRule(32, 32, 32))))  # cut when drawn
    assert layers.similarity(made.eval(), wide)[0]["same"]["value"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="64 x 32 pixels and would read these otherwise"):
        layers.similarity(model, wide)
    with pytest.raises(ValueError, match="family 'bagel' does not read pictures as the tokens"):
        layers.similarity(tiny.model("bagel"), pictures)


def test_locality_of_known_attention(model):
    at = torch.arange(8)
    row, column = at // 2, at % 2
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    far = torch.cdist(torch.stack([row, column], 1).float()[None], torch.stack([row, column], 1).float()[None])[0]
    itself, up = torch.eye(8).double(), torch.roll(torch.eye(8).double(), -2, 1).tril()
    up[:2] = torch.eye(8).double()[:2]
    assert layers._measure(itself, near, far, 2) == {"locality": 1.0, "distance": 0.0, "periodicity": 0.0}
    assert layers._measure(up, near, far, 2)["distance"] == pytest.approx(6 / 8)
    assert layers._lags(up)[2] == 1.0 and layers._lags(itself)[0] == 1.0
    found = layers.locality(model, [tiny.draw("a", 1), tiny.draw("b", 2)])
    assert found.first.grid == (4, 2) and set(found.rows) == set(layers.TASKS)
    for task in layers.TASKS:
        assert found.maps[task].shape[0] == 2 and np.allclose(found.maps[task].sum(-1), 1, atol=1e-5)
        for r in found.rows[task]:
            assert 0 < r["locality"] <= 1 and 0 < r["to text"] < 1 and r["distance"] > 0
    made = analyze.run_locality({"m": model}, [tiny.draw("a", 1)], "draw")
    assert set(made.figures) == {"locality", "regions"} and all(len(png) > 5000 for png in made.figures.values())
    json.dumps(made.numbers)


def test_probes_of_other_families_look_at_this_one_too(model):
    """Attention to words while drawing: the head's own attention is not taken for the sequence's."""
    found = keywords(model, ["a blue star"], {"object": frozenset({"star"})}, steps=2)
    assert found.share.shape == (1, 2, 2, 2) and found.times == (None, None)
    assert points(model) == ("projector", "layer.0", "layer.1")
