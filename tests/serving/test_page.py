"""The page in a headless Chromium, against a real server: type, see, upload, ask, edit, compare, watch a run."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest

from diptych.data import decoding
from diptych.generation.engine import Engine
from tests.support import tiny
from tests.support.serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
WAIT = 180.0  # seconds, on a busy machine
STATIC = Path(__file__).parents[2] / "diptych" / "serving" / "static"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run = root / "mine"
    (run / "samples").mkdir(parents=True)
    rows = [{"step": i, "stage": "unified", "loss": 2 / i, "loss/text": 1 / i, "lr": 1e-3} for i in range(1, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run / "recipe.json").write_text(json.dumps({"name": "mine/tiny", "stages": [{"name": "unified", "steps": 50}]}))
    tiny.picture(0).save(run / "samples" / "step-00000020.png")
    return run


@pytest.fixture(scope="module")
def server(run):
    engine = Engine(tiny.shake(tiny.model("bagel")).requires_grad_(False), "tiny")
    with serving(engine, Engine(engine.model, "other"), runs=run.parent) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A fresh page; what it asks elsewhere, and what goes wrong in it, fails the test."""
    wrong, context = [], browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(WAIT * 1000)
    sync_api.expect.set_options(timeout=WAIT * 1000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda r: r.url.startswith((server.url, "data:", "blob:")) or wrong.append(f"asked {r.url}"))
    page.goto(server.url)
    sync_api.expect(page.locator("#model option")).to_have_count(2)
    page.wrong = wrong
    yield page
    context.close()
    assert not wrong


def expect(locator):
    return sync_api.expect(locator)


def upload(seed=1) -> dict:
    out = io.BytesIO()
    tiny.picture(seed).save(out, "PNG")
    return {"name": "scene.png", "mimeType": "image/png", "buffer": out.getvalue()}


def drawn(locator) -> None:
    """A picture with pixels has been loaded there."""
    expect(locator).to_be_visible()
    assert locator.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0


def test_type_a_prompt_see_a_picture(page):
    page.get_by_role("tab", name="Create").click()
    page.fill("#draw [name=prompt]", "a blue star")
    page.fill("#draw [name=n]", "2")
    page.fill("#draw [name=seed]", "7")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".picture .hint")).to_have_text(["seed 7", "seed 8"])
    expect(page.locator(".sharpening")).to_have_count(0)
    for i in range(2):
        drawn(page.get_by_alt_text("a blue star").nth(i))
    page.get_by_role("button", name="More like this").nth(1).click()  # keeps the seed and everything else
    values = [page.input_value(f"#draw [name={n}]") for n in ("prompt", "seed", "n")]
    assert values == ["a blue star", "8", "1"]
    first = page.get_by_alt_text("a blue star").nth(1).get_attribute("src")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".picture .hint")).to_have_text(["seed 8", "seed 7", "seed 8"])
    assert page.get_by_alt_text("a blue star").first.get_attribute("src") == first


def test_upload_ask_and_see_the_answer_stream(page, server):
    asked = []
    page.on("request", lambda r: r.url.endswith("/completions") and asked.append(json.loads(r.post_data)))
    page.set_input_files("#say input[type=file]", [upload(1), upload(2)])
    expect(page.locator("#shown img")).to_have_count(2)
    page.get_by_title("Remove this picture").first.click()
    expect(page.locator("#shown img")).to_have_count(1)
    page.fill("#say textarea", "how many stars?")
    page.press("#say textarea", "Enter")
    expect(page.locator(".turn.assistant")).not_to_have_class(re.compile("waiting"))
    expect(page.locator(".turn.assistant")).not_to_be_empty()
    drawn(page.locator(".turn.user img"))
    page.select_option("#say [name=modalities]", "image")
    page.fill("#say textarea", "draw one")
    page.press("#say textarea", "Enter")
    drawn(page.get_by_alt_text("Drawn: draw one"))
    page.wait_for_timeout(100)
    first, second = asked
    assert first["stream"] and [p["type"] for p in first["messages"][0]["content"]] == ["image_url", "text"]
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]  # the conversation goes on
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_edit_with_a_slider(page):
    page.get_by_role("tab", name="Edit").click()
    page.fill("#change [name=prompt]", "make it red")
    page.locator("#change button.main").click()
    expect(page.locator("#notice")).to_have_text("Choose a picture to edit first.")
    page.set_input_files("#source input", upload())
    page.locator("#change button.main").click()
    slider = page.get_by_label("How much of the source to show")
    drawn(page.get_by_alt_text("Edited: make it red"))
    expect(slider).to_be_focused()
    page.keyboard.press("End")
    assert page.locator("#edited .slider").evaluate("s => s.style.getPropertyValue('--at')") == "100%"
    page.get_by_role("button", name="Go on from this").click()
    assert page.get_by_alt_text("The picture to edit").get_attribute("src") == page.get_by_alt_text(
        "Edited: make it red"
    ).get_attribute("src")


def test_drop_and_paste(page):
    for kind, event in (("drop", "DragEvent"), ("paste", "ClipboardEvent")):
        page.evaluate(
            """([kind, event, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                const init = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
                document.querySelector("#say textarea").dispatchEvent(new window[event](kind, init));
            }""",
            [kind, event, list(upload()["buffer"])],
        )
    expect(page.locator("#shown img")).to_have_count(2)


def drop(page, name: str, kind: str, data: bytes) -> None:
    page.evaluate(
        """([name, type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const init = { bubbles: true, cancelable: true, dataTransfer: data };
            document.querySelector("#say textarea").dispatchEvent(new DragEvent("drop", init));
        }""",
        [name, kind, list(data)],
    )


def test_files_that_are_no_pictures_are_named(page):
    drop(page, "notes.pdf", "application/pdf", b"%PDF-1.7")
    expect(page.locator("#notice")).to_have_text("notes.pdf: not a picture. Use PNG, JPEG, WebP or GIF.")
    drop(page, "broken.png", "image/png", b"no picture")
    expect(page.locator("#notice")).to_contain_text("broken.png is damaged, or a picture that this browser cannot read")
    expect(page.locator("#shown img")).to_have_count(0)
    drop(page, "scene.png", "image/png", upload()["buffer"])
    expect(page.locator("#shown img")).to_have_count(1)


def test_large_photographs_are_reduced_before_they_are_sent(page):
    asked = []
    page.on("request", lambda r: r.url.endswith("/completions") and asked.append(json.loads(r.post_data)))
    PIL.Image.new("RGB", (5000, 4000), (200, 30, 30)).save(out := io.BytesIO(), "JPEG")  # 20 megapixels
    files = [{"name": "phone.jpg", "mimeType": "image/jpeg", "buffer": out.getvalue()}, upload()]
    page.set_input_files("#say input[type=file]", files)
    expect(page.locator("#shown img")).to_have_count(2)
    page.fill("#say textarea", "what is it?")
    page.press("#say textarea", "Enter")
    expect(page.locator(".turn.assistant")).not_to_have_class(re.compile("waiting|wrong"))
    large, small = (decoding.open_picture(p["image_url"]["url"]) for p in asked[0]["messages"][0]["content"][:2])
    assert large.size == (2048, 1638) and large.getpixel((0, 0)) == pytest.approx((200, 30, 30), abs=4)
    assert small.tobytes() == tiny.picture(1).tobytes()  # sent as it is


def test_what_was_asked_is_not_lost_on_an_error(browser, server):
    page = browser.new_page()
    page.goto(server.url)
    expect(page.locator("#model option")).to_have_count(2)
    page.set_input_files("#say input[type=file]", [upload(1), upload(2)])
    expect(page.locator("#shown img")).to_have_count(2)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#say textarea", "how many stars?")
    page.press("#say textarea", "Enter")
    expect(page.locator(".turn.wrong")).to_have_text("The server cannot be reached.")
    expect(page.locator("#say textarea")).to_have_value("how many stars?")
    expect(page.locator("#shown img")).to_have_count(2)
    expect(page.locator(".turn.user")).to_have_count(0)
    page.unroute("**/v1/chat/completions")
    message = "picture 'messages[0].content[0]' is too large: 9x9 pixels; limit 16"
    body = json.dumps({"error": {"message": message}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=body))
    page.locator("#send").click()
    expect(page.locator(".turn.wrong").last).to_have_text("The picture is too large: 9x9 pixels; limit 16")
    page.unroute("**/v1/chat/completions")
    page.locator("#send").click()
    expect(page.locator(".turn.assistant").last).not_to_have_class(re.compile("waiting|wrong"))
    drawn(page.locator(".turn.user img").first)
    expect(page.locator("#say textarea")).to_have_value("")
    expect(page.locator("#shown img")).to_have_count(0)
    page.close()


def test_the_sizes_that_exist_are_offered(page, server):
    [sizes, *_] = [m["sizes"] for m in server.http.get("/v1/models").json()["data"]]
    offered = [
        tuple(map(int, o.split("x"))) for o in page.locator("#sizes option").evaluate_all("l => l.map(o => o.value)")
    ]
    assert offered[0] == tuple(sizes["default"]) and (sizes["longest"], sizes["longest"]) in offered
    engine = next(iter(server.service.workers.values())).engine
    assert all(engine.sizes.allow(*size) for size in offered) and len(set(offered)) == len(offered)
    expect(page.locator("#about")).to_contain_text(f"of {sizes['shortest']} to {sizes['longest']} pixels a side")
    assert page.locator("#draw [name=size]").get_attribute("list") == "sizes"


def test_compare_two_models_on_one_seed(page):
    page.get_by_role("tab", name="Compare").click()
    page.locator("#versus button.main").click()
    expect(page.locator("#both strong")).to_have_text(["tiny", "other"])
    expect(page.locator("#both .sharpening")).to_have_count(0)
    left, right = (page.locator("#both img").nth(i).get_attribute("src") for i in range(2))
    assert left == right  # the same weights under two names, the same seed
    expect(page.locator("#both .hint")).to_have_text(["seed 1, 4 steps"] * 2)


def test_watch_a_run_as_it_goes(page, run):
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#state")).to_have_text("mine/tiny unified step 39 of 50")
    expect(page.locator(".curve h2")).to_have_text([re.compile("^loss"), re.compile("^loss/text"), re.compile("^lr")])
    drawn(page.get_by_alt_text("Samples drawn during training"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "stage": "unified", "loss": 0.01, "loss/text": 0.02, "lr": 0.001}\n')
    tiny.picture(4).save(run / "samples" / "step-00000040.png")
    expect(page.locator("#state")).to_have_text("mine/tiny unified step 40 of 50")
    expect(page.locator("#sheets span")).to_have_text("step 40")
    expect(page.locator(".curve h2 span").first).to_have_text("0.01000")


def test_keyboard_alone(page):
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Create")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Create")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Home")
    page.focus("#say textarea")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".waiting")).to_have_count(0)
    page.get_by_role("tab", name="Create").click()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.name || document.activeElement.textContent"))
    assert {
        "prompt",
        "negative_prompt",
        "size",
        "n",
        "num_inference_steps",
        "guidance_scale",
        "seed",
        "Draw",
    } <= reached
    page.locator("#create textarea").press("Enter")  # as in the chat: Enter sends, Shift + Enter begins a line
    expect(page.locator("#gallery figure").first).to_be_visible()


def test_phone_width_and_dark(browser, server):
    colours = []
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 375, "height": 700}, color_scheme=scheme)
        page.goto(server.url)
        for name in ("Chat", "Create", "Edit", "Compare", "Runs"):
            page.get_by_role("tab", name=name).click()
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 375, name
        colours.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        page.get_by_role("tab", name="Chat").click()
        new, send = (page.locator(f"#say {n}").bounding_box() for n in ("#fresh", "#send"))
        assert abs(new["y"] + new["height"] / 2 - send["y"] - send["height"] / 2) < 5, "buttons on two lines"
        page.get_by_label("Switch between light and dark").click()
        colours.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        page.close()
    light, dark = colours[:2]
    assert light != dark and colours == [light, dark, dark, light]


def test_a_key_is_asked_for_and_errors_are_told(browser):
    engine = Engine(tiny.model("bagel"), "tiny")
    with serving(engine, keys=("open",), timeout=WAIT) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.locator("#notice")).to_contain_text("An API key is needed", ignore_case=True)
        page.fill("#key input", "open")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#model option")).to_have_count(1)
        page.get_by_role("tab", name="Create").click()
        page.fill("#draw [name=size]", "17x16")
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#notice")).to_contain_text("size must be multiples of 16")
        expect(page.locator(".picture")).to_have_count(0)
        page.close()


def test_nothing_of_the_page_comes_from_elsewhere():
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[\w-]+\.\w", re.sub(r"(?m)(?:^|\s)//.*$", "", text)), file.name
        assert len(text) < 40_000
