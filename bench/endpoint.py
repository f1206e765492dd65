"""Replies of an endpoint as rows: several requests at once, each kept as it comes, failures never scored."""

import hashlib
import json
import time
from multiprocessing.pool import ThreadPool
from typing import Any

from petool_lite.bench.engines import UNREAD, Rows, Work
from petool_lite.console import Report
from petool_lite.data.entries import Entry, properties
from petool_lite.errors import PetoolError
from petool_lite.inference.endpoint import Endpoint, Gone, TooLong
from petool_lite.inference.parse import failure
from petool_lite.prompt.render import CALL_END, CALL_START, Chat, drop_order, entry_request, without_history

_LETTERS = 4  # characters of a token, about
_CUT = 8  # characters of a token from which on a prompt was surely not read whole
_LEAST = 20  # requests that are always allowed
_FAILURES = 3  # in a row after which there is no point in going on
NOBODY = Chat(lambda texts: [[] for _ in texts], "", "", "", 0)  # the server has template and tokens


def endpoint_rows(work: Work, report: Report) -> Rows:
    """The replies to all entries of `work`, in whatever order they come, as many at once as the variant's batch says.
    Raises PetoolError where the endpoint cannot go on; entries without a row are asked for by the same command."""
    variant, count, style = work.variant, len(work.entries), str(work.variant.style)
    most = variant.requests or max(_LEAST, 3 * count)
    endpoint = Endpoint(variant.url, str(variant.model), most)
    requests = (entry_request(NOBODY, entry, style) for entry in work.entries.values())
    tokens = sum(len(json.dumps(request, ensure_ascii=False)) for request in requests) // _LETTERS
    told = f"about {tokens:,} tokens of prompts and at most {count * work.task.max_reply_tokens:,} of replies"
    report(f"{count:,} requests to {endpoint.url} (at most {most:,} with tries again): {told}", 0, 0, "")

    failed: list[PetoolError] = []  # since the last answer

    def hopeless() -> bool:
        return bool(failed) and (isinstance(failed[-1], Gone) or len(failed) >= min(_FAILURES, count))

    def ask(index: int) -> tuple[int, dict[str, Any] | None]:
        if hopeless():
            return index, None
        try:
            found, faults = _row(work, endpoint, index), []
        except PetoolError as error:
            found, faults = UNREAD | {"status": "engine_error", "error": error.message}, [*failed, error]
        if not hopeless():  # what ended it stays the last word
            failed[:] = faults
        return index, found

    with ThreadPool(min(variant.batch, count)) as pool:  # of daemons: Ctrl-C waits for no answer
        yield from ((index, found) for index, found in pool.imap_unordered(ask, work.entries) if found)
    if endpoint.without:
        report(f"{endpoint.url} did not take, and was asked without: {', '.join(endpoint.without)}", 0, 0, "")
    if hopeless():
        hint = failed[-1].hint or "the replies so far are kept; the same command goes on from here"
        raise PetoolError(failed[-1].message, hint)


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
        what = f"{endpoint.url} read {read:,} tokens where {least:,} characters are no less than told"
        raise PetoolError(f"{what}: {why} cuts prompts", "give its model a larger context, or a template with tools")
    # A call as a model of the petool style writes it, so that one parser reads all. Arguments that are no JSON object
    # stay as they were written: the model's fault, not the endpoint's.
    calls = (f'{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}' for name, arguments in answer.calls)
    text = "\n".join(f"{CALL_START}{call}{CALL_END}" for call in calls) or answer.text
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
    told = ((tool.name, tool.description[:400], *properties(tool)) for tool in entry.tools)
    return sum(len(text) for texts in told for text in texts)
