"""The server's addresses: who may come in, how much may be sent, and which answer goes out."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from petool_lite.console import say
from petool_lite.data.entries import nested_beyond
from petool_lite.data.mcp import Servers
from petool_lite.errors import PetoolError, first_line
from petool_lite.inference.call import Request as EngineRequest
from petool_lite.inference.helper import ROUTE, asked_request
from petool_lite.inference.worker import Event
from petool_lite.memory.store import VERDICTS, Store, Unwritable
from petool_lite.serve.queue import RequestQueue
from petool_lite.serve.requests import Asked, Refusal, read_chat, read_responses
from petool_lite.serve.respond import Chat, Responses, respond

_BODY_S = 60  # seconds in which a request's body arrives
_CALL = 1 << 28  # bytes of what a `petool-lite call` of this user asks, which may be a file
_PRIVATE = "what is remembered of users is told with the server's key only: in the address that serve printed, after #"
_SHOWN = 20  # calls of a user on the page
_DEEPEST = 64  # levels of nesting in a request
_FRESH_S = 30.0  # after which MCP servers are asked again, when a request wants their tools
_FORMS: dict[str, Any] = {"/v1/chat/completions": (read_chat, Chat), "/v1/responses": (read_responses, Responses)}


class OfferedTools:
    """The tools of MCP servers as they were a moment ago: a server that changes or dies keeps no request waiting."""

    def __init__(self, given: Sequence[str], fresh_s: float = _FRESH_S) -> None:
        """Ask the servers. Raises PetoolError where one does not answer: better now than amid requests."""
        self._servers, self._fresh_s, self._said = Servers(given), fresh_s, ""
        self._listed, self._asked = self._servers.tools(), time.monotonic()
        self._asking = threading.Lock()  # by one thread at a time

    def current(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form; where they are not fresh, a thread asks for those of the next request."""
        if time.monotonic() - self._asked > self._fresh_s and self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask, daemon=True).start()
        return self._listed

    def _ask(self) -> None:
        try:
            self._listed, self._said = self._servers.tools(), ""
        except (PetoolError, OSError) as error:  # the latter where no file can be made for what a server says
            if (told := first_line(error)) != self._said:
                say(f"note: {told}; its tools of before are still offered")
            self._said = told
        finally:
            self._asked = time.monotonic()
            self._asking.release()


def application(queue: RequestQueue, store: Store | None = None, offered: OfferedTools | None = None) -> Starlette:
    """The application over `queue`. Without `store` no calls are kept; `offered` are for requests without tools."""
    own, settings = _Routes(queue, store, offered), queue.settings
    # Without a key, a web page in the user's browser must not get in under another name for this machine.
    hosts = ["*"] if settings.api_key else ["localhost", "127.0.0.1", "[::1]", "::1", settings.host]
    return Starlette(
        routes=[
            *(Route(path, own.answer, methods=["POST"]) for path in _FORMS),
            Route("/v1/feedback", own.feedback, methods=["POST"]),
            Route(ROUTE, own.help_call, methods=["POST"]),
            Route("/v1/models", own.models),
            Route("/v1/tools", own.tools),
            Route("/v1/history", own.history),
            Route("/", own.page),
            Route("/health", own.health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={Refusal: _refuse},
    )


async def _refuse(request: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.body, error.status, {"Retry-After": "5"} if error.status == 429 else None)


class _Routes:
    """What each address answers."""

    def __init__(self, queue: RequestQueue, store: Store | None, offered: OfferedTools | None) -> None:
        self._queue, self._store, self._offered = queue, store, offered
        self._settings, self._name = queue.settings, queue.settings.model.stem

    async def models(self, request: Request) -> JSONResponse:
        _authorize(request, self._settings.api_key)
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "petool-lite"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> JSONResponse:
        status = "ok" if self._queue.engine.alive else "engine restarts with the next request"
        return JSONResponse({"status": status, "requests": self._queue.present})

    async def page(self, request: Request) -> HTMLResponse:
        text, policy = _page()
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def tools(self, request: Request) -> JSONResponse:
        _authorize(request, self._settings.api_key)
        return JSONResponse({"object": "list", "data": self._offered.current() if self._offered else []})

    async def history(self, request: Request) -> JSONResponse:
        _authorize(request, self._settings.reading_key, _PRIVATE)
        user, store = request.query_params.get("user", ""), self._store
        found = await asyncio.to_thread(store.records, user, _SHOWN) if store else []  # the newest last
        tools = json.loads(found[-1].tools) if found else []
        return JSONResponse({"object": "list", "data": [item.facts() for item in found], "tools": tools})

    async def feedback(self, request: Request) -> JSONResponse:
        """Give the call of a reply's id its verdict; with a `user` only where it is this user's."""
        _authorize(request, self._settings.api_key)
        body = await _body(request, self._settings.max_mb * 2**20)
        identity, verdict, user = (body.get(name) for name in ("id", "verdict", "user"))
        if not isinstance(identity, str):
            raise Refusal(400, "id: expected the id of a reply", "id")
        if verdict not in VERDICTS:
            raise Refusal(400, f"verdict: expected {' or '.join(VERDICTS)}", "verdict")
        if self._store is None:
            raise Refusal(404, "this server keeps no calls", "id", "not_found_error")
        try:
            await asyncio.to_thread(self._store.find, identity, None if user is None else str(user), verdict)
        except Unwritable as error:
            raise Refusal(503, error.message, kind="server_error") from error
        except PetoolError as error:
            raise Refusal(404, error.message, "id", "not_found_error") from error
        return JSONResponse({"object": "feedback", "id": identity, "verdict": verdict})

    async def answer(self, request: Request) -> Any:
        _authorize(request, self._settings.api_key)
        read, form = _FORMS[request.url.path]
        body = await _body(request, self._settings.max_mb * 2**20)
        if self._offered and not body.get("tools"):
            body["tools"] = self._offered.current()
        asked: Asked = read(body)
        if self._store is None:
            asked = replace(asked, remembers=False)
        elif asked.remembers and asked.request.options.explain:  # it tells earlier calls
            _authorize(request, self._settings.reading_key, _PRIVATE)
        made: Chat | Responses = form(asked, self._name)
        own = {"decoding": self._settings.decoding, "trim_history": self._settings.trim_history}
        options = replace(asked.request.options, **own)
        kept = made.identity if asked.remembers else None
        return await respond(self._events(request, replace(asked.request, options=options, kept=kept)), made)

    async def help_call(self, request: Request) -> JSONResponse:
        if (request.scope["server"] or ("", 0))[1] is not None:  # a port, and no socket of this user alone
            raise Refusal(404, "not found", kind="not_found_error")
        asked = asked_request(await _body(request, _CALL))
        kind, facts = [event async for event in self._events(request, asked)][-1]
        return JSONResponse(facts, 200 if kind == "done" else 500)

    def _events(self, request: Request, asked: EngineRequest) -> AsyncIterator[Event]:
        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return self._queue.events(asked, left)


@lru_cache(maxsize=1)
def _page() -> tuple[str, str]:
    """The page to try the model on, and a content policy that lets in its own script and style and nothing else."""
    text = resources.files("petool_lite.serve").joinpath("page.html").read_text(encoding="utf-8")
    parts = [re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")]
    script, style = (base64.b64encode(hashlib.sha256(part[1].encode()).digest()).decode() for part in parts if part)
    own = f"script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'"
    return text, f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _authorize(request: Any, key: str | None, what: str = "wrong or missing API key") -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, what, kind="authentication_error")


async def _body(request: Any, limit: int) -> dict[str, Any]:
    # JSON only: a browser asks before it sends that type across sites, and is not answered.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal(415, "expected Content-Type: application/json")
    try:
        async with asyncio.timeout(_BODY_S):
            raw = bytearray()
            async for part in request.stream():
                raw += part
                if len(raw) > limit:
                    raise Refusal(413, f"the request exceeds {limit:,} bytes")
    except TimeoutError:
        raise Refusal(408, f"the request did not arrive within {_BODY_S} s") from None
    try:
        body = json.loads(raw.decode("utf-8"))
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is no text that can be passed on
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the request is not a JSON object")
    if nested_beyond(body, _DEEPEST):
        raise Refusal(400, f"the request is nested more than {_DEEPEST} levels deep")
    return body
