"""The server over a real socket: OpenAI's own client with every parameter, batching, faults, the end."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import PIL.Image
import pytest

from diptych.core.sample import Image, Sample, user
from diptych.generation.engine import Engine
from diptych.generation.scheduler import ImageJob, TextJob
from diptych.serving.options import Limits, Options
from diptych.serving.schemas import ImagesRequest
from tests.support import tiny
from tests.support.serving import WAIT, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's and the server's libraries


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny.shake(tiny.model("bagel")).requires_grad_(False), "tiny")


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, Engine(engine.model, "other/copy")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT) as made:
        yield made


def png(seed=0, width=32, height=32) -> bytes:
    out = io.BytesIO()
    tiny.picture(seed, width, height).save(out, "PNG")
    return out.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def opened(text: str) -> PIL.Image.Image:
    with PIL.Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return image.convert("RGB")


def hello(text="hello", **how):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **how}


# ---- chat ---------------------------------------------------------------------------------------------------------


def test_models_with_capabilities_and_limits(client, engine):
    first, second = client.models.list().data
    assert (first.id, second.id) == ("tiny", "other/copy")
    assert first.capabilities == {"understand": True, "generate": True, "edit": True}
    assert first.limits["slots"] == 16 and first.limits["pixels"] > 0 and first.exact_batching is True
    assert first.parameters["num_inference_steps"] == 4 and first.parameters["size"] == "32x32"
    assert client.models.retrieve("other/copy").id == "other/copy"
    with pytest.raises(openai.NotFoundError, match="no model 'nothing'; here are: tiny, other/copy"):
        client.models.retrieve("nothing")


def test_chat_says_what_the_library_says(client, engine):
    content = [
        {"type": "image_url", "image_url": {"url": uri(png(1)), "detail": "auto"}},
        {"type": "image_url", "image_url": {"url": uri(png(2, 32, 48))}},
        {"type": "text", "text": "how many stars are there?"},
    ]
    told = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=7)
    expected = engine.chat([user(Image(tiny.picture(1)), Image(tiny.picture(2, 32, 48)), content[2]["text"])], 7)
    [choice] = told.choices
    assert choice.message.content.strip() == expected.text and choice.finish_reason == expected.finish_reason
    assert told.usage.completion_tokens == len(expected.ids) and told.usage.prompt_tokens > 8
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens
    assert told.object == "chat.completion" and told.id.startswith("chatcmpl-")
    assert told.parameters["max_tokens"] == 7 and told.parameters["temperature"] == 0.0  # defaults included


def test_every_parameter_of_a_chat(client):
    how = hello(
        temperature=1.5,
        top_p=0.9,
        seed=11,
        n=2,
        stop=["zzz", "yyy"],
        logprobs=True,
        top_logprobs=3,
        user="me",
        frequency_penalty=0,
        presence_penalty=0,
        response_format={"type": "text"},
        extra_body={"modalities": ["text"]},
    )
    first, second = (client.chat.completions.create(**how) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert first.choices[0].message.content != first.choices[1].message.content  # seeds 11 and 12
    assert [c.index for c in first.choices] == [0, 1]
    assert first.parameters == {
        "n": 2,
        "modalities": ["text"],
        "max_tokens": 5,
        "temperature": 1.5,
        "top_p": 0.9,
        "seed": 11,
        "stop": ["zzz", "yyy"],
    }
    words = first.choices[0].logprobs.content
    assert 0 < len(words) <= 5 and all(len(w.top_logprobs) == 3 and w.logprob <= 0 for w in words)
    assert all(bytes(w.bytes).decode() == w.token for w in words)
    other = client.chat.completions.create(**how | {"seed": 12})
    assert other.choices[0].message.content == first.choices[1].message.content
    some = client.chat.completions.create(**hello(temperature=1.0))
    assert some.parameters["seed"] >= 0  # drawn, and told
    again = client.chat.completions.create(**hello(temperature=1.0, seed=some.parameters["seed"]))
    assert again.choices[0].message.content == some.choices[0].message.content
    completion = {k: v for k, v in hello().items() if k != "max_tokens"}
    short = client.chat.completions.create(**completion, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_thoughts_and_plans_are_reasoning_content(client, engine, monkeypatch):
    """As vLLM names it: in an answer, in a stream, and of a picture."""
    tokenizer, end = engine.model.tokenizer, next(iter(engine.model.stop_ids))
    words = [*tokenizer.encode("<think> it is red </think> two"), end]
    given = iter(words * 3)
    monkeypatch.setattr("diptych.generation.scheduler.next_token", lambda *_: next(given))
    asked = hello(max_tokens=40, extra_body={"think": True})
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.reasoning_content, message.content) == ("it is red ", "two")
    asked["extra_body"] = {"chat_template_kwargs": {"enable_thinking": True}}
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True) if c.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "it is red "
    assert "".join(d.content or "" for d in deltas) == "two"
    drawn = client.images.generate(
        model="tiny", prompt="a star", extra_body={"think": True, "preset": "demo", "steps": 2, "seed": 3}
    )
    assert drawn.data[0].reasoning_content == "<think> it is red </think> two"
    assert drawn.parameters["image_guidance_scale"] == 1.5 and drawn.parameters["think"]["max_new_tokens"] == 1023


def test_an_answer_comes_back_as_the_client_holds_it(client):
    first = client.chat.completions.create(**hello())
    messages = [{"role": "developer", "content": "be kind"}, *hello()["messages"], first.choices[0].message]
    told = client.chat.completions.create(**hello() | {"messages": [*messages, {"role": "user", "content": "more"}]})
    assert told.choices[0].message.content and told.usage.prompt_tokens > first.usage.prompt_tokens


def test_null_stands_for_what_is_not_given(client):
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "logprobs", "response_format"))
    told = client.chat.completions.create(**hello(), **nothing, extra_body={"modalities": None, "size": None})
    assert told.choices[0].message.content == client.chat.completions.create(**hello()).choices[0].message.content


def test_a_stream_says_what_an_answer_says(client, server):
    how = hello(max_tokens=9, temperature=1.0, seed=4)
    whole = client.chat.completions.create(**how, logprobs=True)
    usage = {"include_usage": True}
    chunks = [*client.chat.completions.create(**how, stream=True, logprobs=True, stream_options=usage)]
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 4
    words = [w for c in chunks if c.choices and c.choices[0].logprobs for w in c.choices[0].logprobs.content]
    assert words == whole.choices[0].logprobs.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-2].parameters["seed"] == 4
    assert chunks[-1].usage.completion_tokens == 9 and not chunks[-1].choices
    stop = whole.choices[0].message.content[3:6]
    cut = client.chat.completions.create(**how, stop=stop)
    assert cut.choices[0].message.content == whole.choices[0].message.content.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    raw = server.http.post("/v1/chat/completions", json=hello(stream=True))
    assert raw.text.endswith("data: [DONE]\n\n") and raw.headers["content-type"].startswith("text/event-stream")


def test_an_answer_may_be_words_and_pictures_in_the_order_asked_for(client, engine):
    how = {"size": "32x16", "steps": 2, "guidance_scale": 3.0, "seed": 5}
    drawn = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a star"}], extra_body={"modalities": ["image"], **how}
    )
    [part] = drawn.choices[0].message.content
    expected = engine.generate("a star", 1, (32, 16), 5, num_inference_steps=2, guidance_scale=3.0).images[0]
    assert opened(part["image_url"]["url"].partition(",")[2]).tobytes() == expected.tobytes()
    assert drawn.parameters["image"]["num_inference_steps"] == 2 and drawn.usage.pictures == 1
    both = hello("a star", extra_body={"modalities": ["image", "text", "image"], **how})
    told = client.chat.completions.create(**both).choices[0].message.content
    assert [p["type"] for p in told] == ["image_url", "text", "image_url"] and told[0] == part
    streamed, previews = [], 0
    both["extra_body"]["partial_images"] = 1
    for chunk in client.chat.completions.create(**both, stream=True):
        delta = chunk.choices[0].delta
        previews += getattr(delta, "preview", None) is not None
        if isinstance(delta.content, list):
            streamed += delta.content
        elif delta.content:
            if not streamed or streamed[-1]["type"] != "text":
                streamed.append({"type": "text", "text": ""})
            streamed[-1]["text"] += delta.content
    assert streamed == told and previews == 2
    goes_on = [*both["messages"], {"role": "assistant", "content": told}, {"role": "user", "content": "and now?"}]
    assert client.chat.completions.create(**hello() | {"messages": goes_on}).choices[0].message.content is not None


def test_an_upload_is_a_picture_of_a_message(client, server):
    kept = client.files.create(file=("../../etc/passwd.png", png(1)), purpose="vision")
    assert kept.id.startswith("file-") and kept.filename == "picture.png"

    def answer(part):
        content = [part, {"type": "text", "text": "what is it?"}]
        return client.chat.completions.create(**hello(content)).choices[0].message.content

    direct = answer({"type": "image_url", "image_url": {"url": uri(png(1))}})
    assert answer({"type": "file", "file": {"file_id": kept.id}}) == direct
    assert answer({"type": "image_url", "image_url": {"url": kept.id}}) == direct
    assert server.http.get(f"/v1/files/{kept.id}/content").headers["content-type"] == "image/png"
    assert client.files.delete(kept.id).deleted
    with pytest.raises(openai.BadRequestError, match="neither a data URI nor an upload"):
        answer({"type": "file", "file": {"file_id": kept.id}})
    assert server.http.get(f"/v1/files/{kept.id}/content").status_code == 404


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_every_parameter_of_a_drawing(client, engine, server):
    how = {
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "negative_prompt": "red",
        "settings": {"timestep_shift": 2.0},
    }
    told = client.images.generate(
        model="tiny",
        prompt="a blue star",
        n=3,
        size="32x16",
        response_format="b64_json",
        user="me",
        output_format="png",
        quality="auto",
        background="opaque",
        moderation="auto",
        extra_body=how,
    )
    expected = engine.generate(
        "a blue star", 3, (32, 16), 7, "red", num_inference_steps=3, guidance_scale=2.0, timestep_shift=2.0
    )
    assert [opened(d.b64_json).tobytes() for d in told.data] == [i.tobytes() for i in expected.images]
    assert [d.seed for d in told.data] == [7, 8, 9] and told.size == "32x16"
    assert told.parameters == json.loads(json.dumps(dict(expected.parameters))) | {"n": 3}
    assert told.usage.input_tokens > 0
    linked = client.images.generate(
        prompt="a star", response_format="url", output_format="jpeg", output_compression=50, extra_body={"steps": 1}
    )
    got = server.http.get(linked.data[0].url)
    assert got.headers["content-type"] == "image/jpeg" and got.content[:2] == b"\xff\xd8"
    assert linked.parameters["seed"] == linked.data[0].seed  # drawn, and told
    webp = client.images.generate(prompt="a star", output_format="webp", extra_body={"steps": 1})
    assert base64.b64decode(webp.data[0].b64_json)[8:12] == b"WEBP" and webp.output_format == "webp"


def test_a_picture_sharpens_as_it_comes(client):
    how = {"model": "tiny", "prompt": "a star", "extra_body": {"seed": 3, "steps": 4}}
    whole = client.images.generate(**how, n=2)
    events = [*client.images.generate(**how, stream=True, partial_images=2, n=2)]
    previews = [e for e in events if e.type == "image_generation.partial_image"]
    done = {e.index: e for e in events if e.type == "image_generation.completed"}
    assert [(e.index, e.partial_image_index) for e in previews] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [done[i].b64_json for i in (0, 1)] == [d.b64_json for d in whole.data]
    assert done[1].seed == 4 and done[1].parameters["num_inference_steps"] == 4 and done[0].usage.input_tokens > 0
    assert opened(previews[0].b64_json).size == (32, 32) and previews[0].b64_json != done[0].b64_json


def test_an_edit_with_several_pictures_and_a_mask(client, engine):
    sources = [("a.png", png(1)), ("b.png", png(2))]
    how = {"steps": 2, "seed": 5, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    told = client.images.edit(model="tiny", image=sources, prompt="make it red", n=2, extra_body=how)
    expected = engine.edit(
        [tiny.picture(1), tiny.picture(2)],
        "make it red",
        2,
        None,
        5,
        num_inference_steps=2,
        guidance_scale=2.0,
        image_guidance_scale=1.5,
    )
    assert [opened(d.b64_json).tobytes() for d in told.data] == [i.tobytes() for i in expected.images]
    mask = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))  # the left half may change
    out = io.BytesIO()
    mask.save(out, "PNG")
    masked = client.images.edit(
        model="tiny",
        image=sources[0],
        mask=("m.png", out.getvalue()),
        prompt="make it red",
        size="32x32",
        extra_body=how | {"settings": json.dumps({"timestep_shift": 2.0})},
    )
    pixels, before = np.asarray(opened(masked.data[0].b64_json)), np.asarray(tiny.picture(1))
    assert (pixels[:, 16:] == before[:, 16:]).all() and (pixels[:, :16] != before[:, :16]).any()
    assert masked.parameters["timestep_shift"] == 2.0
    events = [
        *client.images.edit(
            model="tiny", image=sources[0], prompt="make it red", stream=True, partial_images=1, extra_body=how
        )
    ]
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_grey_mask_is_white_where_the_picture_may_change(client):
    mask = PIL.Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    alpha = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    alpha.paste((0, 0, 0, 0), (0, 0, 16, 32))
    drawn = []
    for image in (mask, mask.convert("1"), alpha):
        image.save(out := io.BytesIO(), "PNG")
        files = {"image": ("a.png", png(1)), "mask": ("m.png", out.getvalue())}
        drawn.append(client.images.edit(model="tiny", prompt="red", extra_body={"steps": 2, "seed": 5}, **files))
    assert drawn[0].data[0].b64_json == drawn[1].data[0].b64_json == drawn[2].data[0].b64_json
    pixels, before = np.asarray(opened(drawn[0].data[0].b64_json)), np.asarray(tiny.picture(1))
    assert (pixels[:, 16:] == before[:, 16:]).all() and (pixels[:, :16] != before[:, :16]).any()


def test_every_other_parameter_of_an_edit(client, engine, server):
    how = {
        "num_inference_steps": 2,
        "seed": 5,
        "guidance_scale": 2.0,
        "image_guidance_scale": 1.5,
        "negative_prompt": "red",
        "settings": json.dumps({"renorm": "global"}),
    }
    told = client.images.edit(
        model="tiny",
        image=("a.png", png(1)),
        prompt="a hat",
        size="32x16",
        response_format="url",
        output_format="jpeg",
        output_compression=95,
        quality="auto",
        background="opaque",
        user="me",
        n=1,
        extra_body=how,
    )
    expected = engine.edit(
        tiny.picture(1),
        "a hat",
        1,
        (32, 16),
        5,
        "red",
        num_inference_steps=2,
        guidance_scale=2.0,
        image_guidance_scale=1.5,
        renorm="global",
    )
    assert told.parameters == json.loads(json.dumps(dict(expected.parameters))) | {"n": 1}
    got = server.http.get(told.data[0].url)
    assert got.headers["content-type"] == "image/jpeg" and told.output_format == "jpeg"
    expected.images[0].save(out := io.BytesIO(), "JPEG", quality=95)
    with PIL.Image.open(io.BytesIO(got.content)) as image, PIL.Image.open(out) as same:
        assert image.size == (32, 16) and (np.asarray(image) == np.asarray(same)).all()


def test_every_parameter_of_a_picture_in_a_chat(client, engine):
    how = {
        "modalities": ["image"],
        "size": "16x32",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "negative_prompt": "red",
        "settings": {"timestep_shift": 2.0},
    }
    messages = [{"role": "user", "content": "a star"}]
    told = client.chat.completions.create(model="tiny", messages=messages, n=2, seed=3, user="me", extra_body=how)
    expected = engine.generate(
        "a star", 2, (16, 32), 3, "red", num_inference_steps=2, guidance_scale=3.0, timestep_shift=2.0
    )
    assert told.parameters == {
        "n": 2,
        "modalities": ["image"],
        "seed": 3,
        "image": json.loads(json.dumps(dict(expected.parameters))),
    }
    for choice, image in zip(told.choices, expected.images, strict=True):
        assert opened(choice.message.content[0]["image_url"]["url"].partition(",")[2]).tobytes() == image.tobytes()


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"bagel"}))
def test_every_family_is_served(family):
    engine = Engine(tiny.shake(tiny.model(family)).requires_grad_(False), family)
    few = {"seed": 1} | tiny.having(engine.model, num_inference_steps=2)
    settings = {k: v for k, v in few.items() if k != "seed"}
    with serving(engine) as server:
        [about] = server.http.get("/v1/models").json()["data"]
        assert about["family"] == family and all(about["capabilities"].values()) and about["exact_batching"]

        def drawn(answer):
            assert answer.status_code == 200, answer.text
            return [opened(d["b64_json"]).tobytes() for d in answer.json()["data"]]

        content = [{"type": "image_url", "image_url": {"url": uri(png(1))}}, {"type": "text", "text": "what is it?"}]
        with ThreadPoolExecutor(3) as pool:
            said = pool.submit(server.http.post, "/v1/chat/completions", json=hello(content, model=family))
            made = pool.submit(server.http.post, "/v1/images/generations", json={"prompt": "a star", **few})
            files = [("image", ("a.png", png(i))) for i in (1, 2)]
            changed = pool.submit(server.http.post, "/v1/images/edits", data={"prompt": "red", **few}, files=files)
        assert drawn(made.result()) == [engine.generate("a star", 1, None, 1, **settings).images[0].tobytes()]
        sources = [tiny.picture(1), tiny.picture(2)]
        assert drawn(changed.result()) == [engine.edit(sources, "red", 1, None, 1, **settings).images[0].tobytes()]
        text = said.result().json()["choices"][0]["message"]["content"]
        assert text.strip() == engine.ask(tiny.picture(1), "what is it?", 5).text.strip()
        if "source_share" in about["parameters"]:  # found out only when the drawing begins
            asked = {"prompt": "red", "size": "16x16", "settings": json.dumps({"source_share": 0.5}), **few}
            for stream in ("false", "true"):
                told = server.http.post("/v1/images/edits", data=asked | {"stream": stream}, files=files[:1])
                assert "has the source's size" in told.text and "invalid_request_error" in told.text
                assert told.status_code == (400 if stream == "false" else 200)


# ---- refusals -----------------------------------------------------------------------------------------------------

DRAWN = {"modalities": ["image"]}
IMAGE_PART = {"type": "image_url"}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"tool_choice": "required"}, "tool_choice: Input should be 'auto' or 'none'"),
        ({"logit_bias": {"star": 2}}, "logit_bias: its keys are token ids, not 'star'"),
        ({"logit_bias": {"99999999": 2}}, "logit_bias names token 99999999; the vocabulary has tokens 0 to"),
        ({"top_k": -2}, "top_k: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"seed": "1"}, "seed: Input should be a valid integer"),
        ({"n": True}, "n: Input should be a valid integer"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"stop": 5}, "stop: Input should be a valid string"),
        ({"stop": ["\ud800"]}, "stop holds a lone surrogate (U+D800) at character 0"),
        (
            {"messages": [{"role": "user", "content": [IMAGE_PART | {"image_url": {"url": "x", "detail": "huge"}}]}]},
            "messages.0.content.0.image_url.detail: Input should be 'auto', 'low', 'high' or 'original'",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE_PART | {"image_url": {"detail": "low"}}]}]},
            "messages.0.content.0.image_url.url: Field required",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        ({"messages": [{"role": "user", "content": None}]}, "only an assistant's may be null, not the user's"),
        ({"frequency_penalty": 2.5}, "frequency_penalty: Input should be less than or equal to 2"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"n": 11}, "n may be at most 10, not 11"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_completion_tokens": 3}, "give one"),
        ({"temperature": 2.5}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"seed": -1}, "seed: "),
        ({"stop": ["a"] * 5}, "stop takes up to 4 texts"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {}}, "stream_options needs stream"),
        ({"size": "32x32"}, "size needs image among modalities"),
        ({"model": "../tiny"}, "no model '../tiny'"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "unsupported parameter 'messages.0.nam'"),
        ({"frequency_penalty": 9, "store": True}, "frequency_penalty: Input should be less than or equal to 2"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "at most 8000"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0] holds a lone surrogate"),
        (
            {"messages": [{"role": "user", "content": "a\0b"}]},
            "messages[0].content[0] holds NUL (U+0000) at character 1",
        ),
        (DRAWN, "max_tokens needs text among modalities"),
        ({"modalities": ["text", "image"], "size": "33x32", "stream": True}, "size must be multiples of 16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_a_chat_refuses_by_name(server, change, told):
    answer = server.http.post(
        "/v1/chat/completions", content=json.dumps(hello() | change), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 404) and told in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    "change, told",
    [
        ({"styl": "vivid"}, "unknown or unsupported parameter 'styl'"),
        ({"style": "cubist"}, "style: Input should be 'vivid' or 'natural'"),
        ({"quality": "best"}, "quality: Input should be 'auto', 'low'"),
        ({"background": "transparent"}, "background: "),
        ({"size": "64"}, "size: "),
        ({"size": "33x32"}, "size must be multiples of 16"),
        ({"size": "99999x99999"}, "size must be multiples of 16"),
        ({"steps": 201}, "num_inference_steps may be at most 200, not 201"),
        ({"steps": 2, "num_inference_steps": 2}, "give one"),
        ({"guidance_scale": 2, "true_cfg_scale": 2}, "give one"),
        ({"size": "32x32", "width": 32, "height": 32}, "give one"),
        ({"width": 32}, "width and height are given together"),
        ({"settings": {"num_inference_steps": 2}, "steps": 3}, "given twice"),
        ({"settings": {"leg": 1}}, "unknown settings ['leg']; known: num_inference_steps"),
        ({"settings": {"renorm": "maybe"}}, "renorm"),
        ({"settings": {"timestep_shift": "2"}}, "settings.timestep_shift: "),
        ({"settings": {"timestep_shift": 1e300}}, "must be a finite number"),
        ({"negative_prompt": "red", "guidance_scale": 1.0}, "negative_prompt needs guidance"),
        ({"partial_images": 2}, "partial_images needs stream"),
        ({"stream": True, "response_format": "url"}, "a stream sends b64_json"),
        ({"output_compression": 3}, "output_compression is for jpeg and webp"),
        ({"n": 0}, "n: "),
        ({"prompt": ""}, "prompt: "),
        ({"prompt": "x" * 9000}, "at most 8000"),
        ({"model": None, "prompt": 5}, "prompt: "),
        ({"prompt": "a\0"}, "prompt holds NUL"),
        ({"negative_prompt": "\0", "guidance_scale": 2.0}, "negative_prompt holds NUL"),
        ({"seed": 2**63}, "seed: "),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_what_a_drawing_refuses_by_name(server, change, told):
    answer = server.http.post("/v1/images/generations", json={"prompt": "x", **change})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is None or error["param"].split(".")[0] in ImagesRequest.model_fields or "styl" in change


def test_what_an_edit_refuses_by_name(server):
    def told(files, **data):
        answer = server.http.post("/v1/images/edits", data={"prompt": "x", **data}, files=files)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["message"]

    image = ("image", ("a.png", png(), "image/png"))
    rgb = ("mask", ("m.png", png(), "image/png"))
    out = io.BytesIO()
    PIL.Image.new("LA", (16, 16)).save(out, "PNG")
    assert "image is missing" in told([("mask", ("m.png", out.getvalue()))])
    assert "mask is 16x16 and the first image 32x32" in told([image, ("mask", ("m.png", out.getvalue()))])
    assert "picture 'mask' has no transparency" in told([image, rgb])
    assert "unknown or repeated file 'depth'" in told([image, ("depth", ("d.png", png()))])
    assert "at most 8 pictures" in told([image] * 9)
    assert "unknown or unsupported parameter 'strength'" in told([image], strength="1")
    assert "n: " in told([image], n="many")
    assert "settings must be a JSON object" in told([image], settings="{")
    assert "multipart/form-data" in server.http.post("/v1/images/edits", json={}).json()["error"]["message"]


# ---- habits of OpenAI's clients -----------------------------------------------------------------------------------


def test_what_has_no_effect_is_accepted_and_named(server):
    plain = server.http.post("/v1/chat/completions", json=hello())
    message = {"role": "user", "content": "hello", "name": "me"}
    habits = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "logit_bias": None}
    nulls = {"tools": None, "tool_choice": None, "reasoning_effort": None, "no_such_name": None}
    told = server.http.post("/v1/chat/completions", json=hello() | {"messages": [message]} | habits | nulls)
    assert told.status_code == 200, told.text
    assert told.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]
    assert told.headers["warning"] == '299 diptych "ignored: messages.0.name, store, metadata"'
    assert "warning" not in plain.headers
    part = {"type": "image_url", "image_url": {"url": uri(png()), "detail": "low"}}
    shown = server.http.post("/v1/chat/completions", json=hello([part], stream=True))
    assert shown.status_code == 200 and "messages.0.content.0.image_url.detail" in shown.headers["warning"]
    drawing = {"prompt": "a star", "steps": 1, "seed": 1}
    plain = server.http.post("/v1/images/generations", json=drawing)
    habits = {"quality": "hd", "style": "vivid", "moderation": "auto"}
    told = server.http.post("/v1/images/generations", json=drawing | habits)
    assert told.json()["data"] == plain.json()["data"]
    assert told.headers["warning"] == '299 diptych "ignored: quality, style"'
    edited = server.http.post(
        "/v1/images/edits", data=drawing | {"input_fidelity": "high"}, files=[("image", ("a.png", png()))]
    )
    assert edited.status_code == 200 and "input_fidelity" in edited.headers["warning"]


def test_a_history_with_tools_is_read(server):
    call = {"id": "c", "type": "function", "function": {"name": "count", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "three"},
    ]
    tools = {"tools": [{"type": "function", "function": {"name": "count"}}], "tool_choice": "auto"}
    told = server.http.post("/v1/chat/completions", json=hello() | tools | {"messages": turns})
    assert told.status_code == 200, told.text
    assert "messages.1.tool_calls, messages.2.tool_call_id" in told.headers["warning"]
    plain = [turns[0], {"role": "assistant", "content": ""}, {"role": "user", "content": "three"}]
    same = server.http.post("/v1/chat/completions", json=hello() | {"messages": plain})
    assert same.json()["choices"] == told.json()["choices"]


def test_sampling_parameters_of_vllm_act(server):
    def text(**changes):
        answer = server.http.post("/v1/chat/completions", json=hello(max_tokens=12, logprobs=True, **changes))
        assert answer.status_code == 200, answer.text
        return [w["token"] for w in answer.json()["choices"][0]["logprobs"]["content"]], answer.json()["parameters"]

    likeliest, plain = text()
    assert "top_k" not in plain and "penalties" not in plain
    one, parameters = text(temperature=2.0, seed=1, top_k=1)
    assert one == likeliest and parameters["top_k"] == 1  # one token to choose from
    assert text(top_k=-1)[0] == likeliest
    varied, parameters = text(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0)
    assert len(set(varied)) >= len(set(likeliest)) and parameters["penalties"]["repetition"] == 10.0
    token = server.http.post("/v1/chat/completions", json=hello(max_tokens=3, logit_bias={"65": 100})).json()
    assert len(set(token["choices"][0]["message"]["content"])) == 1  # one token, again and again


def test_sizes_and_guidance_by_the_names_of_other_servers(server):
    drawing = {"prompt": "a star", "steps": 2, "seed": 1}
    ours = server.http.post("/v1/images/generations", json=drawing | {"size": "32x16", "guidance_scale": 3.0})
    for names in ({"true_cfg_scale": 3.0}, {"cfg_scale": 3.0}):
        theirs = server.http.post("/v1/images/generations", json=drawing | {"width": 32, "height": 16} | names)
        assert theirs.status_code == 200, theirs.text
        assert theirs.json()["data"] == ours.json()["data"] and theirs.json()["parameters"] == ours.json()["parameters"]


def test_a_strict_server_refuses_what_has_no_effect(engine):
    with serving(engine, strict=True) as server:
        told = server.http.post("/v1/chat/completions", json=hello(store=True))
        assert told.status_code == 400 and told.json()["error"]["param"] == "store"
        assert "this server is strict" in told.json()["error"]["message"]
        told = server.http.post("/v1/images/generations", json={"prompt": "a star", "steps": 1, "style": "vivid"})
        assert told.status_code == 400 and told.json()["error"]["param"] == "style"
        assert server.http.post("/v1/chat/completions", json=hello(user="me")).status_code == 200


def test_max_tokens_beyond_the_limit_are_bounded_and_told(engine):
    with serving(engine, limits=Limits(new_tokens=3)) as server:
        for name in ("max_tokens", "max_completion_tokens"):
            body = {"messages": [{"role": "user", "content": "hello"}], name: 4096, "temperature": 1.0, "seed": 4}
            told = server.http.post("/v1/chat/completions", json=body).json()
            assert told["parameters"]["max_tokens"] == 3 and told["usage"]["completion_tokens"] == 3
            assert told["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-40, 5e-324])
def test_an_extremely_low_temperature_takes_the_likeliest_tokens(server, temperature):
    likeliest = server.http.post("/v1/chat/completions", json=hello(max_tokens=9, temperature=0)).json()["choices"]
    told = server.http.post("/v1/chat/completions", json=hello(max_tokens=9, temperature=temperature))
    assert told.status_code == 200 and told.json()["choices"] == likeliest


def test_an_assistant_may_have_said_nothing(server):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]
    told = server.http.post("/v1/chat/completions", json=hello() | {"messages": [*turns, *turns[:1]]})
    assert told.status_code == 200, told.text
    empty = [turns[0], {"role": "assistant", "content": ""}, turns[0]]
    same = server.http.post("/v1/chat/completions", json=hello() | {"messages": empty})
    assert same.json()["choices"] == told.json()["choices"]


def test_sizes_are_told_and_others_are_refused_as_the_library_does(server, engine):
    about = server.http.get("/v1/models/tiny").json()["sizes"]
    assert about == engine.sizes.to_json()
    longest, stride = about["longest"], about["stride"]
    small = {"prompt": "a star", "steps": 1}
    fits = server.http.post("/v1/images/generations", json=small | {"size": f"{longest}x{about['shortest']}"})
    assert fits.status_code == 200 and fits.json()["size"] == f"{longest}x{about['shortest']}"
    for width, height in ((longest + stride, longest), (longest, longest + 1), (0, stride), (99999, 99999)):
        with pytest.raises(ValueError) as wrong:
            engine.generate("a star", size=(width, height), num_inference_steps=1)
        size = {"size": f"{width}x{height}"}
        drawing = server.http.post("/v1/images/generations", json=small | size)
        edit = server.http.post("/v1/images/edits", data=small | size, files={"image": ("a.png", png())})
        chat = {"messages": [{"role": "user", "content": "a star"}], "modalities": ["image"], "steps": 1, **size}
        for answer in (drawing, edit, server.http.post("/v1/chat/completions", json=chat)):
            assert answer.status_code == 400 and answer.json()["error"]["message"] == str(wrong.value)
            assert answer.json()["error"]["param"] == "size"


def test_a_shape_that_the_model_was_not_trained_on_is_warned_of(server, engine):
    long = png(1, 96, 16)
    [remark] = engine.sizes.remarks(Sample("", (user(Image(tiny.picture(1, 96, 16)), "?"),)))
    warning = f'299 diptych "{remark}"'
    part = {"type": "image_url", "image_url": {"url": uri(long)}}
    for stream in (False, True):
        told = server.http.post("/v1/chat/completions", json=hello([part], stream=stream))
        assert told.headers["warning"] == warning
    edit = {"data": {"prompt": "red", "steps": 1, "style": "vivid"}, "files": {"image": ("a.png", long)}}
    told = server.http.post("/v1/images/edits", **edit)
    assert told.headers["warning"] == f'299 diptych "ignored: style", {warning}'


def test_head_and_version(server):
    for path in ("/", "/health", "/v1/models"):
        head, get = server.http.head(path), server.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    from diptych import __version__

    assert server.http.get("/version").json() == {"version": __version__}


# ---- batching, faults, the end --------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_company(server):
    def one(i):
        if i % 3 == 0:
            body = {"prompt": "a star" * (i + 1), "seed": i, "steps": 2 + i % 4}
            return server.http.post("/v1/images/generations", json=body).json()["data"]
        if i % 3 == 1:
            files = [("image", ("a.png", png(i)))]
            return server.http.post(
                "/v1/images/edits", data={"prompt": "red", "seed": i, "steps": 3}, files=files
            ).json()["data"]
        body = hello(f"hello {i}", temperature=1.0, seed=i, logprobs=True, max_tokens=3 + i % 5)
        return server.http.post("/v1/chat/completions", json=body).json()["choices"]

    alone = [one(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(one, range(12))] == alone


def slow(n=1, steps=150, **more):
    return {"prompt": "a star", "steps": steps, "n": n, "seed": 0, **more}


def until(condition, seconds=WAIT):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def gauge(server, name):
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot_within_a_step(engine, stream):
    with serving(engine) as server:
        [worker] = server.service.workers.values()
        body = json.dumps(slow(2, 200, stream=stream, **({"partial_images": 16} if stream else {}))).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(head.encode() + body)
            until(lambda: len(worker.scheduler.running) == 2)
        ticks = worker.metrics.ticks.labels("tiny")._sum
        steps = gauge(server, "diptych_tick_seconds_count")
        until(lambda: not worker.calls)
        until(lambda: worker.scheduler.idle)
        assert gauge(server, "diptych_tick_seconds_count") - steps < 30 and ticks
        assert gauge(server, 'diptych_unfinished_total{why="client_closed_request"}') == 1
        assert server.http.post("/v1/images/generations", json=slow(steps=1)).status_code == 200


def test_a_full_queue_says_when_to_come_back(engine):
    with serving(engine, slots=1, queue=2) as server, ThreadPoolExecutor(3) as pool:
        [worker] = server.service.workers.values()
        running = []
        for i in range(3):
            running.append(pool.submit(server.http.post, "/v1/images/generations", json=slow(steps=30)))
            until(lambda i=i: len(worker.calls) == i + 1 or running[0].done())
            if i == 0:
                until(lambda: worker.scheduler.running or running[0].done())
        refused = server.http.post("/v1/images/generations", json=slow(steps=30))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1, refused.text
        assert refused.json()["error"]["code"] == "queue_full"
        assert server.http.post("/v1/images/generations", json=slow(5, 1)).status_code == 429  # never more than fit
        assert [f.result().status_code for f in running] == [200] * 3


def test_a_request_that_takes_too_long_is_told_so(engine):
    with serving(engine, timeout=0.05) as server:
        late = server.http.post("/v1/images/generations", json=slow(steps=200))
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        text = server.http.post("/v1/images/generations", json=slow(steps=200, stream=True)).text
        assert '"code": "timeout"' in text and text.rstrip().splitlines()[-2] == "event: error"
        [worker] = server.service.workers.values()
        until(lambda: worker.scheduler.idle)


def test_an_error_of_the_model_is_told_to_whom_it_concerns(engine, monkeypatch, caplog):
    with serving(engine) as server, ThreadPoolExecutor(2) as pool:
        talk = pool.submit(server.http.post, "/v1/chat/completions", json=hello(max_tokens=60))
        step = type(engine.model).step

        def fails(self, drawings):
            raise RuntimeError("a secret detail")

        monkeypatch.setattr(type(engine.model), "step", fails)
        broken = server.http.post("/v1/images/generations", json=slow())
        assert broken.status_code == 500 and "secret" not in broken.text and "a secret detail" in caplog.text
        monkeypatch.setattr(type(engine.model), "step", step)
        assert talk.result().status_code == 200
        assert server.http.post("/v1/images/generations", json=slow(steps=1)).status_code == 200
        assert gauge(server, "diptych_errors_total") == 1


def test_health_ready_metrics_and_openapi(server):
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.http.get("/ready").json() == {"ready": True, "waiting": {"tiny": 0, "other/copy": 0}}
    server.http.post("/v1/chat/completions", json=hello())
    told = server.http.get("/metrics").text
    for measure in (
        "diptych_requests_total",
        "diptych_request_seconds_bucket",
        "diptych_waiting",
        "diptych_running",
        "diptych_tick_seconds_sum",
        "diptych_batch_size_bucket",
        "diptych_first_seconds_bucket",
        "diptych_tokens_total",
        "diptych_answers_total",
        "process_resident_memory_bytes",
    ):
        assert f"\n{measure}" in told, measure
    api = server.http.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/files"):
        assert path in api["paths"]
    for name in ("ChatRequest", "ImagesRequest"):
        examples = api["components"]["schemas"][name]["examples"]
        path = "chat/completions" if name == "ChatRequest" else "images/generations"
        for example in examples:
            text = (
                json.dumps(example)
                .replace("bagel/tiny", "tiny")
                .replace("base64,...", uri(png()).partition(":image/png;")[2])
            )
            fast = json.loads(text.replace("64x64", "32x32")) | (
                {"steps": 2} if "prompt" in example or "size" in example else {"max_tokens": 2}
            )
            assert server.http.post(f"/v1/{path}", json=fast).status_code == 200, example


def test_memory_and_slots_stay_flat(engine):
    """The small form of what ``benchmarks/serve.py --flat 5000`` does."""
    with serving(engine) as server, ThreadPoolExecutor(8) as pool:
        [worker] = server.service.workers.values()

        def some(i):
            if i % 2:
                return server.http.post("/v1/chat/completions", json=hello(max_tokens=2)).status_code
            return server.http.post("/v1/images/generations", json=slow(steps=1, size="16x16")).status_code

        assert set(pool.map(some, range(24))) == {200}
        before = gauge(server, "process_resident_memory_bytes")

        def jobs():
            return sum(type(o) in (TextJob, ImageJob) for o in gc.get_objects())

        gc.collect()
        gc.disable()
        try:
            others = jobs()
            assert set(pool.map(some, range(80))) == {200}
            until(lambda: worker.scheduler.idle)
            kept = jobs() - others
        finally:
            gc.enable()
        assert kept <= 8, "what has been answered waits with its contexts for the garbage to be collected"
        assert gauge(server, "process_resident_memory_bytes") - before < 20 * 2**20
        assert not worker.calls and not worker.leaving and not server.service.store.files


def test_the_verb_serves_and_ends_with_every_request_answered(tiny_model, tmp_path):
    """SIGTERM under load: what runs is finished, and what cannot be finished in time is told so."""
    (tmp_path / "keys").write_text("# mine\nsecret-key\n")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [
        sys.executable,
        "-m",
        "diptych",
        "serve",
        tiny_model,
        "--port",
        "0",
        "--api-key-file",
        tmp_path / "keys",
        "--grace",
        "2",
        "--slots",
        "4",
    ]
    process = subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("random at http://127.0.0.1:"), (line, process.stderr.read() if not line else "")
        url = line.split()[2]
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret-key"}, timeout=WAIT) as http:
            assert http.post("/v1/images/generations", json=slow(steps=1)).status_code == 200
            with ThreadPoolExecutor(12) as pool:
                short = [pool.submit(http.post, "/v1/images/generations", json=slow(steps=2)) for _ in range(4)]
                long = [pool.submit(http.post, "/v1/images/generations", json=slow(10, 200)) for _ in range(4)]
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                done = [f.result().status_code for f in short]
                told = [f.result() for f in long]
        assert process.wait(WAIT) is not None
        assert set(done) <= {200, 503} and {a.status_code for a in told} <= {200, 503}
        assert any(a.status_code == 503 and a.json()["error"]["code"] == "shutting_down" for a in told)
        log = process.stderr.read()
        assert "POST /v1/images/generations 200" in log and "a star" not in log and "secret-key" not in log
        assert "Traceback" not in log, log
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def test_pictures_drawn_are_limited_and_users_are_named_in_the_log(engine, caplog):
    caplog.set_level("INFO", "diptych.serving")
    with serving(engine, limits=Limits(drawn=32 * 32), quiet=False) as server:
        refused = server.http.post("/v1/images/generations", json=slow(steps=1, size="32x48", user="me"))
        assert refused.status_code == 400 and "size 32x48 has more than 1024 pixels" in refused.text
        large = server.http.post("/v1/images/edits", data={"prompt": "x", "steps": 1}, files={"image": png(1, 64, 64)})
        assert large.status_code == 400 and "more than 1024 pixels" in large.text
        assert server.http.post("/v1/images/generations", json=slow(steps=1, user="me\n")).status_code == 200
    assert "user 'me\\n'" in caplog.text


def test_options_are_checked():
    with pytest.raises(ValueError, match="slots must be more than 0, not 0"):
        Options(slots=0)
    with pytest.raises(ValueError, match="grace must be at least 0"):
        Options(grace=-1)
    with pytest.raises(ValueError, match="different names"), serving(*[Engine(tiny.model("bagel"), "same")] * 2):
        pass


def test_threads_do_not_outlive_the_server(engine):
    before = threading.active_count()
    with serving(engine):
        pass
    until(lambda: threading.active_count() <= before)
