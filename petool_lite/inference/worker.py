"""The engine in a process of its own, so that a crash or a request without end costs that request only."""

import json
import math
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from petool_lite.console import say
from petool_lite.data.entries import Entry
from petool_lite.errors import PetoolError
from petool_lite.inference.call import CallOptions, ToolCaller
from petool_lite.inference.parse import CallFailure
from petool_lite.prompt.render import CALL_START

_LOAD_S = 600  # seconds that loading may take
_STOP_S = 10  # seconds that an engine may take to hear that its request is not wanted any more
_CANCEL = "cancel"

# What a worker answers: ("delta", piece), then one of ("done", facts), ("refused", facts), ("failed", facts)
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What one request asks of the engine; of `options` the worker itself sets `watch` and `check`."""

    entry: Entry
    options: CallOptions
    user: str | None = None


class _Cancelled(Exception):
    """Nobody wants the reply any more."""


class Engine:
    """A worker process that is started again when it dies. One request at a time; `cancel` and `end` come from other
    threads."""

    def __init__(self, model: Path, n_ctx: int = 0) -> None:
        """`start` loads the model; see `ToolCaller`."""
        self._loads = model, n_ctx
        self._process: Any = None
        self._pipe: Connection | None = None
        self._cancelled = threading.Event()
        self._latest = math.inf  # when a cancelled request must have ended, on time.monotonic's clock
        self._ended = False

    def start(self) -> None:
        """Start the process and load the model; raises PetoolError if it does not load."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks of the server
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._loads), daemon=True)
        # Ctrl-C is the server's to handle, also while the new process is still starting up.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        try:
            kind, facts = self._receive(time.monotonic() + _LOAD_S)
        except (EOFError, TimeoutError, OSError) as error:
            self.stop()
            raise PetoolError("the engine died while it loaded the model", "`petool-lite doctor` tries it") from error
        if kind != "ready":
            self.stop()
            raise PetoolError(facts["message"], facts.get("hint", ""))

    def stop(self) -> None:
        """End the process at once; calling it again does nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def end(self) -> None:
        """End the process for good: a request that runs fails, and none starts it again."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    def cancel(self) -> None:
        """Let the request that runs end as soon as the engine hears of it, in words that nobody reads."""
        self._cancelled.set()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def _receive(self, deadline: float) -> Event:
        """The next event; raises TimeoutError after the deadline, which `cancel` brings near."""
        assert self._pipe is not None
        while True:
            if self._cancelled.is_set():
                self._cancelled.clear()
                self._pipe.send(_CANCEL)
                self._latest = time.monotonic() + _STOP_S
            left = min(deadline, self._latest) - time.monotonic()
            if self._pipe.poll(max(0.0, min(0.1, left))):
                event: Event = self._pipe.recv()
                return event
            if left <= 0:
                raise TimeoutError

    def ask(self, request: Request, deadline: float) -> Iterator[Event]:
        """Events of one request, the last one not a "delta"; `deadline` on time.monotonic's clock.

        A worker that dies or takes too long is replaced for the next request.
        """
        self._cancelled.clear()
        self._latest = math.inf
        if self._ended:
            yield "failed", {"kind": "engine_error", "message": "the server is stopping"}
            return
        if not self.alive:
            self.stop()
            self.start()
        assert self._pipe is not None
        try:
            self._pipe.send(request)
            while True:
                event = self._receive(deadline)
                yield event
                if event[0] != "delta":
                    return
        except TimeoutError:
            self.stop()
            yield "failed", {"kind": "timeout", "message": "the request took longer than the server allows"}
        except (EOFError, OSError):
            self.stop()
            what = "the server is stopping" if self._ended else "the engine crashed; it starts again"
            yield "failed", {"kind": "engine_error", "message": what}


def _work(pipe: Connection, model: Path, n_ctx: int) -> None:
    try:
        caller = ToolCaller(model, n_ctx)
    except PetoolError as error:
        pipe.send(("broken", {"message": error.message, "hint": error.hint}))
        return
    pipe.send(("ready", {}))
    while True:
        try:
            request = pipe.recv()
            if request == _CANCEL:  # it came too late
                continue
            pipe.send(_answer(caller, request, pipe))
        except (EOFError, OSError):
            return  # the server is gone


def _answer(caller: ToolCaller, request: Request, pipe: Connection) -> Event:
    pieces = Pieces()

    def watch(text: str) -> None:
        for piece in pieces.grown(text):
            pipe.send(("delta", piece))

    def check() -> None:
        if pipe.poll() and pipe.recv() == _CANCEL:
            raise _Cancelled

    held = request.options.at_least > 0  # what is sent could not be taken back
    chosen = replace(request.options, watch=None if held else watch, check=check)
    try:
        reply = caller.call_entry(request.entry, request.user, chosen)
    except _Cancelled:
        return "failed", {"kind": "cancelled", "message": "the request was cancelled"}
    except CallFailure as failure:
        return "failed", {"kind": failure.kind, "message": failure.message, "reply": failure.reply}
    except PetoolError as error:
        return "refused", {"message": f"{error.message} ({error.hint})" if error.hint else error.message}
    except (EOFError, OSError):
        raise
    except Exception as error:  # no request may end the process; the text of the error may be the user's
        say(f"a request failed in the engine: {type(error).__name__}")
        return "failed", {"kind": "engine_error", "message": f"the engine failed ({type(error).__name__})"}
    text = reply.question if reply.unsure else reply.reply.text
    for piece in (*pieces.grown(text), *pieces.rest(text)):
        pipe.send(("delta", piece))
    explained = request.options.explain
    likely = [
        asdict(item) if explained else {"name": item.name, "probability": item.probability}
        for item in (reply.candidates if explained or reply.unsure else ())
    ]
    return "done", {
        "status": reply.status,
        "called": reply.status == "call",
        "confidence": reply.confidence,
        "candidates": likely,
        "prompt": list(reply.prompt),
        "finish": reply.reply.finish,
        "timings": reply.timings,
        "history_dropped": reply.history_dropped,
        "warning": reply.warning,
        "notes": list(reply.notes),
    }


_HEAD = re.compile(
    r'\s*(?:<tool_call>\s*)?\{"(?:tool_)?name": ?("(?:[^"\\]|\\.)*"), ?"(?:arguments|parameters)": ?(?=\{)', re.DOTALL
)


class Pieces:
    """Cuts a growing reply into the tool's name and pieces of its arguments, or pieces of a text."""

    def __init__(self) -> None:
        self._sent = 0  # characters of the arguments or the text that are sent
        self._start = -1  # where the arguments start; -1 before the name is sent

    def grown(self, text: str) -> Iterator[dict[str, str]]:
        """What can be sent of `text`, the reply so far: {"name"} once, then {"arguments"}; or {"content"}."""
        text = text.rstrip("�")  # half a character comes with the next token
        if self._start < 0:
            head = _HEAD.match(text)
            if head is None:
                if not _like_a_call(text.lstrip()):
                    yield from self._grown("content", text)
                return
            self._start = head.end()
            yield {"name": json.loads(head[1])}
        yield from self._grown("arguments", _object(text[self._start :]))

    def rest(self, text: str) -> Iterator[dict[str, str]]:
        """What is left when `text` is the whole reply: a text that began like a call."""
        if self._start < 0:
            yield from self._grown("content", text)

    def _grown(self, key: str, text: str) -> Iterator[dict[str, str]]:
        if len(text) > self._sent:
            yield {key: text[self._sent :]}
            self._sent = len(text)


def _object(text: str) -> str:
    """`text` up to the end of the object that it starts with."""
    try:
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return text


def _like_a_call(text: str) -> bool:
    """Whether a reply that begins so may still become a call."""
    mark = CALL_START.strip()
    return text.startswith(("{", mark)) or mark.startswith(text)
