"""Real decodes: the AMX guard, greedy and repeatable replies, what was tuned."""

import shutil

import pytest
from cpu_speed import plain_reply

from petool_lite import ToolCaller
from petool_lite.data.entries import Tool
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.llama_open import EngineSettings, model_sha256, remember_settings, tuned_settings
from petool_lite.models import embedded_gguf


@pytest.fixture(scope="module")
def model():
    with LlamaModel(embedded_gguf(), n_ctx=1024) as loaded:
        yield loaded


def test_greedy_replies_are_sensible_and_a_prompt_of_two_batches_does_not_crash(model) -> None:
    """On AMX machines this killed the process before `use_extra_bufts` was turned off."""
    ids = model.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    reply = model.generate(ids, 32)
    assert ("Paris" in reply.text, reply.finish, "<|im_end|>" in reply.text) == (True, "stop", False)
    long = model.generate(model.encode("The capital of France is Paris. " * 90)[:600], 8)
    assert (long.prompt_tokens, len(long.ids), long.prefill_s > 0, long.decode_s > 0) == (600, 8, True, True)


def test_guesses_and_batches_change_no_reply(model) -> None:
    """A prompt that says what is to be copied: the guess holds, and then goes on where the reply ends."""
    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    tools = [Tool(name, "", schema) for name in ("shop.find", "shop.buy", "bank.pay")]
    query = "Buy 19 45 74 94 22 21 at the shop. Code: 19 45 74 94 22 21. Write a JSON call."
    ids = model.encode(f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n")
    constrainer, batches = model.constrainer(), list[int]()
    plain = plain_reply(model, ids, constrainer.start(tools, "petool"))
    evaluate = model._eval
    model._eval = lambda *parts: batches.append(len(parts[0])) or evaluate(*parts)
    reply = model.generate(ids, 60, constrainer.start(tools, "petool"))
    del model._eval
    assert [*reply.ids] == plain
    assert '"19 45 74 94 22 21"' in reply.text
    assert len(batches) < 0.7 * (len(reply.ids) - reply.forced_tokens)


def test_what_was_remembered_is_used_and_a_changed_file_is_not_mistaken(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.gguf"
    shutil.copy(embedded_gguf(), file)
    assert tuned_settings(file) == EngineSettings()
    chosen = EngineSettings(threads_decode=1, ubatch=256, flash_attention=True, kv_type="q8_0")
    remember_settings(file, chosen)
    with ToolCaller(file, n_ctx=512) as caller:
        assert caller._model.settings == chosen
        assert caller._model.generate(caller._model.encode("The capital of France is"), 4).text
    before = model_sha256(file)
    with file.open("ab") as open_file:
        open_file.write(b"x")
    assert model_sha256(file) != before
    assert tuned_settings(file) == EngineSettings()
