"""Questions of the user's own files: what each protocol counts, and files that are wrong."""

import base64
import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest

from diptych.evaluation import harness, other_results
from diptych.evaluation import lmms as interop
from diptych.evaluation.benchmarks.aggregate import COGNITION, PERCEPTION
from diptych.evaluation.benchmarks.question_files import read_questions
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.card import DEFAULT, Answering
from diptych.evaluation.compare import compare
from diptych.evaluation.harness import evaluate
from diptych.evaluation.remote import Endpoint, NoSettings
from diptych.evaluation.scores import Score
from tests.support.fake_server import pictures, serving, text


@dataclass(frozen=True)
class SimpleModel:
    family: str = "says"
    settings: NoSettings = field(default_factory=NoSettings)


class Says:
    """Answers by function of the question."""

    def __init__(self, reply):
        self.reply, self.name, self.seen = reply, "says", []
        self.model = SimpleModel()

    def answers(self, samples, max_new_tokens, temperature, seed, batch_size, top_p=1.0):
        self.seen += samples
        self.asked = (max_new_tokens, temperature, top_p)
        said = [self.reply(s.messages[-1].parts[-1].text, s) for s in samples]
        return [SimpleNamespace(text=t, finish_reason="stop", parameters={}) for t in said]

    def draw(self, *rest):
        raise ValueError("it cannot draw")


def run(benchmark, reply, **more):
    return evaluate(Says(reply), (benchmark,), progress=False, **more)


def png(colour="red"):
    out = io.BytesIO()
    PIL.Image.new("RGB", (30, 20), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def tsv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


QUESTIONS = [
    {
        "index": i,
        "image": png(),
        "question": f"which is {i}?",
        "A": "red",
        "B": "green",
        "C": "blue",
        "D": "",
        "hint": "look" if i == 1 else "",
        "answer": answer,
        "category": category,
    }
    for i, (answer, category) in enumerate((("A", "easy"), ("B", "easy"), ("C", "hard")))
]


def test_circular_is_stricter_than_vanilla(tmp_path):
    file = tsv(tmp_path / "quiz.tsv", QUESTIONS)
    vanilla = run(f"mcq={file}", lambda text, s: "A")
    assert vanilla.scores["quiz-vanilla@ours/overall"].value == pytest.approx(1 / 3)
    assert vanilla.scores["quiz-vanilla@ours/overall"].n == 3 and "quiz-vanilla@ours/hard" in vanilla.scores
    circular = run(f"mcq-circular={file}", lambda text, s: "A")  # right in one rotation of each question
    assert circular.scores["quiz-circular@ours/overall"].value == 0 and len(circular.outcomes) == 9

    def knows(text, sample):
        right = {"0": "red", "1": "green", "2": "blue"}[text.partition("which is ")[2][0]]
        return f"It is {right}." if right != "blue" or "A. blue" in text else "no idea"

    for kind, expected in (("mcq", 2 / 3), ("mcq-circular", 2 / 3)):
        [(name, score)] = [(k, v) for k, v in run(f"{kind}={file}", knows).scores.items() if k.endswith("ours/overall")]
        assert score.value == pytest.approx(expected), name
    both = run(f"mcq-circular={file}", knows, limit=1)  # a limit keeps whole questions
    assert len(both.outcomes) == 6 and both.scores["quiz-circular@ours/overall"].n == 2
    engine = Says(knows)
    evaluate(engine, (f"mcq={file}",), progress=False)
    assert engine.seen[0].messages[0].parts[0].pixels.size == (30, 20)
    assert engine.seen[1].messages[0].parts[1].text.startswith("look\nwhich is 1?\nA. red\nB. green")


def test_rotations_that_are_in_the_file_are_used(tmp_path):
    rows = [QUESTIONS[1], {**QUESTIONS[1], "index": 1_000_001, "image": "1", "A": "green", "B": "red", "answer": "A"}]
    file = tsv(tmp_path / "mm.tsv", rows)
    result = run(f"mcq-circular={file}", lambda text, s: "green" if "A. red" in text else "red")
    assert len(result.outcomes) == 2 and result.scores["mm-circular@ours/overall"].value == 0
    assert len(run(f"mcq={file}", lambda text, s: "green").outcomes) == 1  # vanilla asks once


@pytest.mark.parametrize(
    "change, told",
    [
        ({"answer": "E"}, r"answer \('E',\) is not one of the options"),
        ({"question": None}, "has no 'question'"),
        ({"image": "missing.png"}, "there is no picture"),
        ({"image": "!" * 80}, "not base64"),
    ],
)
def test_wrong_files_are_named(tmp_path, change, told):
    row = {k: v for k, v in ({**QUESTIONS[0]} | change).items() if v is not None}
    with pytest.raises(ValueError, match=told):
        resolve([f"mcq={tsv(tmp_path / 'x.tsv', [row])}"], Tools())
    with pytest.raises(ValueError, match="there is no such file"):
        resolve([f"mcq={tmp_path / 'gone.tsv'}"], Tools())
    with pytest.raises(ValueError, match="mcq needs your file"):
        resolve(["mcq"], Tools())
    with pytest.raises(ValueError, match="takes no file"):
        resolve([f"vqa-mini={tmp_path}"], Tools())
    (tmp_path / "b.jsonl").write_text('{"question": 1}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_questions(tmp_path / "b.jsonl")


def test_tables_as_programs_save_them(tmp_path):
    """A byte order mark; pictures of several, which a rotation names; a short row; another encoding."""
    out = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(out, "PNG")
    many = str([base64.b64encode(out.getvalue()).decode()] * 2)
    head = "index\tquestion\tA\tB\tanswer\timage"
    file, rows = tmp_path / "t.tsv", f"{head}\n1\tq\tx\ty\tA\t{many}\n1000001\tq\ty\tx\tB\t1\n"
    file.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    [quiz], _ = resolve([f"mcq-circular={file}"], Tools())
    assert [len(list(i.sample.images())) for i in quiz.items(0, 0)] == [2, 2]
    for data, told in (
        (f"{head}\n1\tq\tx\ty\n".encode(), "row 1 has no 'answer'"),
        (b"\xff\xfei", "t.tsv is no table"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=told):
            resolve([f"mcq={file}"], Tools())


def test_pope(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    rows = [
        {"question_id": i, "image": "a.jpg", "text": f"Is there a {w}?", "label": label, "category": split}
        for i, (w, label, split) in enumerate(
            (("dog", "yes", "random"), ("cat", "no", "random"), ("car", "yes", "popular"), ("cup", "no", "popular"))
        )
    ]
    file = jsonl(tmp_path / "pope.jsonl", rows)
    replies = {"dog": "Yes.", "cat": "yes it is", "car": "No", "cup": "maybe"}
    scores = run(f"yesno={file}", lambda t, s: replies[t.split("?")[0].split()[-1]]).scores
    got = {k.partition("@ours/")[2]: s.value for k, s in scores.items() if "@ours/" in k}
    assert got["accuracy"] == 0.25 and got["precision"] == 0.5 and got["recall"] == 0.5 and got["f1"] == 0.5
    assert got["yes-ratio"] == 0.5 and got["random/accuracy"] == 0.5 and got["popular/f1"] == 0
    nothing = run(f"yesno={file}", lambda t, s: "hm").scores
    assert all(s.value == 0 for k, s in nothing.items() if "@authors" not in k)


def test_mme(tmp_path):
    rows = []
    for task in (*PERCEPTION, *COGNITION):
        for picture in range(2):
            PIL.Image.new("RGB", (8, 8), (picture, 0, 0)).save(tmp_path / f"{task}{picture}.png")
            for k, answer in enumerate(("Yes", "No")):
                rows.append(
                    {
                        "index": len(rows),
                        "image": f"{task}{picture}.png",
                        "question": f"{task} {picture} {k}",
                        "answer": answer,
                        "category": task,
                    }
                )
    file = jsonl(tmp_path / "MME.jsonl", rows)
    # the first picture's questions are both right, of the second's one: accuracy 75, accuracy+ 50
    scores = run(f"mme={file}", lambda t, s: "yes" if " 1 " in t or t.split("\n")[0].endswith("0") else "no").scores
    got = {k.partition("@ours/")[2]: s.value for k, s in scores.items() if "@ours/" in k}
    assert got["count"] == pytest.approx(125) and got["perception"] == pytest.approx(1250)
    assert got["cognition"] == pytest.approx(500) and got["sum"] == pytest.approx(1750)
    jsonl(tmp_path / "MME.jsonl", rows[:3])
    with pytest.raises(ValueError, match="two questions of a picture"):
        run(f"mme={file}", lambda t, s: "yes")


def test_short_answers(tmp_path):
    rows = [
        {"id": "a", "question": "what?", "answers": ["red"] * 10},
        {"id": "b", "question": "how much?", "answers": ["100"]},
    ]
    file = jsonl(tmp_path / "q.jsonl", rows)
    for kind, stamp, right in (
        ("vqa", "q-vqa@ours", 0.5),
        ("anls", "q-anls@ours", 0.5),
        ("relaxed", "q-relaxed@ours", 1.0),
        ("contains", "q-contains@ours", 0.5),
    ):
        scores = run(f"{kind}={file}", lambda t, s: "Red" if "what" in t else "104").scores
        assert scores[f"{stamp}/overall"].value == pytest.approx(right, abs=0.34 if kind == "anls" else 0), kind


# --- behind a server --------------------------------------------------------------------------------------------------


def test_a_model_behind_a_server(tmp_path):
    drawn = []

    def draw(body):
        drawn.append(body)
        return PIL.Image.new("RGB", (64, 64), "white")

    with serving(reply=lambda t, images: f"Yes {images[0].size if images else ''}", draw=draw) as server:
        engine = Endpoint(server.url, "their-model")
        result = evaluate(engine, ("pope-mini", "edit-mini"), limit=2, folder=tmp_path, progress=False)
        asked = next(b for b in server.asked if "messages" in b)
        assert asked["model"] == "their-model" and asked["temperature"] == 0 and pictures(asked)[0].size == (64, 64)
        assert "is there a" in text(asked)
        picture = evaluate(
            engine, ("geneval-dev",), limit=1, progress=False, settings=engine.settings({"guidance_scale": 3.0})
        )
    assert result.scores["pope-mini@lone-word/yes-ratio"].value == 1 and result.failures == 0
    assert result.card["family"] == "endpoint" and result.card["model"] == "their-model"
    edit = next(d for d in drawn if "raw" in d)
    assert edit["path"].endswith("/images/edits") and b'name="prompt"' in edit["raw"] and b"64x64" in edit["raw"]
    body = next(d for d in drawn if "raw" not in d)
    assert body["size"] == "64x64" and body["guidance_scale"] == 3.0 and isinstance(body["seed"], int)
    assert picture.card["settings"]["guidance_scale"] == 3.0 and len(picture.outcomes) == 6
    with serving(draw=lambda body: PIL.Image.new("RGB", (32, 32))) as server:
        with pytest.raises(ValueError, match=r"sent a picture of \(32, 32\), asked for one of \(64, 64\)"):
            evaluate(Endpoint(server.url, "m"), ("geneval-dev",), limit=1, progress=False)
    with pytest.raises(ValueError, match="needs the name of a model"):
        Endpoint("http://localhost:1/v1", "")
    with pytest.raises(ValueError, match="unknown settings"):
        engine.settings({"shift": 3})


def test_llava_json(tmp_path):
    said = [{"from": "human", "value": "<image>\nis it red?"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "l.json").write_text(json.dumps([{"id": "7", "conversations": said}]))
    result = run(f"yesno={tmp_path / 'l.json'}", lambda t, s: "yes" if t.startswith("is it red?") else "no")
    assert result.scores["l-yesno@ours/accuracy"].value == 1
    (tmp_path / "l.json").write_text(json.dumps([{"id": "7", "conversations": said * 2}]))
    with pytest.raises(ValueError, match="row 1 has 4 turns"):
        run(f"yesno={tmp_path / 'l.json'}", lambda t, s: "yes")


def test_a_server_that_dies_costs_no_item(tmp_path):
    """What it has finished stays, nothing is written as failed, and the run goes on to the bytes of an unbroken one."""
    file = jsonl(tmp_path / "q.jsonl", [{"id": i, "question": f"{i}?", "answer": "yes"} for i in range(6)])

    def go(url, folder):
        return evaluate(Endpoint(url, "m"), (f"yesno={file}",), folder=folder, batch_size=2, progress=False)

    def reply(asked, images):
        if asked.startswith("5"):
            return None  # refused for its own sake
        if asked.startswith("3") and server.dies:
            server.refuse, server.dies = 100, False
        return "yes"

    with serving(reply=reply) as server:
        server.dies = True
        with pytest.raises(ValueError, match=f"{server.url}.*busy"):
            go(server.url, tmp_path / "cut")
        lines = (tmp_path / "cut/items.jsonl").read_text().splitlines()
        assert len(lines) in (2, 4) and not any("error" in line for line in lines)
        server.refuse = 0
        result = go(server.url, tmp_path / "cut")
        go(server.url, tmp_path / "whole")
    assert result.failures == 1 and "the filter says no" in result.outcomes[5].error
    for name in ("items.jsonl", "scores.jsonl", "summary.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- other harnesses --------------------------------------------------------------------------------------------------


def test_vlmevalkit_model(tmp_path):
    PIL.Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    model = interop.VLMEvalKitModel(Says(lambda t, s: f"{t} {[i.pixels.size for i in s.images()]}"))
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": "what?"}]
    assert model.generate(message, "MMBench_DEV_EN") == "what? [(9, 7)]" == model.generate_inner(message)
    assert model.generate("hello") == "hello []" and not model.use_custom_prompt("x") and not model.is_api
    with pytest.raises(ValueError, match="holds 'video'"):
        model.generate([{"type": "video", "value": "x"}])


def test_results_of_others_are_read(tmp_path):
    lmms = {
        "results": {
            "pope": {
                "alias": "pope",
                "pope_accuracy,none": 0.8,
                "pope_accuracy_stderr,none": 0.01,
                "pope_f1_score,none": 0.7,
                "pope_f1_score_stderr,none": "N/A",
            }
        },
        "n-samples": {"pope": {"original": 9000, "effective": 100}},
    }
    (tmp_path / "l.json").write_text(json.dumps(lmms))
    read = other_results.read("lmms-eval", tmp_path / "l.json")
    assert read["pope@lmms-eval/pope_accuracy"] == Score(
        0.8, pytest.approx(0.7797, abs=1e-4), pytest.approx(0.8189, abs=1e-4), 100
    )
    assert read["pope@lmms-eval/pope_f1_score"].low == 0.7  # its error is not known
    for value, error, n in ((5 / 6, 0.1667, 6), (1.0, 0.0, 6), (0.0, 0.0, 3), (0.02, 0.02, 50)):
        lmms["results"] = {"t": {"right,none": value, "right_stderr,none": error, "samples": n}}
        (tmp_path / "l.json").write_text(json.dumps(lmms))
        score = other_results.read("lmms-eval", tmp_path / "l.json")["t@lmms-eval/right"]
        assert 0 <= score.low <= score.value <= score.high <= 1 and score.low < score.high, score
    (tmp_path / "X_acc.csv").write_text('"split","Overall","logic"\n"dev","0.61","0.5"\n"test","0.6","0.4"\n')
    assert other_results.read("vlmevalkit", tmp_path / "X_acc.csv")["X_acc@vlmevalkit/dev/Overall"].value == 0.61
    (tmp_path / "d_results.txt").write_text("Save results to: out.txt\nL1 entity: 0.91\nDPG-Bench score: 83.5\n")
    dpg = other_results.read("dpg", tmp_path / "d_results.txt")
    assert {k.partition("/")[2]: s.value for k, s in dpg.items()} == {"l1-entity": 0.91, "overall": 83.5}
    (tmp_path / "i.json").write_text(
        json.dumps({"1": "Prompt Compliance: 4\nQuality: 4\nKept: 1", "2": "A: 5\nB: 5\nC: 5"})
    )
    assert other_results.read("imgedit", tmp_path / "i.json")["imgedit@basic[official]/items"].value == 4
    types = dict(
        zip(
            ("Add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action"),
            (3.56, 3.31, 1.70, 3.30, 2.62, 3.24, 4.49, 2.38, 4.17),
            strict=True,
        )
    )
    (tmp_path / "t.json").write_text(json.dumps(types))
    assert round(other_results.read("imgedit", tmp_path / "t.json")["imgedit@basic[official]/overall"].value, 2) == 3.2
    head = "key,sementics_score,quality_score,intersection_exist,instruction_language,task_type"
    (tmp_path / "g.csv").write_text(f"{head}\na,4,9,True,en,x\nb,0,9,False,en,y\n")
    gedit = other_results.read("gedit", tmp_path / "g.csv")
    assert gedit["gedit_en@full[official]/O"].value == 3 and gedit["gedit_en@intersection[official]/O"].value == 6
    for kind, told in (("poop", "unknown kind"), ("wise", "has no 'prompt_id'"), ("lmms-eval", "no 'results'")):
        with pytest.raises(ValueError, match=told):
            other_results.read(kind, jsonl(tmp_path / "w.jsonl", [{"a": 1}]))
    bad = {"t.json": "imgedit", "g.csv": "gedit", "l.json": "lmms-eval"}
    (tmp_path / "t.json").write_text('{"1": 3.5, "2": null}')
    (tmp_path / "g.csv").write_text(f"{head}\na,4,nine,True,en,x\n")
    (tmp_path / "l.json").write_text('{"results": {"pope": 1}}')
    for name, kind in bad.items():  # the file is named, and what is wrong in it
        with pytest.raises(ValueError, match=rf"{name}.*(has no '2'|quality_score is 'nine'|of pope are 1)"):
            other_results.read(kind, tmp_path / name)


def test_samples_of_lmms_eval_are_items(tmp_path):
    """Compared in pairs, reported and scored again like ours; a task that grades no sample has none."""

    def made(name: str, grades: list[float]) -> Path:
        folder = tmp_path / name
        run("vqa-mini", lambda text, sample: "red", folder=folder, limit=1)
        (folder / "lmms-eval").mkdir()
        for task, of in (
            ("pope", [{"pope_accuracy": {"score": g, "prediction": "yes"}} for g in grades]),
            ("sums", [{}]),
        ):
            results = {"results": {task: {"total,none": sum(grades)}}, "n-samples": {}, "card": {}}
            (folder / f"lmms-eval/{task}.json").write_text(json.dumps(results))
            same = {"task": task, "target": "yes", "filtered_resps": ["Yes"]}
            rows = [same | {"doc_id": i, "arguments": [f"is it {i}?", {}]} | row for i, row in enumerate(of)]
            (folder / f"lmms-eval/{task}_samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for _ in range(2):
            assert "pope@lmms-eval/total" in harness.rescore(folder, progress=False).scores
        return folder

    a, b = made("a", [1.0, 0.0, 0.0]), made("b", [1.0, 1.0, 0.0])
    found = compare(a, b)
    assert found["pope@lmms-eval"].better == 1 and found["pope@lmms-eval"].score.value == pytest.approx(1 / 3)
    mine = [o for o in harness.load_result(b).outcomes if o.item.benchmark == "pope@lmms-eval"]
    assert [(o.item.prompt, o.text, o.verdict.ok) for o in mine] == [
        ("is it 0?", "Yes", True),
        ("is it 1?", "Yes", True),
        ("is it 2?", "Yes", False),
    ]
    assert mine[2].verdict.reason == "expected 'yes'" and not any("sums@" in name for name in found)


def test_lmms_eval_without_the_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(ValueError, match="lmms-eval cannot be used .*docs/evaluation.md"):
        run("lmms-eval:pope", lambda t, s: "yes", folder=tmp_path)


def test_generation_settings_of_lmms_eval_are_kept():
    of = interop.Generation.of
    assert of({}, DEFAULT) == interop.Generation(1024, 0.0, 1.0, ())
    asked = {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": ["\n\n", "Q:"]}
    assert of(asked, DEFAULT) == interop.Generation(16, 0.7, 0.9, ("\n\n", "Q:"))
    assert (
        of({**asked, "do_sample": False}, DEFAULT).temperature == 0
        and of({"do_sample": True}, DEFAULT).temperature == 1
    )
    assert of(asked, Answering(max_new_tokens=99, temperature=0.2)) == interop.Generation(99, 0.2, 0.9, ("\n\n", "Q:"))
    assert of(asked, DEFAULT).cut("yes Q: no\n\nmore") == "yes " and of({"until": "."}, DEFAULT).cut("a.b") == "a"
    assert of({"until": ""}, DEFAULT).cut("whole") == "whole"
    with pytest.raises(ValueError, match="num_beams is 4"):
        of({"num_beams": 4}, DEFAULT)


TASK = """task: tiny_pope
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
doc_to_visual: !function tiny.visual
doc_to_messages: !function tiny.messages
process_results: !function tiny.results
generation_kwargs: {{max_new_tokens: 8, temperature: 0.5, do_sample: true, top_p: 0.9, until: ["#"]}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
TASK_CODE = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def messages(doc, lmms_eval_specific_kwargs=None):
    image = {"type": "image", "url": visual(doc)[0]}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

def results(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"])}
"""


@pytest.mark.filterwarnings("ignore")
def test_lmms_eval_itself(tmp_path):
    """The real package with a task of the user's own; skipped where it is not installed (docs/evaluation.md)."""
    pytest.importorskip("lmms_eval")
    datasets = pytest.importorskip("datasets")
    images = [PIL.Image.new("RGB", (8, 8), c) for c in ("red", "blue", "red")]
    rows = {"image": images, "question": ["is it red?"] * 3, "answer": ["yes", "no", "no"]}
    kinds = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.to_parquet(str(tmp_path / "t.parquet"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny.yaml").write_text(TASK.format(file=tmp_path / "t.parquet"))
    (tmp_path / "tasks/tiny.py").write_text(TASK_CODE)
    calls = []

    def reply(text, sample):
        calls.append(text)
        return "yes#no" if next(sample.images()).pixels.getpixel((0, 0)) == (255, 0, 0) else "no"

    more = {"folder": tmp_path / "run", "tools": Tools(lmms_tasks=str(tmp_path / "tasks"))}
    result = run("lmms-eval:tiny_pope", reply, **more)
    assert result.scores["tiny_pope@lmms-eval/right"].value == pytest.approx(2 / 3) and len(calls) == 3
    assert (tmp_path / "run/lmms-eval/tiny_pope_samples.jsonl").read_text().count("\n") == 3
    assert run("lmms-eval:tiny_pope", reply, **more).scores == result.scores and len(calls) == 3  # read, not run
    with pytest.raises(ValueError, match="has no task 'tiny_popp'"):
        run("lmms-eval:tiny_popp", reply, **more)
    assert json.loads((tmp_path / "run/summary.json").read_text())["scores"]["tiny_pope@lmms-eval/right"]
    assert [o.verdict.ok for o in result.outcomes] == [True, True, False]
    assert harness.rescore(tmp_path / "run", progress=False).scores == result.scores


def test_rescoring_needs_the_same_questions(tmp_path):
    file = tsv(tmp_path / "quiz.tsv", QUESTIONS)
    result = run(f"mcq={file}", lambda t, s: "A", folder=tmp_path / "run")
    assert harness.rescore(tmp_path / "run", progress=False).scores == result.scores
    tsv(tmp_path / "quiz.tsv", QUESTIONS[:2])
    with pytest.raises(ValueError, match="was not made with the prompts of quiz-vanilla"):
        harness.rescore(tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="no folder of an evaluation"):
        harness.rescore(tmp_path)
