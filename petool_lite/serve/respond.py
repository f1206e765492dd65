"""Answers in OpenAI's two forms, whole or as server-sent events; both are made from the same events of the engine. The
forms are those of https://platform.openai.com/docs/api-reference (chat completions and responses)."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from petool_lite.inference.parse import CUT_OFF, ENGINE
from petool_lite.inference.worker import Event, failed
from petool_lite.serve.requests import Asked, Refusal

_STATUS = {ENGINE: 500, "timeout": 504, "cancelled": 499}


async def respond(events: AsyncIterator[Event], form: "Chat | Responses") -> Any:
    """The response to one request. Raises Refusal for what fails before the first piece, with a status of its own."""
    from starlette.responses import JSONResponse, StreamingResponse

    first = await anext(events, failed("cancelled", "the client has gone"))
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


async def _stream(first: Event, events: AsyncIterator[Event], form: "Chat | Responses") -> AsyncIterator[str]:
    yield "".join([*form.opening(), *form.take(first)])
    async for event in events:
        yield "".join(form.take(event))


class Form:
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
            return list(self._grown(facts, began))
        self.facts = facts
        broken = kind != "done" and facts["kind"] != CUT_OFF
        if kind == "done" and facts["status"] == "call":
            self.finish = "tool_calls"
        elif (facts.get("finish") if kind == "done" else facts["kind"]) in ("length", CUT_OFF):
            self.finish = "length"
        if broken and self.name is not None and not self.asked.stream:  # no valid call: shown as the text that it is
            self.name, self.text = None, facts.get("reply", "")
        if broken and (self.name is not None or facts["kind"] in _STATUS):
            return list(self._failed(facts))
        return list(self._closing())

    def _own(self) -> dict[str, Any]:
        """What petool-lite tells beside OpenAI's fields."""
        told = ("status", "confidence", "candidates", "timings", "history_dropped", "warning", "kind", "notes",
                "prompt")  # fmt: skip
        found = {key: self.facts[key] for key in told if self.facts.get(key)}
        if "candidates" in found and not self.asked.request.options.explain:  # then it tells nothing of earlier calls
            found["candidates"] = [{key: item[key] for key in ("name", "probability")} for item in found["candidates"]]
        found |= {"unused": list(self.asked.unused)} if self.asked.unused else {}
        return {"petool_lite": found} if found else {}

    def _usage(self, read: str, written: str) -> dict[str, Any] | None:
        """Tokens read and written, under names with these words; None where the call failed."""
        if not (timings := self.facts.get("timings")):
            return None
        prompt, reply = timings["prompt_tokens"], timings["reply_tokens"]
        total = {f"{read}_tokens": prompt, f"{written}_tokens": reply, "total_tokens": prompt + reply}
        return total | {f"{read}_tokens_details": {"cached_tokens": timings["reused_tokens"]}}

    _grown: Callable[[dict[str, str], bool], Iterator[str]]  # what goes out for a piece; true for the first one
    _closing: Callable[[], Iterator[str]]  # what goes out last
    _failed: Callable[[dict[str, Any]], Iterator[str]]  # the same where the answer cannot be ended well


class Chat(Form):
    """A chat completion."""

    def opening(self) -> Iterator[str]:
        """A chunk with the role."""
        yield self._chunk({"role": "assistant", "content": None})

    def _grown(self, piece: dict[str, str], began: bool) -> Iterator[str]:
        if "content" in piece:
            yield self._chunk(piece)
        elif "name" in piece:
            head = {"index": 0, "id": self.call_id, "type": "function"}
            yield self._chunk({"tool_calls": [head | {"function": piece | {"arguments": ""}}]})
        else:
            yield self._chunk({"tool_calls": [{"index": 0, "function": piece}]})

    def _closing(self) -> Iterator[str]:
        yield self._chunk({}, self.finish)
        if self.asked.usage:
            yield _sse(self._base("chat.completion.chunk") | {"choices": []} | self._told())
        yield "data: [DONE]\n\n"

    def _failed(self, facts: dict[str, Any]) -> Iterator[str]:
        yield _sse({"error": {"message": facts["message"], "type": facts["kind"]}})
        yield "data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """A chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.name is not None:
            function = {"name": self.name, "arguments": self.arguments}
            message["tool_calls"] = [{"id": self.call_id, "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return self._base("chat.completion") | {"choices": [choice]} | self._told()

    def _told(self) -> dict[str, Any]:
        return {"usage": self._usage("prompt", "completion")} | self._own()

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.identity}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sse(self._base("chat.completion.chunk") | {"choices": [choice]})


class Responses(Form):
    """A response, with one item of output: a function call or a message."""

    _number = -1

    def opening(self) -> Iterator[str]:
        """The response without its output, twice, as OpenAI sends it."""
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._response("in_progress"))

    def _grown(self, piece: dict[str, str], began: bool) -> Iterator[str]:
        if began:
            yield self._event("output_item.added", output_index=0, item=self._item("in_progress", empty=True))
            if self.name is None:
                yield self._event("content_part.added", **self._place(), part=self._part(""))
        if "content" in piece:
            yield self._event("output_text.delta", **self._place(), delta=piece["content"], logprobs=[])
        elif "arguments" in piece:
            yield self._event("function_call_arguments.delta", **self._place(), delta=piece["arguments"])

    def _closing(self) -> Iterator[str]:
        status = "incomplete" if self.finish == "length" else "completed"
        if self.name is not None:
            made = {"name": self.name, "arguments": self.arguments}
            yield self._event("function_call_arguments.done", **self._place(), **made)
        elif self.text:
            yield self._event("output_text.done", **self._place(), text=self.text, logprobs=[])
            yield self._event("content_part.done", **self._place(), part=self._part(self.text))
        if self.name is not None or self.text:
            yield self._event("output_item.done", output_index=0, item=self._item(status))
        yield self._event(status, response=self.whole())

    def _failed(self, facts: dict[str, Any]) -> Iterator[str]:
        error = {"code": "server_error", "message": facts["message"]}
        yield self._event("failed", response=self._response("failed") | {"error": error})

    def whole(self) -> dict[str, Any]:
        """A response."""
        cut = self.finish == "length"
        found = self._response("incomplete" if cut else "completed")
        output = [self._item(found["status"])] if self.name is not None or self.text else []
        usage = self._usage("input", "output")
        usage = usage and usage | {"output_tokens_details": {"reasoning_tokens": 0}}
        reason = {"reason": "max_output_tokens"} if cut else None
        return found | {"output": output, "usage": usage, "incomplete_details": reason} | self._own()

    def _response(self, status: str) -> dict[str, Any]:
        asked = self.asked.request.options
        choice = asked.choice if asked.only is None else {"type": "function", "name": asked.only[0]}
        return {
            "id": f"resp_{self.identity}", "object": "response", "created_at": self.created, "status": status,
            "error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "model": self.model,
            "output": [], "parallel_tool_calls": False, "previous_response_id": None, "store": self.asked.remembers,
            "temperature": 0.0, "top_p": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": choice, "tools": [],
            "truncation": "disabled", "usage": None, "max_output_tokens": asked.reply_tokens,
        }  # fmt: skip

    def _item(self, status: str, empty: bool = False) -> dict[str, Any]:
        if self.name is not None:
            made = {"call_id": self.call_id, "name": self.name, "arguments": "" if empty else self.arguments}
            return {"type": "function_call", "id": f"fc_{self.identity}", "status": status, **made}
        said = {"role": "assistant", "content": [] if empty else [self._part(self.text)]}
        return {"type": "message", "id": f"msg_{self.identity}", "status": status, **said}

    def _place(self) -> dict[str, Any]:
        kind, more = ("fc", {}) if self.name is not None else ("msg", {"content_index": 0})
        return {"output_index": 0, "item_id": f"{kind}_{self.identity}"} | more

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **facts: Any) -> str:
        self._number += 1
        kind = f"response.{kind}"
        return f"event: {kind}\n" + _sse({"type": kind, "sequence_number": self._number, **facts})


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
