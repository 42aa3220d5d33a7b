"""Opening pictures: every pixel format becomes the same RGB, and nothing broken gets through."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pytest
import torch

from diptych.data.decoding import (
    BROKEN,
    data_uri_bytes,
    formats,
    image_size,
    open_picture,
    picture_suffixes,
    suffixes,
)
from diptych.parts.images import data_uri, png_bytes

CASES = Path(__file__).parent / "cases"


def encode(image: PIL.Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(mode: str = "RGB") -> PIL.Image.Image:
    """Red left, blue right, 8 x 4."""
    image = PIL.Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    return image.convert(mode)


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims a huge size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("BMP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("JPEG2000", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
        ("JPEG", "CMYK", {"quality": 95}),
    ],
)
def test_every_kind_is_rgb(kind, mode, options, tmp_path):
    data = encode(picture(mode), kind, **options)
    (tmp_path / "a").write_bytes(data)
    for image in (open_picture(data, "a"), open_picture(tmp_path / "a"), open_picture(str(tmp_path / "a"))):
        assert image.mode == "RGB" and image.size == (8, 4)
        error = np.abs(np.asarray(image, int) - np.asarray(picture(), int)).max()
        assert error <= (8 if kind == "JPEG" else 0)
    assert image_size(data) == (8, 4)


def test_transparency_is_white():
    clear = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    assert [open_picture(encode(clear, "PNG")).getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (127,) * 3]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putpixel((1, 0), 1)
    image = open_picture(encode(palette, "PNG", transparency=0))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 0)]
    assert open_picture(encode(PIL.Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_and_grey():
    deep = PIL.Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [open_picture(encode(deep, "PNG")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert open_picture(encode(PIL.Image.new("L", (1, 1), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(encode(PIL.Image.new("1", (1, 1), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_rotation_is_honoured():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image = open_picture(encode(picture(), "PNG", exif=exif))
    assert image.size == (4, 8)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((0, 7)) == (0, 0, 255)


def test_an_animation_is_its_first_frame():
    frames = [PIL.Image.new("RGB", (3, 3), c) for c in ("red", "blue")]
    image = open_picture(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def noise() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"]


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_named(kind):
    data = encode(noise(), kind)
    with pytest.raises(ValueError, match="picture 'cat.x' is (corrupt or truncated|not a readable)"):
        open_picture(data[: len(data) * 2 // 3], "cat.x")


def test_a_flipped_byte_is_found():
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="picture 'cat.png' is corrupt"):
        open_picture(bytes(data), "cat.png")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_value_error_or_open(kind):
    """Whatever the damage, the only error is ``ValueError`` with the name."""
    data, rng = encode(noise(), kind), np.random.default_rng(1)
    for _ in range(120):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            broken[place] = rng.integers(256)
        broken = broken[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else broken
        try:
            assert open_picture(bytes(broken), "cat", max_pixels=10_000).mode == "RGB"
        except ValueError as error:
            assert "picture 'cat'" in str(error)


@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_huge_pictures_are_refused_before_decoding(size):
    """Below, between and above the limits that Pillow has itself."""
    with pytest.raises(ValueError, match="picture 'bomb.png' is too large.*limit 64000000"):
        open_picture(bomb(*size), "bomb.png")


def test_limit_is_a_setting():
    with pytest.raises(ValueError, match="picture 'a' is too large: 8x4 pixels; limit 31"):
        open_picture(encode(picture(), "PNG"), "a", max_pixels=31)
    assert open_picture(encode(picture(), "PNG"), "a", max_pixels=32).size == (8, 4)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="picture .*no.png' does not exist"):
        open_picture(tmp_path / "no.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        open_picture(tmp_path, "folder")
    with pytest.raises(ValueError, match="'a.ppm' is not a readable PNG, JPEG, WEBP, GIF, BMP"):
        open_picture(encode(picture(), "PPM"), "a.ppm")
    with pytest.raises(ValueError, match="'a.svg' is not .*it is SVG, which this Pillow does not read"):
        open_picture(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg")
    with pytest.raises(ValueError, match="'a.jxl' is not .*it is JXL, which this Pillow does not read"):
        open_picture(b"\xff\x0a" + b"\0" * 40, "a.jxl")
    with pytest.raises(ValueError, match="'empty' is not a readable"):
        open_picture(b"", "empty")
    with pytest.raises(ValueError, match="cannot be read"):
        open_picture("a\0b", "null")


def test_truncated_reading_must_be_off(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is on"):
        open_picture(encode(picture(), "PNG"))


def test_programming_errors_are_not_swallowed():
    assert not any(issubclass(e, (MemoryError, AttributeError, KeyboardInterrupt)) for e in BROKEN)


# ---- one truth, whatever a picture comes as -------------------------------------------------------------------------


def pixels(image: PIL.Image.Image) -> list[list[list[int]]]:
    return np.asarray(image).tolist()


@pytest.mark.parametrize("case", ["sideways.png", "cutout.png", "icc.png"])
def test_every_way_in_shows_the_same(case):
    path = CASES / case
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = open_picture(path)
    ways = [str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), uri]
    ways += [PIL.Image.open(io.BytesIO(data)), PIL.Image.open(io.BytesIO(data)).copy(), expected]
    for source in ways:
        image = open_picture(source)
        assert (image.mode, image.size, image.info) == ("RGB", expected.size, {})
        assert pixels(image) == pixels(expected)
    with path.open("rb") as file, PIL.Image.open(path) as image:
        assert pixels(open_picture(file)) == pixels(open_picture(image)) == pixels(expected)
    assert pixels(open_picture("https://a.example/x.png", fetch={"https://a.example/x.png": data}.get)) == pixels(
        expected
    )


def test_the_caller_s_image_is_left_as_it_is():
    with PIL.Image.open(CASES / "sideways.png") as image:
        size, info = image.size, dict(image.info)
        assert open_picture(image).size == size[::-1]
        assert (image.size, image.info) == (size, info)


def test_a_colour_profile_is_applied():
    """The file's pixels are (200, 30, 30); its profile exchanges red and green."""
    assert np.abs(np.array(open_picture(CASES / "icc.png").getpixel((0, 0))) - (30, 200, 30)).max() <= 2
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "RGBA", "P", "LA"):  # what is in sRGB stays to the bit, and a grey has no use for red
        image = picture(mode)
        assert pixels(open_picture(encode(image, "PNG", icc_profile=srgb))) == pixels(
            open_picture(encode(image, "PNG"))
        )


def test_a_profile_reaches_transparent_and_palette_pictures():
    with PIL.Image.open(CASES / "icc.png") as opened:
        profile = opened.info["icc_profile"]
    red = PIL.Image.new("RGB", (2, 2), (200, 30, 30))
    for image in (red.convert("RGBA"), red.quantize(2)):
        shown = open_picture(encode(image, "PNG", icc_profile=profile))
        assert np.abs(np.array(shown.getpixel((0, 0))) - (30, 200, 30)).max() <= 2, image.mode


def test_damaged_metadata_costs_no_pixels():
    image = picture()
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    for data in (
        encode(image, "PNG", pnginfo=text),
        encode(image, "PNG", icc_profile=b"no profile"),
        encode(image, "PNG", icc_profile=bytes(2**21)),
        encode(image, "PNG", exif=b"Exif\0\0broken"),
        encode(image, "WEBP", lossless=True, icc_profile=b"no profile"),
    ):
        assert pixels(open_picture(data)) == pixels(image)
    assert open_picture(CASES / "workflow.png").getpixel((0, 0)) == (220, 20, 20)


def test_the_orientation_in_a_small_text_still_counts():
    text = PIL.PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>')
    assert open_picture(encode(picture(), "PNG", pnginfo=text)).size == (4, 8)


def test_arrays_and_tensors():
    image = picture()
    array = np.asarray(image)
    channels_first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    clear = np.concatenate([array, np.zeros((4, 8, 1), np.uint8)], 2)
    for source in (array, array / 255, (array / 255).astype(np.float32), channels_first, channels_first / 255):
        assert pixels(open_picture(source)) == pixels(image)
    assert pixels(open_picture(channels_first.bfloat16() / 255)) == pixels(image)  # 0 and 1 alone: exact
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    grey = np.full((2, 3), 0.5)
    for source in (grey, grey[:, :, None], torch.full((2, 3), 0.5), torch.full((1, 2, 3), 0.5)):
        assert open_picture(source).size == (3, 2) and open_picture(source).getpixel((0, 0)) == (128,) * 3
    assert open_picture(np.array([[True, False]])).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\).*H x W x C"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\).*C x H x W"),
        (torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 8, 8\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4), np.int64), "int64; use uint8"),
        (np.full((4, 4), 200.0), r"floats from 200 to 200; they must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), -1.0), r"floats from -1 to -1.*\(x \+ 1\) / 2"),
        (np.full((4, 4), np.nan), "floats from nan"),
        (io.StringIO("x"), "open as text"),
        (7, "is a int; a picture is a path, bytes"),
        (None, "is a NoneType"),
        (["a.png"], "is a list"),
        ("https://a.example/x.png", "is a URL, and no URLs are fetched here"),
        ("file:///etc/passwd", "is a URL"),
        ("data:text/html;base64,AAAA", "must be a data URI of an image"),
        ("data:image/png;base64,A!AA", "not valid base64"),
        ("data:image/png;base64,", "it is empty"),
    ],
)
def test_what_is_no_picture_is_named(source, reason):
    with pytest.raises(ValueError, match=f"picture .*{reason}"):
        open_picture(source)


def test_other_schemes_are_not_fetched():
    with pytest.raises(ValueError, match="only http and https are fetched"):
        open_picture("ftp://a.example/x.png", fetch=lambda url: b"")


def test_a_closed_file_is_named(tmp_path):
    picture().save(tmp_path / "a.png")
    image = PIL.Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ValueError, match="picture .*a.png' .*closed"):
        open_picture(image)


def test_data_uris_as_they_are_written():
    data = png_bytes(picture())
    text = base64.b64encode(data).decode()
    wrapped = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for uri in (
        f"data:image/png;base64,{text}",
        f"data:image/jpg;base64,{text}",
        f"DATA:image/JPEG;BASE64,{text}",
        f"data:image/png;charset=utf-8;base64,{wrapped}",
        f"data:;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{text.replace('+', '%2B')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        data_uri(picture()),
        data_uri(data),
    ):
        assert data_uri_bytes(uri) == data, uri[:40]
        assert pixels(open_picture(uri)) == pixels(picture())


def test_sides_and_ratio_have_limits():
    narrow = PIL.Image.new("RGB", (1093, 5))
    for source in (narrow, png_bytes(narrow), np.asarray(narrow)):
        with pytest.raises(ValueError, match="too narrow: 1093x5 pixels; its sides may be at most 200 to 1"):
            open_picture(source)
    assert open_picture(narrow, max_ratio=300).size == (1093, 5)
    with pytest.raises(ValueError, match="picture 'a' is too large: 8x4 pixels; limit 7 a side"):
        open_picture(picture(), "a", max_side=7)
    with pytest.raises(ValueError, match="picture 'a' is too large: 8x4 pixels; limit 31"):
        open_picture(picture(), "a", max_pixels=31)


def test_deep_greys_and_transparent_values():
    deep = PIL.Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [p[0] for p in pixels(open_picture(deep))[0]] == [0, 128, 255]
    clear = open_picture(encode(deep, "PNG", transparency=0))
    assert [p[0] for p in pixels(clear)[0]] == [255, 128, 255]
    with pytest.raises(ValueError, match="at most 16 bits are read"):
        open_picture(PIL.Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ValueError, match="mode 'F' have no known range"):
        open_picture(PIL.Image.fromarray(np.array([[0.0, 1.0]], np.float32)))


def test_formats_and_suffixes_agree():
    assert {".png", ".jpg", ".jpe", ".jfif", ".tif"} <= set(suffixes()) <= set(picture_suffixes())
    assert (".avif" in suffixes()) == ("AVIF" in formats())
    assert ".svg" in picture_suffixes() and ".svg" not in suffixes()


def test_png_bytes_holds_pixels_alone():
    image = picture()
    image.info = {"icc_profile": b"x" * 999, "dpi": (300, 300)}
    assert png_bytes(image) == png_bytes(picture())
    with PIL.Image.open(io.BytesIO(png_bytes(image))) as opened:
        assert not opened.info


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16"])
@pytest.mark.parametrize("size", [(16, 16), (7, 13), (1, 1)])
def test_black_pictures_are_whole_pictures(mode, size):
    """The last row of a PNG that ends early is blank; so may that of a sound one be."""
    out = io.BytesIO()
    PIL.Image.new(mode, size).save(out, "PNG")
    assert open_picture(out.getvalue()).size == size
    head, rest = out.getvalue()[:33], out.getvalue()[33:]
    at = rest.index(b"IDAT") - 4
    packed = zlib.compress(zlib.decompress(rest[at + 8 : at + 8 + int.from_bytes(rest[at : at + 4], "big")])[:-1])
    chunk = len(packed).to_bytes(4, "big") + b"IDAT" + packed + zlib.crc32(b"IDAT" + packed).to_bytes(4, "big")
    short = head + rest[:at] + chunk + rest[rest.index(b"IEND") - 4 :]
    with pytest.raises(ValueError, match="corrupt or truncated"):
        open_picture(short)
    with pytest.raises(ValueError, match="corrupt or truncated"), PIL.Image.open(io.BytesIO(short)) as image:
        open_picture(image)
