"""The status of clips survives a restart of the server: finished ones with their results, the others as interrupted."""

from __future__ import annotations

import json

import jsonschema
import pytest

from lumos.demo.limits import Limits

fastapi = pytest.importorskip("fastapi", reason="the API needs the extra [serve]")
testclient = pytest.importorskip("fastapi.testclient")

from clip_status import ended  # noqa: E402

from lumos.demo.hosts import Hosts  # noqa: E402
from lumos.demo.journal import Journal  # noqa: E402
from lumos.demo.keys import Keys, read_keys  # noqa: E402
from lumos.demo.schema import CLIP  # noqa: E402
from lumos.demo.server import build_app  # noqa: E402
from lumos.demo.service import Service  # noqa: E402

SMALL = {"prompt": "a red circle", "num_frames": 1, "num_inference_steps": 1, "seed": 5}
LONG = {"prompt": "x", "num_frames": 257, "num_inference_steps": 1000}
ALICE = {"Authorization": "Bearer alice-0123456789ab"}


class Starts:
    """A server that can be restarted on one folder. After a kill, its `worker` writes nothing more."""

    def __init__(self, pipe, root):
        self.pipe, self.root, self.running = pipe, root, []

    def start(self, keys: Keys | None = None, keep: int = 10):
        limits = Limits(max_steps=1000, max_frames=257, queue_length=3, keep_results=keep)
        service = Service(self.pipe, self.root, limits, lambda prompt, seed: {"prompt": prompt, "seed": seed})
        self.running.append(service)
        client = testclient.TestClient(build_app(service, None, Hosts(), keys), base_url="http://localhost")
        return service, client

    def kill(self) -> None:
        for service in self.running:
            service.when_ended.clear()
        self.stop()

    def stop(self) -> None:
        while self.running:
            self.running.pop().worker.close()


@pytest.fixture
def server(pipe, tmp_path):
    server = Starts(pipe, tmp_path / "root")
    yield server
    server.stop()


def test_finished_clips_are_there_after_a_restart(server):
    _, client = server.start()
    done = ended(client, client.post("/api/clips", json=SMALL).json())
    content = client.get(done["content"]).content
    failed = ended(client, client.post("/api/clips", json={"prompt": "y", "image": "YWJj"}).json())
    assert (done["status"], failed["status"]) == ("done", "failed")
    server.stop()
    service, client = server.start()
    assert client.get("/api/clips").json()["clips"] == [failed, done]
    assert client.get(f"/api/clips/{done['id']}").json() == done
    assert client.get(done["content"]).content == content
    assert client.get(done["record"]).json()["seed"] == 5
    assert f"event: done\ndata: {json.dumps(done)}" in client.get(f"/api/clips/{done['id']}/events").text
    service.store._stays.clear()
    service.store.remove(client.get(done["record"]).json()["file"])
    assert client.get(done["content"]).status_code == 410
    assert client.delete(f"/api/clips/{done['id']}").status_code == 204
    server.stop()
    assert server.start()[1].get("/api/clips").json()["clips"] == [failed]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_clips_that_had_not_ended_are_interrupted(server, end):
    _, client = server.start()
    running, waiting = client.post("/api/clips", json=[LONG, {**LONG, "prompt": "z"}]).json()["clips"]
    cancelled = client.post("/api/clips", json=LONG).json()
    client.post(f"/api/clips/{cancelled['id']}/cancel")
    getattr(server, end)()
    for _ in range(2):
        _, client = server.start()
        clips = client.get("/api/clips").json()["clips"]
        assert [clip["id"] for clip in clips] == [cancelled["id"], waiting["id"], running["id"]]
        assert [clip["status"] for clip in clips] == ["cancelled", "interrupted", "interrupted"]
        for clip in clips:
            jsonschema.validate(clip, CLIP)
        assert "the server was stopped before the clip was made" in clips[1]["error"]
        answer = client.get(f"/api/clips/{running['id']}/content")
        assert (answer.status_code, "interrupted" in answer.json()["error"]) == (409, True)
        assert client.post(f"/api/clips/{running['id']}/cancel").status_code == 409
        server.stop()


def test_the_number_of_clips_that_are_kept_is_bounded(server):
    _, client = server.start(keep=3)
    clips = [ended(client, client.post("/api/clips", json=SMALL).json()) for _ in range(6)]
    server.stop()
    service, client = server.start(keep=3)
    assert len(list(service.journal.folder.iterdir())) <= 4
    assert [clip["id"] for clip in client.get("/api/clips").json()["clips"]][:3] == [clip["id"] for clip in clips[:-4:-1]]


def test_clients_see_their_own_clips_after_a_restart(server, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("alice: alice-0123456789ab\nbob: bob-0123456789abcdef\n")
    _, client = server.start(read_keys(path))
    clip = ended(client, client.post("/api/clips", json=SMALL, headers=ALICE).json(), headers=ALICE)
    server.stop()
    (kept,) = (server.root / "clips").iterdir()
    assert "alice-0123456789ab" not in kept.read_text()
    _, client = server.start(read_keys(path))
    bob = {"Authorization": "Bearer bob-0123456789abcdef"}
    assert client.get("/api/clips", headers=ALICE).json()["clips"] == [clip]
    assert client.get("/api/clips", headers=bob).json()["clips"] == []
    assert client.get(clip["content"], headers=bob).status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"status": "odd"}, {"id": "x"}, {"created": "now"}, {"created": 1e300}, {"notes": [1]}, {"result": {"file": "a.mp4"}},
        {"result": {"file": "../../x-0123456789ab.mp4", "seed": 1, "seconds": 1.0}}, {"seed": "1"}, None,
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_status_is_left_out(server, caplog, change):
    service, client = server.start()
    ended(client, client.post("/api/clips", json=SMALL).json())
    (path,) = service.journal.folder.iterdir()
    server.stop()
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    _, client = server.start()
    assert client.get("/api/clips").json()["clips"] == []
    assert "is not the status of a clip" in caplog.text


def test_a_disk_that_fails_stops_no_clip(server, caplog):
    service, client = server.start()
    service.journal = Journal(server.root / "file")
    (server.root / "file").write_text("a file where the folder would be")
    clip = ended(client, client.post("/api/clips", json=SMALL).json())
    assert clip["status"] == "done"
    assert "the status of a clip cannot be kept" in caplog.text
    assert ended(client, client.post("/api/clips", json=SMALL).json())["status"] == "done"
