"""The page's controls and outputs, tested without a browser."""

from __future__ import annotations

import base64
import io
import re
import sys

import numpy as np
import pytest
from contrast import contrast
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


def test_a_card_escapes_html():
    picture = {**RECORD, "file": "y-4-0123456789ab.png", "settings": {**RECORD["settings"], "num_frames": 1}}
    html = views.card(RECORD) + views.card(picture)
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


DEFAULTS = {"width": 24, "height": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0, "history_mask_ratio": 0.7,
            "image_guidance_scale": None}  # fmt: skip
UNTOUCHED = {**DEFAULTS, "image_guidance_scale": "", "prompt": "x", "negative_prompt": " ", "given": None, "seed": " "}


@pytest.mark.parametrize(
    ("answers", "request_"),
    [
        ({}, Request.of("x")),
        ({"seed": "3", "negative_prompt": "y"}, Request.of("x", negative_prompt="y", seed=3)),
        ({"num_frames": 9, "guidance_scale": 1}, Request.of("x", num_frames=9, guidance_scale=1)),
        ({"given": "/u/a"}, Request.of("x", image="/u/a")),
        ({"given": "/u/a", "image_guidance_scale": " 2.5 "}, Request.of("x", image="/u/a", image_guidance_scale=2.5)),
        ({"given": "/u/a", "image_guidance_scale": 2}, Request.of("x", image="/u/a", image_guidance_scale=2.0)),  # of a record
        ({"given": "/u/a", "image_guidance_scale": " "}, Request.of("x", image="/u/a")),
        ({"given": "/u/a", "image_guidance_scale": None}, Request.of("x", image="/u/a")),
    ],
)
def test_the_controls_ask_for_what_was_changed(gradio, answers, request_):
    from lumos.demo.page import request_of

    assert request_of({**UNTOUCHED, **answers}, DEFAULTS, LumosPipeline) == request_


@pytest.mark.parametrize(
    ("name", "kind", "frames"), [("a.mp4", "PNG", 1), ("a.jfif", "JPEG", 1), ("a.png", "WEBP", 3), ("a", "GIF", 3)]
)
def test_an_upload_is_known_by_its_content(gradio, pipes, tmp_path, name, kind, frames):
    import asyncio

    from lumos.demo.page import given_as_what, look, request_of

    service = Service(pipes[0], tmp_path / "root", Limits(), lambda prompt, seed: {})
    service.worker.close()
    path = service.store.new_upload(name)
    first, *rest = (Image.new("RGB", (24, 16), (80 * n, 0, 0)) for n in range(frames))
    first.save(path, kind, **({"save_all": True, "append_images": rest, "duration": 100} if rest else {}))
    service.store.keep(path)
    given_as = asyncio.run(given_as_what(service, str(path)))
    found = request_of({**UNTOUCHED, "given": str(path)}, DEFAULTS, pipes[0], given_as)
    assert found == Request.of("x", **{"image" if frames == 1 else "video": str(path)})
    assert "<img alt" in asyncio.run(look(service, str(path)))


@pytest.mark.parametrize(
    ("answers", "request_"),
    [
        ({"interpolate": False, "views": False, "last_image": None}, Request.of("x")),
        ({"given": "/u/a.png", "last_image": "/u/b.png"}, Request.of("x", image="/u/a.png", last_image="/u/b.png")),
        ({"given": "/u/a.mp4", "given_as": "video", "interpolate": True}, Request.of("x", video="/u/a.mp4", interpolate=2)),
        ({"given": "/u/a.png", "views": True, "prompt": ""}, Request.of("", image="/u/a.png", views=True)),
        ({"solver": "ab2", "keep_given_pixels": True}, Request.of("x", solver="ab2", keep_given_pixels=True)),
    ],
)
def test_the_controls_of_stiv_ask_for_its_uses(gradio, answers, request_):
    from lumos.demo.page import request_of

    defaults = {**vars(StivOptions()), **DEFAULTS}
    untouched = {name: value for name, value in UNTOUCHED.items() if name != "history_mask_ratio"}
    given_as = answers.get("given_as", "image")
    assert request_of({**untouched, **answers}, defaults, StivPipeline, given_as) == request_


def test_the_page_has_the_controls_of_its_generator(gradio, pipes, tmp_path):
    from lumos.demo.page import build_page

    def controls(pipe):
        service = Service(pipe, tmp_path / pipe.generator, Limits(), lambda prompt, seed: {})
        page = build_page(service, {})
        service.worker.close()
        return {block.elem_id: type(block).__name__ for block in page.blocks.values() if getattr(block, "elem_id", None)}

    lumos1, stiv = map(controls, pipes)
    assert {"last_image", "interpolate", "views", "solver", "keep_given_pixels"} & lumos1.keys() == set()
    assert (lumos1["mask_given_frames"], lumos1["history_mask_ratio"]) == ("Checkbox", "Slider")
    assert lumos1["image_guidance_scale"] == stiv["image_guidance_scale"] == "Textbox"  # empty: the model's own
    assert (stiv["last_image"], stiv["interpolate"], stiv["views"], stiv["solver"]) == ("File", "Checkbox", "Checkbox", "Dropdown")


def test_a_seed_is_a_number(gradio):
    from lumos.demo.page import request_of

    with pytest.raises(UserError, match="image_guidance_scale 'two' is not allowed; give a number"):
        request_of({**UNTOUCHED, "image_guidance_scale": "two"}, DEFAULTS, LumosPipeline)

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

    with only_writer(tmp_path, "server"):
        assert main(["demo", "--root", str(tmp_path)]) == 1
    assert "another server is writing into" in capsys.readouterr().err


def test_a_port_that_is_taken(gradio, tmp_path, capsys):
    from lumos.demo.server import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--root", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} (Address already in use)" in capsys.readouterr().err


def shown_order(gallery, html: dict) -> list[str]:
    """The prompts in the order in which the page shows them: by the style `order` of each slot."""
    order = {}
    for place, slot in enumerate(gallery.slots):
        if slot in html:
            found = re.fullmatch(rf"<style>#card-{place} {{ order: (-?\d+); }}</style>(.*)", html[slot], re.DOTALL)
            order[int(found[1])] = re.search(r"<p>(.*?)</p>", found[2])[1]
    return [order[number] for number in sorted(order)]


@pytest.mark.parametrize("count", [1, 3, 24, 60])
def test_a_new_result_changes_one_slot_and_the_newest_is_first(gradio, count):
    from lumos.demo.gallery import SHOWN_RESULTS, Gallery

    with gradio.Blocks():
        gallery = Gallery()
    made, html = [], {}
    for number in range(count):
        updates = gallery.add(made, {**RECORD, "prompt": f"clip {number}"})
        changed = [part for part in updates if part in gallery.slots]
        assert len(changed) == 1
        html[changed[0]] = updates[changed[0]]["value"]
        made = updates[gallery.made]
        assert len(made) == number + 1
    assert shown_order(gallery, html) == [f"clip {number}" for number in range(count)][::-1][:SHOWN_RESULTS]
    assert sum(bool(record) for record in made) == min(count, SHOWN_RESULTS)  # memory does not grow with the session


def test_the_settings_of_a_result_ask_for_it_again(gradio, pipes):
    """A record's values in the controls give the request of that record."""
    from lumos.demo.page import answers_of, request_of

    chosen = {"guidance_scale": 3.5, "history_mask_ratio": 0.2, "num_inference_steps": 7}
    resolved = pipes[0].resolve(Request.of("a cat", negative_prompt="a dog", num_frames=9, seed=2**40, **chosen))
    record = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 2**40, "settings": resolved.settings}
    defaults = {**vars(pipes[0].settings), **vars(pipes[0].clip)}
    names = ["prompt", "negative_prompt", "width", "height", "num_frames", "seed", *chosen, "given"]
    answers = answers_of(record, names)
    assert answers.keys() == set(names) - {"given"}
    again = pipes[0].resolve(request_of({**answers, "given": None}, defaults, pipes[0]))
    assert (again.settings, again.seeds) == (resolved.settings, resolved.seeds)


def test_text_has_enough_contrast(repo):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the usual example of just too little
    css = (repo / "lumos" / "demo" / "page.css").read_text()
    rules = {name.strip(): dict(re.findall(r"([\w-]+): *(#[0-9a-f]{6})\b", body))
             for name, body in re.findall(r"([^{}]+){([^{}]*)}", css)}  # fmt: skip
    button, hover, stage = rules["#generate"], rules["#generate:hover"], rules[".stage"]
    for text, ground in ((button["color"], button["background"]), (button["color"], hover["background"]),
                         (stage["color"], stage["background"])):  # fmt: skip
        assert contrast(text, ground) >= 4.5, (text, ground)


def test_labels_are_words_of_everyday(gradio, pipes, tmp_path):
    """No label of a control is a term of the method or the name of an argument."""
    from lumos.demo.page import sampling_controls

    for number, pipe in enumerate(pipes):
        service = Service(pipe, tmp_path / str(number), Limits(max_steps=1000), lambda prompt, seed: {})
        with gradio.Blocks():
            controls = sampling_controls(service)
        service.worker.close()
        for name, control in controls.items():
            assert control.label
            assert not re.search(r"history mask|latent|confidence|gumbel|renorm|solver|null|_", control.label, re.IGNORECASE), name
