"""The demo in a real browser, with a server process of its own, and the commands of docs/demo.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from contrast import COLOURS_OF_TEXTS, contrast
from forks import Process
from PIL import Image

from lumos.video.io import read_video

pytest.importorskip("gradio", reason="the page needs the extra [demo]")
pytestmark = pytest.mark.slow  # each test has the server, a process of its own
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIELD = ":is(input:not([type=range]), textarea)"
LIMIT = 120  # seconds for whatever should take one; slow machines run this too


class Server:
    def __init__(self, process: Process, url: str, root: Path):
        self.process, self.url, self.root = process, url, root

    def status(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/api/status", timeout=LIMIT) as answer:
            return json.load(answer)

    def wait_for(self, state: str) -> None:
        began = time.monotonic()
        while self.status()["state"] != state:
            assert time.monotonic() - began < LIMIT, f"never {state}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(repo, micro_folder, tmp_path_factory, forks):
    root = tmp_path_factory.mktemp("demo")
    (root / "prompts.txt").write_text("a red circle\n\nthe digit 7 <b>moves</b>\n")
    process = forks.start(
        ["-m", "lumos", "demo", "--model", micro_folder, "--port", "0", "--root", root / "files",
         "--examples", root / "prompts.txt", "--max-frames", "257", "--max-steps", "1000", "--max-upload-mb", "1"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(repo)},
    )  # fmt: skip
    try:
        url = process.first_line(LIMIT).split(" ")[0]
        assert url.startswith("http://127.0.0.1:"), process.stderr
        yield Server(process, url, root / "files")
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested through playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium is installed ({', '.join(BROWSERS)}); Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        for_root = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-dev-shm-usage", *for_root])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    """The browser context of one visitor; its cache spares all pages but the first loading the scripts of gradio."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture
def page(context, server):
    page = context.new_page()
    page.set_default_timeout(LIMIT * 1000)
    elsewhere, errors = [], []
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#generate")
    yield page
    page.close()
    server.wait_for("idle")
    assert (elsewhere, errors) == ([], [])


def ask(page, prompt: str, **numbers: int) -> None:
    """Type a prompt and settings, and press Generate."""
    page.fill("#prompt textarea", prompt)
    if numbers:
        page.click("#settings button")
    for name, value in numbers.items():
        inputs = f"[...document.querySelectorAll('#{name} :is(input, textarea)')]"  # of some there are two: number and slider
        for _ in range(10 * LIMIT):  # what is typed before the page has set itself up is lost
            page.fill(f"#{name} {FIELD}", str(value))
            page.press(f"#{name} {FIELD}", "Tab")
            page.wait_for_timeout(100)
            if page.evaluate(f"{inputs}.every(input => input.value == '{value}')"):
                break
    page.click("#generate")


def test_a_prompt_becomes_a_playing_video(page, server):
    ask(page, "a red circle ${6*7} <b>bold</b>", frames=9, num_inference_steps=3, seed=5)
    page.wait_for_function("(v => v && v.readyState >= 2 && v.currentTime > 0)(document.querySelector('#stage video'))")
    first = page.evaluate("document.querySelector('#stage video').currentTime")
    page.wait_for_function(f"document.querySelector('#stage video').currentTime != {first}")
    assert page.evaluate("document.querySelector('#stage video').duration") == pytest.approx(9 / 8, abs=0.05)
    assert "Seed 5" in page.inner_text("#line")
    card = page.locator("#gallery figure")
    assert card.locator("p").inner_text() == "a red circle ${6*7} <b>bold</b>"
    card.locator("summary").click()
    settings = card.locator("table").inner_text()
    assert re.search(r"num_inference_steps\s+3", settings)
    assert re.search(r"num_frames\s+9", settings)
    name = page.get_attribute("#stage video", "src").rpartition("/")[2]
    record = json.loads((server.root / "results" / f"{name}.json").read_text())
    assert (record["prompt"], record["seed"], record["model"]) == ("a red circle ${6*7} <b>bold</b>", 5, "micro")
    assert {"lumos", "created", "device", "dtype", "peak_memory_mb", "versions"} <= record.keys()
    page.fill(f"#seed {FIELD}", "")
    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('#gallery figure').length == 2")
    assert "Seed 5," not in page.inner_text("#line")


def test_results_stay_and_their_settings_come_back(page, server):
    """A second result neither reloads nor stops the first; a button fills the form with the settings of the first."""
    loads = []
    page.on("request", lambda request: loads.append(request.url) if "/api/results/" in request.url else None)
    ask(page, "a red circle", frames=9, num_inference_steps=3, seed=5)
    page.wait_for_selector("#gallery figure video")
    first = page.get_attribute("#gallery video", "src").rpartition("/")[2]
    page.evaluate("document.querySelector('#gallery video').mark = 'same'")
    page.fill("#prompt textarea", "a blue square")
    page.fill(f"#seed {FIELD}", "6")
    loads.clear()
    page.press("#prompt textarea", "Enter")  # as the button does
    page.wait_for_function("document.querySelectorAll('#gallery figure').length == 2")
    page.wait_for_function("!document.querySelector('#generate').disabled")
    assert page.evaluate("[...document.querySelectorAll('#gallery video')].filter(video => video.mark == 'same').length") == 1
    assert not [url for url in loads if first in url]
    top = page.evaluate("[...document.querySelectorAll('#gallery figure')].map(f => [f.innerText, f.getBoundingClientRect()])"
                        ".sort((a, b) => a[1].top - b[1].top || a[1].left - b[1].left)[0][0]")  # fmt: skip
    assert top.startswith("a blue square")
    page.locator("#gallery figure", has_text="a red circle").locator(".reuse").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a red circle'")
    page.wait_for_function(f"document.querySelector('#seed {FIELD}').value == '5'")
    assert {field.input_value() for field in page.locator("#frames input").all()} == {"9"}


def test_the_button_can_be_read(page):
    """The contrast of the drawn text is at least 4.5 to 1 (WCAG 2, level AA)."""
    style = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('#generate')))")
    text, ground = ("#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3]) for colour in style)
    assert contrast(text, ground) >= 4.5


def test_all_texts_can_be_read(page):
    page.click("#settings button")
    page.wait_for_selector("#history_mask_ratio")
    texts = page.evaluate(COLOURS_OF_TEXTS)
    assert {"Generate", "Prompt"} < {text for text, *_ in texts}
    assert [(text, *colours) for text, *colours in texts if contrast(*colours) < 4.5] == []


def test_frames_appear_and_cancel_stops_the_work(page, server, record_property):
    ask(page, "a red circle", frames=257, num_inference_steps=400)
    page.wait_for_selector("#stage img.preview")
    assert server.status()["state"] == "working"
    page.wait_for_function("document.querySelector('#line progress').value > 0")
    pressed = time.monotonic()
    page.click("#cancel")
    server.wait_for("idle")
    seconds = time.monotonic() - pressed
    record_property("seconds_until_idle", seconds)
    print(f"cancelled within {seconds:.2f} s")
    page.wait_for_function("document.querySelector('#line').innerText.includes('Cancelled')")
    assert page.locator("#gallery figure").count() == 0
    page.wait_for_function("!document.querySelector('#generate').disabled")


def test_closing_the_page_ends_the_work(browser, server):
    page = browser.new_page()
    page.set_default_timeout(LIMIT * 1000)
    page.goto(server.url)
    page.wait_for_selector("#generate")
    ask(page, "a red circle", frames=257, num_inference_steps=1000)
    server.wait_for("working")
    page.close()
    server.wait_for("idle")


def test_a_bad_upload_becomes_a_message_and_a_good_one_a_clip(page, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#upload input[type=file]", tmp_path / "notes.png")
    page.wait_for_function("document.querySelector('#upload').innerText.includes('notes')")
    page.wait_for_function("document.querySelector('#thumbnail').innerText.includes('cannot read the picture notes.png')")
    ask(page, "a red circle")
    page.wait_for_selector("#line [role=alert]")
    message = page.inner_text("#line [role=alert]")
    assert "cannot read the picture notes.png" in message
    assert "convert it to PNG or JPEG" in message
    assert page.locator("#gallery figure").count() == 0
    page.click("#upload button[aria-label=Clear], #upload button[aria-label='Remove this file']")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    page.set_input_files("#upload input[type=file]", tmp_path / "photo.png")
    page.wait_for_function("document.querySelector('#upload').innerText.includes('photo')")
    page.wait_for_function("(i => i && i.naturalWidth == 60 && i.naturalHeight == 40)(document.querySelector('#thumbnail img'))")
    page.click("#generate")
    page.wait_for_selector("#stage video")
    assert "photo.png" in page.locator("#gallery table").text_content()


def test_an_upload_that_is_too_large_becomes_a_message(page, server, tmp_path):
    (tmp_path / "large.mp4").write_bytes(bytes(2**21 + 9))
    page.set_input_files("#upload input[type=file]", tmp_path / "large.mp4")
    page.wait_for_function("document.body.innerText.includes('exceed')")
    assert not any(path.stat().st_size > 2**20 for path in (server.root / "visitors-uploads").rglob("*.mp4"))


def test_examples_fill_the_prompt_and_an_empty_one_is_a_message(page):
    page.click("#generate")
    page.wait_for_selector("#line [role=alert]")
    assert "the prompt is empty" in page.inner_text("#line [role=alert]")
    page.click("text=the digit 7")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'the digit 7 <b>moves</b>'")


def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "a red circle " * 10)
    page.wait_for_selector("#stage video")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    parts = "['#prompt', '#generate', '#stage', '#line', '#upload', '#gallery']"
    top = page.evaluate(f"{parts}.map(part => document.querySelector(part).getBoundingClientRect().top)")
    assert top == sorted(top)


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/.lock", "{repo}/README.md", "{root}/../prompts.txt", "https://example.com/x"])
def test_gradio_serves_no_files(server, repo, path):
    path = path.format(root=server.root, repo=repo)
    for form in (f"/gradio_api/file={path}", f"/file={path}", f"/assets/../../..{path}", f"/static/..%2f..%2f..{path}"):
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(server.url + form, timeout=LIMIT)
        assert told.value.code in (403, 404)


@pytest.mark.parametrize("given", ["/etc/passwd", "https://example.com/a.png", "/dev/zero"])
@pytest.mark.parametrize(("kind", "more"), [("file", {}), ("file", {"is_stream": True}), ("textbox", {}), ("slider", {})])
def test_the_page_reads_no_file_that_was_not_uploaded(server, given, kind, more):
    """Requests of the page are refused if a value is replaced by a path of the server or an address."""
    with urllib.request.urlopen(f"{server.url}/config", timeout=LIMIT) as answer:
        config = json.load(answer)
    parts = {part["id"]: part for part in config["components"]}
    (event,) = [event for event in config["dependencies"] if len(event["inputs"]) > 5]
    inputs = [parts[i] for i in event["inputs"]]
    data = [{"path": given, "meta": {"_type": "gradio.FileData"}, **more} if part["type"] == kind
            else "x" if part["props"].get("elem_id") == "prompt" else part["props"].get("value") for part in inputs]  # fmt: skip
    visitor = uuid.uuid4().hex
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": visitor}).encode()
    join = urllib.request.Request(f"{server.url}/gradio_api/queue/join", body, {"content-type": "application/json"})
    urllib.request.urlopen(join, timeout=LIMIT).close()
    with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash={visitor}", timeout=LIMIT) as answer:
        events = answer.read().decode()
    assert "the file is not there any more" in events
    assert server.status()["state"] == "idle"
    assert not list(server.root.rglob("passwd")) + list(server.root.rglob("zero"))


def documented(repo: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repo / "docs" / "demo.md").read_text(), re.DOTALL)


def test_the_documented_curl_line(server, repo, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    lines = [line for block in documented(repo, "bash") for line in block.splitlines() if line.startswith("curl")]
    Image.new("RGB", (60, 40)).save(tmp_path / "first.png")
    assert len(lines) == 2
    for line in lines:
        subprocess.run(shlex.split(line.replace("http://127.0.0.1:7860", server.url)), cwd=tmp_path, check=True)
        assert read_video(tmp_path / "clip.mp4")[0].shape == (5, 16, 24, 3)
        (tmp_path / "clip.mp4").unlink()


def test_the_documented_snippet(server, repo, tmp_path, monkeypatch):
    (block,) = documented(repo, "python")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(block.replace("http://127.0.0.1:7860", server.url), scope)
    assert read_video(tmp_path / "clip.mp4")[0].shape == (5, 16, 24, 3)
    assert scope["record"]["seed"] == 3
