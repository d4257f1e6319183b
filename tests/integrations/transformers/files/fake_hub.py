"""Serve a Hugging Face hub on this machine that keeps all commits in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants, hf_api

Files = dict[str, bytes]


class Hub:
    """Repositories, and the commits and branches of each."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []

    def create(self, repo_id: str) -> None:
        if repo_id not in self.commits:
            self.commits[repo_id], self.branches[repo_id] = {}, {}
            self.commit(repo_id, "main", {})

    def commit(self, repo_id: str, branch: str, files: Files) -> str:
        former = self.commits[repo_id].get(self.branches[repo_id].get(branch, ""), {})
        content = {**former, **files}
        count = str(len(self.commits[repo_id]))
        oid = hashlib.sha1(json.dumps([count, sorted(content)]).encode()).hexdigest()
        self.commits[repo_id][oid], self.branches[repo_id][branch] = content, oid
        return oid

    def find(self, repo_id: str, revision: str) -> tuple[str, Files] | None:
        oid = self.branches.get(repo_id, {}).get(revision, revision)
        files = self.commits.get(repo_id, {}).get(oid)
        return None if files is None else (oid, files)

    def read(self, repo_id: str, name: str, revision: str = "main") -> str:
        found = self.find(repo_id, revision)
        assert found is not None
        return found[1][name].decode()


class Handler(BaseHTTPRequestHandler):
    """The requests that ``huggingface_hub`` sends to a hub."""

    hub: Hub
    address: str

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.create(repo_id)
            return self.answer({"url": f"{self.address}/{repo_id}", "name": repo_id, "id": "1"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        assert match is not None, path
        repo_id, what, revision = match.groups()
        if what == "branch":
            self.hub.branches[repo_id][revision] = self.hub.branches[repo_id]["main"]
            return self.answer({})
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        lines = [json.loads(line) for line in body.splitlines()]
        added = [line["value"] for line in lines if line["key"] == "file"]
        oid = self.hub.commit(repo_id, revision, {f["path"]: base64.b64decode(f["content"]) for f in added})
        url = f"{self.address}/{repo_id}/commit/{oid}"
        return self.answer({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo_id, what, revision = match.groups()
            found = self.hub.find(repo_id, revision or "main")
            if found is None:
                code = "RevisionNotFound" if repo_id in self.hub.commits else "RepoNotFound"
                return self.answer({"error": code}, 404, X_Error_Code=code)
            oid, files = found
            if what == "tree":
                blobs = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
                listed = [
                    {"type": "file", "path": name, "size": len(files[name]), "oid": blob}
                    for name, blob in blobs.items()
                ]
                return self.answer(listed)
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": repo_id, "sha": oid, "siblings": siblings, "private": False, "tags": []})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = None if match is None else self.hub.find(match[1], match[2])
        if match is None or found is None or match[3] not in found[1]:
            return self.answer({"error": "no"}, 404, X_Error_Code="EntryNotFound")
        content = found[1][match[3]]
        return self.answer(content, X_Repo_Commit=found[0], ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Make ``huggingface_hub`` use a separate hub and a separate cache."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = handler.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # keeps the endpoint that it began with
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
