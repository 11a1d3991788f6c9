"""A hub on this machine: a plain HTTP server with the endpoints of the Hugging Face hub that
downloads use, whose repositories can be damaged."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_FROM = 200  # bytes; larger files have a SHA-256


class LoopbackHub:
    """Repositories by hub name, and plain files by path.

    repositories: name → path → content, as listed.
    served: URL path → other content than the listed one.
    unsized: URL paths of files whose length is not stated: the connection's end is theirs.
    failures: URL path → its next answers: status and headers, or the number of bytes of the file
        after which the connection is closed.
    requests: (method, URL path, Range header) of all requests.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.files: dict[str, bytes] = {}
        self.served: dict[str, bytes] = {}
        self.unsized: set[str] = set()
        self.failures: dict[str, list[tuple[int, dict[str, str]] | int]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def downloads(self) -> list[str]:
        """Paths of the files that were read, with the first byte where it is not 0."""
        paths = []
        for method, path, ranges in self.requests:
            if method == "GET" and not path.startswith("/api/"):
                start = f" from {ranges}" if ranges else ""
                paths.append(path.removeprefix("/").replace(f"resolve/{COMMIT}/", "") + start)
        return paths

    def info(self, path: str) -> object | None:
        """The answer of an API path; None: there is none."""
        # A repository's commit and files.
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path)
        if found and found[1] in self.repositories:
            files = self.repositories[found[1]].items()
            siblings = [self.entry(name, content) for name, content in files]
            return {"id": found[1], "sha": COMMIT, "siblings": siblings}
        # The files of a folder.
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+(?:/(.+))?", path)
        if not found or found[1] not in self.repositories:
            return None
        folder = f"{unquote(found[2])}/" if found[2] else ""
        entries = []
        for name, content in self.repositories[found[1]].items():
            if name.startswith(folder):
                entries.append(self.entry(name, content))
        return entries or None

    def entry(self, name, content: bytes) -> dict:
        # Small files are in git, named by its hash; larger ones have a SHA-256.
        git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": name, "rfilename": name, "size": len(content)}
        entry |= {"oid": git_sha1, "blobId": git_sha1}
        if len(content) < LFS_FROM:
            return entry
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 130}
        return {**entry, "lfs": lfs}

    def content(self, path: str) -> bytes | None:
        """What the server sends for the path of a file."""
        if path in self.served:
            return self.served[path]
        found = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)
        if found:
            return self.repositories.get(found[1], {}).get(found[2])
        return self.files.get(path)


@contextlib.contextmanager
def running() -> Iterator[LoopbackHub]:
    """A hub while the block runs."""
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args):
            pass

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            ranges = self.headers.get("Range")
            hub.requests.append((self.command, path, ranges))
            failures = hub.failures.get(path)
            if failures and not isinstance(failures[0], int):
                status, headers = failures.pop(0)
                self.send(status, b"<html>", headers)
                return

            # The API's answers, or a file.
            api_answer = hub.info(path)
            content = hub.content(path)
            if api_answer is not None:
                self.send(200, json.dumps(api_answer).encode())
            elif content is None:
                self.send(404, b"")
            else:
                self.send_file(path, content, ranges)

        do_HEAD = do_GET

        def send_file(self, path: str, content: bytes, ranges: str | None):
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            # The rest of a file is sent only if it is still the same.
            is_unchanged = self.headers.get("If-Range", etag) == etag
            dropped_after = None
            failures = hub.failures.get(path)
            if failures and self.command == "GET":
                dropped_after = failures.pop(0)
            if ranges is None or not is_unchanged:
                self.send(200, content, headers, dropped_after)
                return
            start, _, end = ranges.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(end or len(content)) + 1]
            last = int(start) + len(part) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            self.send(206, part, headers)

        def send(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            dropped_after: int | None = None,
        ):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if self.path in hub.unsized:
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError):  # the client needs the headers only
                self.wfile.write(body[:dropped_after])
            if dropped_after is not None:  # the connection breaks within the file
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
