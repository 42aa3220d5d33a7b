"""Golden replies: what the one module that reads replies makes of them. A reply that says nothing clear is None."""

import re
from pathlib import Path

import pytest

from diptych.evaluation.judges import official, replies, short_answers

OPTIONS = {"A": "red", "B": "dark red", "C": "a blue circle", "D": "7"}

CHOICES = [
    ("A", "A"),
    ("b", "B"),
    (" (C) ", "C"),
    ("D.", "D"),
    ("**B**", "B"),
    ("A. red", "A"),
    ("(B) dark red", "B"),
    ("(b) whatever it says", "B"),
    ("C) a blue circle", "C"),
    ("The answer is B.", "B"),
    ("Answer: (C)", "C"),
    ("the correct option is D", "D"),
    ("I think the answer would be A", "A"),
    ("It must be (B), I am sure", "B"),
    ("dark red", "B"),
    ("Red.", "A"),
    ("It is a dark red thing", "B"),
    ("there is a blue circle in it", "C"),
    ("7", "D"),
    ("A\nbecause it is red", "A"),
    ("B is right", "B"),
    ("A dog is running", None),
    ("I do not know", None),
    ("", None),
    ("A or B", None),
    ("(A) or (B)", None),
    ("(A), (C)", None),
    ("A, B", None),
    ("The answer is A or B.", None),
    ("B, A is wrong", "B"),
    ("A and C", None),
    ("Between A, B. Answer: B", "B"),
    ("A. B cells, and red", "A"),
    ("答案是B。", "B"),
    ("选D", "D"),
    ("either red or 7", None),
    ("answer: A, no, answer: B", "B"),
    ("E", None),
    ("redder", None),
]


@pytest.mark.parametrize("reply, letter", CHOICES)
def test_choices(reply, letter):
    assert replies.choice(reply, OPTIONS) == letter


GOLDEN = Path(__file__).parent / "golden"
COLOURS = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}


def filled(form, x, y=""):
    """A form with X as the letter meant, x in lower case, {t} its option's text, Y another letter."""
    text = form.replace("\\n", "\n").replace("{t}", COLOURS[x])
    for letter, option in COLOURS.items():
        text = text.replace(f"{{{letter}}}", option)
    text = text.replace("Ｘ", chr(ord(x) + 0xFEE0))
    text = re.sub(r"(?<![A-Za-z])X(?![A-Za-z])", x, text)
    text = re.sub(r"(?<![A-Za-z\\])x(?![A-Za-z])", x.lower(), text)
    return re.sub(r"(?<![A-Za-z])Y(?![A-Za-z])", y, text)


FORMS = (GOLDEN / "reply_forms.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_every_letter(form):
    """The same form gives the same answer for every letter, whatever letter it mentions before."""
    for x in COLOURS:
        for y in COLOURS.keys() - {x}:
            assert replies.choice(filled(form, x, y), COLOURS) == x, filled(form, x, y)


def test_there_are_enough_forms():
    assert len(FORMS) == len(set(FORMS)) >= 140


@pytest.mark.parametrize("form", (GOLDEN / "no_answer.txt").read_text("utf-8").splitlines())
def test_forms_that_say_nothing(form):
    for x in COLOURS:
        for y in COLOURS.keys() - {x}:
            assert replies.choice(filled(form, x, y), COLOURS) is None, filled(form, x, y)


@pytest.mark.parametrize(
    "form",
    [
        "X",
        "Answer: X",
        "\\boxed{X}",
        "The answer is X.",
        "(X)",
        "I think it is X",
        "X is correct",
        "**X**",
        "答案是X",
        "I choose X.",
        "It's X.",
        "Therefore X",
        "So, X",
    ],
)
def test_nine_options_are_alike(form):
    options = {k: str(n) for n, k in enumerate("ABCDEFGHI", 1)}
    for letter in options:
        assert replies.choice(form.replace("X", letter), options) == letter


def test_options_that_look_like_answers_or_refusals():
    options = {"A": "a dog", "B": "dog house", "C": "none of the above", "D": "I cannot tell"}
    for reply, letter in (
        ("A dog", "A"),
        ("It is a dog.", "A"),
        ("none of the above", "C"),
        ("I cannot tell.", "D"),
        ("D. I cannot tell", "D"),
        ("The answer is D, I cannot tell.", "D"),
        ("B. dog house because A is wrong", "B"),
    ):
        assert replies.choice(reply, options) == letter, reply
    numbers = {"A": "1.5", "B": "2", "C": "-3", "D": "x^2"}
    for reply, letter in (
        ("The answer is $x^2$.", "D"),
        ("3.5", None),
        ("It is 2.5", None),
        ("= 2", "B"),
        ("It can't be A. It can't be C. So B.", "B"),
        ("Neither A nor C; B.", "B"),
        ("I see 2 things. A", "A"),
        ("A? No. B? Yes.", None),
    ):
        assert replies.choice(reply, numbers) == letter, reply


def test_thoughts_are_not_the_answer():
    assert replies.spoken("<think>A or B? B.</think>\n\nA") == "\n\nA"
    assert replies.spoken("thinking without the opening tag</think>B") == "B"
    assert replies.spoken("\n<think>A, no, B, no") == ""
    assert replies.spoken("A < B") == "A < B"


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("yes", True),
        ("Yes, there is.", True),
        ("No.", False),
        ("NO", False),
        ("there is no dog", False),
        ("yes and no", None),
        ("", None),
        ("nothing", None),
        ("I cannot know", None),
        ("yesterday", None),
        ("No, wait. The answer is yes.", True),
        ("\\boxed{no}", False),
        ("<answer>Yes</answer> no more", True),
        ('{"answer": "no", "reason": "yes, it is absent"}', False),
        ("是的。", True),
        ("没有", False),
        ("The answer is yes or no", None),
    ],
)
def test_yes_and_no(reply, expected):
    assert replies.yes_no(reply) is expected


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Dog's", "dog 's"),
        ("two  cats.", "2 cats"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("2015.", "2015"),
        ("is it?no", "is itno"),
        ("couldnt've", "couldn't've"),
        ("a yes!", "yes"),
        ("ten", "10"),
        ("none", "0"),
        ("wouldntve", "wouldntve"),
        ("wouldn'tve", "wouldn't've"),
        ("hot-dog", "hot dog"),
        ("St. Louis", "st louis"),
    ],
)
def test_evalai_normalisation(text, normal):
    assert official.evalai(text) == normal


def test_vqa_accuracy_leaves_every_annotator_out():
    given = ["red"] * 3 + ["blue"] * 7
    assert short_answers.vqa_accuracy("The red.", given) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert short_answers.vqa_accuracy("blue", given) == 1 and short_answers.vqa_accuracy("green", given) == 0
    assert short_answers.vqa_accuracy("red", ["red", *["blue"] * 9]) == pytest.approx(9 / 30)
    assert short_answers.vqa_accuracy("two", ["2"]) == 1


def test_anls_relaxed_and_contains():
    assert short_answers.anls("Hello World", ["hello world"]) == 1
    assert short_answers.anls("hallo", ["hello"]) == pytest.approx(0.8) and short_answers.anls(
        "xxllo", ["hello"]
    ) == pytest.approx(0.6)
    assert short_answers.anls("xxxlo", ["hello"]) == 0  # 0.4 is below the threshold
    assert short_answers.relaxed("104", ["100"]) == 1 and short_answers.relaxed("106", ["100"]) == 0
    assert short_answers.relaxed("50%", ["0.5"]) == 1 and short_answers.relaxed("$1,000", ["1000"]) == 1
    assert short_answers.relaxed("0", ["0"]) == 1 and short_answers.relaxed("0.01", ["0"]) == 0
    assert short_answers.relaxed("Yes.", ["yes"]) == 1 and short_answers.relaxed("-95", ["-100"]) == 1
    assert (
        short_answers.contains("The sign says STOP here", ["stop"]) == 1 and short_answers.contains("no", ["stop"]) == 0
    )
    assert short_answers.contains("x + y", ["x+y"], formula=True) == 1 and short_answers.contains("x + y", ["x+y"]) == 0


def test_marks_of_judges():
    assert replies.marks('{"score": [8, 6], "reasoning": "ok"}', 0, 10) == [8, 6]
    assert replies.marks('```json\n{"reasoning": "a", "score": 3}\n```', 0, 10) == [3]
    assert replies.marks('first {"score": [1]} then {"score": [2, 9]}', 0, 10) == [2, 9]
    for wrong in ("", "8/10", '{"score": "high"}', '{"score": [11, 2]}', '{"score": []}', '{"score": [true, 1]}'):
        assert replies.marks(wrong, 0, 10) is None, wrong
    assert replies.marks('{"score": [1]}', 0, 10, count=2) is None
    assert replies.marks('{"reasoning": "a {brace} and \\"score\\": [1]", "score": [4, 5]}', 0, 10) == [4, 5]
    assert replies.marks('{"result": {"score": [2, 3]}}', 0, 10) == [2, 3]
    assert replies.marks('so {not json} {"score": [6]\n, "why": "a\nb"} {', 0, 10) == [6]
    assert replies.marks("{" * 5000, 0, 10) is None
    assert replies.named_marks('{"Consistency": 2, "Realism": 1}', ("Realism", "Consistency"), 0, 2) == {
        "realism": 1,
        "consistency": 2,
    }
    three = "Brief reasoning: fine\n\n**Prompt Compliance: 4**\n- Quality: 5\n3. Preservation: 2/5\n"
    assert replies.named_marks(three, 3, 1, 5) == {"prompt compliance": 4, "quality": 5, "preservation": 2}
    assert replies.named_marks("Score: 1", ("Score",), 0, 1) == {"score": 1}
    assert replies.named_marks("Score: 2", ("Score",), 0, 1) is None
    assert replies.named_marks("Quality: 5", 3, 1, 5) is None


def test_edit_distance_is_a_distance():
    assert short_answers.edit_distance("kitten", "sitting") == 3 == short_answers.edit_distance("sitting", "kitten")
    assert short_answers.edit_distance("", "abc") == 3 and short_answers.edit_distance(["a", "b"], ["b"]) == 1
