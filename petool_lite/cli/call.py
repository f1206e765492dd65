"""`petool-lite call`: one tool call from a GGUF file on this CPU."""

import json
import sys
from importlib import import_module
from typing import Any

import click

from petool_lite.cli.options import SETTING, as_json, chosen_model, engine_options
from petool_lite.console import print_json, say
from petool_lite.errors import USAGE, PetoolError
from petool_lite.places import user_path
from petool_lite.text import decode_text, parse_json, read_text


@click.command()
@click.argument("query", required=False)
@engine_options
@click.option("--tools", metavar="FILE", help="Tools of OpenAI, MCP or PEToolBench; - reads stdin.")
@click.option("--run", is_flag=True, help="Ask whether to run the call on its MCP server, run it, print the result.")
@click.option("--yes", is_flag=True, help="Run it without asking.")
@click.option("--history", metavar="FILE", help="Messages, or PEToolBench's calls; - reads stdin.")
@click.option("--request", metavar="FILE", help="An object: query, tools, history; messages, tools; or a whole entry.")
@click.option("--user", metavar="NAME", help="Whose call it is: kept, read for the next one, and rated with `rate`.")
@click.option("--setting", type=SETTING, help="PEToolBench: which prompt; the model's own if not given.")
@click.option("--required", is_flag=True, help="Call a tool even where none may fit.")
@click.option("--reply-tokens", default=512, type=click.IntRange(min=1), help="The longest reply.")
@click.option("--explain", is_flag=True, help="Also tell how likely each tool was, and the verdicts that bear on it.")
@click.option("--at-least", default=0.0, metavar="P", type=click.FloatRange(0, 1),
              help="Ask which tool is meant where the chosen one is less likely than this.")  # fmt: skip
@as_json
def call(**options: Any) -> None:
    """Print the tool call for QUERY as JSON, or a text where no tool fits.

    \b
    petool-lite call "Show past rates of EUR." --tools tools.json --history history.json --user ann"""
    from petool_lite.inference.helper import OPTIONS, answer

    if (options["run"] and not options["mcp"]) or (options["yes"] and not options["run"]):
        raise PetoolError("--run is for the tools of --mcp, and --yes for --run", "`petool-lite call --help`", USAGE)
    servers = import_module("petool_lite.data.mcp").Servers(options["mcp"]) if options["mcp"] else None
    asked = {"request": _request(options, servers)} | {name: options[name] for name in OPTIONS}
    try:
        document = answer(chosen_model(options["model"]), options["n_ctx"], asked)
    except PetoolError as failure:
        if options["as_json"] and (kind := getattr(failure, "kind", "")):
            print_json({"failure": kind, "error": failure.message, "reply": getattr(failure, "reply", "")})
        raise
    why = explanation(document["candidates"]) if options["explain"] else []
    kept = f"kept as {document['id']}; what did you think of it? petool-lite rate last liked" if document["id"] else ""
    for text in filter(None, (document["warning"], *document["notes"], *why, kept)):
        say(text)
    if not options["as_json"]:
        click.echo(json.dumps(document["call"], ensure_ascii=False) if document["call"] else document["text"])
    if servers and options["run"] and document["status"] == "call":
        _run(servers, options, document)
    elif options["as_json"]:
        print_json(document)


def _run(servers: Any, options: dict[str, Any], document: dict[str, Any]) -> None:
    """Run a call on its server, unless the user says no; print what it answered, and keep it where the call is kept."""
    from petool_lite.memory.store import Memory

    name, arguments = document["call"]["name"], document["call"]["arguments"]
    try:
        wanted = options["yes"] or click.confirm(f"run {name} {json.dumps(arguments)}?", err=True)
    except click.Abort:
        raise PetoolError("nobody said whether to run the call", "--yes runs it without asking", USAGE) from None
    found = servers.run(name, arguments) if wanted else None
    if found and document["id"]:
        Memory().use(lambda store: store.add_result(document["id"], found.text))
    if options["as_json"]:
        print_json(document | {"result": found and {"text": found.text, "failed": found.failed}})
    elif found and not found.failed:
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in found.text)
        click.echo(shown if sys.stdout.isatty() else found.text)
    if found is None:
        say("not run")
    elif found.failed:
        lines = found.text.strip().splitlines() or ["without a word"]
        raise PetoolError(f"{name} answered with an error: {lines[0][:200]}")


def _request(options: dict[str, Any], servers: Any = None) -> dict[str, Any]:
    """The request as an object: the whole of --request, or put together from the single options."""
    query, tools, history, whole = (options[name] for name in ("query", "tools", "history", "request"))
    if [tools, history, whole].count("-") > 1:
        raise PetoolError("only one of the files can be stdin", "write the others to files", USAGE)
    if whole and (tools or history):
        raise PetoolError("--request holds the tools and the history", "give it alone", USAGE)
    if not whole and (not query or bool(tools) == bool(servers)):
        wanted = "give a QUERY and --tools FILE or --mcp COMMAND, or --request FILE"
        raise PetoolError(wanted, "`petool-lite call --help`", USAGE)
    request = _read_json(whole, "--request") if whole else {}
    if isinstance(request, list) and len(request) == 1:
        request = request[0]
    if not isinstance(request, dict):
        raise PetoolError(f"{whole} is not one JSON object", "with query, tools and history")
    if servers and request.get("tools"):
        raise PetoolError("--request holds tools, and --mcp offers others", "give one of them", USAGE)
    if history:
        request["history"] = _read_json(history, "--history")
    if servers or tools:
        request["tools"] = servers.tools() if servers else _read_json(tools, "--tools")
    return request | ({"query": query} if query else {})


def _read_json(name: str, option: str) -> Any:
    place = "stdin" if name == "-" else name
    text = decode_text(sys.stdin.buffer.read(), place) if name == "-" else read_text(user_path(name))
    if not text.strip():
        raise PetoolError(f"{option}: {place} is empty", "expected JSON, see the README")
    return parse_json(text, f"{option}: {place}")


def explanation(candidates: list[dict[str, Any]]) -> list[str]:
    """Lines that tell how likely each candidate was and which earlier calls bear on it."""
    lines = ["why: how likely each tool is, and the calls of its provider"]
    for item in candidates:
        counts = [f"{item[word]} {word}" for word in ("liked", "disliked", "used") if item[word]]
        told = f"  ({', '.join(counts) or 'no earlier call'})" if item["name"] else ""
        lines.append(f"{100 * item['probability']:6.2f} %  {item['name'] or 'no tool'}{told}")
        signs = {"liked": "+", "disliked": "-", None: "*"}
        lines += [f"            {signs[made['verdict']]} {made['name']}: {made['query']}" for made in item["calls"]]
    return lines
