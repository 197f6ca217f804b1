"""What the page shows and asks for, without a browser."""

from __future__ import annotations

import base64
import io
import sys

import numpy as np
import pytest
from micro_stiv import micro_pipeline
from PIL import Image, ImageSequence

from lumos import LumosPipeline, StivPipeline
from lumos.cli import main
from lumos.demo import views
from lumos.demo.limits import Limits
from lumos.demo.service import Service
from lumos.errors import UserError
from lumos.models.stiv.settings import StivOptions
from lumos.pipeline.request import Request

RECORD = {
    "prompt": '<img src=x onerror="alert(1)">', "seed": 3, "file": "x-3-0123456789ab.mp4", "negative_prompt": "a <b>dog</b>",
    "image": None, "video": None, "seconds": 1.5,
    "settings": {"num_frames": 5, "height": 16, "width": 24, "fps": 8, "top_k": None, "guidance_scale": 2.0,
                 "history_mask_ratio": 0.7, "mask_given_frames": False, "num_given_frames": 0, "target_size": None,
                 "guidance_interval": (0.0, 1.0)},
}  # fmt: skip


def test_the_gallery_is_newest_first_and_escapes_html():
    html = views.gallery([RECORD, {**RECORD, "file": "y-4-0123456789ab.png", "settings": {**RECORD["settings"], "num_frames": 1}}])
    assert html.index("y-4-") < html.index("x-3-")
    assert '<video class="result" src="api/results/x-3-0123456789ab.mp4"' in html
    assert '<img class="result" alt="the picture" src="api/results/y-4-0123456789ab.png">' in html
    assert "<img src=x" not in html
    assert "<b>" not in html
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in html
    assert "<td>guidance_scale</td><td>2.0</td>" in html
    assert "<td>negative_prompt</td><td>a &lt;b&gt;dog&lt;/b&gt;</td>" in html
    assert not any(off in html for off in ("top_k", "mask_given_frames", "num_given_frames", "guidance_interval"))
    picture, clip = html.split("x-3-0123456789ab.mp4", 1)
    assert ("fps" in picture, "fps" in clip) == (False, True)


def test_the_preview_holds_the_last_frames():
    frames = [np.full((16, 24, 3), 5 * n, dtype=np.uint8) for n in range(40)]
    data = views.stage_preview(frames, 8).split("base64,")[1].split('"')[0]
    shown = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(io.BytesIO(base64.b64decode(data))))]
    assert len(shown) == 32
    assert abs(int(shown[0].mean()) - 40) <= 3
    assert abs(int(shown[-1].mean()) - 195) <= 3


def test_messages_are_text():
    assert "<script>" not in views.wrong("<script>") + views.status("<script>", 0.5) + views.stage_text("<script>")


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'lumos-video[demo]'" in error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def pipes(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder, device="cpu"), micro_pipeline()


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="the page needs the extra [demo]")


DEFAULTS = {"width": 24, "height": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0, "history_mask_ratio": 0.7}
UNTOUCHED = {**DEFAULTS, "prompt": "x", "negative_prompt": " ", "given": None, "seed": " "}


@pytest.mark.parametrize(
    ("answers", "request_"),
    [
        ({}, Request.of("x")),
        ({"seed": "3", "negative_prompt": "y"}, Request.of("x", negative_prompt="y", seed=3)),
        ({"num_frames": 9, "guidance_scale": 1}, Request.of("x", num_frames=9, guidance_scale=1)),
        ({"given": "/u/a.PNG"}, Request.of("x", image="/u/a.PNG")),
        ({"given": "/u/a.gif"}, Request.of("x", video="/u/a.gif")),
        ({"given": "/u/a.mov", "width": 32}, Request.of("x", video="/u/a.mov", width=32)),
    ],
)
def test_the_controls_ask_for_what_was_changed(gradio, answers, request_):
    from lumos.demo.page import request_of

    assert request_of({**UNTOUCHED, **answers}, DEFAULTS, LumosPipeline) == request_


@pytest.mark.parametrize(
    ("answers", "request_"),
    [
        ({"interpolate": False, "views": False, "last_image": None}, Request.of("x")),
        ({"given": "/u/a.png", "last_image": "/u/b.png"}, Request.of("x", image="/u/a.png", last_image="/u/b.png")),
        ({"given": "/u/a.mp4", "interpolate": True}, Request.of("x", video="/u/a.mp4", interpolate=2)),
        ({"given": "/u/a.png", "views": True, "prompt": ""}, Request.of("", image="/u/a.png", views=True)),
        ({"solver": "ab2", "keep_given_pixels": True}, Request.of("x", solver="ab2", keep_given_pixels=True)),
    ],
)
def test_the_controls_of_stiv_ask_for_its_uses(gradio, answers, request_):
    from lumos.demo.page import request_of

    defaults = {**vars(StivOptions()), **DEFAULTS}
    untouched = {name: value for name, value in UNTOUCHED.items() if name != "history_mask_ratio"}
    assert request_of({**untouched, **answers}, defaults, StivPipeline) == request_


def test_the_page_has_the_controls_of_its_generator(gradio, pipes, tmp_path):
    from lumos.demo.page import build_page

    def controls(pipe):
        service = Service(pipe, tmp_path / pipe.generator, Limits(), lambda prompt, seed: {})
        page = build_page(service, [])
        service.worker.close()
        return {block.elem_id: type(block).__name__ for block in page.blocks.values() if getattr(block, "elem_id", None)}

    lumos1, stiv = map(controls, pipes)
    assert {"last_image", "interpolate", "views", "solver", "keep_given_pixels"} & lumos1.keys() == set()
    assert (lumos1["mask_given_frames"], lumos1["history_mask_ratio"]) == ("Checkbox", "Slider")
    assert (stiv["last_image"], stiv["interpolate"], stiv["views"], stiv["solver"]) == ("File", "Checkbox", "Checkbox", "Dropdown")


def test_a_seed_is_a_number(gradio):
    from lumos.demo.page import request_of

    with pytest.raises(UserError, match="seed 'three' is not allowed; give a whole number"):
        request_of({**UNTOUCHED, "seed": "three"}, DEFAULTS, LumosPipeline)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999999"], "cannot listen on 127.0.0.1 port 99999999"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--queue-length", "0"], "--queue-length 0 is not allowed"),
        (["--examples", "nowhere.txt"], "cannot read nowhere.txt as examples, one prompt a line"),
        (["--port", "0", "--model", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_wrong_flags_are_one_line(gradio, flags, message, tmp_path, capsys):
    assert main(["demo", "--root", str(tmp_path / "root"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_folder_has_one_demo(gradio, tmp_path, capsys):
    from lumos.files import only_writer

    with only_writer(tmp_path, "demo"):
        assert main(["demo", "--root", str(tmp_path)]) == 1
    assert "another demo is writing into" in capsys.readouterr().err


def test_a_port_that_is_taken(gradio, tmp_path, capsys):
    from lumos.demo.server import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--root", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} (Address already in use)" in capsys.readouterr().err
