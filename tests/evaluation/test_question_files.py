"""Question files as benchmarks publish them, written here by hand: what is read, and what is refused."""

import base64
import json

import PIL.Image
import pytest

from diptych.core.sample import Image, Text
from diptych.evaluation.benchmarks.question_files import parts, read_questions
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.harness import evaluate
from tests.evaluation.test_questions import Says, jsonl, png, run, tsv


def picture(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (12, 8), "red").save(path)
    return path


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_options_as_lists(tmp_path):
    """A list of options; answers as a letter, as text, in brackets, and as a place in the list (AI2D)."""
    options = ["red", "blue", "green"]
    for answer, letter in (("B", "B"), ("blue", "B"), ("(C)", "C"), ("c", "C"), (2, "C"), ("0", "A")):
        for listed in (options, str(options)):
            row = {"id": 1, "question": "?", "options": listed, "answer": answer}
            [question] = read_questions(jsonl(tmp_path / "q.jsonl", [row]))
            assert (question.answers, dict(question.options)) == ((letter,), dict(zip("ABC", options, strict=True)))
    digits = [{"id": i, "question": "?", "options": ["7", "0", "1"], "answer": a} for i, a in enumerate(("2", "1"))]
    assert [q.answers for q in read_questions(jsonl(tmp_path / "d.jsonl", digits))] == [("C",), ("B",)]  # places
    digits[0]["answer"] = "7"
    assert [q.answers for q in read_questions(jsonl(tmp_path / "d.jsonl", digits))] == [("A",), ("C",)]  # texts
    wrong = [{"id": i, "question": "?", "options": options, "answer": a} for i, a in enumerate(("B", "F", "pink"))]
    with pytest.raises(ValueError, match=r"row 1: answer \('F',\) is not one of the options .*\(2 of 3 rows\)"):
        resolve([f"mcq={jsonl(tmp_path / 'w.jsonl', wrong)}"], Tools())


def test_seed(tmp_path):
    picture(tmp_path, "SEED-Bench-image/1_2.png")
    rows = [
        {
            "answer": "A",
            "choice_a": "One",
            "choice_b": "Two",
            "choice_c": "Three",
            "choice_d": "Four",
            "data_id": "1_2",
            "data_type": "image",
            "question": "How many?",
            "question_id": "101",
            "question_type_id": 5,
        },
        {
            "answer": "A",
            "choice_a": "x",
            "choice_b": "y",
            "choice_c": "z",
            "choice_d": "w",
            "data_id": "v.mp4",
            "data_type": "video",
            "question": "What next?",
            "question_id": "102",
            "question_type_id": 10,
        },
    ]
    file = write(tmp_path / "SEED-Bench.json", {"questions": rows, "question_type": {"Instance Counting": 5}})
    [question] = read_questions(file)
    assert question.options["D"] == "Four" and question.category == "5" and question.images[0].endswith("1_2.png")
    scores = run(f"seed={file}", lambda t, s: "a one").scores
    assert scores["SEED-Bench-seed@official/overall"].value == 1 and scores["SEED-Bench-seed@ours/overall"].value == 1


def test_mmmu(tmp_path):
    """Open questions, answers in a list, pictures at their markers; VLMEvalKit's TSV and the published columns."""
    rows = [
        {
            "id": "validation_Math_1",
            "question": "<image 1> or <image 2>?",
            "options": "['one', '<image 2>']",
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": f"data:image/png;base64,{png()}",
            "image_2": f"data:image/png;base64,{png('blue')}",
        },
        {
            "id": "validation_Art_2",
            "question": "How high is <image 1>?",
            "options": "[]",
            "answer": "['12.5', '25/2']",
            "question_type": "open",
            "image_1": f"data:image/png;base64,{png()}",
        },
    ]
    file = jsonl(tmp_path / "mmmu.jsonl", rows)
    engine = Says(lambda t, s: "The answer is (A)." if len([*s.images()]) > 1 else "It is 12.50 m")
    scores = evaluate(engine, (f"mmmu={file}",), progress=False).scores
    assert {k: s.value for k, s in scores.items() if "official" in k} == {
        f"mmmu-mmmu@official/{k}": 1.0 for k in ("overall", "Math", "Art")
    }
    first = engine.seen[0].messages[0].parts
    assert [type(p).__name__ for p in first] == ["Image", "Text", "Image", "Text", "Image", "Text"]
    assert [p.pixels.getpixel((0, 0)) for p in first if isinstance(p, Image)] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
    table = [
        {
            "index": 1,
            "image": f"['{png()}']",
            "question": "How many?",
            "A": "",
            "B": "",
            "answer": "4",
            "category": "Math",
            "l2-category": "Science",
        },
        {
            "index": 2,
            "image": png(),
            "question": "Which?",
            "A": "x",
            "B": "y",
            "answer": "B",
            "category": "Art",
            "l2-category": "Humanities",
        },
    ]
    scores = run(f"mmmu={tsv(tmp_path / 'MMMU.tsv', table)}", lambda t, s: "So 4" if "many" in t else "B").scores
    assert scores["MMMU-mmmu@official/overall"].value == 1 and scores["MMMU-mmmu@ours/l2/Science"].n == 1


def test_real_world_qa(tmp_path):
    """Options inside the question, and questions that are answered with a number or a word."""
    ask = "Which way?\n\nA. Left\nB. Right\nC. Up\nPlease answer directly with only the letter of the correct option."
    rows = [
        {"image": f"data:image/png;base64,{png()}", "question": ask, "answer": "B"},
        {"image": f"data:image/png;base64,{png()}", "question": "How many lanes?", "answer": "3"},
    ]
    file = jsonl(tmp_path / "RealWorldQA.jsonl", rows)
    first = read_questions(file)[0]
    assert first.text == "Which way?" and dict(first.options) == {"A": "Left", "B": "Right", "C": "Up"}
    scores = run(f"mcq={file}", lambda t, s: "Right" if "Which" in t else "3.").scores
    assert scores["RealWorldQA-vanilla@official/overall"].value == 1 == scores["RealWorldQA-vanilla@ours/overall"].value
    circular = run(f"mcq-circular={file}", lambda t, s: "Right" if "Which" in t else "3.")
    assert len(circular.outcomes) == 4 and circular.scores["RealWorldQA-circular@ours/overall"].value == 1


def test_vqav2(tmp_path):
    """The published pair of files, joined by question id; answers are objects of ten annotators."""
    picture(tmp_path, "val2014/COCO_val2014_000000262148.jpg")
    questions = [{"image_id": 262148, "question": "What colour?", "question_id": 262148000}]
    answers = [
        {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(["red"] * 2 + ["blue"] * 8)
    ]
    write(
        tmp_path / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{"question_id": 262148000, "image_id": 262148, "answers": answers}]},
    )
    file = write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    name = f"{file.stem}-vqav2@official/overall"
    assert run(f"vqav2={file}", lambda t, s: "Blue").scores[name].value == 1
    assert run(f"vqav2={file}", lambda t, s: "Red").scores[name].value == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)
    row = {"question_id": 1, "question": "?", "answers": answers}
    scores = run(f"vqa={jsonl(tmp_path / 'q.jsonl', [row])}", lambda t, s: "blue").scores
    assert scores["q-vqa@ours/overall"].value == 1 == scores["q-vqa@official/overall"].value
    with pytest.raises(ValueError, match="row 1: an answer has no 'answer'"):
        read_questions(jsonl(tmp_path / "q.jsonl", [{"question": "?", "answers": [{"text_": "x"}]}]))


def test_ocrbench_formulas(tmp_path):
    """Formulas are told by the published category, or by the data set's name."""
    category = "Handwritten Mathematical Expression Recognition"
    rows = [
        {"dataset_name": "HME100k", "type": category, "question": "Write it.", "answers": ["x ^ 2 + Y"]},
        {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "question": "Read.", "answers": ["ＳＴＯＰ"]},
    ]
    file = write(tmp_path / "OCRBench.json", [{**r, "image_path": picture(tmp_path, "a.png").name} for r in rows])
    scores = run(f"contains={file}", lambda t, s: "x^2+Y" if "Write" in t else "it says stop").scores
    assert scores["OCRBench-contains@official/overall"].value == 1
    scores = run(f"contains={file}", lambda t, s: "x^2+y" if "Write" in t else "s t o p").scores
    assert scores["OCRBench-contains@official/overall"].value == 0


def test_files_of_yes_or_no(tmp_path):
    """POPE's .json of lines, and HallusionBench."""
    picture(tmp_path, "COCO_val2014_000000000001.jpg")
    pope = tmp_path / "coco_pope_random.json"
    row = {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?", "label": "yes"}
    pope.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question_id": 2, "label": "no"}) + "\n")
    scores = run(f"yesno={pope}", lambda t, s: "Yes, there is one.").scores
    got = {k.partition("@")[2]: s.value for k, s in scores.items() if k.endswith("accuracy")}
    assert got == {"ours/accuracy": 0.5, "official/accuracy": 0.0, "authors/accuracy": 0.5}
    picture(tmp_path, "hallusion_bench/VD/figure/0_0.png")
    same = {
        "category": "VD",
        "subcategory": "figure",
        "set_id": "0",
        "figure_id": "0",
        "visual_input": "1",
        "filename": "./hallusion_bench/VD/figure/0_0.png",
        "question": "Is it flat?",
    }
    rows = [
        {**same, "question_id": "0", "gt_answer": "1"},
        {**same, "question_id": "1", "gt_answer": "0"},
        {**same, "question_id": "0", "gt_answer": "1", "category": "VS", "visual_input": "0", "filename": None},
    ]
    file = write(tmp_path / "HallusionBench.json", rows)
    assert [len(q.images) for q in read_questions(file)] == [1, 1, 0]
    scores = run(f"hallusion={file}", lambda t, s: "yes").scores
    got = {k.rpartition("/")[2]: s.value for k, s in scores.items()}
    assert got == {"aAcc": pytest.approx(2 / 3), "fAcc": 0, "qAcc": pytest.approx(2 / 3)}


def test_mmvp_and_cv_bench(tmp_path):
    for n in (1, 2):
        picture(tmp_path, f"MMVP Images/{n}.jpg")
    rows = "".join(f"{n},Open or closed?,(a) Open (b) Closed,({a})\n" for n, a in ((1, "a"), (2, "b")))
    table = "Index,Question,Options,Correct Answer\n" + rows
    (tmp_path / "Questions.csv").write_text(table)
    scores = run(f"mmvp={tmp_path / 'Questions.csv'}", lambda t, s: "(a)").scores
    assert scores["Questions-mmvp@official/pairs"].value == 0 and scores["Questions-mmvp@ours/accuracy"].value == 0.5
    rows = [
        {
            "idx": i,
            "type": "2D",
            "task": "Count",
            "image": f"data:image/png;base64,{png()}",
            "question": "How many?",
            "choices": ["0", "1", "2"],
            "answer": a,
            "prompt": "How many? (A) 0 (B) 1 (C) 2",
            "source": s,
        }
        for i, (s, a) in enumerate((("ADE20K", "(A)"), ("COCO", "(B)"), ("Omni3D", "(B)"), ("Omni3D", "(C)")))
    ]
    scores = run(f"cvbench={jsonl(tmp_path / 'test.jsonl', rows)}", lambda t, s: "(B) 1").scores
    assert scores["test-cvbench@official/overall"].value == pytest.approx(((0 + 1) / 2 + 0.5) / 2)


def test_ai2d_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    image = {"bytes": base64.b64decode(png()), "path": None}
    table = pyarrow.table({"question": ["Which?"], "options": [["leaf", "root"]], "answer": ["1"], "image": [image]})
    parquet.write_table(table, tmp_path / "ai2d.parquet")
    assert run(f"mcq={tmp_path / 'ai2d.parquet'}", lambda t, s: "root").scores["ai2d-vanilla@ours/overall"].value == 1


def test_documents_and_charts(tmp_path):
    """DocVQA's, ChartQA's and GQA's own files."""
    picture(tmp_path, "documents/a_1.png"), picture(tmp_path, "png/7.png"), picture(tmp_path, "images/2370799.jpg")
    doc = {
        "data": [{"questionId": 7, "question": "Total?", "image": "documents/a_1.png", "answers": ["$5", "5 dollars"]}]
    }
    assert (
        run(f"anls={write(tmp_path / 'val.json', doc)}", lambda t, s: "$5").scores["val-anls@official/overall"].value
        == 1
    )
    chart = [{"imgname": "7.png", "query": "How many?", "label": "2895"}]
    scores = run(f"relaxed={write(tmp_path / 'test_human.json', chart)}", lambda t, s: "2,895").scores
    assert (scores["test_human-relaxed@official/overall"].value, scores["test_human-relaxed@ours/overall"].value) == (
        0,
        1,
    )
    gqa = {"201307251": {"question": "Is it red?", "imageId": "2370799", "answer": "yes"}}
    assert run(f"vqa={write(tmp_path / 'gqa.json', gqa)}", lambda t, s: "Yes").scores["gqa-vqa@ours/overall"].value == 1


def test_captions(tmp_path):
    for n in range(3):
        picture(tmp_path, f"{n}.png")
    rows = [
        {"image": f"{n}.png", "caption": c}
        for n in range(3)
        for c in (f"a dog number {n} runs", f"the dog {n} is fast")
    ]
    file = jsonl(tmp_path / "coco.jsonl", rows)
    scores = run(f"captions={file}", lambda t, s: "a dog number 1 runs").scores
    assert 0 < scores["coco-captions@ours/CIDEr"].value < 10 and scores["coco-captions@ours/CIDEr"].n == 3
    coco = {"images": [], "annotations": [{"image_id": n, "id": n, "caption": f"a cat {n}"} for n in (1, 2)]}
    for n in (1, 2):
        picture(tmp_path, f"val2014/COCO_val2014_{n:012d}.jpg")
    file = write(tmp_path / "captions_val2014.json", coco)
    assert run(f"captions={file}", lambda t, s: "a cat 1").scores["captions_val2014-captions@ours/CIDEr"].n == 2


def test_pictures_stay_below_the_file(tmp_path):
    """Nothing outside the file's folder is read, so nothing of it is ever sent to an endpoint."""
    secret = picture(tmp_path, "secret.png")
    folder = tmp_path / "quiz"
    folder.mkdir()
    (folder / "link.png").symlink_to(secret)
    for reference in (
        str(secret),
        "../secret.png",
        "link.png",
        "file:///etc/passwd",
        "http://169.254.169.254/x.png",
        "a\0b",
    ):
        row = {"id": 1, "question": "?", "answer": "yes", "image": reference}
        with pytest.raises(ValueError, match="row 1: picture .* (lies outside|is no path)"):
            resolve([f"yesno={jsonl(folder / 'q.jsonl', [row])}"], Tools())


@pytest.mark.parametrize(
    "change",
    [
        {"question": "a\ud800b"},
        {"answer": "\udfff"},
        {"A": "\ud800"},
        {"id": "\ud800"},
        {"category": "\ud800"},
        {"hint": "\ud800"},
    ],
)
def test_text_that_cannot_be_written_is_refused_by_row(tmp_path, change):
    row = {"id": 1, "question": "?", "A": "x", "B": "y", "answer": "A", **change}
    with pytest.raises(ValueError, match=r"row 2.* which UTF-8 cannot write"):
        read_questions(
            jsonl(
                tmp_path / "q.jsonl",
                [{**row, "question": "?", "answer": "A", "A": "x", "id": 0, "category": "c", "hint": ""}, row],
            )
        )


def test_markers_place_pictures():
    assert parts("<image 2> then <image 9>", ["a", "b"]) == [Image("a"), Image("b"), Text("then"), Text("<image 9>")]
    assert parts("no marker", ["a"]) == [Image("a"), Text("no marker")]


STYLES = [
    "X",
    "\\boxed{X}",
    "<answer>X</answer>",
    "**Answer:** X",
    "It's X.",
    "X is correct.",
    "答案是X",
    "answer: x",
    "A. red\nB. blue\nC. green\nD. yellow\n\nAnswer: X",
    "I think it is X",
    "The answer is (X).",
]


@pytest.mark.parametrize("style", STYLES)
def test_a_model_that_is_always_right_scores_1(tmp_path, style):
    """In every style of reply, each letter is right as often as it is meant, and so is every rotation."""
    options = {"A": "red", "B": "blue", "C": "green", "D": "yellow"}
    rows = [
        {"index": i, "question": f"what colour is thing {i}?", **options, "answer": "ABCD"[i % 4]} for i in range(8)
    ]
    file = jsonl(tmp_path / "q.jsonl", rows)

    def reply(text, sample):
        number = int(text.partition("thing ")[2].partition("?")[0])
        line = next(line for line in text.splitlines() if line.endswith(f". {options['ABCD'[number % 4]]}"))
        return (
            style.replace("X", line[0]).replace("x", line[0].lower())
            if "box" not in style
            else style.replace("X", line[0])
        )

    assert run(f"mcq={file}", reply).scores["q-vanilla@ours/overall"].value == 1
    assert run(f"mcq-circular={file}", reply).scores["q-circular@ours/overall"].value == 1
