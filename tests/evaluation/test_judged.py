"""What a judge scores: the judge is a server of this machine, its replies are kept and replay without it."""

import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from diptych.evaluation import harness
from diptych.evaluation.benchmarks import dpg
from diptych.evaluation.benchmarks.dpg import Proposition, dependent, read_dpg
from diptych.evaluation.benchmarks.gedit import read_gedit
from diptych.evaluation.benchmarks.geneval2 import probability
from diptych.evaluation.benchmarks.imgedit import read_imgedit
from diptych.evaluation.benchmarks.printed_text import read_back
from diptych.evaluation.benchmarks.table import Tools, resolve
from diptych.evaluation.benchmarks.wise import read_wise
from diptych.evaluation.harness import evaluate
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.remote import PictureFolder, cut, tiled
from diptych.evaluation.scores import Outcome
from tests.support.fake_server import serving


def flat(colour, size=(16, 16)):
    return PIL.Image.new("RGB", size, colour)


@pytest.fixture
def pictures(tmp_path):
    """``put(place, picture)`` below a folder of pictures made elsewhere."""

    def put(place, image):
        path = tmp_path / "made" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        return tmp_path / "made"

    return put


def score(folder, benchmark, tools, **more):
    return evaluate(PictureFolder(folder), (benchmark,), tools=tools, progress=False, **more)


def judge(server, tmp_path, **more):
    return Judge("wise-owl", server.url, tmp_path / "cache", **more)


# --- the judge --------------------------------------------------------------------------------------------------------


def test_replies_are_kept_and_replay_without_the_judge(tmp_path):
    red, blue = flat("red"), flat("blue")
    with serving(reply=lambda text, images: f"{text}! {images[0].getpixel((0, 0))}") as server:
        one = judge(server, tmp_path)
        assert one.ask("colour", [red]).text == "colour! (255, 0, 0)" and one.ask("colour", [blue]).text[-2:] == "5)"
        one.ask("colour", [red])
        assert len(server.asked) == 2  # the third was known
        assert server.asked[0]["temperature"] == 0 and server.asked[0]["model"] == "wise-owl"
        one.ask("colour", [red], attempt=1)
        assert len(server.asked) == 3
        server.refuse = 2
        assert one.ask("again", [red]).text  # what may pass is tried again
        assert len(set(one.every(lambda _: one.ask("the same at once", [red]), range(24)))) == 1
    offline = Judge("wise-owl", None, tmp_path / "cache")
    assert offline.ask("colour", [flat("red")]).text == "colour! (255, 0, 0)"
    with pytest.raises(ValueError, match="has no reply of wise-owl to 'colour'"):
        offline.ask("colour", [flat("green")])
    with pytest.raises(ValueError, match="has no reply"):
        Judge("other", None, tmp_path / "cache").ask("colour", [red])
    [kept] = [json.loads(f.read_text()) for f in (tmp_path / "cache").rglob("*.json") if "again" in f.read_text()]
    assert kept["model"] == "wise-owl" and re.match(r"\d{4}-\d\d-\d\dT", kept["date"])
    with pytest.raises(ValueError, match="http://127.0.0.1:.*"):
        Judge("wise-owl", server.url, retries=0).ask("x")  # it is gone


def test_a_judge_may_think(tmp_path):
    with serving(reply=lambda *_: "<think>Is it red? No.</think>yes") as server:
        assert judge(server, tmp_path).ask("x").text == "yes"


def test_wrong_judges_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs the name"):
        Judge("", "http://localhost:1/v1")
    with pytest.raises(ValueError, match="neither an address nor a cache"):
        Judge("x")
    with serving(reply=lambda *_: None) as server, pytest.raises(ValueError, match="the filter says no"):
        judge(server, tmp_path).ask("x")
    (tmp_path / "w.json").write_text(json.dumps([{"prompt_id": 1, "Prompt": "p", "Explanation": "e"}]))
    with pytest.raises(ValueError, match="wise needs a judge: --judge"):
        resolve([f"wise={tmp_path / 'w.json'}"], Tools())


def test_a_reply_that_cannot_be_read_is_a_failure_and_no_guess(tmp_path, pictures):
    rows = [{"prompt_id": 1, "Prompt": "p", "Explanation": "e"}, {"prompt_id": 2, "Prompt": "q", "Explanation": "e"}]
    (tmp_path / "w.json").write_text(json.dumps(rows))
    folder = pictures("1.png", flat("red"))
    pictures("2.png", flat("red"))

    def reply(text, images):
        return "no idea" if '"p"' in text else "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"

    with serving(reply=reply) as server:
        result = score(folder, f"wise={tmp_path / 'w.json'}", Tools(judge=judge(server, tmp_path)))
        assert len(server.asked) == 4  # three attempts at the first
    assert result.failures == 1 and result.scores["wise@legacy[wise-owl, our rubric]/culture"].value == 0.5
    assert "cannot be read" in result.outcomes[0].verdict.reason


# --- WISE -------------------------------------------------------------------------------------------------------------


def test_wise(tmp_path, pictures):
    ids = {1: 2, 500: 2, 600: 0, 750: 1, 850: 2, 999: 0}  # a mark of consistency for a prompt of each category
    (tmp_path / "wise").mkdir()
    for name, some in (("a", list(ids)[:3]), ("b", list(ids)[3:])):
        rows = [{"prompt_id": i, "Prompt": f"prompt {i}", "Explanation": "why"} for i in some]
        (tmp_path / "wise" / f"{name}.json").write_text(json.dumps(rows))
    for i in ids:
        folder = pictures(f"{i}.png", flat("red"))

    def reply(text, images):
        i = int(re.search(r"prompt (\d+)", text)[1])
        return f"**Consistency**: {ids[i]}\nRealism: 1\nAesthetic Quality: 2"

    with serving(reply=reply) as server:
        tools = Tools(judge=judge(server, tmp_path))
        result = evaluate(
            PictureFolder(folder), (f"wise={tmp_path / 'wise'}",), tools=tools, progress=False, folder=tmp_path / "run"
        )
        stamp = "wise@legacy[wise-owl, our rubric]"
        each = {i: (0.7 * c + 0.2 + 0.2) / 2 for i, c in ids.items()}
        weights = dict(zip(ids, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), strict=True))
        assert result.scores[f"{stamp}/overall"].value == pytest.approx(sum(weights[i] * v for i, v in each.items()))
        assert result.scores[f"{stamp}/space"].value == pytest.approx(0.2) and result.failures == 0
        asked = len(server.asked)
        again = harness.rescore(tmp_path / "run", tools=tools, progress=False)
        assert again.scores == result.scores and len(server.asked) == asked
    replayed = harness.rescore(
        tmp_path / "run", tools=Tools(judge=Judge("wise-owl", None, tmp_path / "cache")), progress=False
    )
    assert replayed.scores == result.scores
    [written] = harness.write_layout(tmp_path / "out", result, resolve([f"wise={tmp_path / 'wise'}"], tools)[0])
    assert (written / "999.png").is_file()
    from diptych.evaluation.other_results import read

    marks = [json.loads(line) for line in (written / "scores.jsonl").read_text().splitlines()]
    (tmp_path / "official.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": int(m["prompt_id"]),
                    "consistency": m["consistency"],
                    "realism": m["realism"],
                    "aesthetic_quality": m["aesthetic quality"],
                }
            )
            + "\n"
            for m in marks
        )
    )
    read_back = read("wise", tmp_path / "official.jsonl")["wise@legacy[official]/overall"]
    assert read_back.value == pytest.approx(result.scores[f"{stamp}/overall"].value)


def test_published_wise_folders(tmp_path):
    """The legacy folder holds rewritten prompts of the same ids, the verified one all prompts twice."""
    rows = [{"prompt_id": i, "Prompt": f"p{i}", "Explanation": "e"} for i in (1, 500)]
    for name, some in (("cultural", rows[:1]), ("spatio", rows[1:]), ("cultural_rewrite", rows[:1])):
        again = [{**r, "Prompt": "rewritten"} if "rewrite" in name else r for r in some]
        (tmp_path / f"{name}.json").write_text(json.dumps(again))
    assert [r["prompt"] for r in read_wise(tmp_path)] == ["p1", "p500"]
    (tmp_path / "merge.json").write_text(json.dumps(rows))
    assert [r["id"] for r in read_wise(tmp_path)] == [1, 500]
    (tmp_path / "merge.json").write_text(json.dumps([*rows, {**rows[0], "Prompt": "another"}]))
    with pytest.raises(ValueError, match="merge.json row 3: another prompt of the id 1"):
        read_wise(tmp_path)
    assert read_wise(tmp_path / "cultural_rewrite.json")[0]["prompt"] == "rewritten"  # by name it is read


def test_wise_verified_is_another_protocol(tmp_path, pictures):
    names = ["", "time", "space", "Biology", "physics", "Chemistry"]
    rows = [
        {"prompt_id": 100 + 150 * k, "Prompt": f"p{k}", "Explanation": "e", "Subcategory": n}
        for k, n in enumerate(names)
    ]
    rows[2]["prompt_id"], rows[1]["prompt_id"] = 420, 410
    (tmp_path / "w.json").write_text(json.dumps(rows))
    for row in rows:
        folder = pictures(f"{row['prompt_id']}.png", flat("red"))
    with serving(reply=lambda text, _: f"Score: {int('p0' in text or 'p3' in text)}") as server:
        tools = Tools(judge=judge(server, tmp_path))
        scores = score(folder, f"wise-verified={tmp_path / 'w.json'}", tools).scores
    assert scores["wise@verified[wise-owl, our rubric]/overall"].value == pytest.approx(0.4 + 0.12)
    rows[3]["Subcategory"] = "gardening"
    (tmp_path / "w.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="of no category"):
        score(folder, f"wise-verified={tmp_path / 'w.json'}", tools)


# --- DPG --------------------------------------------------------------------------------------------------------------

HEAD = "item_id,text,proposition_id,dependency,category_broad,question_natural_language"
DPG = f"""{HEAD}
p0,"a red cat, on a mat",1,0,entity,Is there a cat?
p0,"a red cat, on a mat",2,1,attribute,Is the cat red?
p0,"a red cat, on a mat",3,"1,4",relation,Is the cat on the mat?
p0,"a red cat, on a mat",4,0,entity,Is there a mat?
p1,a dog,1,0,entity,Is there a dog?
"""


def test_a_no_is_inherited():
    asked = [Proposition(1, "", (), ""), Proposition(2, "", (1,), ""), Proposition(3, "", (2,), "")]
    assert dependent({1: False, 2: True, 3: True}, asked) == {1: False, 2: False, 3: False}
    assert dependent({1: True, 2: True, 3: False}, asked) == {1: True, 2: True, 3: False}


def test_dpg_with_its_grids(tmp_path, pictures):
    (tmp_path / "dpg.csv").write_text(DPG)
    assert [p.parents for p in read_dpg(tmp_path / "dpg.csv")["p0"][1]] == [(), (1,), (1, 4), ()]
    tiles = [flat(c) for c in ("red", "green", "blue", "white")]
    folder = pictures("p0.png", tiled(tiles))
    pictures("p1.jpg", flat("black", (32, 32)))
    assert [cut(tiled(tiles), k).getpixel((0, 0)) for k in range(4)] == [t.getpixel((0, 0)) for t in tiles]

    def reply(text, images):
        assert images[0].size == (16, 16)
        no_cat = "Is there a cat" in text and images[0].getpixel((0, 0)) == (255, 0, 0)
        return "No." if no_cat or "a dog" in text else "yes"

    with serving(reply=reply) as server:
        tools = Tools(judge=judge(server, tmp_path))
        result = score(folder, f"dpg={tmp_path / 'dpg.csv'}", tools)
        scores = {k.partition("]/")[2]: s.value for k, s in result.scores.items()}
        # p0: in the red picture the cat is missing, so are its colour and place; p1 has nothing
        assert scores["overall"] == pytest.approx(100 * ((1 / 4 + 3) / 4 + 0) / 2)
        # categories are of the last picture, before a no is inherited: p0 has all, p1 no dog
        assert scores["entity"] == pytest.approx(100 * 2 / 3) and scores["attribute"] == pytest.approx(100)
        [out] = harness.write_layout(tmp_path / "out", result, resolve([f"dpg={tmp_path / 'dpg.csv'}"], tools)[0])
    with PIL.Image.open(out / "p0.png") as grid:
        assert grid.size == (32, 32) and grid.getpixel((31, 31)) == (255, 255, 255)
    (folder / "p1.jpg").unlink()
    with serving(reply=reply) as server:
        result = score(folder, f"dpg={tmp_path / 'dpg.csv'}", Tools(judge=judge(server, tmp_path)), batch_size=1)
    assert result.failures == 4 and len(result.outcomes) == 8  # counted, not dropped
    with serving(reply=reply) as server:  # one picture of a prompt is no grid
        (folder / "p0.png").unlink()
        pictures("p0.png", flat("blue"))
        tools = Tools(judge=judge(server, tmp_path), pictures=1)
        assert score(folder, f"dpg={tmp_path / 'dpg.csv'}", tools, limit=1).failures == 0
    (tmp_path / "dpg.csv").write_text(DPG.replace(",2,1,", ",2,1;4,"))
    with pytest.raises(ValueError, match="dpg.csv line .: dependency is '1;4'"):
        read_dpg(tmp_path / "dpg.csv")


def test_dpg_scores_follow_the_published_script(tmp_path, pictures):
    """Random answers of 60 prompts x 4 pictures against its procedure written out: overall after a no is inherited,
    both levels of categories before it, of the last picture."""
    rng = np.random.default_rng(5)
    kinds = ("entity - whole", "entity - part", "attribute - color", "relation - spatial", "other - count")
    prompts = {
        f"p{k}": [
            Proposition(
                i, f"q{i}?", tuple(int(p) for p in range(1, i) if rng.random() < 0.4), kind.split(" - ")[0], kind
            )
            for i, kind in enumerate(rng.choice(kinds, rng.integers(1, 7)).tolist(), 1)
        ]
        for k in range(60)
    }
    items = dpg.dpg_items({k: (f"prompt {k}", asked) for k, asked in prompts.items()}, 4, 0, 0)
    answers = {item.id: {p.id: bool(rng.random() < 0.7) for p in prompts[item.cluster]} for item in items}

    class Fixed:
        """A judge that answers from the table."""

        def read(self, parse, text, images):
            return parse("yes" if answers[self.item.id][int(text[1 : text.index("?")])] else "no")

    outcomes, fixed = [], Fixed()
    for item in items:
        fixed.item = item
        outcomes.append(Outcome(item, dpg.judge_dpg(fixed, dpg.ASK, item, None)))
    overall, pooled = [], {}
    for key, asked in prompts.items():
        grades = []
        for item in (i for i in items if i.cluster == key):
            counted = dict(answers[item.id])
            for p in asked:
                if any(not counted[parent] for parent in p.parents):
                    counted[p.id] = False
            grades.append(sum(counted.values()) / len(counted))
            before = answers[item.id]
        overall.append(sum(grades) / len(grades))
        for p in asked:
            for name in (p.category, p.detail):
                pooled.setdefault(name, []).append(before[p.id])
    scores = {k.partition("/")[2]: s.value for k, s in dpg.dpg_scores("dpg@ours[x]", outcomes).items()}
    assert scores == pytest.approx(
        {"overall": 100 * np.mean(overall)} | {k: 100 * np.mean(v) for k, v in pooled.items()}
    )


def test_dpg_categories_of_both_levels_and_unreadable_replies(tmp_path, pictures):
    head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    head += "question_natural_language"
    (tmp_path / "dpg.csv").write_text(
        f"{head}\np0,a red cat,k,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
        'p0,a red cat,k,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?\n'
        "p0,a red cat,k,3,0,global,,global - (photo),Is it a photo?\n"
    )
    folder = pictures("p0.png", flat("red"))
    with serving(reply=lambda text, _: "hm" if "photo" in text else "yes") as server:
        result = score(folder, f"dpg={tmp_path / 'dpg.csv'}", Tools(judge=judge(server, tmp_path), pictures=1))
    scores = {k.partition("]/")[2]: s.value for k, s in result.scores.items()}
    assert scores["overall"] == pytest.approx(200 / 3) and result.failures == 0  # one question, not the picture
    assert "cannot be read: Is it a photo?" in result.outcomes[0].verdict.reason
    assert scores["attribute - color"] == scores["attribute"] == 100 and scores["global"] == 0


# --- GenEval 2, text --------------------------------------------------------------------------------------------------


def test_soft_scores_are_probabilities(tmp_path, pictures):
    assert probability((("Three", np.log(0.5)), (" 3", np.log(0.25)), ("two", np.log(0.2))), "three") == pytest.approx(
        0.75
    )
    assert probability((("left", np.log(0.5)), ("l", np.log(0.1))), "left of") == pytest.approx(0.5)
    rows = [{"prompt": "three cats", "vqa_list": [["How many cats?", "three"], ["What animal?", "cat"]]}]
    (tmp_path / "g.jsonl").write_text(json.dumps(rows[0]) + "\n")
    folder = pictures("00000.png", flat("red"))
    chances = {"many": {"three": np.log(0.9), "two": np.log(0.1)}, "animal": {"cat": np.log(0.4), "dog": np.log(0.6)}}

    def tokens(text):
        return next(v for k, v in chances.items() if k in text)

    with serving(reply=lambda *_: "three", tokens=tokens) as server:
        tools = Tools(judge=judge(server, tmp_path))
        scores = score(folder, f"geneval2={tmp_path / 'g.jsonl'}", tools).scores
    assert scores["geneval2@soft-tifa-am[wise-owl, our rubric]/overall"].value == pytest.approx(65)
    assert scores["geneval2@soft-tifa-gm[wise-owl, our rubric]/overall"].value == pytest.approx(60)
    rows[0] |= {"skills": ["count", "object"], "atom_count": 2}
    (tmp_path / "g.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with serving(reply=lambda *_: "three", tokens=tokens) as server:
        scores = score(folder, f"geneval2={tmp_path / 'g.jsonl'}", Tools(judge=judge(server, tmp_path))).scores
    got = {k.partition("]/")[2]: s.value for k, s in scores.items() if "-am" in k}
    assert got == pytest.approx({"overall": 65, "skill/count": 90, "skill/object": 40, "atoms/2": 65})
    with serving(reply=lambda *_: "three") as server, pytest.raises(ValueError, match="no log-probabilities"):
        score(folder, f"geneval2={tmp_path / 'g.jsonl'}", Tools(judge=Judge("deaf", server.url)))
    (tmp_path / "g.jsonl").write_text('{"prompt": "x", "vqa_list": ["How many?"]}\n')
    with pytest.raises(ValueError, match="line 1: vqa_list must be"):
        score(folder, f"geneval2={tmp_path / 'g.jsonl'}", tools)


def test_printed_text_is_read_back(tmp_path, pictures):
    assert read_back("HELLO, world!", "Hello World") == {"words": 1.0, "similarity": 1.0}
    assert read_back("hello", "hello hello") == {"words": 0.5, "similarity": pytest.approx(5 / 11)}
    assert read_back("", "hi")["words"] == 0
    (tmp_path / "t.jsonl").write_text('{"prompt": "a sign that says STOP NOW", "text": "STOP NOW"}\n')
    folder = pictures("00000.png", flat("red"))
    with serving(reply=lambda *_: "stop not") as server:
        scores = score(folder, f"text={tmp_path / 't.jsonl'}", Tools(judge=judge(server, tmp_path))).scores
    assert scores["text@words[wise-owl]/overall"].value == 0.5 and scores["text@whole[wise-owl]/overall"].value == 0


# --- edits ------------------------------------------------------------------------------------------------------------


def test_gedit(tmp_path, pictures):
    flat("white", (20, 10)).save(tmp_path / "source.png")
    rows = [
        {
            "key": key,
            "task_type": task,
            "instruction": f"make {key}",
            "instruction_language": language,
            "input_image": "source.png",
            "Intersection_exist": both,
        }
        for key, task, language, both in (
            ("a", "color_alter", "en", True),
            ("b", "color_alter", "en", False),
            ("c", "style_change", "en", True),
            ("d", "style_change", "cn", True),
        )
    ]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for r in rows:
        place = f"fullset/{r['task_type']}/{r['instruction_language']}/{r['key']}.png"
        folder = pictures(place, flat("red", (40, 20)))
    marks = {"a": [9, 4], "b": [0, 10], "c": [8, 9], "d": [5, 5]}

    def reply(text, images):
        assert all(i.size == (20, 10) for i in images)  # the edited one is brought to its source's size
        if len(images) == 1:
            return '{"score": [9, 10]}'
        assert images[0].getpixel((0, 0)) == (255, 255, 255)
        return json.dumps({"score": marks[re.search(r"make (\w)", text)[1]], "reasoning": "so"})

    with serving(reply=reply) as server:
        tools = Tools(judge=judge(server, tmp_path))
        result = score(folder, f"gedit={tmp_path / 'g.jsonl'}", tools)
    o = {k: (min(v) * 9) ** 0.5 for k, v in marks.items()}
    at = "[wise-owl, our rubric]/O"
    scores = {k: s.value for k, s in result.scores.items()}
    assert scores[f"gedit_en@full{at}"] == pytest.approx(((o["a"] + o["b"]) / 2 + o["c"]) / 2)
    assert scores[f"gedit_en@intersection{at}"] == pytest.approx((o["a"] + o["c"]) / 2)
    assert scores[f"gedit_cn@full{at}"] == pytest.approx(o["d"])
    [out] = harness.write_layout(tmp_path / "out", result, resolve([f"gedit={tmp_path / 'g.jsonl'}"], tools)[0])
    with PIL.Image.open(out / "fullset/color_alter/en/a_SRCIMG.png") as source:
        assert source.size == (20, 10)
    rows[0]["task_type"] = "gardening"
    (tmp_path / "g.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="row 1: the task is 'gardening'"):
        score(folder, f"gedit={tmp_path / 'g.jsonl'}", tools)


def test_imgedit(tmp_path, pictures):
    flat("white").save(tmp_path / "s.png")
    from diptych.evaluation.benchmarks.aggregate import IMGEDIT

    entries = {str(k): {"id": "s.png", "prompt": f"edit {k}", "edit_type": kind} for k, kind in enumerate(IMGEDIT)}
    (tmp_path / "i.json").write_text(json.dumps(entries))
    for k in entries:
        folder = pictures(f"{k}.png", flat("red"))
    (folder / "8.png").unlink()  # the model failed there

    def reply(text, images):
        k = int(re.search(r"edit (\d)", text)[1])
        assert f'kind "{IMGEDIT[k]}"' in text and len(images) == 2
        return f"Compliance: {1 + k % 5}\nQuality: 3\nPreservation: 3"

    with serving(reply=reply) as server:
        tools = Tools(judge=judge(server, tmp_path))
        result = score(folder, f"imgedit={tmp_path / 'i.json'}", tools, batch_size=1)
    each = [round((1 + k % 5 + 6) / 3, 2) for k in range(8)] + [1.0]
    overall = result.scores["imgedit@basic[wise-owl, our rubric]/overall"]
    assert overall.value == pytest.approx(sum(each) / 9) and 1 <= overall.low < overall.high <= 5
    assert result.failures == 1 and result.scores["imgedit@basic[wise-owl, our rubric]/action"].value == 1


def test_edits_of_older_revisions_and_pictures_outside(tmp_path):
    flat("white").save(tmp_path / "s.png")
    (tmp_path / "quiz").mkdir()
    flat("white").save(tmp_path / "quiz/s.png")
    entry = {"id": "s.png", "prompt": "make it red", "edit_type": "alter"}
    (tmp_path / "quiz/i.json").write_text(json.dumps({"1": entry}))
    assert [r["type"] for r in read_imgedit(tmp_path / "quiz/i.json")] == ["adjust"]
    for outside in ("../s.png", str(tmp_path / "s.png"), "http://127.0.0.1/x.png"):
        (tmp_path / "quiz/i.json").write_text(json.dumps({"1": {**entry, "id": outside}}))
        with pytest.raises(ValueError, match="entry '1': picture .* lies outside"):
            read_imgedit(tmp_path / "quiz/i.json")
        row = {
            "key": "a",
            "task_type": "color_alter",
            "instruction": "x",
            "instruction_language": "en",
            "input_image": outside,
            "Intersection_exist": True,
        }
        (tmp_path / "quiz/g.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match="row 1: picture .* lies outside"):
            read_gedit(tmp_path / "quiz/g.jsonl")


def test_the_users_rubrics_take_our_place(tmp_path, pictures):
    (tmp_path / "rubrics").mkdir()
    (tmp_path / "rubrics" / "wise.txt").write_text("PROMPT {prompt} EXPLAINED {explanation} {odd}")
    (tmp_path / "w.json").write_text(json.dumps([{"prompt_id": 1, "Prompt": "p", "Explanation": "e"}]))
    folder = pictures("1.png", flat("red"))
    with serving(reply=lambda *_: "Consistency: 2\nRealism: 2\nAesthetic Quality: 2") as server:
        tools = Tools(judge=judge(server, tmp_path), rubrics=tmp_path / "rubrics")
        result = score(folder, f"wise={tmp_path / 'w.json'}", tools)
        assert "PROMPT p EXPLAINED e {odd}" in json.dumps(server.asked)
    assert list(result.scores) == ["wise@legacy[wise-owl]/culture"]
    with pytest.raises(ValueError, match="has no dpg.txt"):
        tools.rubric("dpg", "")


def test_broken_and_missing_pictures_are_named_failures(tmp_path, pictures):
    (tmp_path / "w.json").write_text(
        json.dumps([{"prompt_id": i, "Prompt": "p", "Explanation": "e"} for i in (1, 2, 3)])
    )
    folder = pictures("1.jpg", flat("red"))
    out = io.BytesIO()
    flat("red").save(out, "PNG")
    (folder / "2.png").write_bytes(out.getvalue()[:40])
    with serving(reply=lambda *_: "Consistency: 2\nRealism: 2\nAesthetic Quality: 2") as server:
        tools = Tools(judge=judge(server, tmp_path))
        result = score(folder, f"wise={tmp_path / 'w.json'}", tools)
        assert result.failures == 2 and "2.png" in result.outcomes[1].error and "3{.png," in result.outcomes[2].error
        (folder / "1.jpg").rename(folder / "3.jpg")  # the first batches may be missing
        assert score(folder, f"wise={tmp_path / 'w.json'}", tools, batch_size=1).failures == 2
        (folder / "2.png").unlink()
        (folder / "3.jpg").rename(folder / "c.jpg")
        with pytest.raises(ValueError, match="it answers no questions"):
            score(folder, "vqa-mini", tools, limit=1)
        with pytest.raises(ValueError, match="holds none of the 3 pictures, such as .*1{.png"):
            score(folder, f"wise={tmp_path / 'w.json'}", tools)
