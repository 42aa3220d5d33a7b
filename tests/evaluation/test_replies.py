"""Golden replies: what the one module that reads replies makes of them. A reply that says nothing clear is None."""

import pytest

from diptych.evaluation.judges import replies

OPTIONS = {"A": "red", "B": "dark red", "C": "a blue circle", "D": "7"}

CHOICES = [
    ("A", "A"), ("b", "B"), (" (C) ", "C"), ("D.", "D"), ("**B**", "B"), ("A. red", "A"), ("(B) dark red", "B"),
    ("(b) whatever it says", "B"), ("C) a blue circle", "C"), ("The answer is B.", "B"), ("Answer: (C)", "C"),
    ("the correct option is D", "D"), ("I think the answer would be A", "A"), ("It must be (B), I am sure", "B"),
    ("dark red", "B"), ("Red.", "A"), ("It is a dark red thing", "B"), ("there is a blue circle in it", "C"),
    ("7", "D"),
    ("A\nbecause it is red", "A"), ("B is right", "B"),
    ("A dog is running", None), ("I do not know", None), ("", None), ("A or B", None), ("(A) or (B)", None),
    ("(A), (C)", None), ("A, B", None), ("The answer is A or B.", None), ("B, A is wrong", "B"), ("A and C", None),
    ("Between A, B. Answer: B", "B"),
    ("A. B cells, and red", "A"), ("答案是B。", "B"), ("选D", "D"),
    ("either red or 7", None), ("answer: A, no, answer: B", None), ("E", None), ("redder", None),
]  # fmt: skip


@pytest.mark.parametrize("reply, letter", CHOICES)
def test_choices(reply, letter):
    assert replies.choice(reply, OPTIONS) == letter


def test_thoughts_are_not_the_answer():
    assert replies.spoken("<think>A or B? B.</think>\n\nA") == "\n\nA"
    assert replies.spoken("thinking without the opening tag</think>B") == "B"
    assert replies.spoken("\n<think>A, no, B, no") == ""
    assert replies.spoken("A < B") == "A < B"


@pytest.mark.parametrize("reply, said", [
    ("yes", True), ("Yes, there is.", True), ("No.", False), ("NO", False), ("there is no dog", False),
    ("yes and no", None), ("", None), ("nothing", None), ("I cannot know", None), ("yesterday", None),
])  # fmt: skip
def test_yes_and_no(reply, said):
    assert replies.yes_no(reply) is said


@pytest.mark.parametrize("text, normal", [
    ("The Dog's", "dog 's"), ("two  cats.", "2 cats"), ("dont", "don't"), ("1,000", "1000"), ("3.5", "3.5"),
    ("2015.", "2015"), ("is it?no", "is itno"), ("couldnt've", "couldn't've"),
    ("a yes!", "yes"), ("ten", "10"), ("none", "0"), ("wouldntve", "wouldntve"), ("wouldn'tve", "wouldn't've"),
    ("hot-dog", "hot dog"), ("St. Louis", "st louis"),
])  # fmt: skip
def test_evalai_normalisation(text, normal):
    assert replies.vqa_normal(text) == normal


def test_vqa_accuracy_leaves_every_annotator_out():
    given = ["red"] * 3 + ["blue"] * 7
    assert replies.vqa_accuracy("The red.", given) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert replies.vqa_accuracy("blue", given) == 1 and replies.vqa_accuracy("green", given) == 0
    assert replies.vqa_accuracy("red", ["red", *["blue"] * 9]) == pytest.approx(9 / 30)
    assert replies.vqa_accuracy("two", ["2"]) == 1


def test_anls_relaxed_and_contains():
    assert replies.anls("Hello World", ["hello world"]) == 1
    assert replies.anls("hallo", ["hello"]) == pytest.approx(0.8) and replies.anls("xxllo", ["hello"]) == pytest.approx(
        0.6
    )
    assert replies.anls("xxxlo", ["hello"]) == 0  # 0.4 is below the threshold
    assert replies.relaxed("104", ["100"]) == 1 and replies.relaxed("106", ["100"]) == 0
    assert replies.relaxed("50%", ["0.5"]) == 1 and replies.relaxed("$1,000", ["1000"]) == 1
    assert replies.relaxed("0", ["0"]) == 1 and replies.relaxed("0.01", ["0"]) == 0
    assert replies.relaxed("Yes.", ["yes"]) == 1 and replies.relaxed("-95", ["-100"]) == 1
    assert replies.contains("The sign says STOP here", ["stop"]) == 1 and replies.contains("no", ["stop"]) == 0
    assert replies.contains("x + y", ["x+y"], spaces=False) == 1 and replies.contains("x + y", ["x+y"]) == 0


def test_marks_of_judges():
    assert replies.marks('{"score": [8, 6], "reasoning": "ok"}', 0, 10) == [8, 6]
    assert replies.marks('```json\n{"reasoning": "a", "score": 3}\n```', 0, 10) == [3]
    assert replies.marks('first {"score": [1]} then {"score": [2, 9]}', 0, 10) == [2, 9]
    for wrong in ("", "8/10", '{"score": "high"}', '{"score": [11, 2]}', '{"score": []}', '{"score": [true, 1]}'):
        assert replies.marks(wrong, 0, 10) is None, wrong
    assert replies.marks('{"score": [1]}', 0, 10, count=2) is None
    three = "Brief reasoning: fine\n\n**Prompt Compliance: 4**\n- Quality: 5\n3. Preservation: 2/5\n"
    assert replies.named_marks(three, 3, 1, 5) == {"prompt compliance": 4, "quality": 5, "preservation": 2}
    assert replies.named_marks("Score: 1", ("Score",), 0, 1) == {"score": 1}
    assert replies.named_marks("Score: 2", ("Score",), 0, 1) is None
    assert replies.named_marks("Quality: 5", 3, 1, 5) is None


def test_edit_distance_is_a_distance():
    assert replies.edit_distance("kitten", "sitting") == 3 == replies.edit_distance("sitting", "kitten")
    assert replies.edit_distance("", "abc") == 3 and replies.edit_distance(["a", "b"], ["b"]) == 1
