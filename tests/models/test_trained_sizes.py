"""The sizes that a model was trained on: one rule for every request, and pictures of any size are read at them."""

from __future__ import annotations

import PIL.Image
import pytest

from diptych.core.sample import Image, Sample, Text, assistant, user
from diptych.data.worlds import shapes_sources
from diptych.generation.engine import Engine
from diptych.models import store, table
from diptych.models.protocol import fitted
from diptych.models.sizes import Sizes

UNIFIED = [n for n, size in table.SIZES.items() if size.family != "autoencoder"]
TINY = [n for n in UNIFIED if table.SIZES[n].folder and (table.SHIPPED / str(table.SIZES[n].folder)).is_dir()]


@pytest.mark.parametrize("name", UNIFIED)
def test_every_size_draws_its_default_and_says_what_else(name):
    sizes = table.config(name).trained
    assert sizes.allow(*sizes.default) and sizes.read >= 64
    low, high = sizes.shortest - sizes.stride, sizes.longest + sizes.stride
    for wrong in ((low, low), (high, high), (sizes.default[0] + 1, sizes.default[1]), (-64, 64), (0, 0)):
        with pytest.raises(ValueError, match=f"size must be .*{sizes.longest}.* not {wrong[0]}x{wrong[1]}"):
            sizes.check(*wrong)
    assert Sizes(**sizes.to_json() | {"default": sizes.default}) == sizes


def test_published_sizes():
    """BAGEL draws 512 to 1024 pixels (its inference script); the others one size each."""
    trained = {name: table.config(name).trained for name in UNIFIED}
    assert (trained["bagel/7b-mot"].shortest, trained["bagel/7b-mot"].longest) == (512, 1024)
    one = {"cheers/1.5b": 512, "iomm/b": 512, "synergen/2b": 512, "synergen/qwen2-0.5b": 256}
    assert all(trained[n].shortest == trained[n].longest == side for n, side in one.items())


def test_a_canvas_derived_from_an_edit_source_obeys_the_rule_of_a_requested_one():
    config = table.config("bagel/7b-mot")

    def canvas(width, height):
        source = PIL.Image.new("RGB", (width, height))
        return fitted(Sample("s", (user(Image(source), "red"), assistant(Image(None)))), config.trained, config.draw)

    assert canvas(2000, 1000) == (512, 1024)
    with pytest.raises(ValueError, match="2000x500 pixels gives a canvas of 1024x256, but size must be .* 512 to 1024"):
        canvas(2000, 500)


def test_models_are_listed_with_the_sizes_that_they_draw():
    rows = {row["name"]: row for row in store.list_models()}
    assert rows["bagel/7b-mot"]["sizes"]["range"] == "multiples of 16 from 512 to 1024"
    assert rows["cheers/1.5b"]["sizes"]["range"] == "512x512"
    assert rows["autoencoder/tiny"]["sizes"] is None


@pytest.fixture(scope="module", params=TINY)
def engine(request):
    return Engine(store.load(request.param), request.param)


def test_other_canvases_are_refused(engine):
    for size in ((128, 128), (32, 32), (64, 48), (256, 64)):
        with pytest.raises(ValueError, match=f"size must be .*trained on, not {size[0]}x{size[1]}"):
            engine.generate("a star", size=size)


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (640, 480), (48, 48)])
def test_pictures_of_other_sizes_are_read_as_well_as_those_of_training(engine, size):
    if not engine.sizes.allow(64, 64) or engine.sizes.shortest != 64:
        pytest.skip("trained on several sizes")
    rows = [shapes_sources.source("shapes/ask", "test", 64)[i] for i in range(12)]
    asked, answers = [], []
    for row in rows:
        [picture] = row.images()
        question = " ".join(p.text for p in row.messages[0].parts if isinstance(p, Text))
        resized = picture.pixels.resize(size, PIL.Image.Resampling.LANCZOS)
        asked.append(Sample(row.id, (user(Image(resized), question),)))
        answers.append(" ".join(p.text for p in row.messages[-1].parts if isinstance(p, Text)))
    right = sum(a.text.strip() == b for a, b in zip(engine.answers(asked), answers, strict=True))
    assert right >= 10


def test_an_edit_of_an_upload_is_drawn_at_the_size_of_training(engine):
    source = shapes_sources.source("shapes/edit", "test", 64)[0]
    picture = next(iter(source.images())).pixels
    large = picture.resize((256, 256), PIL.Image.Resampling.LANCZOS)
    edited = engine.edit(large, source.prompt).images[0]
    assert edited.size == engine.sizes.default


def test_extreme_shapes_are_read_with_a_warning(engine):
    with pytest.warns(UserWarning, match="a picture of 400x100 pixels has an aspect ratio above 2"):
        engine.ask(PIL.Image.new("RGB", (400, 100)), "what is it?", max_new_tokens=1)
    assert not engine.sizes.remarks(Sample("s", (user(Image(PIL.Image.new("RGB", (640, 480))), "?"), assistant())))
