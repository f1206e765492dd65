"""Fetching from a stand-in Hub on 127.0.0.1: pinned, checked, never half-written, and refused in words."""

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

from petool_lite.data.demo import generate
from petool_lite.data.fetch import FILES, LOCK, fetch
from petool_lite.errors import PetoolError

REPO = "someone/entries"
FIRST, SECOND = "1" * 40, "2" * 40
ENTRIES = json.dumps(generate("test", 3)).encode()
FOLDER = f"data/{REPO.replace('/', '--')}"

# The Hub's address and offline mode are read when its client is imported, so every call has a process of its own.
PROGRAM = """
import json, sys
from pathlib import Path
from petool_lite.data.fetch import fetch
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
call, said = json.loads(sys.argv[1]), []
try:
    if "source" in call:
        rows = len(load_dataset(call["source"], "rating").entries)
    else:
        got = fetch(**call, report=lambda stage, done, total, note: said.append([stage, done, total, note]))
        rows = [[file.name, str(file.path), file.sha256, file.bytes, file.revision] for file in got]
    print(json.dumps({"rows": rows, "said": said}))
except PetoolError as error:
    print(json.dumps({"error": error.message, "hint": error.hint, "said": said}))
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Hub:
    """What the stand-in serves and what it was asked; `cuts` ends the next GETs of a file after so many bytes."""

    commits: dict[str, dict[str, bytes]]
    head: str = FIRST
    refusal: tuple[int, str] | None = None
    listed: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    refuse_after_cut: bool = False
    down: bool = False
    address: str = ""

    def gets(self) -> list[tuple[str, str | None]]:
        return [(path, part) for method, path, part in self.asked if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    """The routes of the Hub that `dataset_info` and `hf_hub_download` use."""

    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.asked.append((self.command, path, self.headers.get("Range")))
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if hub.refusal:
            self.send(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
        elif path == api or path.startswith(f"{api}/revision/"):
            self.send_info(hub.head if path == api else path.rpartition("/")[2])
        elif path.startswith(files):
            commit, _, name = path.removeprefix(files).partition("/")
            self.send_file(commit, name)
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_info(self, commit: str) -> None:
        if commit not in self.hub.commits:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        rows: list[dict[str, Any]] = []
        for name, data in {**self.hub.commits[commit], **self.hub.listed}.items():
            lfs = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            rows.append({"rfilename": name, "size": len(data), **({"lfs": lfs} if name != "small.json" else {})})
        self.send(200, json.dumps({"id": REPO, "sha": commit, "siblings": rows}).encode(), {})

    def send_file(self, commit: str, name: str) -> None:
        if self.hub.down:
            return self.send(503, b"", {})
        data = self.hub.commits.get(commit, {}).get(name)
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.command == "GET" and self.hub.cuts else None
        self.send(206 if start else 200, data[start:], headers, cut)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None and self.hub.refuse_after_cut:
            self.hub.down = True


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub({FIRST: {"a.json": ENTRIES, "b.json": b"[2]", "small.json": b"[3]"}, SECOND: {"a.json": b"[4]"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Call:
    """Run one fetch (or, with source=, one load) in a process of its own, against the stand-in."""

    def run(offline: bool = False, **arguments: Any) -> dict[str, Any]:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "PETOOL_LITE_CACHE": str(tmp_path),
        }
        arguments = arguments if "source" in arguments else {"repo": REPO, **arguments}
        line = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=250, env={**os.environ, **settings})
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def files_in(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden drafts too."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_the_first_fetch_pins_the_commit_and_later_ones_keep_to_it(hub, call, tmp_path) -> None:
    folder, names = tmp_path / FOLDER, ["a.json", "small.json"]
    first = call(names=names)
    assert first["rows"] == [
        ["a.json", str(folder / "a.json"), sha256(ENTRIES), len(ENTRIES), FIRST],
        ["small.json", str(folder / "small.json"), sha256(b"[3]"), 3, FIRST],
    ]
    stamps = {row[0]: {"sha256": row[2], "bytes": row[3]} for row in first["rows"]}
    assert json.loads((folder / LOCK).read_text()) == {"repo": REPO, "revision": FIRST, "files": stamps}
    assert files_in(folder) == ["a.json", LOCK, "small.json"]

    hub.asked.clear()
    hub.head = SECOND  # the branch moves on
    assert call(names=names, offline=True)["rows"] == call(names=names)["rows"] == first["rows"]
    assert hub.asked == []

    (folder / "a.json").unlink()
    assert call(names=[*names, "b.json"])["rows"][2][2:] == [sha256(b"[2]"), 3, FIRST]
    assert (folder / "a.json").read_bytes() == ENTRIES
    assert [path for _, path, _ in hub.asked if REPO in path and FIRST not in path] == []

    hub.head = FIRST
    assert call(names=["a.json"], revision=SECOND)["rows"][0][2:] == [sha256(b"[4]"), 3, SECOND]
    lock = json.loads((folder / LOCK).read_text())
    assert (lock["revision"], list(lock["files"])) == (SECOND, ["a.json"])


def test_a_file_changed_on_disk_is_downloaded_again(hub, call, tmp_path) -> None:
    path = tmp_path / FOLDER / "a.json"
    call(names=["a.json"])
    path.write_bytes(b"[5]")
    refused = call(names=["a.json"], offline=True)
    assert "in place of the changed" in refused["error"]
    assert path.read_bytes() == b"[5]"
    again = call(names=["a.json"])
    assert again["rows"][0][2] == sha256(ENTRIES) == sha256(path.read_bytes())
    assert any("was changed" in stage and sha256(b"[5]") in stage for stage, *_ in again["said"])


def test_other_bytes_for_the_pinned_commit_are_refused(hub, call, tmp_path) -> None:
    folder = tmp_path / FOLDER
    call(names=["a.json"])
    (folder / "a.json").unlink()
    hub.commits[FIRST]["a.json"] = b"[6]"
    refused = call(names=["a.json"])
    assert all(text in refused["error"] for text in ("a.json", FIRST, sha256(ENTRIES), sha256(b"[6]")))
    assert LOCK in refused["hint"]
    assert files_in(folder) == [LOCK]


def test_other_bytes_than_the_hub_lists_are_refused_on_first_use(hub, call, tmp_path) -> None:
    hub.listed = {"a.json": b"[7]"}
    refused = call(names=["a.json"])
    assert sha256(b"[7]") in refused["error"]
    assert sha256(ENTRIES) in refused["error"]
    assert files_in(tmp_path / FOLDER) == []


def test_a_broken_download_leaves_nothing_and_the_next_call_completes(hub, call, tmp_path) -> None:
    hub.cuts, hub.refuse_after_cut = [len(ENTRIES) // 2], True
    broken = call(names=["a.json"])
    assert f"cannot download hub:{REPO}/a.json" in broken["error"]
    assert "503" in broken["error"]
    assert "network" in broken["hint"]
    assert files_in(tmp_path / FOLDER) == []
    hub.down = False
    assert call(names=["a.json"])["rows"][0][2] == sha256(ENTRIES)


def test_a_dropped_connection_is_resumed_where_it_stopped(hub, call) -> None:
    data = bytes(12 << 20)  # the client writes, and so resumes, in steps of 10 MiB
    hub.commits[FIRST]["a.json"], hub.cuts = data, [11 << 20]
    assert call(names=["a.json"])["rows"][0][2] == sha256(data)
    assert [part for _, part in hub.gets()] == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize(
    ("refusal", "said", "hint"),
    [
        ((401, "RepoNotFound"), "no such data set", "hf auth login"),
        ((403, "GatedRepo"), "gated", "accept the terms"),
        ((404, "RevisionNotFound"), "no such commit", "revision"),
    ],
)
def test_a_refusal_is_one_clear_line(hub, call, tmp_path, refusal, said, hint) -> None:
    hub.refusal = refusal
    answer = call(names=["a.json"], revision=FIRST)
    assert said in answer["error"]
    assert "\n" not in answer["error"]
    assert hint in answer["hint"]
    assert files_in(tmp_path / FOLDER) == []


def test_a_name_that_is_not_there_is_told_before_any_download(hub, call) -> None:
    answer = call(names=["a.json", "c.json"])
    assert "c.json: no such file" in answer["error"]
    assert "a.json, b.json, small.json" in answer["hint"]
    assert hub.gets() == []


def test_a_data_source_on_the_hub_uses_the_same_lock(call, tmp_path) -> None:
    source = f"hub:{REPO}/a.json"
    assert call(source=source)["rows"] == 3
    assert json.loads((tmp_path / FOLDER / LOCK).read_text())["revision"] == FIRST
    assert call(source=source, offline=True)["rows"] == 3


def test_offline_is_said_and_nothing_is_made(tmp_path) -> None:
    with pytest.raises(PetoolError, match=r"cannot download hub:someone/entries/a.json: .*offline") as error:
        fetch(REPO, ["a.json"], folder=tmp_path / "new")
    assert "HF_HUB_OFFLINE" in error.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("repo", "names", "revision", "said"),
    [
        ("entries", ["a.json"], None, "not the name of a Hub data set"),
        ("one--two/entries", ["a.json"], None, "not the name of a Hub data set"),
        (REPO, [], None, "no file"),
        (REPO, ["../a.json"], None, "not the name of a data file"),
        (REPO, ["/a.json"], None, "not the name of a data file"),
        (REPO, [LOCK], None, "not the name of a data file"),
        (REPO, ["a.json"], "main", "not a commit"),
    ],
)
def test_a_request_that_makes_no_sense_is_wrong_usage(tmp_path, repo, names, revision, said) -> None:
    with pytest.raises(PetoolError, match=said) as error:
        fetch(repo, names, revision, tmp_path)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("text", "said"), [("{", "cannot read"), ("[]", "cannot read"), ("other", "is of other/one")])
def test_a_lock_that_does_not_fit_is_refused(tmp_path, text, said) -> None:
    other = json.dumps({"repo": "other/one", "revision": FIRST, "files": {}})
    (tmp_path / LOCK).write_text(other if text == "other" else text)
    with pytest.raises(PetoolError, match=said):
        fetch(REPO, ["a.json"], folder=tmp_path)


def test_the_six_published_files_are_the_default() -> None:
    assert len(set(FILES)) == 6
    assert {"user_entries_sft_r.json", "user_entries_test_c.json"} < set(FILES)
