"""Conversations: several turns about one picture, lettered options, small words to read, and what the model says of
itself.

Words to read are held out by word (``printable``), conversations by the scenes and canvases of their world.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from diptych.core.sample import Image, Message, assistant, user
from diptych.data.canvas import Generated, Made, pick
from diptych.data.worlds import choices, emoji, shapes, shapes_questions
from diptych.data.worlds.canvas_sources import canvas_info, inks, on
from diptych.data.worlds.emoji_scenes import article
from diptych.data.worlds.grounds import random_ground, random_size
from diptych.data.worlds.shapes_sources import random_draw, random_edit

# --- several turns ----------------------------------------------------------------------------------------------------


def questions_about(rng: np.random.Generator, scene: shapes.Scene) -> list[tuple[str, str, str]]:
    """One question of every type that can be asked about a scene without doubt: (type, question, answer)."""
    things = list(scene.things)
    kinds, by_shape, by_colour = (
        Counter(t.kind for t in things),
        Counter(t.shape for t in things),
        Counter(t.colour for t in things),
    )
    asked = [("count", "how many objects are there?", shapes.NUMBERS[len(things)])]
    noun = pick(rng, shapes.SHAPES)
    asked.append(("count", f"how many {shapes.plural(noun)} are there?", shapes.NUMBERS[by_shape[noun]]))
    if alone := [t for t in things if by_shape[t.shape] == 1]:
        thing = pick(rng, alone)
        asked.append(("colour", f"what colour is the {thing.shape}?", thing.colour))
    if alone := [t for t in things if by_colour[t.colour] == 1]:
        thing = pick(rng, alone)
        asked.append(("shape", f"what shape is the {thing.colour} object?", thing.shape))
    yes = rng.random() < 0.5
    absent = [(c, s) for c in shapes.COLOURS for s in shapes.SHAPES if (c, s) not in kinds]
    colour, shape = pick(rng, list(kinds)) if yes else pick(rng, absent)
    asked.append(("exists", f"is there a {colour} {shape}?", "yes" if yes else "no"))
    single = [t for t in things if by_shape[t.shape] == 1]
    if len(single) > 1:
        a, b = (single[i] for i in rng.permutation(len(single))[:2].tolist())
        true = shapes.relations(a, b)
        word = pick(rng, sorted(true)) if true and rng.random() < 0.5 else pick(rng, shapes.RELATIONS)
        asked.append(("position", f"is the {a.shape} {word} the {b.shape}?", "yes" if word in true else "no"))
    return asked


def _turn(rng: np.random.Generator, scene: shapes.Scene, avoid: tuple[str, ...] = ()) -> tuple[str, str, str]:
    return pick(rng, [row for row in questions_about(rng, scene) if row[1] not in avoid])


FORMS = ("draw, ask", "draw, ask, ask", "draw, edit", "draw, edit, ask", "show, ask, ask", "edit, ask")


def make_turns(rng: np.random.Generator, split: str, size: int, forms: tuple[str, ...] = FORMS) -> Made:
    """A conversation of two or three turns about a picture that is shown or drawn (``FORMS``); info: the form, the
    answer to the last question, the type of every turn, the scene after it, ground."""
    form = pick(rng, forms)
    side = (64, 64) if form.startswith("draw") else random_size(rng)  # a chat names no size to draw
    edit = random_edit(rng) if "edit" in form else None
    if edit:
        scene, text = edit.before, shapes.describe(edit.before)
    elif form.startswith("draw"):
        text, _, scene = random_draw(rng)
    else:
        scene, text = shapes.random_scene(rng), ""
    ground = random_ground(rng, split, side, inks(scene) + (inks(edit.after) if edit else []), white=0.6)
    seed = int(rng.integers(1 << 32))

    def shown(some: shapes.Scene) -> PIL.Image.Image:
        return shapes.render_on(np.random.default_rng(seed), ground, some, side)

    messages: list[Message] = []
    types: list[str] = []
    for turn in form.split(", "):
        if turn == "draw":
            messages += [user(on(text, ground)), assistant(Image(shown(scene), "target"))]
        elif turn == "edit":
            assert edit is not None
            source = () if messages else (Image(shown(edit.before), "condition"),)
            messages += [user(*source, edit.text), assistant(Image(shown(edit.after), "target"))]
            scene = edit.after
        elif turn == "show":
            continue
        else:
            earlier = tuple(p.text for m in messages for p in m.parts if not isinstance(p, Image))
            kind, question, answer = _turn(rng, scene, earlier)
            picture = () if messages else (Image(shown(scene)),)
            messages += [user(*picture, question), assistant(answer)]
            types.append(kind)
    last = messages[-1].parts[-1]
    answer = "" if isinstance(last, Image) else last.text
    info = {"type": form, "answer": answer, "turns": types, "scene": scene.to_json()}
    return tuple(messages), info | canvas_info(ground, side)


# --- lettered options -------------------------------------------------------------------------------------------------


def _choice(rng: np.random.Generator) -> choices.Asked:
    """A question about a scene with up to four options, of space or of ``shapes_questions``."""
    kind = pick(rng, (*choices.SPACE, "colour", "shape", "which"))
    if kind in choices.SPACE:
        return choices.SPACE[kind](rng)
    question = shapes_questions.random_question(rng, (kind,))
    every = list(shapes.COLOURS) if kind == "colour" else list(shapes.SHAPES)
    others = [word for word in every if word != question.answer]
    options = [question.answer, *(others[i] for i in rng.permutation(len(others))[: int(rng.integers(1, 4))].tolist())]
    return question.scene, question.text, options, question.answer


def make_options(rng: np.random.Generator, split: str, size: int) -> Made:
    """A picture and a question with lettered options, and the right one: "(B) red"; info: answer, letter, options."""
    scene, question, options, right = _choice(rng)
    letters, letter = choices.lettered(rng, options, right)
    side = random_size(rng)
    ground = random_ground(rng, split, side, inks(scene), white=0.6)
    picture = Image(shapes.render_on(rng, ground, scene, side))
    answer = f"({letter}) {right}"
    info = {"type": "options", "answer": answer, "letter": letter, "options": letters, "scene": scene.to_json()}
    messages = user(picture, choices.with_options(question, letters)), assistant(answer)
    return messages, info | canvas_info(ground, side)


# --- small words ------------------------------------------------------------------------------------------------------


@cache
def printable(split: str) -> tuple[str, ...]:
    """The words of three to six letters of emoji names; a third of them, by a hash, are "test"."""
    words = {w for e in emoji.records() for w in e.labels["en"].lower().split() if w.isalpha() and w.isascii()}
    return tuple(w for w in sorted(words) if 3 <= len(w) <= 6 and (_digest(w) % 3 == 0) == (split == "test"))


def _digest(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")


@cache
def _font(point: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(point)


def written(word: str, size: int, rng: np.random.Generator) -> PIL.Image.Image:
    """A word on white paper, as large as fits, in one of the colours of the shapes world."""
    point = size // 2
    while (font := _font(point)).getlength(word) > 0.9 * size:
        point -= 1
    image = PIL.Image.new("RGB", (size, size), "white")
    left, top, right, bottom = font.getbbox(word)
    x, y = (rng.uniform(0, max(1.0, size - n)) for n in (right - left, bottom - top))
    ink = pick(rng, list(shapes.COLOURS.values()))
    PIL.ImageDraw.Draw(image).text((x - left, y - top), word, ink, font)
    return image


def make_word(rng: np.random.Generator, split: str, size: int) -> Made:
    """A printed word of three to six letters to read; the pictures are 64 to 128 pixels square; info: answer."""
    word, side = pick(rng, printable(split)), pick(rng, (64, 64, 96, 128))
    messages = user(Image(written(word, side, rng)), "what does it say?"), assistant(word)
    return messages, {"type": "word", "answer": word}


# --- self-description -------------------------------------------------------------------------------------------------

NAME = "I am a small model that reads and draws pictures."
DRAWS = "Shapes and emoji, for example: a red circle left of a blue star."
ASK = "Ask me to draw something, or show me a picture."
FIXED: dict[str, tuple[str, ...]] = {
    f"Hello! {ASK}": ("hello", "hi", "hey", "hello there", "good morning", "good evening", "hi there", "hello!", "hi!"),
    "I am well. Shall I draw something?": ("how are you?", "how do you do?", "how is it going?", "are you well?"),
    DRAWS: (
        "what can you draw?",
        "what do you draw?",
        "which pictures can you draw?",
        "what should I ask you to draw?",
        "can you draw?",
        "give me an example",
    ),
    NAME: ("who are you?", "what are you?", "what is your name?", "introduce yourself", "tell me about yourself"),
    f"I draw, answer questions about pictures and edit them. {ASK}": (
        "what can you do?",
        "what do you do?",
        "help",
        "how can you help me?",
        "how does this work?",
        "what is this?",
        "can you help me?",
    ),
    "Show me a picture and say what to change: make the star green.": (
        "can you edit pictures?",
        "how do I edit a picture?",
        "can you change a picture?",
        "what can you edit?",
    ),
    "Red, green, blue, yellow, purple and black.": ("which colours do you know?", "what colours can you draw?"),
    "Circles, squares, triangles, stars and crosses.": ("which shapes do you know?", "what shapes can you draw?"),
    "Only short English.": ("which languages do you speak?", "do you speak German?", "can you write long texts?"),
    "No, only small drawings.": ("can you draw photographs?", "can you draw a photo?", "do you know real people?"),
    "I only know small pictures.": ("what is the weather?", "tell me a joke", "what time is it?", "what is the news?"),
    "You are welcome.": ("thank you", "thanks", "thanks a lot", "thank you very much"),
    "Goodbye!": ("bye", "goodbye", "see you", "good night"),
    "Yes.": ("can you see?", "can you read pictures?", "do you understand pictures?", "can you count?"),
    "A round shape.": ("what is a circle?",),
    "A shape with four equal sides.": ("what is a square?",),
    "A shape with three sides.": ("what is a triangle?",),
    "A shape with five points.": ("what is a star?",),
    "Two bars that meet in the middle.": ("what is a cross?",),
    "A small picture of a thing or a face.": ("what is an emoji?",),
}


@cache
def help_pairs() -> tuple[tuple[str, str], ...]:
    """Questions without a picture and their fixed answers, in the style of a help text: ``FIXED``, and what kind of
    thing each of the iconic emoji is ("what is an owl?": "an animal")."""
    pairs = [(question, answer) for answer, questions in FIXED.items() for question in questions]
    asked = {question for question, _ in pairs}
    for concept in emoji.concepts("train", len(emoji.ICONIC)):
        noun = emoji.NOUNS.get(concept.id, concept.labels["en"])
        for question in (f"what is {article(noun)}?", f"what kind of thing is {article(noun)}?"):
            if question not in asked:
                pairs.append((question, f"{article(emoji.kind(concept)).capitalize()}."))
    colours = [(f"is {name} a colour?", "Yes.") for name in shapes.COLOURS]
    known = [(f"do you know what {article(noun)} is?", "Yes.") for noun in emoji.NOUNS.values()]
    return (*pairs, *colours, *known)


def make_help(rng: np.random.Generator, split: str, size: int) -> Made:
    """A greeting or a question about the model, and the fixed answer; half of them are of ``FIXED``; info: answer."""
    pairs = help_pairs()
    fixed = sum(len(questions) for questions in FIXED.values())
    question, answer = pick(rng, pairs[:fixed] if rng.random() < 0.5 else pairs)
    return (user(question), assistant(answer)), {"type": "help", "answer": answer}


SOURCES: dict[str, Callable[..., Made]] = {
    "talk/turns": make_turns,
    "talk/options": make_options,
    "talk/words": make_word,
    "talk/help": make_help,
}


def source(name: str, split: str = "train", size: int = 64, seed: int = 0) -> Generated:
    """An endless source of conversations; ``size`` has no effect. Raises ``ValueError`` for a name that is not in
    ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
    return Generated(name, SOURCES[name], split, size, seed)
