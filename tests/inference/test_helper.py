"""A call that a running server helps with is the call that this process would make, and nobody else is heard."""

import json
import re
import socket
import stat

import pytest
from support_serve import SCHEMA, Server

from petool_lite.inference.helper import _place
from petool_lite.models import embedded_gguf

TOOLS = [{"name": name, "description": name, "parameters": SCHEMA} for name in ("sky.now", "map.find", "bus.next")]
MODEL = ("--model", str(embedded_gguf()), "--context", "2048")


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    """Where a helper listens."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
    return _place(embedded_gguf(), 2048)


@pytest.fixture
def ask(command, tmp_path):
    """`petool-lite call` of a query; its document."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))

    def run(query: str) -> dict:
        result = command("call", *MODEL, "--tools", "tools.json", "--json", "--explain", query, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout) | {"told": re.sub(r"\d", "", result.stderr)}

    return run


def test_the_reply_is_the_same_with_and_without_a_helper(place, ask) -> None:
    queries = ("How is the weather in Oslo?", "Where is Lima, and its harbour?")
    alone = [ask(query) for query in queries]
    with Server() as server:
        assert [stat.S_IMODE(path.stat().st_mode) for path in (place, place.parent)] == [0o600, 0o700]
        helped = [ask(query) for query in queries]
        assert [one["timings"]["reused_tokens"] > 0 for one in helped] == [False, True], "one process answers both"
        assert server.post({}, path="/helper")[0] == 404, "over a port nobody is helped"
        assert server.end() == 0
    assert not place.exists()
    for one, other in zip(alone, helped, strict=True):
        assert [one[key] for key in ("status", "call", "told")] == [other[key] for key in ("status", "call", "told")]
        assert one["confidence"] == pytest.approx(other["confidence"], rel=0.02)


def test_a_dead_socket_and_an_open_folder_leave_the_call_to_this_process(place, ask) -> None:
    with socket.socket(socket.AF_UNIX) as left:  # of a server that was killed
        left.bind(str(place))
    assert ask("Weather in Oslo?")["status"] == "call"
    place.parent.chmod(0o777)
    assert _place(embedded_gguf(), 2048) is None
