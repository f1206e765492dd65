"""The engine in a process of its own, so that a crash or a request without end costs that request only."""

import contextlib
import json
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from petool_lite.console import say
from petool_lite.errors import PetoolError
from petool_lite.inference.call import Request, ToolCaller
from petool_lite.inference.parse import ENGINE, OPEN, CallFailure

_LOAD_S = 600  # seconds that loading may take

# What a worker answers: ("delta", piece), then one of ("done", facts), ("refused", facts), ("failed", facts)
Event = tuple[str, dict[str, Any]]


def failed(kind: str, message: str, **facts: Any) -> Event:
    """The event of a request that has no answer; `kind` is one of `parse`'s words, or "timeout", "cancelled"."""
    return "failed", {"kind": kind, "message": message} | facts


class _Cancelled(Exception):
    """Nobody wants the reply any more."""


class Engine:
    """A worker process with one or more slots. One thread at a time sends to it; `end` and `kill` come from any."""

    def __init__(self, model: Path, n_ctx: int = 0, slots: int = 1) -> None:
        """`start` loads the model, with `n_ctx` tokens for each slot; see `ToolCaller`."""
        self._loads = model, n_ctx, slots
        self._process: Any = None
        self._pipe: Any = None
        self._takers: dict[int, Callable[[Event], object]] = {}  # who gets the events of a request
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
            self.kill()
            raise PetoolError("the engine died while it loaded the model", "`petool-lite doctor` tries it") from error
        if kind != "ready":
            self.kill()
            raise PetoolError(facts["message"], facts.get("hint", ""))
        threading.Thread(target=self._listen, args=(pipe, process), daemon=True).start()

    def _listen(self, pipe: Connection, process: Any) -> None:
        """Hand on what the process answers, until it is gone: then every request that it had fails."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, event = pipe.recv()
                take = self._takers.get(number) if event[0] == "delta" else self._takers.pop(number, None)
                if take:
                    take(event)
        process.join()
        for number in list(self._takers):
            self._fail(number, "the engine crashed; it starts again")

    def _fail(self, number: int, message: str) -> None:
        if take := self._takers.pop(number, None):
            take(failed(ENGINE, "the server is stopping" if self._ended else message))

    def send(self, number: int, request: Request, take: Callable[[Event], object]) -> None:
        """Have a request answered; `take` gets its events from another thread. A process that died is started again."""
        try:
            if not self.alive and not self._ended:
                self.start()
            self._takers[number] = take
            self._pipe.send((number, request))
        except PetoolError as error:
            self._takers[number] = take
            self._fail(number, error.message)
        except OSError:
            self._fail(number, "the engine crashed; it starts again")

    def cancel(self, number: int) -> None:
        """Let the engine hear that nobody wants a request any more."""
        with contextlib.suppress(OSError):  # a process that is gone is told by `_listen`
            self._pipe.send((number, None))

    def kill(self) -> None:
        """Kill the process, if there is one; the requests that it has fail."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """End the process for good: requests that run fail, and none starts it again."""
        self._ended = True
        self.kill()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())


def _work(pipe: Connection, model: Path, n_ctx: int, slots: int) -> None:
    """What runs in the process: a thread a request, on the slot that served its user last, or rested for longest."""
    try:
        free = ToolCaller(model, n_ctx).slots(slots)  # the one that rests for longest first
    except PetoolError as error:
        pipe.send((-1, ("broken", {"message": error.message, "hint": error.hint})))
        return
    lock, users, wanted = threading.Lock(), dict[ToolCaller, str | None](), set[int]()

    def send(number: int, event: Event) -> None:
        with lock, contextlib.suppress(OSError):  # the server is gone, and soon this process
            pipe.send((number, event))

    def serve(slot: ToolCaller, number: int, request: Request) -> None:
        def check() -> None:
            if number not in wanted:
                raise _Cancelled

        event = _answer(slot, request, partial(send, number), check)
        wanted.discard(number)
        with lock:
            free.append(slot)
        send(number, event)

    send(-1, ("ready", {}))
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while True:
            number, request = pipe.recv()
            if request is None:  # nobody wants it any more
                wanted.discard(number)
                continue
            with lock:
                slot = next((slot for slot in free if request.user and users.get(slot) == request.user), free[0])
                free.remove(slot)
            users[slot] = request.user
            wanted.add(number)
            threading.Thread(target=serve, args=(slot, number, request), daemon=True).start()


def _answer(caller: ToolCaller, request: Request, send: Callable[[Event], None], check: Callable[[], None]) -> Event:
    pieces, helped = Pieces(), isinstance(request.entry, Mapping)

    def watch(text: str, whole: bool = False) -> None:
        for piece in pieces.grown(text, whole):
            send(("delta", piece))

    try:
        held = helped or request.options.at_least > 0  # what is sent could not be taken back
        options = replace(request.options, watch=None if held else watch, check=check)
        reply, kept = caller.answer(replace(request, options=options))
    except _Cancelled:
        return failed("cancelled", "the request was cancelled")
    except CallFailure as error:
        return failed(error.kind, error.message, reply=error.reply)
    except PetoolError as error:
        return "refused", {"message": f"{error.message} ({error.hint})" if error.hint else error.message}
    except Exception as error:  # no request may end the process; the text of the error may be the user's
        say(f"a request failed in the engine: {type(error).__name__}")
        return failed(ENGINE, f"the engine failed ({type(error).__name__})")
    if helped:
        return "done", reply.document(kept)
    watch(reply.question if reply.unsure else reply.reply.text, whole=True)
    return "done", reply.facts() | {"finish": reply.reply.finish, "prompt": list(reply.prompt)}


_HEAD = re.compile(
    r'\s*(?:<tool_call>\s*)?\{"(?:tool_)?name": ?("(?:[^"\\]|\\.)*"), ?"(?:arguments|parameters)": ?(?=\{)', re.DOTALL
)


class Pieces:
    """Cuts a growing reply into the tool's name and pieces of its arguments, or pieces of a text."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}  # characters of each part

    def grown(self, text: str, whole: bool = False) -> Iterator[dict[str, str]]:
        """What can be sent of `text`, the reply so far or the `whole`: {"name"}, then {"arguments"}; or {"content"}."""
        for part, found in _parts(text.rstrip("�"), whole).items():  # half a character comes with the next token
            if len(found) > (sent := self._sent.get(part, 0)):
                yield {part: found[sent:]}
                self._sent[part] = len(found)


def _parts(text: str, whole: bool) -> dict[str, str]:
    """The name and the arguments of a call that has begun, or a text; nothing while it may still become a call."""
    if head := _HEAD.match(text):
        given = text[head.end() :]
        with contextlib.suppress(ValueError, RecursionError):
            given = given[: json.JSONDecoder().raw_decode(given)[1]]  # up to the object's end
        return {"name": json.loads(head[1]), "arguments": given}
    begun = text.lstrip()
    maybe = begun.startswith(("{", OPEN)) or OPEN.startswith(begun)
    return {} if maybe and not whole else {"content": text}
