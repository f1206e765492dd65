"""The engine in a process of its own, so that a crash or a request without end costs that request only."""

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from petool_lite.console import say
from petool_lite.errors import PetoolError
from petool_lite.inference.parse import CallFailure
from petool_lite.inference.request import published_entry, tools_from_openai
from petool_lite.inference.tool_caller import CallOptions, ToolCaller

_LOAD_S = 600  # seconds that loading may take

# What a worker answers: ("delta", piece), then one of ("done", reply), ("refused", message), ("failed", message)
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class EngineOptions:
    """What a worker loads and how it decodes."""

    model: Path
    n_ctx: int = 0
    decoding: str = "constrained"
    trim_history: bool = False


class Engine:
    """A worker process that is started again when it dies. One request at a time; not safe to share between threads."""

    def __init__(self, options: EngineOptions) -> None:
        """`start` loads the model."""
        self._options = options
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Start the process and load the model; raises PetoolError if it does not load."""
        context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks of the server
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._options), daemon=True)
        self._process.start()
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

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    def _receive(self, deadline: float) -> Event:
        assert self._pipe is not None
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        event: Event = self._pipe.recv()
        return event

    def ask(self, request: dict[str, Any], deadline: float) -> Iterator[Event]:
        """Events of one request, the last one not a "delta"; `deadline` on time.monotonic's clock.

        A worker that dies or takes too long is replaced for the next request.
        """
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
            yield "failed", {"kind": "engine_error", "message": "the engine crashed; it starts again"}


def _work(pipe: Connection, options: EngineOptions) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    try:
        caller = ToolCaller(options.model, options.n_ctx)
    except PetoolError as error:
        pipe.send(("broken", {"message": error.message, "hint": error.hint}))
        return
    pipe.send(("ready", {}))
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return  # the server is gone
        try:
            event = _answer(caller, request, options, pipe)
        except Exception as error:  # no request may end the process; the text of the error may be the user's
            say(f"a request failed in the engine: {type(error).__name__}")
            event = "failed", {"kind": "engine_error", "message": f"the engine failed ({type(error).__name__})"}
        try:
            pipe.send(event)
        except OSError:
            return  # the server is gone


def _answer(caller: ToolCaller, request: dict[str, Any], options: EngineOptions, pipe: Connection) -> Event:
    pieces = Pieces()

    def watch(text: str) -> None:
        for piece in pieces.grown(text):
            pipe.send(("delta", piece))

    chosen = CallOptions(
        decoding=options.decoding,
        trim_history=options.trim_history,
        reply_tokens=request["reply_tokens"],
        only=request["only"],
        watch=watch if request["stream"] else None,
    )
    try:
        if request["system"] is not None and caller.style == "published":
            row = {"instruction": request["system"], "query": request["query"]}
            reply = caller.call_entry(published_entry(row, caller.trained_setting), request["user"], chosen)
        else:
            tools = tools_from_openai(request["tools"])
            reply = caller.call(request["query"], tools, request["history"], request["user"], chosen)
    except CallFailure as failure:
        return "failed", {"kind": failure.kind, "message": failure.message, "reply": failure.reply}
    except PetoolError as error:
        return "refused", {"message": f"{error.message} ({error.hint})" if error.hint else error.message}
    return "done", {
        "tool_name": reply.call.tool_name,
        "arguments": json.dumps(dict(reply.call.parameters), ensure_ascii=False),
        "timings": reply.timings,
        "history_dropped": reply.history_dropped,
        "warning": reply.warning,
    }


class Pieces:
    """Cuts a growing reply in the training format into the tool's name and pieces of its arguments."""

    _BETWEEN = ', "parameters": '

    def __init__(self) -> None:
        self._sent = -1  # characters of the arguments that are sent; -1 before the name is

    def grown(self, text: str) -> Iterator[dict[str, str]]:
        """What can be sent of `text`, the reply so far: {"name": ...} once, then {"arguments": ...}."""
        head, found, arguments = self._split(text)
        if not found:
            return
        if self._sent < 0:
            self._sent = 0
            yield {"name": json.loads(head + "}")["tool_name"]}
        # The last brace closes the call, not its arguments; half a character comes with the next token.
        ready = arguments[:-1].rstrip("�")
        if len(ready) > self._sent:
            yield {"arguments": ready[self._sent :]}
            self._sent = len(ready)

    def _split(self, text: str) -> tuple[str, str, str]:
        """The text before, of and after the mark between name and arguments, which a name may contain, too."""
        start = text.find(self._BETWEEN)
        while start >= 0:
            head = text[:start]
            try:
                json.loads(head + "}")
            except ValueError:
                start = text.find(self._BETWEEN, start + 1)
            else:
                return head, self._BETWEEN, text[start + len(self._BETWEEN) :]
        return text, "", ""
