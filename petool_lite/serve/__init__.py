"""`serve`: an OpenAI-compatible server for tool calls, on this machine's loopback unless told otherwise.

POST /v1/chat/completions takes OpenAI's fields `messages` (the last user message is the query), `tools`, `tool_choice`,
`stream`, `user` and `max_completion_tokens`, and one of petool-lite's own: `history`, the user's earlier calls in the
published shape. Decoding is greedy, so sampling fields change nothing. GET /v1/models and /health answer, too.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petool_lite.console import say
from petool_lite.data.entries import nested_beyond
from petool_lite.errors import FAILED, USAGE, PetoolError
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.tool_caller import REPLY_TOKENS
from petool_lite.inference.worker import Engine, EngineOptions, Event

_HEAD_S, _BODY_S = 10, 60  # seconds in which the head of a connection's first request, and a request's body, arrive
_CONNECTIONS = 512  # at once; more are answered 503
_DEEPEST = 64  # levels of nesting in a request


@dataclass(frozen=True)
class ServeSettings:
    """What is served, where and within which limits; `queue` counts the requests that wait for the one that runs."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    queue: int = 8
    timeout_s: float = 300.0
    max_bytes: int = 4 * 2**20
    n_ctx: int = 0
    decoding: str = "constrained"
    trim_history: bool = False


class _Refusal(Exception):
    """A request that gets an error status; in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": None}}


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises PetoolError for what cannot be served, or not without an API key."""
    import uvicorn

    check_gguf(settings.model)
    if not is_loopback(settings.host) and not settings.api_key:
        raise PetoolError(
            f"{settings.host} can be reached by others, and no API key is set",
            "set PETOOL_LITE_API_KEY, or serve on 127.0.0.1",
            USAGE,
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise PetoolError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", "choose another --port", FAILED
        ) from error
    with listener:
        desk = Desk(settings)
        desk.engine.start()
        try:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            say(f"serving {settings.model.name} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends)")
            config = uvicorn.Config(
                application(desk),
                http=_patient_protocol(),
                log_level="warning",
                timeout_graceful_shutdown=3,
                limit_concurrency=_CONNECTIONS,
            )
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            say("stopped")
        finally:
            desk.engine.stop()


def _patient_protocol() -> Any:
    """uvicorn's HTTP, but a connection that sends no whole request head in time is closed."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(_HEAD_S, lambda: transport.close() if self.scope is None else None)

    return Protocol


class Desk:
    """Takes requests in their order to the one engine, and turns those away that find the queue full."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.engine = Engine(EngineOptions(settings.model, settings.n_ctx, settings.decoding, settings.trim_history))
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()  # held here, or they might be collected while they run
        self.present = 0  # requests that run or wait

    async def events(self, request: dict[str, Any]) -> AsyncIterator[Event]:
        """Events of one request, see `Engine.ask`. Raises _Refusal where the queue is full or the wait too long.

        A client that reads slowly, or has gone, keeps nobody waiting: the engine's events are kept for it.
        """
        if self.present > self.settings.queue:
            raise _Refusal(429, "the queue is full; try again later", "rate_limit_error")
        self.present += 1
        found = asyncio.Queue[Event | _Refusal | None]()
        task = asyncio.create_task(self._served(request, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        while (event := await found.get()) is not None:
            if isinstance(event, _Refusal):
                raise event
            yield event

    async def _served(self, request: dict[str, Any], found: "asyncio.Queue[Event | _Refusal | None]") -> None:
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            try:
                await asyncio.wait_for(self._turn.acquire(), self.settings.timeout_s)
            except TimeoutError:
                found.put_nowait(_Refusal(504, "the request waited longer than the server allows", "timeout"))
                return
            try:
                await self._ask(request, deadline, found)
            finally:
                self._turn.release()
        finally:
            self.present -= 1
            found.put_nowait(None)

    async def _ask(self, request: dict[str, Any], deadline: float, found: "asyncio.Queue[Any]") -> None:
        """Run the engine's blocking calls on a thread, to the end even where the client has gone."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                for event in self.engine.ask(request, deadline):
                    loop.call_soon_threadsafe(found.put_nowait, event)
            except PetoolError as error:  # it died and cannot be started again
                failed: Event = ("failed", {"kind": "engine_error", "message": error.message})
                loop.call_soon_threadsafe(found.put_nowait, failed)

        await asyncio.to_thread(work)


def application(desk: Desk) -> Any:
    """The Starlette application of `desk`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    name = desk.settings.model.stem
    model = {"id": name, "object": "model", "created": 0, "owned_by": "petool-lite"}

    async def models(request: Request) -> Any:
        _authorize(request, desk.settings)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Any:
        alive = desk.engine.alive
        body = {"status": "ok" if alive else "engine restarts with the next request", "requests": desk.present}
        return JSONResponse(body)

    async def completions(request: Request) -> Any:
        _authorize(request, desk.settings)
        wanted = engine_request(await _body(request, desk.settings.max_bytes))
        return await _respond(desk, wanted, name)

    async def refuse(request: Request, error: Exception) -> Any:
        assert isinstance(error, _Refusal)
        headers = {"Retry-After": "5"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    # Without a key, a web page in the user's browser must not get in under another name for this machine.
    hosts = ["*"] if desk.settings.api_key else ["localhost", "127.0.0.1", "[::1]", "::1", desk.settings.host]
    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={_Refusal: refuse},
    )


def _authorize(request: Any, settings: ServeSettings) -> None:
    if settings.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), settings.api_key.encode()):
        raise _Refusal(401, "wrong or missing API key", "authentication_error")


async def _body(request: Any, limit: int) -> dict[str, Any]:
    # JSON only: a browser asks before it sends that type across sites, and is not answered.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refusal(415, "expected Content-Type: application/json")
    try:
        async with asyncio.timeout(_BODY_S):
            raw = await _received(request, limit)
    except TimeoutError:
        raise _Refusal(408, f"the request did not arrive within {_BODY_S} s") from None
    try:
        body = json.loads(raw.decode("utf-8"))
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is no text that can be passed on
    except (ValueError, RecursionError) as error:
        raise _Refusal(400, f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refusal(400, "the request is not a JSON object")
    if nested_beyond(body, _DEEPEST):
        raise _Refusal(400, f"the request is nested more than {_DEEPEST} levels deep")
    return body


async def _received(request: Any, limit: int) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise _Refusal(413, f"the request exceeds {limit:,} bytes")
    return bytes(raw)


def engine_request(body: dict[str, Any]) -> dict[str, Any]:
    """The worker's request from OpenAI's; raises _Refusal for what this server cannot do."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        raise _Refusal(400, "messages: expected a list of objects")
    asked = [item for item in messages if item.get("role") == "user"]
    system = [item for item in messages if item.get("role") in ("system", "developer")]
    if not asked:
        raise _Refusal(400, "messages: expected one of the role user")
    choice = body.get("tool_choice")
    if choice == "none" or not body.get("tools"):
        raise _Refusal(400, "this model answers with a tool call and nothing else: give tools, and no tool_choice none")
    only = _object(choice, "tool_choice.function").get("name") if isinstance(choice, dict) else None
    if not isinstance(only, str | None):
        raise _Refusal(400, "tool_choice.function.name: expected a name")
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or REPLY_TOKENS
    if not isinstance(limit, int) or not 1 <= limit <= 2**31 or body.get("n", 1) != 1:
        raise _Refusal(400, "expected max_completion_tokens of at least 1, and n of 1")
    user = body.get("user")
    return {
        "query": _text(asked[-1]),
        "system": _text(system[-1]) if system else None,
        "tools": body["tools"],
        "history": body.get("history") or [],
        "user": None if user is None else str(user),
        "only": only,
        "reply_tokens": limit,
        "stream": bool(body.get("stream")),
        "stream_usage": bool(_object(body, "stream_options").get("include_usage")),
        "unread_messages": len(messages) - 1,
    }


def _object(holder: dict[str, Any], path: str) -> dict[str, Any]:
    """The object under the last part of `path`; an empty one where there is none."""
    found = holder.get(path.rpartition(".")[2]) or {}
    if not isinstance(found, dict):
        raise _Refusal(400, f"{path}: expected an object")
    return found


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str):
        raise _Refusal(400, "messages: expected a text as content")
    return content


async def _respond(desk: Desk, wanted: dict[str, Any], model: str) -> Any:
    from starlette.responses import JSONResponse, StreamingResponse

    events = desk.events(wanted)
    kind, facts = await anext(events)  # a refusal or a failure before the first piece gets a status of its own
    if kind == "delta":
        return StreamingResponse(_stream(events, facts, wanted, model), media_type="text/event-stream")
    async for _ in events:
        pass  # let the engine's thread end before the next request's turn
    if kind == "refused":
        raise _Refusal(400, facts["message"])
    if kind == "failed" and facts["kind"] in ("engine_error", "timeout"):
        raise _Refusal(504 if facts["kind"] == "timeout" else 500, facts["message"], facts["kind"])
    return JSONResponse(_completion(kind, facts, wanted, model))


def _completion(kind: str, facts: dict[str, Any], wanted: dict[str, Any], model: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    if kind == "done":
        function = {"name": facts["tool_name"], "arguments": facts["arguments"]}
        message["tool_calls"] = [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}]
        finish = "tool_calls"
    else:  # a reply that is no valid call is shown as the text that it is
        message["content"] = facts["reply"]
        finish = "length" if facts["kind"] == "cut_off" else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return _base("chat.completion", model) | {
        "choices": [choice],
        "usage": _usage(facts),
        "petool_lite": _own(facts, wanted),
    }


def _own(facts: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    own = {key: facts[key] for key in ("timings", "history_dropped", "warning", "kind") if facts.get(key)}
    return own | {"unread_messages": wanted["unread_messages"]}


def _base(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(facts: dict[str, Any]) -> dict[str, Any] | None:
    timings = facts.get("timings")
    if not timings:
        return None
    return {
        "prompt_tokens": timings["prompt_tokens"],
        "completion_tokens": timings["reply_tokens"],
        "total_tokens": timings["prompt_tokens"] + timings["reply_tokens"],
        "prompt_tokens_details": {"cached_tokens": timings["reused_tokens"]},
    }


async def _stream(
    events: AsyncIterator[Event], first: dict[str, Any], wanted: dict[str, Any], model: str
) -> AsyncIterator[str]:
    """Server-sent events: the tool's name, pieces of its arguments, the reason of the end, the usage if asked for."""
    base = _base("chat.completion.chunk", model)

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sse(base | {"choices": [choice]})

    head = {"index": 0, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    yield chunk({"role": "assistant", "content": None, "tool_calls": [head | {"function": first | {"arguments": ""}}]})
    async for kind, facts in events:
        if kind == "delta":
            yield chunk({"tool_calls": [{"index": 0, "function": facts}]})
        elif kind == "done":
            yield chunk({}, "tool_calls")
            if wanted["stream_usage"]:
                yield _sse(base | {"choices": [], "usage": _usage(facts), "petool_lite": _own(facts, wanted)})
        elif facts["kind"] == "cut_off":
            yield chunk({}, "length")
        else:
            yield _sse({"error": {"message": facts["message"], "type": facts.get("kind", "invalid_request_error")}})
    yield "data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
