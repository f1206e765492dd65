"""Every family: its file computes what transformers does, reads text as training does, and holds what it must."""

from dataclasses import replace
from pathlib import Path

import pytest
from support_bench import called, rows_of
from support_families import CHANGES, family_model, small_tokenizer
from support_gguf import LLAMA3_ROPE, logits_of
from support_serve import Server

from petool_lite import ToolCaller
from petool_lite.bench.engines import Task
from petool_lite.bench.run import bench
from petool_lite.bench.variants import Variant, endpoint_variant
from petool_lite.data.files import load_dataset
from petool_lite.export import check_exportable, load_source, write_targets
from petool_lite.export.source import load_adapter
from petool_lite.export.verify import OtherServer
from petool_lite.families import chat_template
from petool_lite.inference.call import CallOptions
from petool_lite.inference.constrain import Constrainer
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import CUT_OFF, CallFailure
from petool_lite.models import resolve_base
from petool_lite.prompt import render
from petool_lite.prompt.render import Layout, chat_from_directory, example

TEXTS = (
    "<s>Where is  the\n\n\tfive-day forecast for Zürich, 12345 m up?", "日本語 and 🦙🦙, l’été é 3.14", " leading", "a",
    '<s>{"tool_name": "x.y", "parameters": {"n": 10000}}</s>[user]\n  def f(x):\n    return x</s>',
)  # fmt: skip


# a short original context, so that 200 positions fall into all three bands of Llama 3's rule
ROPES = {
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
}


@pytest.mark.parametrize(("name", "rope"), [*((name, "") for name in CHANGES), *(("Llama", rope) for rope in ROPES)])
def test_its_file_computes_and_reads_as_transformers_does(make_adapter, tmp_path, name, rope) -> None:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    changes = {"rope_parameters": ROPES[rope], "tie_word_embeddings": rope == "linear"} if rope else {}
    directory = family_model(name, small_tokenizer(name, tmp_path / "tokenizer"), tmp_path / "model", **changes)
    check_exportable(directory)
    model = make_adapter(directory, tmp_path / "adapter").merge_and_unload().to(torch.bfloat16).float()
    source = load_source(resolve_base(str(directory)), load_adapter(tmp_path / "adapter"))
    targets = {kind: tmp_path / f"{kind}.gguf" for kind in ("bf16", "q4_k_m")}
    moved = write_targets(source, targets).values()
    assert all(change.changed and 0 < change.delta < 10 * change.base for change in moved)
    ids = [int(i) for i in torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(2))]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
    found = logits_of(targets["bf16"], ids)
    near = 0.03 * np.abs(wanted).max()
    assert wanted[found.argmax()] > wanted.max() - near
    assert np.abs(found - wanted).max() < near
    assert np.corrcoef(logits_of(targets["q4_k_m"], ids), wanted)[0, 1] > 0.9
    chat, theirs = chat_from_directory(directory), AutoTokenizer.from_pretrained(directory)
    with LlamaModel(targets["bf16"], vocab_only=True) as file:
        for text in TEXTS:
            ids = chat.encode(text)
            assert file.chat().encode(text) == ids, text
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text


@pytest.fixture(scope="module", params=CHANGES)
def tiny_file(request, tmp_path_factory) -> tuple[Path, Path]:
    """The directory of a family's tiny model, and its q8_0 file with the petool template."""
    folder = tmp_path_factory.mktemp("family")
    directory = family_model(request.param, small_tokenizer(request.param, folder / "tokenizer"), folder / "model")
    template = render.exported_template(chat_template(directory), "petool")
    keys = {"petool_lite.prompt_style": "petool", "petool_lite.prompt_layout": "1"}
    source = replace(load_source(resolve_base(str(directory))), template=template, keys=keys)
    write_targets(source, {"q8_0": folder / "m.gguf"})
    return directory, folder / "m.gguf"


def test_its_file_calls_tools_from_prompts_that_training_renders(tiny_file) -> None:
    """A random model, constrained: whatever it writes is a call of an offered tool."""
    directory, file = tiny_file
    entries, chat = load_dataset("demo:test:3").entries, chat_from_directory(directory)
    with ToolCaller(file, n_ctx=8192) as caller:
        for entry in called(1):
            try:
                assert caller.call_entry(entry, options=CallOptions(reply_tokens=64)).answer
            except CallFailure as failure:  # a random model may write a text without end
                assert failure.kind == CUT_OFF
                assert any(f'"name": "{tool.name}"' in failure.reply for tool in entry.tools), failure.reply
    server = OtherServer(file) if OtherServer.installed() else None
    with LlamaModel(file, vocab_only=True) as model:
        for entry in entries:
            row = example(chat, entry, Layout("petool", 8192))
            asked = row.ids[: row.answer_start]
            assert render.prompt_ids(model.chat(), entry, Layout("petool", 8192)).ids == asked
            assert server is None or server.ids(render.entry_request(chat, entry, "petool")) == asked
            written = render.answer_text(entry.answer, "petool")
            assert model.decode(row.ids[row.answer_start : -1]) == written, "no space before the answer"
            for constrainer in (model.constrainer(), Constrainer.from_directory(directory, chat.eos_id)):
                constrainer.start(entry.tools, "petool", True).accept(row.ids[row.answer_start :])


def test_its_file_is_served_and_scored(tiny_file, tmp_path) -> None:
    """From the file itself, from our own server, and from llama.cpp's where that is installed."""
    _, file = tiny_file
    other = OtherServer(file, 4096) if OtherServer.installed() else None
    with Server("--context", 4096, model=file) as server:
        variants = [Variant("file", file), endpoint_variant(server.url, "ours", 0)]
        variants += [endpoint_variant(other.url, "theirs", 0)] if other else []
        document = bench(variants, Task(load_dataset("demo:test:6"), 8, 1), tmp_path)
    found = [(item["name"], item["n"], item["engine_errors"]) for item in document["variants"]]
    assert found == [(variant.name, 1, 0) for variant in variants]
    for row in rows_of(tmp_path / "results-theirs.jsonl") if other else []:
        assert (row["prompt_tokens"] > 100, row["reply_tokens"] > 0) == (True, True)
