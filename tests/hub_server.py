"""A stand-in of the Hugging Face hub in this process: the few requests of it that huggingface_hub sends."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, READ_TOKEN = "hf_stand_in", "hf_may_only_read"
REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"


@dataclass
class StoredRepository:
    """A repository: its commits from the first to the last, each with the content of every file."""

    private: bool = False
    hidden: bool = False  # the tokens here may not read it, so that it seems not to exist
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        """Add a commit to the branch main."""
        number = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[number], self.refs["main"] = files, number
        self.messages.append(message)
        return number

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[self.refs["main"]]


class Hub(ThreadingHTTPServer):
    """The server and what it stores."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, StoredRepository] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.requests: list[str] = []
        self.fail: str | None = None  # a pattern of requests that are answered with an error
        self.before_commit: Callable[[], None] | None = None  # what happens once between a push's look and its commit
        self.created: set[str] = set()  # the repositories that a request has created, and no push has filled yet

    def create(self, name: str, private: bool = False) -> StoredRepository:
        """Create a repository, with the file that the hub puts into each."""
        repository = self.repositories[name] = StoredRepository(private)
        repository.commit({".gitattributes": b"*.npz filter=lfs\n"}, "initial commit")
        return repository

    def environment(self, cache: object, token: str = TOKEN) -> dict[str, str]:
        """The variables by which huggingface_hub finds this server, with a cache and a token of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}


class Handler(BaseHTTPRequestHandler):
    """The answers."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.fail and re.search(self.server.fail, path):
            return self.send(507, {"error": "no storage is left"})  # huggingface_hub tries some others again
        if token not in ("", TOKEN, READ_TOKEN):
            return self.send(401, {"error": "no"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self.send(200, {"name": "owner", "type": "user"}) if token else self.send(401, {"error": "no"})
        if self.command == "PUT" and path.startswith("/lfs/"):
            self.server.objects[path.removeprefix("/lfs/")] = body
            return self.send(200, {})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.send(200, {"errors": [], "warnings": []})
        if self.command == "POST" and token != TOKEN:
            return self.send(403, {"error": "no"}, {"X-Error-Message": "you may not write"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if name in self.server.repositories:
                return self.send(409, {"error": "exists"})
            self.server.created.add(name)
            self.server.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self.send(200, {"url": f"{self.server.url}/{name}", "name": name, "id": "1"})
        return self.answer_about_repository(path, body, token)

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer_about_repository(self, path: str, body: bytes, token: str) -> None:
        patterns = {
            "info": rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?",
            "tree": rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)",
            "preupload": rf"/api/models/{REPOSITORY}/preupload/main",
            "batch": rf"/{REPOSITORY}\.git/info/lfs/objects/batch",
            "commit": rf"/api/models/{REPOSITORY}/commit/main",
            "resolve": rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        }
        matches = ((kind, re.fullmatch(pattern, path)) for kind, pattern in patterns.items())
        kind, found = next(((kind, match) for kind, match in matches if match), ("", None))
        if found is None:
            return self.send(400, {"error": f"the stand-in does not know {self.command} {path}"})
        repository = self.server.repositories.get(found["repository"])
        if repository is None or repository.hidden or (repository.private and not token):
            return self.send(404 if token else 401, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        asked = found.groupdict().get("revision") or "main"
        revision = repository.refs.get(asked, asked)
        if revision not in repository.commits:
            return self.send(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[revision]
        if kind == "info":
            siblings = [{"rfilename": name} for name in files]
            described = {"id": found["repository"], "sha": revision, "private": repository.private, "tags": []}
            return self.send(200, described | {"siblings": siblings, "downloads": 0, "likes": 0, "gated": False})
        if kind == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.send(200, listed)
        if kind == "preupload":
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if _is_large(file) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": modes})
        if kind == "batch":
            objects = [
                file | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if kind == "commit":
            return self.commit(repository, found["repository"], body)
        return self.send_file(files, found["file"], revision)

    def commit(self, repository: StoredRepository, name: str, body: bytes) -> None:
        if self.server.before_commit:
            self.server.before_commit()
            self.server.before_commit = None
        files, message = dict(repository.files), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                parent = value.get("parentCommit")
                if parent is None:  # only the one who has just created the repository need not name its commit
                    assert name in self.server.created
                elif parent != repository.refs["main"]:
                    return self.send(412, {"error": "a commit has happened since"})
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        number = repository.commit(files, message)
        self.server.created.discard(name)
        url = f"{self.server.url}/{name}/commit/{number}"
        return self.send(200, {"success": True, "commitUrl": url, "commitOid": number})

    def send_file(self, files: dict[str, bytes], name: str, revision: str) -> None:
        if name not in files:
            return self.send(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
        tag = hashlib.sha256(files[name]).hexdigest()
        return self.send(200, files[name], {"X-Repo-Commit": revision, "ETag": f'"{tag}"'})

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(file: dict[str, Any]) -> bool:
    """As the hub decides: by the size, or by .gitattributes."""
    return file["size"] > 2**16 or file["path"].endswith((".npz", ".safetensors"))


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a stand-in of the hub during the body of this context."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
