"""The exported file in programs that are not ours: llama.cpp's own server and llama-cpp-python's chat handler."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from petool_lite.export.other_server import OtherServer

from petool_lite import ToolCaller
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.data.openai import entry_messages, tool_json
from petool_lite.errors import PetoolError
from petool_lite.inference.constrain import Constraint
from petool_lite.inference.llama import LlamaModel
from petool_lite.prompt.render import Layout, prompt_ids

pytest.importorskip("xllamacpp")
PETOOL = Layout("petool", 8192)
EVERYDAY = Path(__file__).parents[3] / "shared" / "everyday.jsonl"


def asked(source: str) -> tuple[Entry, ...]:
    if source == "everyday" and not EVERYDAY.is_file():
        pytest.skip(f"no {EVERYDAY}")
    return load_dataset(str(EVERYDAY) if source == "everyday" else source).entries


def body_of(entry: Entry) -> dict[str, Any]:
    return {"messages": entry_messages(entry), "tools": [tool_json(tool) for tool in entry.tools]}


@pytest.mark.parametrize("source", ["demo:test:50", "everyday"])
def test_they_read_the_ids_that_training_used(exported, source) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    file = exported / "runs" / "one" / "export" / "model.q8_0.gguf"
    server = OtherServer(file)
    with LlamaModel(file, vocab_only=True) as model:
        chat, template = model.chat(), model.metadata["tokenizer.chat_template"]
        handler = Jinja2ChatFormatter(template, eos_token=chat.eos_token, bos_token=chat.bos_token)
        for entry in asked(source):
            wanted = prompt_ids(chat, entry, PETOOL).ids
            assert server.ids(body_of(entry)) == wanted, entry.id
            assert chat.encode(handler(**body_of(entry)).prompt) == wanted, entry.id


def read_anew(self: LlamaModel, ids: Sequence[int], reuse: bool = True) -> int:
    return READ(self, ids, False)


READ = LlamaModel.read


def one_by_one(self: Constraint) -> list[int]:
    """As llama.cpp's server decodes: tokens without a choice are not read in one batch."""
    return [self.eos_id] if not self.finished and self._matcher.is_stopped() else []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["demo:test:40", "everyday"])
def test_the_official_client_gets_the_same_call_from_both(monkeypatch, source) -> None:
    """PETOOL_LITE_DEMO: the GGUF file of `make demo`.

    llama.cpp rounds products of one row otherwise than those of several, by up to 0.7 of a logit in this file. So the
    same call is asked of the same arithmetic: the whole prompt read, then one token at a time. How often a batch of
    tokens without a choice, or a prompt read in part before, gives another call is printed.
    """
    from openai import OpenAI

    file = Path(os.environ.get("PETOOL_LITE_DEMO", ""))
    if not file.is_file():
        pytest.skip("PETOOL_LITE_DEMO names no file")
    entries, server, found = asked(source), OtherServer(file, 4096), dict[str, list[Any]]()
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for entry in entries:
        more = {"model": "any", "temperature": 0, "extra_body": {"cache_prompt": False}}
        message = client.chat.completions.create(**more, **body_of(entry)).choices[0].message
        calls = [Call(item.function.name, json.loads(item.function.arguments)) for item in message.tool_calls or []]
        found.setdefault("theirs", []).append(calls[0] if calls else message.content)
    for way in ("in batches", "one by one"):
        if way == "one by one":
            monkeypatch.setattr(Constraint, "forced", one_by_one)
            monkeypatch.setattr(LlamaModel, "read", read_anew)
        with ToolCaller(file) as caller:
            found[way] = [answer(caller, entry) for entry in entries]
    pairs = [list(zip(entries, found[way], found["theirs"], strict=True)) for way in ("in batches", "one by one")]
    batches, singles = [[pair for pair in way if pair[1] != pair[2]] for way in pairs]
    right = sum(item.answer == ours for item, ours, _ in pairs[0])
    print(f"{len(entries) - len(batches)} of {len(entries)} the same, {right} right; other:")
    print(*((entry.query, *calls) for entry, *calls in batches), sep="\n")
    assert not singles


def answer(caller: ToolCaller, entry: Entry) -> Any:
    try:
        return caller.call_entry(entry).answer
    except PetoolError as error:
        return error.message
