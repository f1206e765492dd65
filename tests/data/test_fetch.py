"""Fetching from a stand-in Hub on 127.0.0.1: pinned, fetched once, and refused in words."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support_bench import answering
from support_published import published_rows

from petool_lite.data.fetch import fetch
from petool_lite.errors import PetoolError

REPO = "someone/entries"
FIRST, SECOND = "1" * 40, "2" * 40
ENTRIES = json.dumps(published_rows("test", 3)).encode()

# The Hub's address is read when its client is imported, so every test has a process of its own: a call a line.
PROGRAM = """
import json, sys
from huggingface_hub import constants
from petool_lite.data.fetch import fetch
from petool_lite.data.files import load_dataset
from petool_lite.errors import PetoolError
for line in sys.stdin:
    call = json.loads(line)
    constants.HF_HUB_OFFLINE = call.pop("offline")
    try:
        if "source" in call:
            rows = len(load_dataset(call["source"]).entries)
        else:
            rows = [[file.name, file.path.read_text(), file.revision] for file in fetch(**call)]
        print(json.dumps({"rows": rows}), flush=True)
    except PetoolError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}), flush=True)
"""


@dataclass
class Hub:
    """What the stand-in serves and what it was asked; with `cut` a file ends after so many bytes."""

    commits: dict[str, dict[str, bytes]]
    head: str = FIRST
    refusal: tuple[int, str] | None = None
    cut: int | None = None
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, request: str, *_: Any) -> tuple[int, dict[str, str], bytes]:
        """As `dataset_info` and `hf_hub_download` are answered."""
        path = request.partition(" ")[2].partition("?")[0]
        self.asked.append(request)
        commit, _, name = path.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")
        commit = self.head if commit == "main" else commit
        data = self.commits.get(commit, {}).get(name)
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b""
        if path == f"/api/datasets/{REPO}":
            rows = [{"rfilename": name} for name in self.commits[self.head]]
            return 200, {}, json.dumps({"id": REPO, "sha": self.head, "siblings": rows}).encode()
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        return 200, about | {"Content-Length": str(len(data))}, data[: self.cut]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub({FIRST: {"a.json": ENTRIES, "b.json": b"[2]", "small.json": b"[3]"}, SECOND: {"a.json": b"[4]"}})
    with answering(hub.answer) as hub.address:
        yield hub


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """One fetch (or, with source=, one load) against the stand-in."""
    own = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    line, pipe = [sys.executable, "-c", PROGRAM], subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=os.environ | own) as process:

        def run(offline: bool = False, **arguments: Any) -> dict[str, Any]:
            asked = ({} if "source" in arguments else {"repo": REPO}) | arguments | {"offline": offline}
            print(json.dumps(asked), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.kill()


def test_the_newest_commit_is_fetched_once_and_a_revision_is_kept_to(hub, call) -> None:
    names = ["a.json", "small.json"]
    first = call(names=names)
    assert first["rows"] == [["a.json", ENTRIES.decode(), FIRST], ["small.json", "[3]", FIRST]]
    hub.asked.clear()
    assert call(names=names, offline=True) == first
    assert hub.asked == []
    assert call(names=names) == first
    assert not [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]
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
