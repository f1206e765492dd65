"""The engine in a process of its own, so that a crash or a request without end costs that request only."""

import contextlib
import itertools
import json
import math
import multiprocessing
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from petool_lite.console import say
from petool_lite.data.entries import Entry
from petool_lite.errors import PetoolError
from petool_lite.inference.call import CallOptions, ToolCaller
from petool_lite.inference.helper import answer_alone
from petool_lite.inference.parse import CallFailure
from petool_lite.prompt.render import CALL_START

_LOAD_S = 600  # seconds that loading may take
_STOP_S = 10  # seconds that an engine may take to hear that its request is not wanted any more
_GRACE_S = 2  # the same where the client waits for the word that its time is over

# What a worker answers: ("delta", piece), then one of ("done", facts), ("refused", facts), ("failed", facts)
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What one request asks of the engine; of `options` the worker itself sets `watch` and `check`."""

    entry: Entry
    options: CallOptions
    user: str | None = None


@dataclass(frozen=True)
class Helped:
    """What another process asks of the engine, see `helper`; answered by one event, ("done", document)."""

    asked: Mapping[str, Any]

    @property
    def user(self) -> Any:
        """Whose call it is, None for nobody's."""
        return self.asked["user"]


class _Cancelled(Exception):
    """Nobody wants the reply any more."""


class Engine:
    """A worker process with one or more slots, which is started again when it dies. `ask` is called by as many threads
    at once as there are slots; `end` comes from any."""

    def __init__(self, model: Path, n_ctx: int = 0, slots: int = 1) -> None:
        """`start` loads the model, with `n_ctx` tokens for each slot; see `ToolCaller`."""
        self._loads = model, n_ctx, slots
        self._process: Any = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()  # of starting, stopping and sending
        self._answers: dict[int, SimpleQueue[Event]] = {}  # what comes back, by request
        self._numbers = itertools.count()
        self._ended = False

    def start(self) -> None:
        """Start the process and load the model; raises PetoolError if it does not load."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks of the server
        pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *self._loads), daemon=True)
        # Ctrl-C is the server's to handle, also while the new process is still starting up.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self._process, self._pipe = process, pipe
        try:
            kind, facts = pipe.recv()[1] if pipe.poll(_LOAD_S) else ("broken", {"message": "it took too long to load"})
        except (EOFError, OSError) as error:
            self.stop()
            raise PetoolError("the engine died while it loaded the model", "`petool-lite doctor` tries it") from error
        if kind != "ready":
            self.stop()
            raise PetoolError(facts["message"], facts.get("hint", ""))
        threading.Thread(target=self._listen, args=(pipe, process), daemon=True).start()

    def _listen(self, pipe: Connection, process: Any) -> None:
        """Hand on what the process answers, until it is gone: then every request that it had fails."""
        try:
            while True:
                number, event = pipe.recv()
                if found := self._answers.get(number):
                    found.put(event)
        except (EOFError, OSError):
            process.join()
            what = "the server is stopping" if self._ended else "the engine crashed; it starts again"
            for found in list(self._answers.values()):
                found.put(("failed", {"kind": "engine_error", "message": what}))

    def stop(self) -> None:
        """End the process at once; calling it again does nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def end(self) -> None:
        """End the process for good: requests that run fail, and none starts it again."""
        self._ended = True
        if self._process is not None:
            self._process.kill()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def ask(self, request: Request | Helped, deadline: float, cancelled: threading.Event) -> Iterator[Event]:
        """Events of one request, the last one not a "delta"; `deadline` on time.monotonic's clock. Once it is
        `cancelled`, or the deadline passes, the engine hears that nobody wants it; where it does not end it soon, the
        engine is replaced. Raises PetoolError where it died and cannot be started again."""
        if self._ended:
            yield "failed", {"kind": "engine_error", "message": "the server is stopping"}
            return
        number, answers, latest = next(self._numbers), SimpleQueue[Event](), math.inf
        try:
            with self._lock:
                if not self.alive:
                    self.stop()
                    self.start()
                self._answers[number] = answers
                process = self._process
            self._send(number, request)
            while True:
                now = time.monotonic()
                if latest == math.inf and (cancelled.is_set() or now > deadline):
                    self._send(number, None)
                    latest = now + (_STOP_S if cancelled.is_set() else _GRACE_S)  # when it must have heard
                if now > latest:
                    process.kill()  # it hangs: `_listen` tells all
                try:
                    event = answers.get(timeout=max(0.01, min(0.1, deadline - now)))
                except Empty:
                    continue
                if event[0] == "failed" and now > deadline and not cancelled.is_set():
                    event = "failed", {"kind": "timeout", "message": "the request took longer than the server allows"}
                yield event
                if event[0] != "delta":
                    return
        finally:
            self._answers.pop(number, None)

    def _send(self, number: int, request: Request | Helped | None) -> None:
        with self._lock, contextlib.suppress(OSError):  # a process that is gone is told by `_listen`
            if self._pipe is not None:
                self._pipe.send((number, request))


class _Worker:
    """What runs in the process: slots that answer one request at a time, each request on a thread."""

    def __init__(self, pipe: Connection, callers: Sequence[ToolCaller]) -> None:
        self._pipe, self._lock, self._callers = pipe, threading.Lock(), callers
        self._unwanted: dict[int, threading.Event] = {}
        self._users: list[str | None] = [None for _ in callers]  # whom each slot served last
        self._free = list(range(len(callers)))  # the one that is free for longest first

    def send(self, number: int, event: Event) -> None:
        """Answer; every thread may."""
        with self._lock, contextlib.suppress(OSError):  # the server is gone, and soon this process
            self._pipe.send((number, event))

    def take(self, number: int, request: Request | Helped | None) -> None:
        """Give a request to the slot that served its user last, else to the one that rested for longest; None is for a
        request that nobody wants any more."""
        if request is None:
            if unwanted := self._unwanted.get(number):
                unwanted.set()
            return
        with self._lock:
            known = [place for place in self._free if request.user and self._users[place] == request.user]
            place = (known or self._free)[0]
            self._free.remove(place)
        self._users[place], self._unwanted[number] = request.user, threading.Event()
        threading.Thread(target=self._serve, args=(place, number, request), daemon=True).start()

    def _serve(self, place: int, number: int, request: Request | Helped) -> None:
        unwanted = self._unwanted[number]

        def check() -> None:
            if unwanted.is_set():
                raise _Cancelled

        event = _answer(self._callers[place], request, partial(self.send, number), check)
        del self._unwanted[number]
        with self._lock:
            self._free.append(place)
        self.send(number, event)


def _work(pipe: Connection, model: Path, n_ctx: int, slots: int) -> None:
    try:
        caller = ToolCaller(model, n_ctx)
        worker = _Worker(pipe, caller.slots(slots))
    except PetoolError as error:
        pipe.send((-1, ("broken", {"message": error.message, "hint": error.hint})))
        return
    worker.send(-1, ("ready", {}))
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while True:
            worker.take(*pipe.recv())


def _answer(
    caller: ToolCaller, request: Request | Helped, send: Callable[[Event], None], check: Callable[[], None]
) -> Event:
    pieces = Pieces()

    def watch(text: str) -> None:
        for piece in pieces.grown(text):
            send(("delta", piece))

    try:
        if isinstance(request, Helped):
            return "done", answer_alone(caller, request.asked, check)
        held = request.options.at_least > 0  # what is sent could not be taken back
        chosen = replace(request.options, watch=None if held else watch, check=check)
        reply = caller.call_entry(request.entry, request.user, chosen)
    except _Cancelled:
        return "failed", {"kind": "cancelled", "message": "the request was cancelled"}
    except CallFailure as failure:
        return "failed", {"kind": failure.kind, "message": failure.message, "reply": failure.reply}
    except PetoolError as error:
        return "refused", {"message": f"{error.message} ({error.hint})" if error.hint else error.message}
    except Exception as error:  # no request may end the process; the text of the error may be the user's
        say(f"a request failed in the engine: {type(error).__name__}")
        return "failed", {"kind": "engine_error", "message": f"the engine failed ({type(error).__name__})"}
    text = reply.question if reply.unsure else reply.reply.text
    for piece in (*pieces.grown(text), *pieces.rest(text)):
        send(("delta", piece))
    facts = reply.facts() | {"called": reply.status == "call", "finish": reply.reply.finish}
    if not request.options.explain:  # then it tells nothing of earlier calls
        facts["candidates"] = [{"name": item.name, "probability": item.probability} for item in reply.candidates]
    return "done", facts | {"prompt": list(reply.prompt)}


_HEAD = re.compile(
    r'\s*(?:<tool_call>\s*)?\{"(?:tool_)?name": ?("(?:[^"\\]|\\.)*"), ?"(?:arguments|parameters)": ?(?=\{)', re.DOTALL
)
_MARK = CALL_START.strip()


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
                begun = text.lstrip()
                if not begun.startswith(("{", _MARK)) and not _MARK.startswith(begun):  # nor can it become a call
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
    with contextlib.suppress(ValueError, RecursionError):
        return text[: json.JSONDecoder().raw_decode(text)[1]]
    return text
