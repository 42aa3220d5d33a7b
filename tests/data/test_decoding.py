"""Opening pictures: every pixel format becomes the same RGB, and nothing broken gets through."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from diptych.data.decoding import BROKEN, image_size, open_image


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
        ("WEBP", "RGB", {"lossless": True}),
        ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
        ("JPEG", "CMYK", {"quality": 95}),
    ],
)
def test_every_kind_is_rgb(kind, mode, options, tmp_path):
    data = encode(picture(mode), kind, **options)
    (tmp_path / "a").write_bytes(data)
    for image in (open_image(data, "a"), open_image(tmp_path / "a"), open_image(str(tmp_path / "a"))):
        assert image.mode == "RGB" and image.size == (8, 4)
        error = np.abs(np.asarray(image, int) - np.asarray(picture(), int)).max()
        assert error <= (8 if kind == "JPEG" else 0)
    assert image_size(data) == (8, 4)


def test_transparency_is_white():
    clear = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    assert [open_image(encode(clear, "PNG")).getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (127,) * 3]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putpixel((1, 0), 1)
    image = open_image(encode(palette, "PNG", transparency=0))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 0)]
    assert open_image(encode(PIL.Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_and_grey():
    deep = PIL.Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [open_image(encode(deep, "PNG")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert open_image(encode(PIL.Image.new("L", (1, 1), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(encode(PIL.Image.new("1", (1, 1), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_rotation_is_honoured():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image = open_image(encode(picture(), "PNG", exif=exif))
    assert image.size == (4, 8)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.getpixel((0, 7)) == (0, 0, 255)


def test_an_animation_is_its_first_frame():
    frames = [PIL.Image.new("RGB", (3, 3), c) for c in ("red", "blue")]
    image = open_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def noise() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_named(kind):
    data = encode(noise(), kind)
    with pytest.raises(ValueError, match="picture 'cat.x' is (corrupt or truncated|not a readable)"):
        open_image(data[: len(data) * 2 // 3], "cat.x")


def test_a_flipped_byte_is_found():
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="picture 'cat.png' is corrupt"):
        open_image(bytes(data), "cat.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_raise_value_error_or_open(kind):
    """Whatever the damage, the only error is ``ValueError`` with the name."""
    data, rng = encode(noise(), kind), np.random.default_rng(1)
    for _ in range(120):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            broken[place] = rng.integers(256)
        broken = broken[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else broken
        try:
            assert open_image(bytes(broken), "cat", max_pixels=10_000).mode == "RGB"
        except ValueError as error:
            assert "picture 'cat'" in str(error)


@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_huge_pictures_are_refused_before_decoding(size):
    """Below, between and above the limits that Pillow has itself."""
    with pytest.raises(ValueError, match="picture 'bomb.png' is too large.*limit 64000000"):
        open_image(bomb(*size), "bomb.png")


def test_limit_is_a_setting():
    with pytest.raises(ValueError, match="picture 'a' is too large: 8x4 pixels; limit 31"):
        open_image(encode(picture(), "PNG"), "a", max_pixels=31)
    assert open_image(encode(picture(), "PNG"), "a", max_pixels=32).size == (8, 4)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match="picture .*no.png' does not exist"):
        open_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        open_image(tmp_path, "folder")
    with pytest.raises(ValueError, match="'a.tif' is not a readable PNG, JPEG, WEBP, GIF, BMP file"):
        open_image(encode(picture(), "TIFF"), "a.tif")
    with pytest.raises(ValueError, match="'empty' is not a readable"):
        open_image(b"", "empty")
    with pytest.raises(ValueError, match="cannot be read"):
        open_image("a\0b", "null")


def test_truncated_reading_must_be_off(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is on"):
        open_image(encode(picture(), "PNG"))


def test_programming_errors_are_not_swallowed():
    assert not any(issubclass(e, (MemoryError, AttributeError, KeyboardInterrupt)) for e in BROKEN)
