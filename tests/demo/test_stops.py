"""A server that is told to stop by SIGTERM, as services are, leaves what one leaves after Ctrl-C."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="the API needs the extra [serve]")

from lumos.cli import main
from lumos.commands import serve
from lumos.demo.server import Server


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 0)])
def test_a_stopped_server_removes_uploads_and_ends_replicas(micro_folder, tmp_path, monkeypatch, number, code):
    uploads, over = tmp_path / "root" / "visitors-uploads", []

    def run(self, sockets):
        (uploads / "upload-1").mkdir()
        signal.raise_signal(number)  # uvicorn raises the signal again when it has served the last answer

    @contextmanager
    def replicas():
        try:
            yield None
        finally:
            over.append(True)

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(serve, "replicas_of", lambda args: replicas())
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", "--model", str(micro_folder), "--port", "0", "--root", str(tmp_path / "root")]) == code
    assert (list(uploads.iterdir()), over, signal.getsignal(signal.SIGTERM)) == ([], [True], before)
