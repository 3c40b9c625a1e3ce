"""A stand-in for the Hugging Face hub, in memory, on loopback.

It speaks what `huggingface_hub` asks of the hub for models: repositories, public and private, with
branches and commits; large files through Git LFS (batch, upload, verify), of which the commit holds
a pointer and a download is redirected; tokens that may read, or write too. Errors carry the status
and the `X-Error-Code` that the hub answers with. Xet and uploads in parts are not spoken.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

import yaml

OWNER, READER = "hf_owner", "hf_reader"  # the tokens: all may be done, nothing may be written
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Branches point to commits, commits to whole listings of files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class HubServer(http.server.ThreadingHTTPServer):
    """The server; it runs in a thread from its making to `close`."""

    daemon_threads = True

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256, as Git LFS keeps them
        self.verified: set[str] = set()
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, once each, since the list was last cleared."""
        found = [re.search(r"^HEAD .*/resolve/[^/]+/(.+)", request) for request in self.requests]
        return sorted({match[1] for match in found if match})


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer  # by HTTP/1.0: no connection outlives its answer, so `close` ends it all

    def log_message(self, *_):
        self.server.requests.append(f"{self.command} {self.path}")

    def do_GET(self):
        self._answer(_GET)

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(_POST)

    def do_PUT(self):
        self._answer(_PUT)

    def _answer(self, routes):
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for pattern, method in routes.items():
                if match := re.fullmatch(pattern, path):
                    names = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items()}
                    return method(self, body, **names)
            raise _Refusal(404)
        except _Refusal as refusal:
            self._send(
                {"error": refusal.message or refusal.code},
                refusal.status,
                {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message},
            )

    def _send(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _token(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", OWNER, READER):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return token

    def _readable(self, repo: str) -> Repository:
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self._token()):
            # To those it does not know, the hub does not say which of them is only private.
            raise _Refusal(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        return found

    def _writable(self, repo: str) -> Repository:
        found = self._readable(repo)
        if self._token() != OWNER:
            raise _Refusal(403 if self._token() else 401, message="You need write access")
        return found

    def _commit_of(self, repo: str, revision: str) -> str:
        found = self._readable(repo)
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def info(self, _, repo: str, revision: str = "main"):
        sha = self._commit_of(repo, revision)
        private = self.server.repositories[repo].private
        self._send({"id": repo, "sha": sha, "private": private, "tags": [], "siblings": []})

    def tree(self, _, repo: str, revision: str):
        files = self._readable(repo).commits[self._commit_of(repo, revision)]
        self._send([self._entry(name, content) for name, content in files.items()])

    def _entry(self, name: str, content: bytes) -> dict:
        oid = hashlib.sha1(content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.server.large:
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def resolve(self, _, repo: str, revision: str, name: str):
        sha = self._commit_of(repo, revision)
        content = self._readable(repo).commits[sha].get(name)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.server.large:
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._send(content, headers=headers | {"ETag": etag})
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        storage = self.server.url.replace("127.0.0.1", "localhost")  # to the client another host
        self._send(b"", 302, headers | {"Location": f"{storage}/large/{digest}"})

    def large_file(self, _, digest: str):
        if self.headers.get("Authorization"):
            raise _Refusal(400, message="A token is nothing that the storage may see")
        self._send(self.server.large[digest], headers={"ETag": f'"{digest}"'})

    def create(self, body: bytes):
        wanted = json.loads(body)
        if self._token() != OWNER:
            raise _Refusal(403 if self._token() else 401, message="You cannot create this")
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repositories:
            return self._send({"error": "You already created this model repo", "url": url}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[repo] = new = Repository(private)
        new.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send({"url": url})

    def branch(self, body: bytes, repo: str, branch: str):
        found = self._writable(repo)
        if branch in found.branches:
            raise _Refusal(409, message="Reference already exists")
        found.branches[branch] = found.branches["main"]
        self._send({})

    def preupload(self, body: bytes, repo: str, revision: str):
        self._writable(repo)
        self._commit_of(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send({"files": files})

    def batch(self, body: bytes, repo: str):
        self._writable(repo)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large:
                actions = {
                    "upload": {"href": f"{self.server.url}/large/{entry['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify"},
                }
                entry["actions"] = actions
        self._send({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, digest: str):
        if hashlib.sha256(body).hexdigest() != digest:
            raise _Refusal(400, message="The digest is another one")
        self.server.large[digest] = body
        self._send({})

    def verify(self, body: bytes):
        entry = json.loads(body)
        if len(self.server.large[entry["oid"]]) != entry["size"]:
            raise _Refusal(400, message="The size is another one")
        self.server.verified.add(entry["oid"])
        self._send({})

    def commit(self, body: bytes, repo: str, revision: str):
        found = self._writable(repo)
        files = dict(found.files(revision))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = found.commit(revision, files)
        self._send({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def validate_yaml(self, body: bytes):
        content = json.loads(body)["content"]
        try:
            front = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(front, dict) else [{"message": "not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)


_GET = {
    rf"/api/models/{_REPO}": _Handler.info,
    rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)": _Handler.info,
    rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)": _Handler.tree,
    rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)": _Handler.resolve,
    r"/large/(?P<digest>\w+)": _Handler.large_file,
}
_POST = {
    r"/api/repos/create": _Handler.create,
    rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)": _Handler.branch,
    rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)": _Handler.preupload,
    rf"/{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"/verify": _Handler.verify,
    rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)": _Handler.commit,
    r"/api/validate-yaml": _Handler.validate_yaml,
}
_PUT = {r"/large/(?P<digest>\w+)": _Handler.upload}
