"""The server's addresses: who may come in, how much may be sent, and which answer goes out."""

import asyncio
import hmac
import json
from typing import Any

from petool_lite.data.entries import nested_beyond
from petool_lite.serve.queue import RequestQueue
from petool_lite.serve.requests import Asked, Refusal, read_chat, read_responses
from petool_lite.serve.respond import Chat, Form, Responses, respond

_BODY_S = 60  # seconds in which a request's body arrives
_DEEPEST = 64  # levels of nesting in a request
_FORMS: dict[str, tuple[Any, type[Form]]] = {
    "/v1/chat/completions": (read_chat, Chat),
    "/v1/responses": (read_responses, Responses),
}


def application(queue: RequestQueue) -> Any:
    """The Starlette application over `queue`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    settings = queue.settings
    name = settings.model.stem
    model = {"id": name, "object": "model", "created": 0, "owned_by": "petool-lite"}

    async def models(request: Request) -> Any:
        _authorize(request, settings.api_key)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Any:
        alive = queue.engine.alive
        body = {"status": "ok" if alive else "engine restarts with the next request", "requests": queue.present}
        return JSONResponse(body)

    async def answer(request: Request) -> Any:
        _authorize(request, settings.api_key)
        read, form = _FORMS[request.url.path]
        asked: Asked = read(await _body(request, settings.max_mb * 2**20))

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await respond(queue.events(asked.request, left), form(asked, name))

    async def refuse(request: Request, error: Exception) -> Any:
        assert isinstance(error, Refusal)
        return JSONResponse(error.body, error.status, {"Retry-After": "5"} if error.status == 429 else None)

    # Without a key, a web page in the user's browser must not get in under another name for this machine.
    hosts = ["*"] if settings.api_key else ["localhost", "127.0.0.1", "[::1]", "::1", settings.host]
    return Starlette(
        routes=[
            *(Route(path, answer, methods=["POST"]) for path in _FORMS),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={Refusal: refuse},
    )


def _authorize(request: Any, key: str | None) -> None:
    if key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "wrong or missing API key", kind="authentication_error")


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
