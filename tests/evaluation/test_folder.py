"""The folder of an evaluation: foreign files stay, other settings are refused, an interrupt or a full disk loses
nothing, and no secret of an address is written."""

import errno
import json
import os
import shutil
import signal
import threading

import PIL.Image
import pytest

from diptych.evaluation import addresses, files, harness
from diptych.evaluation.card import THINK, Answering
from diptych.evaluation.compare import compare
from diptych.evaluation.harness import evaluate, load_result, rescore
from diptych.evaluation.judges.judge import Judge
from diptych.evaluation.page import write_markdown, write_report
from diptych.evaluation.remote import Endpoint
from diptych.evaluation.report import sections
from tests.evaluation.test_harness import Fake
from tests.support.fake_server import serving, text


def questions(path, n=6):
    rows = [{"id": i, "question": f"{i}?", "answer": "yes"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"yesno={path}"


# --- foreign files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["items.jsonl", "scores.jsonl", "summary.json", "pictures/cat.png"])
def test_a_folder_of_something_else_is_refused_and_kept(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name.partition('/')[0]} without its card"):
        evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path, progress=False)
    assert file.read_text() == "mine" and not (tmp_path / "card.json").exists()


@pytest.mark.parametrize("content", ["[1, 2]", '{"name": "Ada"}', '"x"'])
def test_a_card_of_something_else_is_refused_and_kept(content, tmp_path):
    (tmp_path / "card.json").write_text(content)
    for read in (
        lambda: evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path, progress=False),
        lambda: rescore(tmp_path),
        lambda: load_result(tmp_path),
        lambda: compare(tmp_path, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"card\.json is not the card of an evaluation"):
            read()
    assert (tmp_path / "card.json").read_text() == content


def test_foreign_files_beside_an_evaluation_stay(tmp_path):
    mine = ("notes.txt", "items.old.jsonl", "scores.backup.jsonl", "items.jsonl.bak", "report.md")
    for name in mine:
        (tmp_path / name).write_text('{"id": "mine"}\n')
    for _ in range(2):
        evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path, progress=False)
    assert all((tmp_path / name).read_text() == '{"id": "mine"}\n' for name in mine)
    assert "mine" not in (tmp_path / "items.jsonl").read_text()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def thinker():
    with serving(reply=lambda asked, images: "<think>no?</think>yes") as server:
        yield server


def test_answering_options_reach_the_model_and_the_card(tmp_path, thinker):
    benchmark = questions(tmp_path / "q.jsonl", 2)

    def asked(folder, answering):
        more = dict(folder=tmp_path / folder, answering=answering, progress=False, limit=1)
        return evaluate(Endpoint(thinker.url, "m"), (benchmark,), **more), thinker.asked[-1]

    result, body = asked("plain", Answering())
    assert body["max_tokens"] == 48 and len(body["messages"]) == 1 and "chat_template_kwargs" not in body
    assert result.card["system"] == "" and result.card["thinking"] is None
    assert list(result.card["max_new_tokens"].values()) == [48] and result.card["temperature"] == 0

    result, body = asked("all", Answering(7, "Be brief.", True, 0.5))
    system, question = body["messages"]
    assert system == {"role": "system", "content": f"{THINK}\n\nBe brief."} and question["role"] == "user"
    assert body["max_tokens"] == 7 and body["temperature"] == 0.5
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert list(result.card["max_new_tokens"].values()) == [7] and result.card["system"] == system["content"]
    assert all(score.value == 1 for name, score in result.scores.items() if name.endswith("accuracy"))
    assert asked("long", Answering(thinking=True))[1]["max_tokens"] == 2048
    result, body = asked("off", Answering(thinking=False))
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and len(body["messages"]) == 1
    for other in (Answering(8, "Be brief.", True, 0.5), Answering(7, "Be long.", True, 0.5), Answering(7)):
        with pytest.raises(ValueError, match=r"was made with (max_new_tokens|system|temperature|thinking)"):
            asked("all", other)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            Answering(**wrong)


def test_a_card_that_lacks_a_setting_is_another_setting(tmp_path):
    evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path, progress=False)
    card = json.loads((tmp_path / "card.json").read_text())
    del card["settings"]["guidance_scale"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"settings\.guidance_scale = None"):
        evaluate(Fake(), ("vqa-mini",), limit=1, folder=tmp_path, progress=False)


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_the_replies_that_came(tmp_path):
    benchmark, stop, ended = questions(tmp_path / "q.jsonl"), threading.Event(), threading.Event()

    def reply(asked, images):
        if asked.startswith("2") and not stop.is_set():  # the others are answered while this one waits
            while sum(text(body)[0] in "01345" for body in server.asked) < 5:
                ended.wait(0.01)
            ended.wait(0.2)
            stop.set()
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(5)
        return "yes"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell has it ignored
    with serving(reply=reply) as server:
        try:
            with pytest.raises(KeyboardInterrupt):
                evaluate(Endpoint(server.url, "m"), (benchmark,), folder=tmp_path / "cut", batch_size=6, progress=False)
        finally:
            signal.signal(signal.SIGINT, before)
        ended.set()
        asked = len(server.asked)
        evaluate(Endpoint(server.url, "m"), (benchmark,), folder=tmp_path / "cut", batch_size=6, progress=False)
        assert len(server.asked) == asked + 1, "only the question that was under way is asked again"
        evaluate(Endpoint(server.url, "m"), (benchmark,), folder=tmp_path / "whole", batch_size=6, progress=False)
    for name in ("items.jsonl", "scores.jsonl", "summary.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob("items.*.jsonl"))


def test_a_full_disk_loses_no_finished_item(tmp_path, monkeypatch):
    names, more = ("edit-mini", "caption-mini"), dict(limit=4, batch_size=5, progress=False)
    evaluate(Fake(), names, folder=tmp_path / "whole", **more)
    append, calls = files.append, []

    def full(path, rows):
        calls.append(path)
        if len(calls) == 3:  # half of the rows fit
            with path.open("ab") as file:
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows)[:-20])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, rows)

    monkeypatch.setattr(files, "append", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(Fake(), names, folder=tmp_path / "cut", **more)
    assert not list((tmp_path / "cut").rglob("*.part"))
    monkeypatch.setattr(files, "append", append)
    evaluate(Fake(), names, folder=tmp_path / "cut", **more)
    rows = [[json.loads(r) for r in (tmp_path / f / "items.jsonl").read_text().splitlines()] for f in ("cut", "whole")]
    assert [r["id"] for r in rows[0]] == [r["id"] for r in rows[1]]
    assert (tmp_path / "cut/summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = ("hunter22", "k3y-in-query", "sk-env-key", "al%40ice")


def secret_address(url):
    return url.replace("http://", "http://al%40ice:hunter22@") + "?key=k3y-in-query"


def test_no_secret_is_written_or_said(tmp_path, capsys, caplog):
    benchmark, heard = questions(tmp_path / "q.jsonl", 3), []

    def reply(asked, images):
        return None if asked.startswith("2") else "yes"

    with serving(reply=reply) as server:
        url = secret_address(server.url)
        engine = Endpoint(url, "m", "sk-env-key")
        result = evaluate(engine, (benchmark,), folder=tmp_path / "run", progress=False)
        assert result.failures == 1 and len(server.asked) == 3, "the whole address is used for requests"
    heard.append(repr(engine.model) + json.dumps(result.to_json()) + repr(result.outcomes))
    for attempt in (
        lambda: evaluate(engine, (benchmark,), folder=tmp_path / "gone", progress=False),  # no server any more
        lambda: evaluate(Endpoint(url.replace("http", "ftp", 1), "m", "sk-env-key"), (benchmark,), progress=False),
        lambda: Endpoint(url, ""),
        lambda: Judge("j", url, None, "sk-env-key", retries=0).ask("what?"),
        lambda: harness.evaluate(Endpoint(url, "other"), (benchmark,), folder=tmp_path / "run", progress=False),
    ):
        with pytest.raises(ValueError) as refusal:
            attempt()
        heard.append(str(refusal.value))
    heard.append(repr(Judge("j", url, tmp_path, "sk-env-key")))
    made = sections({"a": load_result(tmp_path / "run")})
    write_report(tmp_path / "r.html", made)
    write_markdown(tmp_path / "r.md", made)
    printed = capsys.readouterr()
    heard += [printed.out, printed.err, caplog.text]
    heard += [file.read_text() for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl", ".html", ".md")]
    for secret in SECRETS:
        assert not [text for text in heard if secret in text], secret
    assert result.card["url"] == server.url


def test_a_server_that_repeats_the_key_does_not_reveal_it(tmp_path):
    text = "https://user:hunter22@h.example/v1?key=k3y-in-query: bad key sk-env-key, password hunter22, k3y-in-query"
    url = "https://user:hunter22@h.example/v1?key=k3y-in-query"
    clean = addresses.without_secrets(text, url, "sk-env-key")
    assert clean == "https://h.example/v1: bad key ***, password ***, ***"
    assert addresses.public_address("http://[::1]:8000/v1#x") == "http://[::1]:8000/v1"
    assert addresses.without_secrets("none of it", "http://h/v1") == "none of it"


def test_a_picture_server_is_named_without_its_password(tmp_path):
    with serving(draw=lambda body: PIL.Image.new("RGB", (32, 32))) as server:
        engine = Endpoint(secret_address(server.url), "m")
        with pytest.raises(ValueError, match="sent a picture of") as refusal:
            evaluate(engine, ("geneval-dev",), limit=1, folder=tmp_path / "run", progress=False)
    assert "hunter22" not in str(refusal.value) and server.url in str(refusal.value)
    shutil.rmtree(tmp_path / "run")
