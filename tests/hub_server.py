"""A local server with the part of the HTTP API of the Hugging Face hub that downloads and uploads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub:
    """Repositories by name, each a dict of files; `requests` are the lines of all requests. Use it as a context manager."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name: str) -> str:
        """The commit of a repository: a hash of its files."""
        files = sorted((path, sha1(data)) for path, data in self.repositories[name].items())
        return sha1(repr(files).encode())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            hub.repositories.setdefault(name, {})
            self.reply({"url": f"{hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", path):
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.reply({"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            name = found[1]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hub.commit(name)
            url = f"{hub.address}/{name}/commit/{commit}"
            self.reply({"commitUrl": url, "commitOid": commit, "success": True, "hookOutput": ""})
        else:
            self.reply({"error": "no such route"}, 404)

    def answer(self) -> None:
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, _, file = found.groups()
            data = hub.repositories.get(name, {}).get(file)
            if data is None:
                self.reply({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": hub.commit(name), "ETag": f'"{sha1(data)}"', "Accept-Ranges": "bytes"}
            self.send(data, 200, headers)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/[^/]+)?", path):
            name = found[1]
            if name not in hub.repositories:
                self.reply({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            files = hub.repositories[name]
            if "/tree/" in path:
                self.reply([
                    {"type": "file", "path": p, "size": len(d), "oid": sha1(d)} for p, d in files.items()
                ])
                return
            siblings = [{"rfilename": p, "size": len(d), "blobId": sha1(d)} for p, d in files.items()]
            self.reply({"id": name, "modelId": name, "sha": hub.commit(name), "siblings": siblings, "private": False, "tags": []})
        else:
            self.reply({"error": "no such route"}, 404)

    def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Print nothing."""
