"""Replies of an endpoint as rows: several requests at once, each kept as it comes, failures never scored."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

from petool_lite.bench.engines import UNREAD, Rows, Work

from petool_lite.console import Report
from petool_lite.data.entries import Call, Entry, properties
from petool_lite.errors import PetoolError
from petool_lite.inference.endpoint import Answer, Endpoint, Gone, TooLong
from petool_lite.inference.parse import failure
from petool_lite.prompt.render import CALL_END, CALL_START, Chat, drop_order, entry_request, without_history

_LETTERS = 4  # characters of a token, about
_CUT = 8  # characters of a token from which on a prompt was surely not read whole
_LEAST = 20  # requests that are always allowed
_FAILURES = 3  # in a row after which there is no point in going on
NOBODY = Chat(lambda texts: [[] for _ in texts], "", "", "", 0)  # the server has template and tokens


def endpoint_rows(work: Work, report: Report) -> Rows:
    """The replies to all entries of `work`, in whatever order they come.

    Raises PetoolError where the endpoint cannot go on; entries without a row are asked for by the same command.
    """
    variant, limit, style = work.variant, work.task.max_reply_tokens, str(work.variant.style)
    most = variant.requests or max(_LEAST, 3 * len(work.entries))
    endpoint = Endpoint(variant.url, str(variant.model), most)
    letters = sum(_letters(entry_request(NOBODY, entry, style)) for entry in work.entries.values())
    told = f"about {letters // _LETTERS:,} tokens of prompts and at most {len(work.entries) * limit:,} of replies"
    report(f"{len(work.entries):,} requests to {endpoint.url} (at most {most:,} with tries again): {told}", 0, 0, "")
    failed: list[PetoolError] = []  # the failures since the last answer
    for index, found in _side_by_side(work, endpoint, failed):
        if isinstance(found, PetoolError):
            yield index, UNREAD | {"status": "engine_error", "error": found.message}
        elif isinstance(found, BaseException):
            raise found
        else:
            yield index, found
    if endpoint.without:
        report(f"{endpoint.url} did not take, and was asked without: {', '.join(endpoint.without)}", 0, 0, "")
    if failed and _hopeless(failed, len(work.entries)):
        hint = failed[-1].hint or "the replies so far are kept; the same command goes on from here"
        raise PetoolError(failed[-1].message, hint)


def _hopeless(failed: list[PetoolError], entries: int) -> bool:
    """Whether there is no point in asking on."""
    return isinstance(failed[-1], Gone) or len(failed) >= min(_FAILURES, entries)


def _side_by_side(work: Work, endpoint: Endpoint, failed: list[PetoolError]) -> Iterator[tuple[int, Any]]:
    """Rows, or the errors in their place, from as many threads as the variant's batch says, until it is hopeless."""
    waiting: Queue[int] = Queue()
    done: Queue[tuple[int, Any] | None] = Queue()
    lock, stop = threading.Lock(), threading.Event()
    for index in work.entries:
        waiting.put(index)

    def ask() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except Empty:
                break
            found = _asked(work, endpoint, index)
            with lock:
                if not stop.is_set():  # what ended it stays the last word
                    failed[:] = [*failed, found] if isinstance(found, PetoolError) else []
                if isinstance(found, BaseException) and (not failed or _hopeless(failed, len(work.entries))):
                    stop.set()
            done.put((index, found))
        done.put(None)

    running = min(work.variant.batch, len(work.entries))
    for _ in range(running):  # daemons: Ctrl-C waits for no answer
        threading.Thread(target=ask, daemon=True).start()
    try:
        while running:
            item = done.get()
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        stop.set()


def _asked(work: Work, endpoint: Endpoint, index: int) -> dict[str, Any] | BaseException:
    try:
        return _row(work, endpoint, index)
    except BaseException as error:
        return error


def _row(work: Work, endpoint: Endpoint, index: int) -> dict[str, Any]:
    """What a row says of the reply to an entry; what exceeds the context loses old history, as for other engines."""
    entry, style, started = work.entries[index], str(work.variant.style), time.perf_counter()
    order, gone = drop_order(entry, style), 0
    while True:
        request = entry_request(NOBODY, without_history(entry, set(order[:gone])), style)
        asked = json.dumps(request, ensure_ascii=False)
        sent = {"prompt_sha256": hashlib.sha256(asked.encode()).hexdigest(), "history_dropped": gone}
        try:
            answer = endpoint.ask(request["messages"], request.get("tools", ()), work.task.max_reply_tokens)
            break
        except TooLong:
            if gone == len(order):
                return UNREAD | sent | {"status": "too_long"}
            gone += -(-(len(order) - gone) // 4)
    read = answer.prompt_tokens
    if 0 < read < (least := _least_letters(entry, request)) // _CUT:
        why = "its template leaves out the tools, or it" if request.get("tools") else "it"
        what = (
            f"{endpoint.url} read {read:,} tokens where {least:,} characters are no less than told: {why} cuts prompts"
        )
        raise PetoolError(what, "give its model a larger context, or a template with tools")
    text = reply_text(answer)
    seconds = round(time.perf_counter() - started, 4)
    return UNREAD | sent | {
        "status": "ok", "reply": text, "finish": answer.finish, "reply_tokens": answer.reply_tokens,
        "failure": failure(text, entry.tools, answer.finish, bool(work.task.text)),
        "prompt_tokens": read, "cached_tokens": min(answer.cached_tokens, read),
        "decode_s": seconds, "seconds": seconds, "batch": work.variant.batch, "without": endpoint.without,
    }  # fmt: skip


def _least_letters(entry: Entry, request: dict[str, Any]) -> int:
    """Characters that whoever reads the whole request reads at least: messages, or what is short of the tools."""
    if not request.get("tools"):
        return sum(len(str(message["content"])) for message in request["messages"])
    return sum(
        len(tool.name) + min(len(tool.description), 400) + sum(map(len, properties(tool))) for tool in entry.tools
    )


def _letters(request: dict[str, Any]) -> int:
    return len(json.dumps(request, ensure_ascii=False))


def reply_text(answer: Answer) -> str:
    """The reply as a model of the petool style writes it, so that one parser reads all; its text without a call.

    Arguments that are no JSON object stay as they were written: the model's fault, not the endpoint's.
    """
    return "\n".join(f"{CALL_START}{_call(*call)}{CALL_END}" for call in answer.calls) or answer.text


def _call(name: str, arguments: str) -> str:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return Call(name, found).to_json()
    return f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
