"""Chat completions of whatever speaks OpenAI's API: GPT-4o, vLLM, Ollama, llama-server, our own server. The key comes
from the environment and goes into one header: no file, message or URL holds it. A failure that may pass is tried again,
later each time, or when the server says; one that cannot pass ends with one line."""

import email.utils
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from petool_lite.errors import USAGE, PetoolError

KEY, OPENAI_KEY = "PETOOL_LITE_ENDPOINT_KEY", "OPENAI_API_KEY"
_TRIES, _PATIENCE, _TIMEOUT = 6, 120.0, 300.0  # of one request; the longest wait between two, and for an answer, in s
_PASSING = (408, 409, 425, 429)  # and all from 500 on
_TOO_LONG = re.compile(r"context.{0,30}(length|size|window)|exceeds? the .{0,20}context|prompt.{0,20}too long", re.I)
# What a server may not know, by what its refusal names: it is then asked without, for good.
_WITHOUT = {
    "chat_template_kwargs": re.compile(r"chat_template_kwargs", re.I),
    "max_tokens": re.compile(r"max_completion_tokens|max_tokens", re.I),
    "temperature": re.compile(r"temperature", re.I),
    "a system message": re.compile(r"system|alternate", re.I),
    "free names": re.compile(r"pattern|name|provider", re.I),
}
_OF_FUNCTIONS = ("description", "parameters", "arguments")  # beside the name, in OpenAI's form
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class TooLong(PetoolError):
    """The prompt exceeds the model's context."""


class Gone(PetoolError):
    """No further request can go well."""


class _Passing(Exception):
    """A failure that may pass: what it is, and for how many seconds the server asks to wait."""


class _Refused(Exception):
    """The server does not take this request as it is: what it said in short, and all of it."""


@dataclass(frozen=True)
class Answer:
    """An answer: text, calls as (name, arguments as written), "stop" or "length", and counts of tokens, 0 if untold."""

    text: str
    calls: tuple[tuple[str, str], ...]
    finish: str
    prompt_tokens: int
    reply_tokens: int
    cached_tokens: int


class Endpoint:
    """One model of one server; any number of threads may ask it."""

    def __init__(self, url: str, model: str, most: int) -> None:
        """`url` ends before /chat/completions; at most `most` requests are made, tries included. Raises PetoolError."""
        self.url, self.model, self.made, self._most = base_url(url), model, 0, most
        theirs = self.url.startswith("https://api.openai.com/")
        self._key = (os.environ.get(KEY) or (os.environ.get(OPENAI_KEY) if theirs else "") or "").strip()
        self.without: list[str] = []  # what requests are made without, since the server did not take it
        self._there = False  # whether it has ever answered
        self._lock = threading.Lock()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A redirection, which could take the key to another host, is not followed.
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT, limits=httpx.Limits(max_keepalive_connections=0))

    def ask(self, messages: Sequence[Any], tools: Sequence[Any], limit: int) -> Answer:
        """The answer to OpenAI messages and tools, of at most `limit` tokens, chosen greedily. Raises TooLong, Gone
        where it is useless to ask for anything else, and PetoolError where this request failed."""
        failed = 0
        while True:
            without = self.without
            names = plain_names(tools, messages) if "free names" in without else {}
            try:
                return _answer(self._post(self._body(messages, tools, limit, without, names)), names)
            except _Passing as error:
                what, wait = error.args
                failed += 1
                if failed == _TRIES or wait > _PATIENCE:
                    later = f"; it asks to wait {wait:,.0f} s" if wait > _PATIENCE else ""
                    raise PetoolError(f"{self.url}: {what}{later}", "try again later") from None
                time.sleep(max(wait, min(2.0 ** (failed - 1), _PATIENCE)))
            except _Refused as refused:
                short, text = refused.args
                self._give_way(short, text, without, bool(tools))

    def _body(
        self, messages: Sequence[Any], tools: Sequence[Any], limit: int, without: list[str], names: Mapping[str, str]
    ) -> dict[str, Any]:
        """The request, without what the server did not take."""
        messages = one_turn(messages) if "a system message" in without else list(messages)
        if names:
            calls = [_renamed(message.get("tool_calls", ()), names) for message in messages]
            messages = [one | ({"tool_calls": made} if made else {}) for one, made in zip(messages, calls, strict=True)]
            tools = _renamed(tools, names)
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": limit, "temperature": 0}
        body |= {"chat_template_kwargs": {"enable_thinking": False}} | ({"tools": list(tools)} if tools else {})
        body |= {"max_completion_tokens": limit} if "max_tokens" in without else {}
        return {key: value for key, value in body.items() if key not in without}

    def _give_way(self, short: str, text: str, without: list[str], tools: bool) -> None:
        """Leave out from now on what a refusal's `text` names; raises where there is nothing left to leave out."""
        if _TOO_LONG.search(text):
            raise TooLong(f"{self.url}: {short}")
        with self._lock:
            if self.without != without:  # another thread has learned something meanwhile
                return
            for name, words in _WITHOUT.items():
                if name not in without and words.search(text) and (tools or name != "free names"):
                    self.without = sorted([*without, name])
                    return
        raise PetoolError(f"{self.url}: {short}", "it does not take this request; another --style may help")

    def _post(self, body: Mapping[str, Any]) -> Any:
        with self._lock:
            if self.made >= self._most:
                hint = "the same command goes on from here; --max-requests allows more"
                raise Gone(f"stopped after {self.made:,} requests to {self.url}", hint)
            self.made += 1
        try:
            answer = self._client.post(f"{self.url}/chat/completions", json=body)
        except httpx.HTTPError as error:
            if not self._there and isinstance(error, httpx.ConnectError):
                raise Gone(f"{self.url}: nobody is there ({error})", "start the server, or mend the address") from None
            raise _Passing(f"no answer ({str(error)[:100] or type(error).__name__})", 0.0) from None
        self._there = True
        if not answer.is_success:
            raise self._failure(answer.status_code, answer.headers, answer.text)
        try:
            return answer.json()
        except (ValueError, RecursionError):
            if answer.content.lstrip()[:1] == b"<":
                raise Gone(f"{self.url} answers with a web page", "give the address that ends in /v1") from None
            raise _Passing(f"an answer that is cut off or no JSON, {len(answer.content):,} bytes", 0.0) from None

    def _failure(self, status: int, headers: Mapping[str, str], text: str) -> Exception:
        """What an error status means, without the key, which some servers repeat."""
        text = text.replace(self._key, "...") if self._key else text
        page = text.lstrip()[:1] == "<"
        what = f"status {status}" + (" and a web page" if page else f": {_said(text)}" if text.strip() else "")
        if status in (400, 413, 422) or (status == 500 and not page and _WITHOUT["a system message"].search(text)):
            return _Refused(what, text)
        if status in (401, 403):
            return Gone(f"{self.url}: {what}", f"put the key into {KEY}, or for api.openai.com into {OPENAI_KEY}")
        if "insufficient_quota" in text or (status < 500 and status not in _PASSING):
            return Gone(f"{self.url}: {what}", "see the address, the model's name and the account")
        return _Passing(what, _asked_wait(headers.get("Retry-After") or ""))


def base_url(url: str) -> str:
    """The address up to /v1; raises PetoolError for one that is no http(s) address, or holds a user or a query."""
    try:
        parts = urlsplit(url.strip())
        known, _ = bool(parts.scheme in ("http", "https") and parts.hostname), parts.port
    except ValueError:
        known = False
    if not known:
        raise PetoolError(f"not an address: {url[:100]}", "give one such as http://127.0.0.1:8000/v1", USAGE)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PetoolError("the address holds more than host and path", f"put a key into {KEY}", USAGE)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def one_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with those of the system folded into the user's first turn."""
    system = [str(message["content"]) for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if first := next((message for message in rest if message["role"] == "user"), None):
        first["content"] = "\n\n".join([*system, str(first["content"])])
    return rest


def plain_names(tools: Iterable[Mapping[str, Any]], messages: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The name of each tool and each called one -> one of up to 64 letters, digits, _ and -: some take no others."""
    found: dict[str, str] = {}
    for item in (*tools, *(call for message in messages for call in message.get("tool_calls", ()))):
        name, number = str(item["function"]["name"]), 1
        plain = made = re.sub(r"[^a-zA-Z0-9_-]+", "_", name)[:64]
        while name not in found and made in found.values():
            number += 1
            made = f"{plain[:60]}_{number}"
        found.setdefault(name, made)
    return found


def _renamed(items: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tools or calls under their plain names, without what OpenAI's form does not have."""
    found = []
    for item in items:
        kept = {key: value for key, value in item["function"].items() if key in _OF_FUNCTIONS}
        found.append({**item, "function": {"name": names[str(item["function"]["name"])], **kept}})
    return found


def _said(text: str) -> str:
    """What an error says, on one short line."""
    found: Any = text
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), str(found))
    return " ".join(str(found).split())[:200]


def _asked_wait(told: str) -> float:
    """Seconds of a Retry-After header, which may be a date; 0 without one."""
    with suppress(ValueError, TypeError, IndexError, OverflowError):
        plain = told.strip().replace(".", "", 1).isdecimal()
        return float(told) if plain else max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return 0.0


def _answer(found: Any, names: Mapping[str, str]) -> Answer:
    """The first choice of a chat completion; raises _Passing for a document that has none."""
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        message, given = choice["message"], {plain: name for name, plain in names.items()}
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        for item in functions:
            if not isinstance(item["arguments"], str):
                item["arguments"] = json.dumps(item["arguments"], ensure_ascii=False)
        calls = tuple((given.get(item["name"], item["name"]), item["arguments"]) for item in functions)
        text = _THOUGHT.sub("", str(message.get("content") or ""), count=1)
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(text, calls, finish, *(int(count or 0) for count in (*counts, cached)))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _Passing(f"an answer without a choice: {_said(json.dumps(found))}", 0.0) from error
