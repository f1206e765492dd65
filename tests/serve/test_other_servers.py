"""The exported file in programs that are not ours: llama.cpp's own server and llama-cpp-python's chat handler."""

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petool_lite import ToolCaller
from petool_lite.data.entries import Call
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.inference.llama import LlamaModel
from petool_lite.prompt.render import Layout, prompt_ids

xllamacpp = pytest.importorskip("xllamacpp")
PETOOL = Layout("petool", 8192)


def served(file: Path, n_ctx: int) -> Callable[[str, dict[str, Any]], Any]:
    """llama.cpp's HTTP server on the file, told nothing but where it lies; how to ask it, and its address."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.offline = str(file), n_ctx, 1, True
    params.cpuparams.n_threads, params.warmup, params.use_jinja = 2, False, True
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        asked = urllib.request.Request(f"{server.listening_address}{path}", data, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(asked, timeout=300))

    ask.server = server  # type: ignore[attr-defined]
    return ask


def body_of(entry: Any) -> dict[str, Any]:
    return {"messages": entry_messages(entry), "tools": [tool_json(tool) for tool in entry.tools]}


def test_they_read_the_ids_that_training_used(exported) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    file = exported / "runs" / "one" / "export" / "model.q8_0.gguf"
    entries = load_dataset("demo:test:50").entries
    ask = served(file, 2048)
    with LlamaModel(file, vocab_only=True) as model:
        chat, template = model.chat(), model.metadata["tokenizer.chat_template"]
        handler = Jinja2ChatFormatter(template, eos_token=chat.eos_token, bos_token=chat.bos_token)
        for entry in entries:
            wanted = prompt_ids(chat, entry, PETOOL).ids
            text = ask("/apply-template", body_of(entry))["prompt"]
            found = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            assert found == wanted, entry.id
            assert chat.encode(handler(**body_of(entry)).prompt) == wanted, entry.id


@pytest.mark.slow
def test_the_official_client_gets_the_same_call_from_both() -> None:
    """PETOOL_LITE_DEMO: the GGUF file of `make demo`; for 40 entries of its test data."""
    from openai import OpenAI

    file = Path(os.environ.get("PETOOL_LITE_DEMO", ""))
    if not file.is_file():
        pytest.skip("PETOOL_LITE_DEMO names no file")
    ask, same, other = served(file, 4096), 0, []
    client = OpenAI(base_url=f"{ask.server.listening_address}/v1", api_key="none")  # type: ignore[attr-defined]
    with ToolCaller(file) as caller:
        for entry in load_dataset("demo:test:40").entries:
            ours = caller.call_entry(entry).answer
            message = client.chat.completions.create(model="any", temperature=0, **body_of(entry)).choices[0].message
            calls = message.tool_calls or []
            theirs = [Call(item.function.name, json.loads(item.function.arguments)) for item in calls] or [
                message.content
            ]
            same += theirs == [ours]
            other += [] if theirs == [ours] else [(entry.query, ours, theirs)]
    print(f"{same} of 40 the same", *other, sep="\n")
    assert same == 40
