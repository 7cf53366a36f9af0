"""A stand-in for the Hugging Face Hub on the loopback interface: data sets of Parquet files, and planted outages.

    dataset = HubDataset({"default": {"train": [...], "validation": [...]}})
    with hub_stand_in({"roneneldan/TinyStories": dataset}) as endpoint:
        subprocess.run(..., env=hub_environment(endpoint, tmp_path))

It answers what `datasets.load_dataset(..., streaming=True)` asks: repository info, the tree, and files by HEAD and GET
with ranges, for a branch name or a commit.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_ROW_GROUP_SIZE = 1000
_MAX_SHARDS = {"train": 4}


@dataclass(frozen=True)
class HubDataset:
    """`subsets` maps a configuration ("default" if there is only one) to splits, and a split to its rows."""

    subsets: Mapping[str, Mapping[str, Sequence[str | None]]]
    revision: str = REVISION
    column: str = "text"
    gated: bool = False

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """Contents by path: README.md and the Parquet files, laid out and named as on the Hub."""
        files = {"README.md": self._readme().encode()}
        for subset, splits in self.subsets.items():
            for split, rows in splits.items():
                files |= self._parquet_files(_folder(subset), split, list(rows))
        return files

    def _parquet_files(self, folder: str, split: str, rows: list[str | None]) -> dict[str, bytes]:
        files = {}
        num_shards = min(_MAX_SHARDS.get(split, 1), len(rows))
        for shard in range(num_shards):
            part = rows[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
            stream = io.BytesIO()
            table = pa.table({self.column: pa.array(part, pa.string())})
            pq.write_table(table, stream, row_group_size=_ROW_GROUP_SIZE)
            digest = hashlib.sha256(stream.getvalue()).hexdigest()[:16]
            files[f"{folder}/{split}-{shard:05}-of-{num_shards:05}-{digest}.parquet"] = stream.getvalue()
        return files

    def _readme(self) -> str:
        configs, infos = ["configs:"], ["dataset_info:"]
        for subset, splits in self.subsets.items():
            configs += [f"- config_name: {subset}", "  data_files:"]
            infos += [f"- config_name: {subset}", "  features:", f"  - name: {self.column}", "    dtype: string"]
            infos += ["  splits:"]
            for split, rows in splits.items():
                configs += [f"  - split: {split}", f"    path: {_folder(subset)}/{split}-*"]
                num_bytes = sum(len((row or "").encode()) for row in rows)
                infos += [f"  - name: {split}", f"    num_bytes: {num_bytes}", f"    num_examples: {len(rows)}"]
            infos += ["  download_size: 1", "  dataset_size: 1"]
        return "\n".join(["---", "license: cdla-sharing-1.0", *configs, *infos, "---", "A stand-in.", ""])


def _folder(subset: str) -> str:
    return "data" if subset == "default" else subset


@contextlib.contextmanager
def hub_stand_in(datasets: Mapping[str, HubDataset], *, fault: str = "", fault_path: str = "/") -> Iterator[str]:
    """Yields the endpoint of a Hub that holds `datasets` by their OWNER/NAME.

    `fault` is what happens to every request whose path contains `fault_path`: "error" answers 500, "silence" never
    answers, "cut" breaks the connection, "not a hub" answers 404 as any web server does for pages it has not.
    """
    ended = threading.Event()
    server = _Server(("127.0.0.1", 0), functools.partial(_Handler, dict(datasets), fault, fault_path, ended))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Returns the environment of a process that shall know no Hub but `endpoint`, and no cache but `home`."""
    dropped = re.compile(r"(?i)(.*_)?proxy$|HF_.*|HUGGING.*|TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if not dropped.match(name)}
    # Counting downloads would be a request to somewhere else.
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Joining threads would wait for connections that clients keep open.
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        """A client that is killed while it reads is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, datasets: dict[str, HubDataset], fault: str, fault_path: str, ended: threading.Event, *args):
        self._datasets, self._fault, self._fault_path, self._ended = datasets, fault, fault_path, ended
        super().__init__(*args)

    def log_message(self, format: str, *args) -> None:
        if log := os.environ.get("HUB_STAND_IN_LOG"):
            with Path(log).open("a") as file:
                file.write(format % args + "\n")

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self._fault and self._fault_path in path:
            self._fail()
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._with_dataset(match[1], match[2] or "main", self._send_info)
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            send_tree = functools.partial(self._send_tree, folder=match[3] or "", recursive=recursive)
            self._with_dataset(match[1], match[2], send_tree)
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._with_dataset(match[1], match[2], functools.partial(self._send_paths_info, wanted=wanted))
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_dataset(match[1], match[2], functools.partial(self._send_file, name=match[3]))
        else:
            self._send_error(404, "NotFound", f"no such page: {path}")

    do_HEAD = do_POST = do_GET

    def _fail(self) -> None:
        if self._fault == "error":
            self._send(500, b"the stand-in is broken", {})
            return
        if self._fault == "not a hub":
            self._send(404, b"no such page", {})
            return
        if self._fault == "silence":
            self._ended.wait()
        self.close_connection = True

    def _with_dataset(self, name: str, revision: str, answer) -> None:
        dataset = self._datasets.get(name)
        if dataset is None:
            self._send_error(404, "RepoNotFound", "Repository not found")
        elif dataset.gated:
            self._send_error(403, "GatedRepo", "Access to this dataset is restricted")
        elif revision not in ("main", dataset.revision):
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            answer(dataset, name=name) if answer == self._send_info else answer(dataset)

    def _send_info(self, dataset: HubDataset, name: str) -> None:
        siblings = [{"rfilename": path} for path in dataset.files]
        info = {"_id": "0", "id": name, "sha": dataset.revision, "private": False, "gated": False, "disabled": False}
        self._send_json({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _send_tree(self, dataset: HubDataset, folder: str, recursive: bool) -> None:
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict[str, object]] = {}
        for path in dataset.files:
            if not path.startswith(prefix):
                continue
            parents = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                directory = prefix + "/".join(parents[:depth])
                entries[directory] = {
                    "type": "directory",
                    "oid": _oid(directory.encode()),
                    "size": 0,
                    "path": directory,
                }
            entries[path] = _file_entry(dataset, path)
        if not entries:
            self._send_error(404, "EntryNotFound", f"{folder} does not exist")
            return
        self._send_json([e for p, e in entries.items() if recursive or "/" not in p[len(prefix) :]])

    def _send_paths_info(self, dataset: HubDataset, wanted: list[str]) -> None:
        self._send_json([_file_entry(dataset, path) for path in wanted if path in dataset.files])

    def _send_file(self, dataset: HubDataset, name: str) -> None:
        headers = {"X-Repo-Commit": dataset.revision, "Accept-Ranges": "bytes"}
        content = dataset.files.get(name)
        if content is None:
            self._send_error(404, "EntryNotFound", f"{name} does not exist", headers)
            return
        headers["ETag"] = f'"{_oid(content)}"'
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._send(200, content, headers)
            return
        start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _file_entry(dataset: HubDataset, path: str) -> dict[str, object]:
    content = dataset.files[path]
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
