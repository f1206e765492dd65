"""`serve`: an OpenAI-compatible server for tool calls. `routes` lets a request in, `requests` reads it, `queue` takes
it to the engine and hears when its client leaves, `respond` writes the answer; `memory` keeps what a user did."""

import ipaddress
import secrets
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from petool_lite.console import say
from petool_lite.errors import USAGE, PetoolError, in_words
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.helper import listening
from petool_lite.memory.store import Memory
from petool_lite.serve.queue import RequestQueue
from petool_lite.serve.routes import OfferedTools, application

_HEAD_S = 10  # seconds in which the head of a connection's first request arrives
_CONNECTIONS = 512  # at once; more are answered 503


@dataclass(frozen=True)
class ServeSettings:
    """What is served, where and within which limits. The command line owns the defaults."""

    model: Path
    host: str
    port: int
    api_key: str | None
    slots: int  # requests that run at once
    queue: int  # more that may wait
    timeout_s: float
    max_mb: int  # MiB of one request
    n_ctx: int  # tokens of context in each slot, 0 for the engine's default
    decoding: str
    trim_history: bool
    store: bool  # what users with a name did is kept and read for their next request
    mcp: tuple[str, ...]  # servers whose tools are offered where a request brings none
    page_key: str = field(default_factory=lambda: secrets.token_urlsafe(9))

    @property
    def reading_key(self) -> str:
        """What reads the users' memory: the API key, or one of this run for who started it, as files of mode 0600."""
        return self.api_key or self.page_key


def run(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises PetoolError for what cannot be served, or not without an API key."""
    check_gguf(settings.model)
    local = settings.host == "localhost"
    with suppress(ValueError):
        local = local or ipaddress.ip_address(settings.host).is_loopback
    if not local and not settings.api_key:
        what = f"{settings.host} can be reached by others, and no API key is set"
        raise PetoolError(what, "set PETOOL_LITE_API_KEY, or serve on 127.0.0.1", USAGE)
    store = Memory().store if settings.store else None
    offered = OfferedTools(settings.mcp) if settings.mcp else None
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with in_words(f"cannot listen on {settings.host}:{settings.port}", "choose another --port", OSError):
        listener = socket.create_server((settings.host, settings.port), family=family)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while it loads; later uvicorn hears it first
    with listener, listening(settings.model, settings.n_ctx) as helping:
        queue = RequestQueue(settings)
        try:
            queue.engine.start()
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            port = listener.getsockname()[1]
            say(f"serving {settings.model.name} at http://{host}:{port}/v1 (Ctrl-C ends)")
            say(f"to try it: http://{host}:{port}/{'' if settings.api_key else f'#{settings.page_key}'}")
            _server(application(queue, store, offered), queue).run(sockets=[listener, *helping])
        except KeyboardInterrupt:
            pass
        finally:
            queue.engine.kill()
    say("stopped")


def _server(app: Any, queue: Any) -> Any:
    """uvicorn, but a signal ends the running request at once, and a connection that sends no whole head is closed."""

    class Protocol(H11Protocol):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(_HEAD_S, lambda: transport.close() if self.scope is None else None)

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            queue.engine.end()
            super().handle_exit(sig, frame)

    most = {"timeout_graceful_shutdown": 1, "limit_concurrency": _CONNECTIONS}
    return Server(uvicorn.Config(app, http=Protocol, log_level="critical", lifespan="off", **most))
