"""The page at /: tried in a headless Chromium with a real model, and who may read what it shows."""

import json
import re

import httpx
import pytest
from support_memory import made
from support_serve import ASK, SCHEMA, SLOW, TOOLS, Server

from petool_lite.memory.store import Store

HOSTILE = "<img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        store = Store()
        running = Server()
    with running:
        running.store, running.key = store, running.page.partition("#")[2]
        yield running


def finished(page) -> None:
    page.locator("#seen:not([hidden])").wait_for()
    page.locator("#go:not([disabled])").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (375, "light")])
def test_a_call_is_made_explained_and_rated_by_keyboard_alone(opened, server, width, scheme) -> None:
    page, user = opened(server.page, width, scheme), f"ann{width}{scheme}"
    page.focus("#user")
    page.keyboard.type(user)
    page.locator("#must").check()
    page.keyboard.press("Control+Enter")
    finished(page)
    bars = page.locator("#bars .one")
    assert sorted(bars.locator("b").all_inner_texts()) == ["kestrel.quotes", "nectar.find_quotes"]
    shares = [float(text.split()[0]) for text in bars.locator(".share").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.2
    assert "Who plays jazz tonight?" in page.inner_text("#bars .disliked")
    assert (name := page.inner_text("#title")) in ("kestrel.quotes", "nectar.find_quotes")
    assert json.loads(page.inner_text("#answer")).keys() == {"topic"}
    assert "Find quotes on comets." in "".join(page.locator("#prompt span").all_text_contents())
    assert page.locator("#times dt").count() == 10
    page.keyboard.press("Alt+d")
    page.locator("#dislike[aria-pressed=true]").wait_for()
    assert [(kept.called, kept.verdict) for kept in server.store.records(user)] == [(name, "disliked")]
    page.fill("#query", "Find quotes on rain.")
    page.keyboard.press("Control+Enter")
    page.locator("#prompt span.cached").first.wait_for()
    finished(page)
    assert f"{name}: Find quotes on comets." in page.locator("#bars .disliked").all_inner_texts()
    page.locator("#recall").click()
    page.locator("#calls .disliked").wait_for()
    page.keyboard.press("Alt+l")
    page.locator("#calls .liked").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing is cut at the side"
    answer, tools = (page.locator(name).bounding_box()["y"] for name in ("#title", "#tools"))
    assert width > 760 or answer < tools, "on a phone the answer comes first"
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)") == (scheme == "dark")


def test_what_others_wrote_is_text_and_what_is_wrong_is_said(opened, server) -> None:
    page = opened(server.page)
    tool = {"function": {"name": HOSTILE, "description": HOSTILE, "parameters": SCHEMA}}
    page.fill("#tools", json.dumps([tool]))
    page.fill("#history", json.dumps([{"instruction": HOSTILE, "rating": 1, "tool_call": {
        "tool_name": HOSTILE, "parameters": {}}}]))  # fmt: skip
    page.fill("#query", HOSTILE)
    page.locator("#must").check()
    page.click("#go")
    finished(page)
    assert page.inner_text("#title") == HOSTILE
    assert (page.evaluate("window.pwned"), page.locator("img").count()) == (None, 0)
    assert page.is_disabled("#like"), "nobody's call cannot be rated"
    wrong = ("#tools", "[{", "tools is not JSON"), ("#tools", "[]", "at least one"), ("#history", "{}", "history")
    for field, text, said in wrong:
        page.fill(field, text)
        page.keyboard.press("Control+Enter")
        page.locator("#answer.wrong", has_text=said).wait_for()
        page.fill("#tools", json.dumps([tool]))
    page.fill("#tools", json.dumps(SLOW["tools"][:1]))
    page.fill("#history", "")
    page.keyboard.press("Control+Enter")
    page.locator("#answer", has_text=re.compile(".{5}")).wait_for()
    assert page.is_enabled("#stop"), "it streams"
    page.keyboard.press("Escape")
    page.locator("#answer.wrong", has_text="stopped").wait_for()
    page.route("**/v1/**", lambda route: route.abort())  # as where the server has ended
    page.keyboard.press("Control+Enter")
    page.locator("#answer.wrong", has_text="does petool-lite serve still run?").wait_for()


def test_nobody_reads_what_is_remembered_without_the_servers_key(server) -> None:
    server.store.add([made(1, "eve", query="A secret.", verdict="liked")])
    explained = {"messages": ASK, "tools": TOOLS, "user": "eve", "explain": True, "max_tokens": 20}
    for key in ("", "wrong"):
        for code, body in (server.get("/v1/history?user=eve", key), server.post(explained, key=key)):
            said = body["error"]["message"]
            assert (code, "with the server's key only" in said, "secret" in json.dumps(body)) == (401, True, False)
    code, body = server.get("/v1/history?user=eve", server.key)
    assert (code, [item["query"] for item in body["data"]]) == (200, ["A secret."])
    assert server.post(explained, key=server.key)[0] == 200
    assert server.post(explained | {"store": False})[0] == 200, "what the request itself brings is no secret"
    page = httpx.get(server.page.partition("#")[0])
    assert re.match("default-src 'none'; script-src 'sha256-(?!.*unsafe)", page.headers["content-security-policy"])
    assert not re.search(r"<[^>]*\s(?:src|href)\s*=", page.text)
    assert server.get("/", Host="evil.example")[0] == 400
