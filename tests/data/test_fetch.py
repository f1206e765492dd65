"""Fetching from a stand-in Hub on 127.0.0.1: pinned, fetched once, and refused in words."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants
from support_bench import answering
from support_published import published_rows

from petool_lite.data.files import fetch, load_dataset
from petool_lite.errors import PetoolError

REPO = "someone/entries"
FIRST, SECOND = "1" * 40, "2" * 40
ENTRIES = json.dumps(published_rows("test", 3)).encode()


@dataclass
class Hub:
    """What the stand-in serves and what it was asked."""

    commits: dict[str, dict[str, bytes]]
    head: str = FIRST
    refusal: tuple[int, str] | None = None
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
        return 200, about | {"Content-Length": str(len(data))}, data


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub({FIRST: {"a.json": ENTRIES, "b.json": b"[2]", "small.json": b"[3]"}, SECOND: {"a.json": b"[4]"}})
    with answering(hub.answer) as hub.address:
        yield hub


@pytest.fixture
def call(hub: Hub, tmp_path: Path, monkeypatch) -> Callable[..., Any]:
    """One fetch against the stand-in: name, content and commit of each file."""
    address = "/{repo_id}/resolve/{revision}/{filename}"
    own = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.address}{address}"}
    own |= {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_IMPLICIT_TOKEN": True}
    for name, value in own.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the client keeps one, made with other surroundings

    def run(names: list[str], revision: str | None = None, offline: bool = False) -> list[tuple[str, str, str]]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        return [(file.name, file.path.read_text(), file.revision) for file in fetch(REPO, names, revision)]

    return run


def test_the_newest_commit_is_fetched_once_and_a_revision_is_kept_to(hub, call) -> None:
    names = ["a.json", "small.json"]
    first = call(names)
    assert first == [("a.json", ENTRIES.decode(), FIRST), ("small.json", "[3]", FIRST)]
    hub.asked.clear()
    assert call(names, offline=True) == first
    assert hub.asked == []
    assert call(names) == first
    assert not [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]
    assert call(["a.json"], SECOND) == [("a.json", "[4]", SECOND)]
    hub.head = SECOND  # the branch moves on
    assert call(["a.json"]) == [("a.json", "[4]", SECOND)]
    assert call(["a.json"], FIRST) == [("a.json", ENTRIES.decode(), FIRST)]


def test_a_refusal_is_one_clear_line(hub, call) -> None:
    for refusal, said, hint in (
        ((401, "RepoNotFound"), "no such data set", "hf auth login"),
        ((403, "GatedRepo"), "gated", "accept the terms"),
        ((404, "RevisionNotFound"), "no such commit", "revision"),
        ((418, "Broken"), "cannot download hub:", "network"),
    ):
        hub.refusal = refusal
        with pytest.raises(PetoolError) as error:
            call(["a.json"], FIRST)
        assert said in error.value.message.splitlines()[-1]
        assert hint in error.value.hint


def test_a_source_on_the_hub_needs_no_file_name_where_there_is_one_file(hub, call, monkeypatch) -> None:
    call(["a.json"])
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert len(load_dataset(f"hub:{REPO}/a.json").entries) == 3
    with pytest.raises(PetoolError, match="no such file"):
        load_dataset(f"hub:{REPO}/c.json")
    with pytest.raises(PetoolError, match="does not say which file") as error:
        load_dataset(f"hub:{REPO}")
    assert "a.json, b.json, small.json" in error.value.hint
    hub.commits[FIRST] = {"a.json": ENTRIES, "README.md": b"x"}
    assert len(load_dataset(f"hub:{REPO}").entries) == 3


def test_offline_is_said_and_a_request_that_makes_no_sense_is_refused() -> None:
    offline = "cannot download hub:someone/entries/a.json: the Hub client is in offline mode"
    for repo, names, said in (
        (REPO, ["a.json"], offline), ("one--two/x", ["a"], "repo_id"), (REPO, [], "no file"), (REPO, ["../a"], "name"),
    ):  # fmt: skip
        with pytest.raises(PetoolError, match=said):
            fetch(repo, names)
