"""`petool-lite call` and `petool-lite serve`: tool calls from a GGUF file on this CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from petool_lite.cli.data import SETTING, as_json
from petool_lite.errors import USAGE, PetoolError

model_option = click.option(
    "--model", default=None, metavar="FILE", help="A GGUF file; the newest run's smallest export if not given."
)
context_option = click.option(
    "--context", "n_ctx", default=0, type=click.IntRange(min=0), help="Tokens of prompt and reply together. [8192]"
)
decoding_option = click.option(
    "--decoding",
    type=click.Choice(["constrained", "free", "likelihood"]),
    default="constrained",
    show_default=True,
    help="Only calls of the offered tools; anything; or constrained, the tool picked by its whole name's probability.",
)
trim_option = click.option("--trim-history", is_flag=True, help="Let old history go where the prompt is too long.")


def chosen_model(name: str | None) -> Path:
    """The named GGUF file, or the newest complete run's smallest export."""
    if name is not None:
        return Path(name).expanduser()
    from petool_lite.bench.variants import tuned_file
    from petool_lite.runs import find_run

    try:
        run = find_run(None)
    except PetoolError as error:
        raise PetoolError(error.message, f"{error.hint}; or give --model FILE.gguf") from error
    return tuned_file(run)


@click.command()
@click.argument("query", required=False)
@model_option
@click.option("--tools", default=None, metavar="FILE", help="JSON list of tools; - reads stdin.")
@click.option("--history", default=None, metavar="FILE", help="JSON list of earlier calls; - reads stdin.")
@click.option(
    "--request",
    default=None,
    metavar="FILE",
    help="Everything in one JSON object: query, tools, history; or a published entry. - reads stdin.",
)
@click.option(
    "--user", default=None, metavar="NAME", help="Keep what was read for this user on disk for the next call."
)
@click.option("--setting", type=SETTING, default=None, help="What the history tells; the file's own if not given.")
@decoding_option
@trim_option
@context_option
@click.option("--reply-tokens", default=512, show_default=True, type=click.IntRange(min=1), help="The longest reply.")
@click.option("--explain", is_flag=True, help="Also tell how likely each tool was, and the ratings that bear on it.")
@as_json
def call(**options: Any) -> None:
    """Print the tool call for QUERY as JSON.

    \b
    petool-lite call "Show past rates of EUR." --tools tools.json --history history.json --user ann
    """
    from petool_lite.inference.parse import CallFailure
    from petool_lite.inference.tool_caller import ToolCaller

    request = _request(options)
    with ToolCaller(chosen_model(options["model"]), options["n_ctx"]) as caller:
        try:
            reply = _made(caller, request, options)
        except CallFailure as failure:
            if options["as_json"]:
                print(json.dumps({"failure": failure.kind, "error": failure.message, "reply": failure.reply}))
            raise
    _show_call(reply, options)


def _request(options: dict[str, Any]) -> dict[str, Any]:
    """The request as an object: the whole of --request, or put together from the single options."""
    sources = [options[name] for name in ("tools", "history", "request")]
    if sources.count("-") > 1:
        raise PetoolError("only one of the files can be stdin", "write the others to files", USAGE)
    if options["request"]:
        if options["tools"] or options["history"]:
            raise PetoolError("--request holds the tools and the history", "give it alone", USAGE)
        request = _read_json(options["request"], "--request")
        if isinstance(request, list) and len(request) == 1:
            request = request[0]
        if not isinstance(request, dict):
            raise PetoolError(f"{options['request']} is not one JSON object", "with query, tools and history")
        return request | ({"query": options["query"]} if options["query"] else {})
    if not options["query"] or not options["tools"]:
        raise PetoolError("give a QUERY and --tools FILE, or --request FILE", "`petool-lite call --help`", USAGE)
    history = _read_json(options["history"], "--history") if options["history"] else []
    return {"query": options["query"], "tools": _read_json(options["tools"], "--tools"), "history": history}


def _read_json(name: str, option: str) -> Any:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
        if not text.strip():
            raise PetoolError(f"{option}: {'stdin' if name == '-' else name} is empty", "expected JSON, see the README")
        return json.loads(text)
    except OSError as error:
        raise PetoolError(f"{option}: cannot read {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PetoolError(f"{option}: {name} is not JSON: {error}") from error


def _made(caller: Any, request: dict[str, Any], options: dict[str, Any]) -> Any:
    from petool_lite.inference.request import published_entry
    from petool_lite.inference.tool_caller import CallOptions

    chosen = CallOptions(
        options["decoding"],
        options["setting"],
        options["trim_history"],
        options["explain"],
        options["reply_tokens"],
    )
    if any(key.startswith("instruction") for key in request):
        entry = published_entry(request, options["setting"] or caller.trained_setting)
        return caller.call_entry(entry, options["user"], chosen)
    if not isinstance(request.get("query"), str):
        raise PetoolError("the request has no query", "a text under the key query")
    return caller.call(request["query"], request.get("tools"), request.get("history", []), options["user"], chosen)


def _show_call(reply: Any, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    from petool_lite.console import print_json, say

    if reply.warning:
        say(reply.warning)
    if options["explain"]:
        for line in explanation(reply.candidates):
            say(line)
    call = {"tool_name": reply.call.tool_name, "parameters": dict(reply.call.parameters)}
    if not options["as_json"]:
        click.echo(reply.call.to_json())
        return
    facts = {"history_dropped": reply.history_dropped, "saved_bytes": reply.saved_bytes}
    print_json({"call": call, "timings": reply.timings, **facts, "candidates": [asdict(c) for c in reply.candidates]})


def explanation(candidates: Any) -> list[str]:
    """Lines that tell how likely each candidate was and which ratings bear on it."""
    lines = ["why: how likely each tool's name is, and the calls of its provider"]
    for item in candidates:
        counts = [f"{item.ratings[word]} {word}" for word in ("liked", "disliked", "unrated") if item.ratings[word]]
        lines.append(f"{100 * item.probability:6.2f} %  {item.tool_name}  ({', '.join(counts) or 'no earlier call'})")
        marks = {1: "+", 0: "-", None: "*"}
        lines += [
            f"            {marks[c['rating']]} {c['tool_name']}: {c['instruction']}" for c in item.ratings["calls"]
        ]
    return lines


@click.command()
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Any but a loopback address needs an API key.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option(
    "--api-key", envvar="PETOOL_LITE_API_KEY", default=None, help="What clients must send; better in the environment."
)
@click.option("--queue", default=8, show_default=True, type=click.IntRange(min=1), help="Requests that may wait.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds a request may take, waiting included.")
@click.option("--max-request", default=4, show_default=True, type=click.IntRange(min=1), help="MiB of one request.")
@decoding_option
@trim_option
@context_option
def serve(**options: Any) -> None:
    """Serve /v1/chat/completions, /v1/models and /health for OpenAI clients."""
    from petool_lite.serve import ServeSettings, run

    settings = ServeSettings(
        model=chosen_model(options["model"]),
        host=options["host"],
        port=options["port"],
        api_key=options["api_key"],
        queue=options["queue"],
        timeout_s=options["timeout"],
        max_bytes=options["max_request"] * 2**20,
        n_ctx=options["n_ctx"],
        decoding=options["decoding"],
        trim_history=options["trim_history"],
    )
    run(settings)
