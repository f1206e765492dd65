"""Fetching from a stand-in Hub on 127.0.0.1: pinned, fetched once, and refused in words."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support_published import published_rows

from petool_lite.data.fetch import fetch
from petool_lite.errors import PetoolError

REPO = "someone/entries"
FIRST, SECOND = "1" * 40, "2" * 40
ENTRIES = json.dumps(published_rows("test", 3)).encode()

# The Hub's address and offline mode are read when its client is imported, so every call has a process of its own.
PROGRAM = """
import json, sys
from petool_lite.data.fetch import fetch
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
call = json.loads(sys.argv[1])
try:
    if "source" in call:
        rows = len(load_dataset(call["source"]).entries)
    else:
        rows = [[file.name, file.path.read_text(), file.revision] for file in fetch(**call)]
    print(json.dumps({"rows": rows}))
except PetoolError as error:
    print(json.dumps({"error": error.message, "hint": error.hint}))
"""


@dataclass
class Hub:
    """What the stand-in serves and what it was asked; with `cut` a file ends after so many bytes."""

    commits: dict[str, dict[str, bytes]]
    head: str = FIRST
    refusal: tuple[int, str] | None = None
    cut: int | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    """The routes of the Hub that `dataset_info` and `hf_hub_download` use."""

    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.asked.append((self.command, path))
        commit, _, name = path.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")
        commit = hub.head if commit == "main" else commit
        data = hub.commits.get(commit, {}).get(name)
        if hub.refusal:
            self.send(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
        elif path == f"/api/datasets/{REPO}":
            rows = [{"rfilename": name} for name in hub.commits[hub.head]]
            self.send(200, json.dumps({"id": REPO, "sha": hub.head, "siblings": rows}).encode(), {})
        elif data is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self.send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.hub.cut])


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub({FIRST: {"a.json": ENTRIES, "b.json": b"[2]", "small.json": b"[3]"}, SECOND: {"a.json": b"[4]"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run one fetch (or, with source=, one load) in a process of its own, against the stand-in."""

    def run(offline: bool = False, **arguments: Any) -> dict[str, Any]:
        settings = {
            "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        arguments = arguments if "source" in arguments else {"repo": REPO, **arguments}
        line = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=250, env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_newest_commit_is_fetched_once_and_a_revision_is_kept_to(hub, call) -> None:
    names = ["a.json", "small.json"]
    first = call(names=names)
    assert first["rows"] == [["a.json", ENTRIES.decode(), FIRST], ["small.json", "[3]", FIRST]]
    hub.asked.clear()
    assert call(names=names, offline=True) == first
    assert hub.asked == []
    assert call(names=names) == first
    assert not [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    assert call(names=["a.json"], revision=SECOND)["rows"] == [["a.json", "[4]", SECOND]]
    hub.head = SECOND  # the branch moves on
    assert call(names=["a.json"])["rows"] == [["a.json", "[4]", SECOND]]
    assert call(names=["a.json"], revision=FIRST)["rows"] == [["a.json", ENTRIES.decode(), FIRST]]


def test_a_broken_download_is_said_and_the_next_call_completes(hub, call) -> None:
    hub.cut = len(ENTRIES) // 2
    broken = call(names=["a.json"])
    assert f"cannot download hub:{REPO}/a.json" in broken["error"]
    assert "network" in broken["hint"]
    hub.cut = None
    assert call(names=["a.json"])["rows"] == [["a.json", ENTRIES.decode(), FIRST]]


def test_a_refusal_is_one_clear_line(hub, call) -> None:
    for refusal, said, hint in (
        ((401, "RepoNotFound"), "no such data set", "hf auth login"),
        ((403, "GatedRepo"), "gated", "accept the terms"),
        ((404, "RevisionNotFound"), "no such commit", "revision"),
    ):
        hub.refusal = refusal
        answer = call(names=["a.json"], revision=FIRST)
        assert said in answer["error"].splitlines()[-1]
        assert hint in answer["hint"]


def test_a_source_on_the_hub_needs_no_file_name_where_there_is_one_file(hub, call) -> None:
    assert call(source=f"hub:{REPO}/a.json")["rows"] == 3
    assert call(source=f"hub:{REPO}/a.json", offline=True)["rows"] == 3
    assert "no such file" in call(source=f"hub:{REPO}/c.json")["error"]
    several = call(source=f"hub:{REPO}")
    assert "does not say which file" in several["error"]
    assert "a.json, b.json, small.json" in several["hint"]
    hub.commits[FIRST] = {"a.json": ENTRIES, "README.md": b"x"}
    assert call(source=f"hub:{REPO}")["rows"] == 3


def test_offline_is_said_and_a_request_that_makes_no_sense_is_refused() -> None:
    offline = "cannot download hub:someone/entries/a.json: the Hub client is in offline mode"
    for repo, names, said in (
        (REPO, ["a.json"], offline), ("one--two/x", ["a"], "repo_id"), (REPO, [], "no file"), (REPO, ["../a"], "name"),
    ):  # fmt: skip
        with pytest.raises(PetoolError, match=said):
            fetch(repo, names)
