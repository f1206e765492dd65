"""Answers in OpenAI's two forms, whole or as server-sent events; both are made from the same events of the engine.

The forms are those of https://platform.openai.com/docs/api-reference (chat completions and responses).
"""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from typing import Any

from petool_lite.inference.parse import CUT_OFF, ENGINE
from petool_lite.inference.worker import Event
from petool_lite.serve.requests import Asked, Refusal

_STATUS = {ENGINE: 500, "timeout": 504, "cancelled": 499}


async def respond(events: AsyncIterator[Event], form: "Form") -> Any:
    """The response to one request; a refusal or a failing engine before the first piece gets a status of its own.

    Raises Refusal.
    """
    from starlette.responses import JSONResponse, StreamingResponse

    first = await anext(events, ("failed", {"kind": "cancelled", "message": "the client has gone"}))
    _check(first)
    if form.asked.stream:
        return StreamingResponse(_stream(first, events, form), media_type="text/event-stream")
    form.take(first)
    async for event in events:
        _check(event)
        form.take(event)
    return JSONResponse(form.whole())


def _check(event: Event) -> None:
    kind, facts = event
    if kind == "refused":
        raise Refusal(400, facts["message"])
    if kind == "failed" and facts["kind"] in _STATUS:
        raise Refusal(_STATUS[facts["kind"]], facts["message"], kind=facts["kind"])


async def _stream(first: Event, events: AsyncIterator[Event], form: "Form") -> AsyncIterator[str]:
    for part in form.opening():
        yield part
    for part in form.take(first):
        yield part
    async for event in events:
        for part in form.take(event):
            yield part


class Form(ABC):
    """One answer in the making: events in, server-sent events out, and the whole at the end."""

    def __init__(self, asked: Asked, model: str) -> None:
        self.asked, self.model, self.created = asked, model, int(time.time())
        self.identity, self.call_id = uuid.uuid4().hex, f"call_{uuid.uuid4().hex[:24]}"
        self.name: str | None = None
        self.arguments, self.text, self.finish = "", "", "stop"
        self.facts: dict[str, Any] = {}

    def take(self, event: Event) -> list[str]:
        """Take one event in; returns what goes out for it."""
        kind, facts = event
        if kind == "delta":
            began = self.name is None and not self.text
            self.name = facts.get("name", self.name)
            self.arguments += facts.get("arguments", "")
            self.text += facts.get("content", "")
            return list(self.grown(facts, began))
        self.facts = facts
        broken = kind != "done" and facts["kind"] != CUT_OFF
        if kind == "done" and facts["called"]:
            self.finish = "tool_calls"
        elif (facts.get("finish") if kind == "done" else facts["kind"]) in ("length", CUT_OFF):
            self.finish = "length"
        if broken and self.name is not None and not self.asked.stream:  # no valid call: shown as the text that it is
            self.name, self.text = None, facts.get("reply", "")
        if broken and (self.name is not None or facts["kind"] in _STATUS):
            return list(self.failed(facts))
        return list(self.closing())

    @property
    def own(self) -> dict[str, Any]:
        """What petool-lite tells beside OpenAI's fields."""
        found = {key: self.facts[key] for key in ("timings", "history_dropped", "warning", "kind", "notes")
                 if self.facts.get(key)}  # fmt: skip
        return found | ({"unused": list(self.asked.unused)} if self.asked.unused else {})

    @property
    def counts(self) -> tuple[int, int, int] | None:
        """Tokens of the prompt, those of them that were known already, and of the reply; None where it failed."""
        timings = self.facts.get("timings")
        if not timings:
            return None
        return timings["prompt_tokens"], timings["reused_tokens"], timings["reply_tokens"]

    @abstractmethod
    def opening(self) -> Iterator[str]:
        """What goes out first."""

    @abstractmethod
    def grown(self, piece: dict[str, str], began: bool) -> Iterator[str]:
        """What goes out for a piece of the answer; `began` for the first."""

    @abstractmethod
    def closing(self) -> Iterator[str]:
        """What goes out last."""

    @abstractmethod
    def failed(self, facts: dict[str, Any]) -> Iterator[str]:
        """What goes out last where the answer cannot be ended well."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answer as one object."""


class Chat(Form):
    """A chat completion."""

    def opening(self) -> Iterator[str]:
        """A chunk with the role."""
        yield self._chunk({"role": "assistant", "content": None})

    def grown(self, piece: dict[str, str], began: bool) -> Iterator[str]:
        """A chunk with the tool's name, a piece of its arguments, or a piece of the text."""
        if "content" in piece:
            yield self._chunk(piece)
        elif "name" in piece:
            head = {"index": 0, "id": self.call_id, "type": "function"}
            yield self._chunk({"tool_calls": [head | {"function": piece | {"arguments": ""}}]})
        else:
            yield self._chunk({"tool_calls": [{"index": 0, "function": piece}]})

    def closing(self) -> Iterator[str]:
        """The reason of the end, and the usage if it was asked for."""
        yield self._chunk({}, self.finish)
        if self.asked.usage:
            yield _sse(self._base("chat.completion.chunk") | {"choices": [], "usage": self._usage()} | self._told())
        yield "data: [DONE]\n\n"

    def failed(self, facts: dict[str, Any]) -> Iterator[str]:
        """An error in OpenAI's form."""
        yield _sse({"error": {"message": facts["message"], "type": facts["kind"]}})
        yield "data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """A chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.name is not None:
            function = {"name": self.name, "arguments": self.arguments}
            message["tool_calls"] = [{"id": self.call_id, "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return self._base("chat.completion") | {"choices": [choice], "usage": self._usage()} | self._told()

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.identity}", "object": kind, "created": self.created, "model": self.model}

    def _told(self) -> dict[str, Any]:
        return {"petool_lite": self.own} if self.own else {}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sse(self._base("chat.completion.chunk") | {"choices": [choice]})

    def _usage(self) -> dict[str, Any] | None:
        if self.counts is None:
            return None
        prompt, known, reply = self.counts
        total = {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}
        return total | {"prompt_tokens_details": {"cached_tokens": known}}


class Responses(Form):
    """A response, with one item of output: a function call or a message."""

    _number = -1

    def opening(self) -> Iterator[str]:
        """The response without its output, twice, as OpenAI sends it."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def grown(self, piece: dict[str, str], began: bool) -> Iterator[str]:
        """The item when it begins, then its pieces."""
        if began:
            yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", empty=True))
            if self.name is None:
                yield self._event("response.content_part.added", **self._place(), part=self._part(""))
        if "content" in piece:
            yield self._event("response.output_text.delta", **self._place(), delta=piece["content"], logprobs=[])
        elif "arguments" in piece:
            where = {"output_index": 0, "item_id": f"fc_{self.identity}"}
            yield self._event("response.function_call_arguments.delta", **where, delta=piece["arguments"])

    def closing(self) -> Iterator[str]:
        """The whole item, then the whole response."""
        status = "incomplete" if self.finish == "length" else "completed"
        if self.name is not None:
            where = {"output_index": 0, "item_id": f"fc_{self.identity}", "name": self.name}
            yield self._event("response.function_call_arguments.done", **where, arguments=self.arguments)
        elif self.text:
            yield self._event("response.output_text.done", **self._place(), text=self.text, logprobs=[])
            yield self._event("response.content_part.done", **self._place(), part=self._part(self.text))
        if self.name is not None or self.text:
            yield self._event("response.output_item.done", output_index=0, item=self._item(status))
        yield self._event(f"response.{status}", response=self.whole())

    def failed(self, facts: dict[str, Any]) -> Iterator[str]:
        """The response with its error."""
        error = {"code": "server_error", "message": facts["message"]}
        yield self._event("response.failed", response=self._response("failed") | {"error": error})

    def whole(self) -> dict[str, Any]:
        """A response."""
        cut = self.finish == "length"
        found = self._response("incomplete" if cut else "completed")
        output = [self._item(found["status"])] if self.name is not None or self.text else []
        usage: dict[str, Any] | None = None
        if self.counts is not None:
            prompt, known, reply = self.counts
            usage = {"input_tokens": prompt, "output_tokens": reply, "total_tokens": prompt + reply}
            usage |= {
                "input_tokens_details": {"cached_tokens": known},
                "output_tokens_details": {"reasoning_tokens": 0},
            }
        reason = {"reason": "max_output_tokens"} if cut else None
        told = {"petool_lite": self.own} if self.own else {}
        return found | {"output": output, "usage": usage, "incomplete_details": reason} | told

    def _response(self, status: str) -> dict[str, Any]:
        asked = self.asked.request.options
        choice = asked.choice if asked.only is None else {"type": "function", "name": asked.only[0]}
        return {
            "id": f"resp_{self.identity}", "object": "response", "created_at": self.created, "status": status,
            "error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "model": self.model,
            "output": [], "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "temperature": 0.0, "top_p": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": choice, "tools": [],
            "truncation": "disabled", "usage": None, "max_output_tokens": asked.reply_tokens,
        }  # fmt: skip

    def _item(self, status: str, empty: bool = False) -> dict[str, Any]:
        if self.name is not None:
            made = {"call_id": self.call_id, "name": self.name, "arguments": "" if empty else self.arguments}
            return {"type": "function_call", "id": f"fc_{self.identity}", "status": status, **made}
        content = [] if empty else [self._part(self.text)]
        return {
            "type": "message",
            "id": f"msg_{self.identity}",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _place(self) -> dict[str, Any]:
        return {"output_index": 0, "item_id": f"msg_{self.identity}", "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **facts: Any) -> str:
        self._number += 1
        return f"event: {kind}\n" + _sse({"type": kind, "sequence_number": self._number, **facts})


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
