"""A sheet of laid-out samples: pictures, text and segments (``diptych data show``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from diptych.core.layout import Kind, Layout
from diptych.core.sample import Image, Sample, Text
from diptych.data.contact_sheet import clip, wrap
from diptych.data.mixture import Source
from diptych.data.written import check_picture_path, save_picture

WIDTH, MARGIN, PAD, THUMB, TEXT = 1280, 28, 20, 144, 420  # pixels
PAPER, CARD, EDGE, INK, SOFT = "#f1f2f6", "#ffffff", "#dfe2ea", "#1c2333", "#697086"
KINDS = {
    Kind.TEXT: "#5b7fc7",
    Kind.VISION: "#3fa37c",
    Kind.CLEAN: "#8dbf4f",
    Kind.NOISED: "#e0853d",
    Kind.CODES: "#c2579a",
    Kind.QUERY: "#8a6fd1",
    Kind.PAD: "#b9bdc9",
}
ROLES = {"understand": "#3fa37c", "condition": "#8dbf4f", "target": "#e0853d"}
SPEAKERS = {"system": "#8b90a0", "user": "#41506f", "assistant": "#5b7fc7"}
PLAIN, BOLD, MONO = "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf"


def show(
    sources: Mapping[str, Source],
    lay_out: Callable[[Sample], Layout],
    decode: Callable[[list[int]], str] | None,
    n: int,
    path: str | Path,
) -> PIL.Image.Image:
    """A contact sheet of ``n`` samples, taken from the sources in turn, written to ``path`` and returned.

    A card shows the conversation (pictures framed in the colour of their role, texts that carry loss underlaid), the
    laid-out segments as a bar, and ``Layout.describe(decode)``. Raises ``ValueError`` where ``path`` is a file that
    this library did not write, or is no .png, .jpg or .webp.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    check_picture_path(path := Path(path))
    turns = ((name, source, i) for i in range(n) for name, source in sources.items() if i < len(source))
    picked = list(islice(turns, n))
    if not picked:
        raise ValueError("there is nothing to show: no source has a sample")
    cards = [_card(name, sample := source[index], lay_out(sample), decode) for name, source, index in picked]
    head = 96
    sheet = PIL.Image.new("RGB", (WIDTH, head + sum(c.height + PAD for c in cards) + MARGIN - PAD), PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    title, bold = f"{len(cards)} samples from {', '.join(dict.fromkeys(p[0] for p in picked))}", _font(BOLD, 22)
    draw.text((MARGIN, 22), clip(title, bold, WIDTH - 2 * MARGIN), INK, bold)
    _legend(draw, MARGIN, 62)
    y = head
    for card in cards:
        sheet.paste(card, (MARGIN, y))
        y += card.height + PAD
    save_picture(sheet, path)
    return sheet


def _legend(draw: PIL.ImageDraw.ImageDraw, x: int, y: int) -> None:
    small = _font(PLAIN, 13)
    for kind, colour in KINDS.items():
        if kind != Kind.PAD:
            draw.rounded_rectangle((x, y, x + 14, y + 14), 3, colour)
            draw.text((x + 20, y), str(kind), SOFT, small)
            x += 40 + round(draw.textlength(str(kind), small))
    legend = "frames: role of the picture      underlaid or dark line: carries loss"
    draw.text((WIDTH - MARGIN - draw.textlength(legend, small), y), legend, SOFT, small)


def _card(name: str, sample: Sample, sequence: Layout, decode: Callable[[list[int]], str] | None) -> PIL.Image.Image:
    width, inner = WIDTH - 2 * MARGIN, WIDTH - 2 * MARGIN - 2 * PAD
    mono, small, bold = _font(MONO, 13), _font(PLAIN, 13), _font(BOLD, 16)
    talk = _flow([_turn(message.role, message.parts, inner) for message in sample.messages], inner, 28)
    lines = [clip(line, mono, inner) for line in sequence.describe(decode).split("\n")[1:]]
    below = 52 + talk.height + 20
    height = below + 50 + 20 * len(lines) + 12
    card = PIL.Image.new("RGB", (width, height), PAPER)
    draw = PIL.ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), 12, CARD, EDGE)
    words = sum(s.supervised for s in sequence.segments)
    counts = f"tokens {len(sequence)} · pictures {sequence.pictures} · words with loss {words}"
    draw.text((width - PAD - draw.textlength(counts, small), 20), counts, SOFT, small)
    draw.text((PAD, 17), name, INK, bold)
    left = PAD + draw.textlength(name, bold) + 14
    room = width - PAD - left - draw.textlength(counts, small) - 20
    draw.text((left, 20), clip(sample.id.removeprefix(f"{name}/"), small, round(room)), SOFT, small)
    card.paste(talk, (PAD, 52))
    _bar(draw, sequence, PAD, below, inner)
    for i, (segment, line) in enumerate(zip(sequence.segments, lines, strict=True)):
        y = below + 50 + 20 * i
        draw.rounded_rectangle((PAD, y + 2, PAD + 7, y + 15), 2, KINDS[segment.kind])
        draw.text((PAD + 6, y), line, INK, mono)
    return card


def _bar(draw: PIL.ImageDraw.ImageDraw, sequence: Layout, x: int, y: int, width: int) -> None:
    """Segments side by side, as wide as they are long but never too thin to see; loss is the dark line below."""
    small, least, gap = _font(BOLD, 12), 4, 2
    lengths = [len(s) for s in sequence.segments]
    free = width - (least + gap) * len(lengths)
    at = float(x)
    for segment, length in zip(sequence.segments, lengths, strict=True):
        wide = least + max(free, 0) * length / sum(lengths)
        draw.rounded_rectangle((round(at), y, round(at + wide), y + 28), 4, KINDS[segment.kind])
        for text in (f"{segment.kind} {length}", str(length)):
            if draw.textlength(text, small) + 8 < wide:
                draw.text((at + wide / 2, y + 14), text, "white", small, anchor="mm")
                break
        if segment.supervised or segment.kind == Kind.NOISED:
            draw.rectangle((round(at), y + 32, round(at + wide), y + 34), INK)
        at += wide + gap


def _turn(role: str, parts: tuple[Text | Image, ...], width: int) -> PIL.Image.Image:
    """One message: who speaks, and its parts below."""
    body, bold = _font(PLAIN, 16), _font(BOLD, 13)
    boxes = [_picture(p) if isinstance(p, Image) else _text(p, body, min(TEXT, width)) for p in parts]
    parts_box = _flow(boxes, width, 12)
    turn = PIL.Image.new("RGB", (max(parts_box.width, round(bold.getlength(role)) + 1), parts_box.height + 24), CARD)
    PIL.ImageDraw.Draw(turn).text((0, 0), role, SPEAKERS.get(role, SOFT), bold)
    turn.paste(parts_box, (0, 24))
    return turn


def _flow(boxes: list[PIL.Image.Image], width: int, gap: int) -> PIL.Image.Image:
    """The boxes from left to right, in as many lines as they need."""
    places: list[tuple[int, int]] = []
    x = y = tall = 0
    for box in boxes:
        if x and x + box.width > width:
            x, y, tall = 0, y + tall + gap, 0
        places.append((x, y))
        x, tall = x + box.width + gap, max(tall, box.height)
    wide = max((x + box.width for box, (x, _) in zip(boxes, places, strict=True)), default=1)
    out = PIL.Image.new("RGB", (wide, max(y + tall, 1)), CARD)
    for box, place in zip(boxes, places, strict=True):
        out.paste(box, place)
    return out


def _picture(image: Image) -> PIL.Image.Image:
    """The picture in a frame of its role's colour, the role and its size below."""
    pixels, small = image.pixels, _font(PLAIN, 12)
    scale = min(THUMB / pixels.height, 3 * THUMB / pixels.width)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    enlarge = scale > 1 and max(pixels.size) <= THUMB  # keep the pixels of tiny pictures visible
    thumb = pixels.resize(size, PIL.Image.Resampling.NEAREST if enlarge else PIL.Image.Resampling.LANCZOS)
    label = f"{image.role} {pixels.width}x{pixels.height}"
    box = PIL.Image.new("RGB", (max(size[0] + 6, round(small.getlength(label))), size[1] + 24), CARD)
    draw = PIL.ImageDraw.Draw(box)
    draw.rectangle((0, 0, size[0] + 5, size[1] + 5), ROLES[image.role])
    box.paste(thumb, (3, 3))
    draw.text((0, size[1] + 8), label, ROLES[image.role], small)
    return box


def _text(text: Text, font: PIL.ImageFont.FreeTypeFont, width: int, most: int = 6) -> PIL.Image.Image:
    """The text wrapped; a long one ends in an ellipsis."""
    lines = wrap(text.text, font, width - 16)
    if len(lines) > most:
        lines = [*lines[: most - 1], clip(lines[most - 1] + " …", font, width - 16)]
    wide = max((round(font.getlength(line)) for line in lines), default=0) + 16
    box = PIL.Image.new("RGB", (wide, 22 * len(lines) + 4), CARD)
    draw = PIL.ImageDraw.Draw(box)
    if text.loss:
        draw.rounded_rectangle((0, 0, wide - 1, box.height - 1), 6, "#fdeedd")
    for i, line in enumerate(lines):
        draw.text((8, 2 + 22 * i), line, INK, font)
    return box


def _font(face: str, size: int) -> PIL.ImageFont.FreeTypeFont:
    """DejaVu, as it comes with matplotlib."""
    import matplotlib

    return PIL.ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", face)), size)
