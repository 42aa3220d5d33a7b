"""Looking inside a model: attention is what the network computes, measures are right where the answer is known, nothing
is left behind. (The published probes are compared in tests/parity/bagel.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from diptych import cli
from diptych.analysis import attention, collect, keywords, published, run, separability
from diptych.core import intervals
from diptych.core.batch import pack
from diptych.core.mask import dense
from diptych.core.sample import Image, Sample, assistant, user
from diptych.core.tensors import NONE
from tests.support import tiny

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return tiny.shake(tiny.model(request.param))


def request(sample=None):
    return attention.request(sample or tiny.ask())


# ---- attention as computed -------------------------------------------------------------------------------------------


def test_one_layer_by_hand():
    """q = RoPE(q_norm(W_q LN(x) + b)), k alike, softmax under the rule: written out for the first layer."""
    model = tiny.shake(tiny.model("bagel"))
    sequence, seen = model.lay_out(request()), {}
    layer = collect.layers(model)[0]
    entered = []
    handle = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    collect.read(model, sequence, lambda i, call: seen.__setitem__(i, call.weights()))
    handle.remove()
    own = layer.self_attn[0]
    with torch.no_grad():
        x = entered[0].clone()
        h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.input_layernorm[0].weight
        positions = torch.tensor(sequence.positions(), dtype=torch.float)

        def rotated(project, norm):
            y = F.linear(h, project.weight, project.bias).unflatten(-1, (-1, own.width))
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            half = own.width // 2
            angle = positions[:, None] * 1e6 ** (-torch.arange(half) / half)
            c, s = angle.cos()[:, None], angle.sin()[:, None]
            a, b = y[..., :half], y[..., half:]
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        q, k = rotated(own.q_proj, own.q_norm), rotated(own.k_proj, own.k_norm)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / own.width**0.5
        expected = scores.masked_fill(~dense(pack([sequence], 2)), -torch.inf).softmax(-1)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)


def test_weights_follow_every_form_of_mask():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 3), (2, 5)))
    allowed = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    by_head = allowed.expand(2, 4, 3, 5).clone()
    by_head[1, 2, :, 0] = False
    bias = torch.randn(3, 5, generator=generator).masked_fill(~allowed, -torch.inf)
    for mask in (None, allowed, allowed[None, None], by_head, bias):
        call = collect.AttentionCall(0, q, k, mask, False, None)
        v = torch.eye(5).expand(2, 2, 5, 5)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        for item in range(2):
            torch.testing.assert_close(call.weights(item), out[item])
            torch.testing.assert_close(call.weights(item, torch.tensor([2])), out[item][:, [2]])
    causal = collect.AttentionCall(0, q, q, None, True, 0.5)
    out = F.scaled_dot_product_attention(q, q, torch.eye(3).expand(2, 4, 3, 3), is_causal=True, scale=0.5)
    torch.testing.assert_close(causal.weights(1), out[1])


def test_rows_sum_to_one_and_respect_the_rule(model):
    sequence, seen = model.lay_out(request()), []
    collect.read(model, sequence, lambda i, call: seen.append(call.weights()))
    assert len(seen) == len(collect.layers(model)) > 0
    hidden = ~dense(pack([sequence], model.routes))
    for w in seen:
        assert w.shape[1:] == (len(sequence), len(sequence))
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
        assert float(w[:, hidden].abs().max()) == 0


def test_allocation_sums_to_one_and_markers_count_where_asked(model):
    samples = [tiny.ask(f"ask{i}", i) for i in range(3)]
    for rows in ("answer", "question"):
        without, counted = (attention.allocation(model, samples, rows, markers) for markers in (False, True))
        for found in (without, counted):
            assert found.picture.shape == (3, len(collect.layers(model)))
            np.testing.assert_allclose(found.picture + found.text + found.markers, 1, atol=1e-5)
        assert (without.markers > 0).all() and np.allclose(counted.markers, 0)
        assert (counted.text > without.text).all()
        own = collect.places(model, request(samples[0]), model.lay_out(request(samples[0]))).picture_markers.any()
        assert (counted.picture > without.picture).all() if own else np.allclose(counted.picture, without.picture)
    rows = without.to_json()
    assert rows[0]["picture"]["low"] < rows[0]["picture"]["value"] < rows[0]["picture"]["high"]


def test_the_answer_row_is_the_last_of_the_request(model):
    sample = tiny.ask()
    sequence, last = model.lay_out(request(sample)), []
    p = collect.places(model, request(sample), sequence)
    collect.read(model, sequence, lambda i, call: last.append(call.weights()[:, -1].mean(0)[p.picture].sum()))
    found = attention.allocation(model, [sample])
    np.testing.assert_allclose(found.picture[0], torch.stack(last).numpy(), rtol=1e-5)
    other = attention.allocation(model, [tiny.ask(answer="seven")])
    assert np.array_equal(other.picture, found.picture)  # the answer itself is never read


def test_places_are_told_apart(model):
    sample = request()
    sequence = model.lay_out(sample)
    p = collect.places(model, sample, sequence)
    groups = torch.stack([p.picture, p.picture_markers, p.text, p.text_markers])
    assert bool((groups.sum(0) == 1).all())
    ids = [i for s in sequence.segments for i in s.ids]
    assert model.tokenizer.decode([ids[i] for i in p.texts[0]]) == "how many stars are there?"
    assert p.speakers == ("user",)
    parts = collect.words(model, "how many stars are there?", p.texts[0])
    assert [w for w, _ in parts] == ["how", "many", "stars", "are", "there"]
    assert [i for _, at in parts for i in at] == list(p.texts[0])


def test_change_is_in_percent_of_the_base():
    base = np.array([[0.2, 0.5], [0.4, 0.5]])
    found = attention.change(base * [1.1, 0.5], base)
    assert found[0]["value"] == pytest.approx(10) and found[1] == {"value": -50, "low": -50, "high": -50}
    with pytest.raises(ValueError, match="cannot compare 2 layers of 2 requests with 1 of 2"):
        attention.change(base, base[:, :1])


# ---- nothing is left behind ------------------------------------------------------------------------------------------


def test_watching_changes_nothing_and_leaves_no_hook(model):
    def answer():
        [context] = model.extend([model.open()], [model.lay_out(request())])
        star = Sample("d", (user("a star"), assistant(Image(None, "target"))))
        drawing = keywords.begin(model, star, model.settings, 3)
        while not drawing.done:
            [drawing] = model.step([drawing])
        return torch.cat([context.logits, drawing.state.flatten()])

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before, own = answer(), hooks()  # transformers has some of its own
    sdpa = F.scaled_dot_product_attention
    seen = []
    with collect.attention(model, lambda call: seen.append(float(call.weights().sum()))):
        during = answer()
    separability.features(model, [tiny.picture(0)], separability.points(model))
    attention.allocation(model, [tiny.ask()])
    published.published_attention(model, model.lay_out(tiny.request(tiny.ask())))
    with pytest.raises(ZeroDivisionError), collect.attention(model, lambda call: 1 / 0):
        answer()
    assert seen and torch.equal(before, during) and torch.equal(before, answer())
    assert F.scaled_dot_product_attention is sdpa
    assert hooks() == own


def test_layers_are_the_blocks_that_attend_over_the_sequence():
    model = tiny.model("bagel")
    assert [id(b) for b in collect.layers(model)] == [id(b) for b in model.decoder.layers]
    assert len(list(model.blocks())) == 3  # the vision encoder has one more


class Deaf(type(tiny.model("bagel"))):
    """A family whose blocks do not attend."""

    def blocks(self):
        yield self.projector


def test_a_family_that_does_not_attend_says_so():
    deaf = Deaf(tiny.bagel(), tiny.model("bagel").tokenizer)
    deaf.initialise(0)
    with pytest.raises(ValueError, match="no attention to look at"):
        attention.allocation(deaf.eval(), [tiny.ask()])


def test_families_that_lack_what_is_asked_say_so(model):
    with pytest.raises(ValueError, match=r"has no point 'retina'; it has .*layer.0 .. layer.1"):
        collect.module(model, "retina")
    for part in ("vision", "projector"):
        if part not in separability.points(model):
            with pytest.raises(ValueError, match=f"has no point '{part}'"):
                separability.features(model, [tiny.picture(0)], [part])
    with pytest.raises(ValueError, match="has no point 'layer.9'"):
        collect.module(model, "layer.9")
    with pytest.raises(ValueError, match="shows no picture"):
        attention.allocation(model, [tiny.say()])


# ---- separability ----------------------------------------------------------------------------------------------------


def blobs(classes: int, each: int, apart: float, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = apart * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), width, generator=generator, dtype=torch.float64), labels


def test_separable_features_are_separated_and_shuffled_labels_give_chance():
    x, labels = blobs(4, 40, 12.0)
    assert separability.accuracy(x, labels)[0] == 1
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    value, low, high = separability.accuracy(x, shuffled)
    assert low < 0.25 < high and value < 0.4
    assert separability.silhouette(x, labels) > 0.6 > 0.05 > separability.silhouette(x, shuffled)
    assert separability.discriminant_ratio(x, labels) > 20 > 1 > separability.discriminant_ratio(x, shuffled)


def test_folds_are_stratified():
    labels = torch.tensor([0] * 11 + [1] * 25)
    fold = separability.folds(labels, 5)
    for c in (0, 1):
        counts = fold[labels == c].bincount(minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    with pytest.raises(ValueError, match="class 0 has 3 pictures"):
        separability.folds(torch.tensor([0] * 3 + [1] * 9), 5)


def test_logistic_regression_finds_the_minimum():
    """Half of the rows at -1 and all at +1 are of class 1, so the classes part a little left of -1."""
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64).repeat(10, 1)
    labels = torch.tensor([0, 1, 1, 1]).repeat(10)
    predict = separability.logistic(x, labels)
    assert predict(torch.tensor([[-4.0], [-0.5], [4.0]])).tolist() == [0, 1, 1]
    easy, truth = blobs(3, 30, 6.0)
    assert torch.equal(separability.logistic(easy, truth)(easy), truth)


def test_measures_by_hand():
    x = torch.tensor([[0.0, 0], [2, 0], [10, 0], [12, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert separability.discriminant_ratio(x, labels) == pytest.approx(100 / 4)
    each = [(11 - 2) / 11, (9 - 2) / 9, (9 - 2) / 9, (11 - 2) / 11]
    assert separability.silhouette(x, labels) == pytest.approx(sum(each) / 4)
    assert separability.silhouette(x[:3], labels[:3]) == pytest.approx((0.8 + 0.75 + 0) / 3)


def test_tsne_keeps_neighbours_together():
    x, labels = blobs(3, 40, 10.0)
    y = separability.tsne(x, perplexity=15.0)
    assert torch.equal(y, separability.tsne(x, perplexity=15.0))  # the seed is fixed
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert float((labels[nearest] == labels).float().mean()) > 0.98
    p = separability._neighbours(x.numpy(), 15.0)
    assert p.sum() == pytest.approx(1) and np.allclose(p, p.T)
    with pytest.raises(ValueError, match="needs more than 90 points, not 60"):
        separability.tsne(x[:60])


def test_features_are_means_over_the_pictures_own_tokens(model):
    pictures = [tiny.picture(0), tiny.picture(1, 48, 32), tiny.picture(2), tiny.picture(3)]
    at = separability.points(model)
    together = separability.features(model, pictures, at)
    for i, picture in enumerate(pictures):
        alone = separability.features(model, [picture], at)
        for name in at:
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-5, rtol=1e-4)
            assert float(together[name][i].norm()) == pytest.approx(1)
    laid = model.lay_out(Sample("p", (user(Image(pictures[0])),)))
    kept = {}
    modules = {name: collect.module(model, name) for name in at}
    with collect.outputs(modules, kept.__setitem__):
        model.extend([model.open()], [laid])
    order = torch.cat(pack([laid], model.routes).routes)
    own = torch.tensor([s.image is not None and i == NONE for s in laid.segments for i in s.ids])[order]
    for name in at:
        rows = kept[name].flatten(0, -2)
        rows = rows[own] if name.startswith("layer.") else rows  # without markers
        torch.testing.assert_close(together[name][0], F.normalize(rows.mean(0).double(), dim=0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "family, parts",
    [
        ("bagel", ("vision", "projector")),
        ("cheers", ("vision", "projector")),
        ("iomm", ()),
        ("synergen", ("projector",)),
    ],
)
def test_points_are_what_a_family_has(family, parts):
    assert separability.points(tiny.model(family)) == (*parts, "layer.0", "layer.1")


@pytest.mark.parametrize("name", separability.SETS)
def test_sets_are_labelled_pictures(name):
    data = separability.labelled(name, 3, 32)
    assert len(data.pictures) == 3 * len(data.classes) == len(data.labels) and len(data.classes) >= 2
    assert {p.size for p in data.pictures} == {(32, 32)}
    again = separability.labelled(name, 3, 32)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(data.pictures, again.pictures, strict=True))
    assert len({p.tobytes() for p in data.pictures}) == len(data.pictures)


def test_intervals():
    assert intervals.wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    value, low, high = intervals.mean([1.0, 2.0, 3.0])
    assert (value, low, high) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


# ---- keywords --------------------------------------------------------------------------------------------------------


OUTSIDE = ("iomm", "omnigen2")  # their generators draw outside the sequence, so a picture attends to no prompt there


@pytest.fixture(scope="module", params=[f for f in tiny.FAMILIES if f not in OUTSIDE])
def drawer(request):
    """A family whose pictures attend to their prompt."""
    return tiny.shake(tiny.model(request.param))


def steps(model):
    sample = Sample("d", (user("a star"), assistant(Image(None, "target"))))
    return keywords.begin(model, sample, model.settings, 0).steps


@pytest.mark.parametrize("family", OUTSIDE)
def test_a_family_that_draws_outside_its_sequence_says_so(family):
    match = f"'{family}' has no attention to look at: .* a picture and the .* of its prompt"
    with pytest.raises(ValueError, match=match):
        keywords.keywords(tiny.model(family), ["a red star"], keywords.shapes_words())


def test_keyword_masses_sum_to_one(drawer):
    model = drawer
    prompts = ["a red circle left of a blue star", "two green squares above a cross"]
    found = keywords.keywords(model, prompts, keywords.shapes_words(), steps=3)
    assert found.classes == ("object", "colour", "position", "other")
    assert found.mass.shape == (2, 3, len(collect.layers(model)), 6)
    np.testing.assert_allclose(found.mass.sum(-1), 1, atol=1e-5)
    assert (found.mass > 0).all()
    np.testing.assert_allclose(found.share.sum(-1), 100, rtol=1e-9)
    assert found.steps[0] == 0 and found.steps[-1] == steps(model) - 1
    assert found.even.sum() == pytest.approx(100)


def test_words_get_their_classes(model):
    sample = Sample("p", (user("Two red circles, left of a star!"), assistant(Image(None, "target"))))
    number, said = keywords.classify(model, sample, keywords.shapes_words())
    names = {"two": "other", "red": "colour", "circles": "object", "left": "position", "of": "position", "a": "other"}
    assert said == [*names.items(), ("star", "object")]
    laid = model.lay_out(sample)
    ids = [i for s in laid.segments for i in s.ids]
    colour = [ids[i] for i in range(len(ids)) if number[i] == 1]
    assert model.tokenizer.decode(colour).strip() == "red"


def test_keywords_refuse(drawer):
    model, most = drawer, steps(drawer)
    with pytest.raises(ValueError, match="no prompt has a word of class animal; they have a, red, star"):
        keywords.keywords(model, ["a red star"], {"animal": frozenset({"cat"})})
    with pytest.raises(ValueError, match=f"cannot look at {most + 1} of {most} steps"):
        keywords.keywords(model, ["a red star"], keywords.shapes_words(), steps=most + 1)
    with pytest.raises(ValueError, match="'other' is what no class names"):
        keywords.keywords(model, ["a red star"], {"other": frozenset({"a"})})


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)

    def go(probe, *words):
        code = cli.main(["analyze", probe, str(tiny_model), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from diptych.models import store

    folder = tmp_path_factory.mktemp("models") / "base"
    store.save(tiny.shake(tiny.model("bagel"), 2), folder)
    return folder


@pytest.mark.parametrize(
    "words, figures",
    [
        (("separability", "--data", "shapes/colours", "-n", 32, "--at", "vision,layer.1"), ("separability", "tsne")),
        (("attention", "-n", 3, "--size", 32, "--published"), ("attention",)),
        (
            ("keywords", "--prompt", "a red cat", "--words", "object=cat", "--words", "colour=red", "--steps", 2),
            ("keywords",),
        ),
    ],
    ids=lambda w: w[0],
)
@pytest.mark.parametrize("compare", [False, True], ids=["alone", "base"])
def test_analyze_writes_numbers_and_figures(call, base, words, figures, compare):
    code, out, err = call(*words, "--out", "found", "--json", *(["--against", base] if compare else []))
    assert code == 0, err
    told = json.loads(out)
    saved = json.loads(Path(told["files"][0]).read_text())
    assert saved == {k: v for k, v in told.items() if k != "files"}
    assert told["files"] == [f"found/{words[0]}.json", *(f"found/{name}.png" for name in figures)]
    for file in told["files"][1:]:
        with PIL.Image.open(file) as image:
            assert min(image.size) > 250 and len(image.convert("RGB").getcolors(10**6)) > 10
    assert len(saved["models"]) == 1 + compare
    assert any("change" in key for key in saved) == compare


def test_analyze_reads_a_folder_of_classes(call, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(48):
            tiny.picture(i + 100 * (name == "dogs")).save(tmp_path / "mine" / name / f"{i}.png")
    code, out, err = call("separability", "--data", "mine", "--at", "vision", "--json")
    assert code == 0, err
    assert json.loads(out)["classes"] == ["cats", "dogs"]


@pytest.mark.parametrize(
    "words, told",
    [
        (("separability", "--rows", "answer"), "No such option: --rows"),
        (("separability", "--data", "emoji/unicorns"), "unknown set 'emoji/unicorns'; choose from emoji/fruit"),
        (("separability", "--at", "retina"), "has no point 'retina'"),
        (("keywords", "--words", "object"), "--words takes CLASS=WORD,WORD, not 'object'"),
        (("keywords", "--steps", 0), "steps must be at least 1, not 0"),
        (("attention", "--data", "nothing"), "unknown data set 'nothing'"),
    ],
)
def test_analyze_refuses(call, words, told):
    code, out, err = call(*words)
    assert code == cli.BAD and not out and told in err


def test_sizes_of_embedded_pictures_follow_the_model(model):
    assert run.size(model) == 32
