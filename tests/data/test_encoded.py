"""What frozen encoders make of pictures is computed once, and training on it is training on the pictures."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace

import pytest
import torch

from diptych import cli
from diptych.core.batch import pack
from diptych.core.layout import Kind
from diptych.data import encoded
from diptych.data.catalog import sources
from diptych.recipes.run import precompute
from diptych.training.parameters import by_part, freeze
from tests.support import tiny
from tests.support.loading import make_loader
from tests.training.test_loop import losses, train

SETS = {"shapes/draw#24": 0.5, "shapes/ask#12": 0.3, "shapes/edit#12": 0.2}


def recipe(**changes):
    return tiny.recipe(**{"steps": 4, "data": SETS, "precision": "fp32"} | changes)


def with_posterior(base):
    row = json.loads(json.dumps(base.model))
    row["autoencoder"] |= {"posterior": True, "statistics": False}
    return replace(base, model=row)


@pytest.mark.parametrize("change", [lambda r: r, with_posterior], ids=["mean", "posterior"])
def test_training_on_encoded_pictures_is_training_on_pictures(change, tmp_path):
    plain = change(recipe())
    told = precompute(plain, tmp_path / "made", device="cpu", shard=10, batch=5)
    assert {name: t["rows"] for name, t in told.items()} == {
        "shapes/draw#24": 24,
        "shapes/ask#12": 12,
        "shapes/edit#12": 12,
    }
    assert [t["pictures"] for t in told.values()] == [24, 0, 24]  # a question's picture goes through no frozen encoder
    read = replace(plain, encoded=str(tmp_path / "made"))
    for a, b in zip(losses(train(plain, tmp_path / "a")), losses(train(read, tmp_path / "b")), strict=True):
        assert a[2:] == pytest.approx(b[2:], rel=1e-5) and a[:2] == b[:2]


def test_pixels_stay_only_where_the_layout_asks_for_them(tmp_path):
    made = tiny.model("bagel")
    precompute(recipe(), tmp_path, device="cpu", data=["shapes/draw#3", "shapes/edit#3"], shard=2)
    assert sorted(p.name for p in (tmp_path / "shapes" / "draw#3").iterdir()) == [
        "000000.tar",
        "000001.tar",
        "encoded.json",
    ]
    held = sources(["shapes/draw#3", "shapes/edit#3"], size=32, encoded=tmp_path)
    drawn, (source, target) = held["shapes/draw#3"][0].images(), held["shapes/edit#3"][0].images()
    assert all(i.image is None and i.size == (32, 32) and i.dimensions == (32, 32) for i in (*drawn, target))
    assert source.pixels.size == (32, 32) and set(source.encoded) == {"autoencoder"}  # the vision encoder is trained
    original = sources(["shapes/edit#3"], size=32)["shapes/edit#3"][0]
    laid, again = made.lay_out(original), made.lay_out(held["shapes/edit#3"][0])
    assert [s.encoded for s in again.segments if s.image is not None] == [True, False, True]
    assert laid.describe() == again.describe()
    for name, kind in (("clean", Kind.CLEAN), ("noised", Kind.NOISED)):
        fresh, kept = (pack([x], 2).of(kind)[0].images for x in (laid, again))
        assert torch.allclose(made.encode("autoencoder", fresh), kept, atol=1e-6), name
    with pytest.raises(ValueError, match="picture has no pixels, only the features of autoencoder"):
        target.pixels  # noqa: B018


def test_another_encoder_or_other_pictures_are_refused(tmp_path):
    base = recipe(data={"shapes/draw#8": 1.0})
    precompute(base, tmp_path / "made", device="cpu")
    precompute(base, tmp_path / "made", device="cpu")  # nothing to do
    read = replace(base, encoded=str(tmp_path / "made"))
    with pytest.raises(ValueError, match="'shapes/draw#8' was encoded by another 'autoencoder'"):
        train(replace(read, seed=5), tmp_path / "other-weights")  # the tiny autoencoder's weights follow the seed
    with pytest.raises(ValueError, match="holds something else .digests was"):
        precompute(replace(base, seed=5), tmp_path / "made", device="cpu")
    with pytest.raises(ValueError, match="'size': 32}, not from .*'size': 48"):
        train(replace(read, size=48), tmp_path / "other-size")
    row = json.loads(json.dumps(base.model))
    row["draw"]["longest"] = 64
    with pytest.raises(ValueError, match="weights or settings changed"):
        train(replace(read, model=row), tmp_path / "other-settings")
    with pytest.raises(ValueError, match="unknown encoders .'vision'.; bagel has: autoencoder"):
        precompute(base, tmp_path / "x", device="cpu", encoders=["vision"])


def test_a_killed_encoding_goes_on_and_bad_members_are_skipped(tmp_path):
    base, folder = recipe(data={"shapes/draw#8": 1.0}), tmp_path / "shapes" / "draw#8"
    precompute(base, tmp_path, device="cpu", shard=3)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "000001.tar").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards .000001.tar"):
        sources(["shapes/draw#8"], size=32, encoded=tmp_path)
    precompute(base, tmp_path, device="cpu", shard=3, rank=1, world=2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with tarfile.open(folder / "000002.tar") as opened:
        at = opened.getmember("000000006.safetensors").offset_data
    with (folder / "000002.tar").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 64)
    held = sources(["shapes/draw#8"], size=32, encoded=tmp_path)
    rows = make_loader(
        held, {"shapes/draw#8": 1.0}, tiny.model("bagel").lay_out, tokens=192, pictures=8, routes=2, streams=1
    )
    for _ in zip(range(4), rows):  # noqa: B905
        pass
    assert (
        list(rows.skipped) == ["shapes/draw#8/6"]
        and "000000006: member .safetensors is damaged" in rows.skipped["shapes/draw#8/6"]
    )


def test_from_the_command_line(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(recipe(steps=2).to_json())
    out = tmp_path / "made"
    command = [
        "data",
        "precompute",
        str(tmp_path / "recipe.json"),
        "--device",
        "cpu",
        "--out",
        str(out),
        "--dtype",
        "bf16",
    ]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes/draw#24"]["rows"] == 24
    tensor = sources(["shapes/draw#24"], size=32, encoded=out)["shapes/draw#24"][3]
    assert next(tensor.images()).encoded["autoencoder"].dtype == torch.bfloat16
    run = [
        "train",
        str(tmp_path / "recipe.json"),
        "--out",
        str(tmp_path / "run"),
        "--encoded",
        str(out),
        "--device",
        "cpu",
    ]
    assert cli.main(run) == 0
    assert cli.main([*command, "--limit", "0"]) == 2 and "--limit must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_encoders_are_parts_that_a_stage_can_leave_frozen(family):
    made = tiny.model(family)
    parts = by_part(made)
    for name, encoder in made.encoders.items():
        inside = {n for n, _ in made.named_parameters() if n.startswith(tuple(f"{m}." for m in encoder.modules))}
        homes = {part for part, own in parts.items() if inside & own.keys()}
        trained = freeze(made, dict.fromkeys(parts.keys() - homes - made.frozen, 1.0))
        assert inside and trained and not any(made.get_parameter(n).requires_grad for n in inside), name
        assert all(hasattr(made.config, s) for s in encoder.settings)
        assert made.digest(name) == tiny.model(family).digest(name) != tiny.model(family, seed=1).digest(name)
    assert encoded.encoders_of({}) == set()
