"""`serve` in a process of its own, and the examples of the page about the HTTP API on a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from clip_requests import png
from pages import blocks

from lumos.video.io import read_video

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
pytest.importorskip("fastapi.testclient")

from lumos.demo.keys import read_keys
from lumos.demo.schema import CLIP
from lumos.demo.server import build_app


@pytest.mark.slow
def test_a_server_of_its_own_answers_without_gradio(repo, micro_folder, tmp_path, forks):
    """`serve` loads no gradio, and stops at once on a signal, although a client is connected."""
    program = (
        "import sys, threading, time, urllib.request, json, os, signal\n"
        "from lumos.cli import main\n"
        "import lumos.demo.server as server\n"
        "made = server.listen\n"
        "def listen(*args):\n"
        "    socket = made(*args); ports.append(socket.getsockname()[1]); return socket\n"
        "ports = []; server.listen = listen\n"
        "def use():\n"
        "    try: follow()\n"
        "    except BaseException: os.kill(os.getpid(), signal.SIGINT); raise\n"
        "def follow():\n"
        "    while True:\n"
        "        try: url = f'http://127.0.0.1:{ports[0]}'; urllib.request.urlopen(f'{url}/health', timeout=100); break\n"
        "        except (IndexError, OSError): time.sleep(0.01)  # the model is still being loaded\n"
        "    body = json.dumps({'prompt': 'x', 'num_frames': 257, 'num_inference_steps': 100}).encode()\n"
        "    ask = urllib.request.Request(f'{url}/api/clips', body, {'content-type': 'application/json'})\n"
        "    clip = json.load(urllib.request.urlopen(ask, timeout=100))\n"
        "    events = urllib.request.urlopen(f\"{url}/api/clips/{clip['id']}/events\", timeout=100)\n"
        "    print(events.readline().decode().strip(), 'gradio' in sys.modules, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(events.read().decode().count('event: interrupted'), flush=True)\n"
        "user = threading.Thread(target=use); user.start()\n"
        "code = main(['serve', '--model', sys.argv[1], '--port', '0', '--root', sys.argv[2], '--max-frames', '257'])\n"
        "user.join(); print(code)"
    )
    done = forks.run(["-c", program, micro_folder, tmp_path / "root"], cwd=repo)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("http://127.0.0.1:")
    assert re.fullmatch(r"event: (waiting|working) False", lines[1])
    assert lines[2:] == ["1", "0"]


@pytest.fixture
def address(service):
    """The address of a real server, which runs in a thread."""
    from lumos.demo.hosts import Hosts
    from lumos.demo.server import Server, listen

    uvicorn = pytest.importorskip("uvicorn")
    with listen("127.0.0.1", 0) as listener:
        server = Server(uvicorn.Config(build_app(service, None, Hosts()), log_level="warning", ws="none"), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_documented_client(address, repo, tmp_path, monkeypatch):
    (block,) = blocks("docs/http-api.md", "python")
    monkeypatch.chdir(tmp_path)
    exec(block.replace("http://127.0.0.1:8000", address), {})
    assert read_video(tmp_path / "clip.mp4")[0].shape == (5, 16, 24, 3)
    with pytest.raises(RuntimeError, match="prompt has 80 characters; at most 50 are allowed"):
        exec(block.replace("http://127.0.0.1:8000", address).replace("a large red circle moves left", "x" * 80), {})


def test_the_documented_curl_line(address, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "photo.png").write_bytes(png(220))  # in base64, more than Linux takes as one argument of a command
    command = next(block for block in blocks("docs/http-api.md", "bash") if "curl" in block)
    done = subprocess.run(["bash", "-c", command.replace("http://127.0.0.1:8000", address)], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), CLIP)


def test_the_documented_keys_and_routes(client, tmp_path):
    (block,) = blocks("docs/http-api.md", "yaml")
    (tmp_path / "keys.yaml").write_text(block)
    assert [(key.name, key.queue_length, key.clips_per_hour) for key in read_keys(tmp_path / "keys.yaml").keys] == [
        ("alice", None, None), ("bob", 4, 100)
    ]  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
    listed = {re.sub("ID", "{clip_id}", re.sub("NAME", "{name}", path)).partition("?")[0]
              for path in re.findall(r"^\| `.*?(/[\w/.]+[^`]*)` \|", text, re.MULTILINE)}  # fmt: skip
    assert listed - {"/api/openapi.json"} == set(client.get("/api/openapi.json").json()["paths"])
