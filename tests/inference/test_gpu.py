"""The GPU's decoder on a CPU: what transformers answers, whatever the batch, merged and in 4 bits, free and held."""

from pathlib import Path

import pytest

from petool_lite.data.entries import Tool
from petool_lite.inference.constrain import Constrainer
from petool_lite.inference.decoder import Decoder, Memory
from petool_lite.inference.gpu import GpuModel, Job
from petool_lite.inference.parse import parse_call
from petool_lite.prompt.render import chat_from_directory


@pytest.fixture(scope="module")
def model(tiny):
    return GpuModel(tiny, None, device="cpu")


@pytest.fixture(scope="module")
def exact_model(tiny):
    """In float32: with random weights in 16 bits, rounding alone decides between tokens."""
    engine = GpuModel(tiny, None, device="cpu")
    engine._decoder = Decoder(engine.model.float())
    return engine


@pytest.fixture(scope="module")
def chat(tiny):
    return chat_from_directory(tiny)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[(31 * place * place + 7 * length) % 40_000 + 10 for place in range(length)] for length in lengths]


def job_of(chat, tokens: int, **more) -> Job:
    return Job(tokens, chat.eos_id, frozenset({chat.eos_id}), chat.decode, **more)


def transformers_reply(model, prompt: list[int], job: Job) -> tuple[int, ...]:
    import torch

    output = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=job.max_tokens, do_sample=False,
        eos_token_id=sorted(job.stops), pad_token_id=job.eos_id,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return tuple(output[: output.index(job.eos_id)] if job.eos_id in output else output)


def test_replies_are_those_of_transformers_in_any_batch(exact_model, chat) -> None:
    prompts, job = prompts_of(5, 90, 33, 300, 41), job_of(chat, 12)
    wanted = [transformers_reply(exact_model.model, prompt, job) for prompt in prompts]
    for batch in (1, 2, 5):
        found = dict(exact_model.generate(prompts, job, batch))
        assert [found[index].ids for index in range(5)] == wanted
        assert {reply.finish for reply in found.values()} == {"length"}
        assert found[3].prompt_tokens == 300


def test_in_16_bits_a_reply_does_not_depend_on_its_batch(model, chat) -> None:
    """Random weights, whose next tokens lie as near to each other as they ever do."""
    prompts, job = prompts_of(*range(10, 90, 10)), job_of(chat, 8)
    assert model.flips(prompts, job, 8, 4) == (0, 4)


def test_a_reply_ends_at_any_of_the_stop_ids_and_the_others_go_on(model, chat) -> None:
    from dataclasses import replace

    prompts, job = prompts_of(20, 50, 30), job_of(chat, 12)
    free = dict(model.generate(prompts, job, 3))
    stop = free[1].ids[4]
    found = dict(model.generate(prompts, replace(job, stops=frozenset({stop})), 3))
    assert (found[1].ids, found[1].finish) == (free[1].ids[: free[1].ids.index(stop)], "stop")
    for index in (0, 2):
        ids = free[index].ids
        assert found[index].ids == (ids[: ids.index(stop)] if stop in ids else ids)
    short = dict(model.generate(prompts, replace(job, stops=frozenset(), lengths=[3, 7, 1]), 3))
    assert [len(short[index].ids) for index in range(3)] == [3, 7, 1]


def random_adapter(base: Path, target: Path) -> Path:
    """An adapter on every linear, none of whose weights is zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(target)
    return target


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_an_adapter_counts_merged_or_on_a_4_bit_base(tiny, tmp_path, precision) -> None:
    """Logits are those of peft's own forward, and not those of the base."""
    import torch

    prompt = prompts_of(40)[0]
    engine = GpuModel(tiny, random_adapter(tiny, tmp_path / "adapter"), precision, device="cpu")

    def logits(loaded: GpuModel) -> torch.Tensor:
        memory = Memory(loaded._decoder.buffers(256), 1, 256)
        return loaded._decoder.read(prompt, memory, 0)

    with torch.inference_mode():
        found, wanted = logits(engine), engine.model(torch.tensor([prompt])).logits[0, -1].float()
        bare = logits(GpuModel(tiny, None, precision, device="cpu"))
    near, far = (found - wanted).abs().max(), (found - bare).abs().max()
    assert near < 0.02 * wanted.abs().max() < far


def tool(name: str, required: tuple[str, ...] = ()) -> Tool:
    return Tool(name, "", {"properties": {key: {"type": "boolean"} for key in required}, "required": list(required)})


def test_each_prompt_is_held_to_its_own_tools_in_any_batch(model, chat, tiny) -> None:
    constrainer = Constrainer.from_directory(tiny, chat.eos_id)
    offered = [[tool("first", ("a",))], [tool("second")], [tool("third"), tool("fourth", ("a", "b"))]]
    job = job_of(chat, 60, constrain=lambda index: constrainer.start(offered[index], "petool"))
    prompts = prompts_of(30, 9, 20)
    found = dict(model.generate(prompts, job, 3))
    for index, reply in found.items():
        assert parse_call(reply.text, offered[index]).name in {item.name for item in offered[index]}
        assert reply.forced_tokens > 3
    assert found[1].text == '<tool_call>\n{"name": "second", "arguments": {}}\n</tool_call>'
    alone = dict(model.generate(prompts, job, 1))
    assert [alone[index].ids for index in range(3)] == [found[index].ids for index in range(3)]


def test_batches_keep_to_the_memory_that_there_is(model, chat, monkeypatch) -> None:
    monkeypatch.setattr("petool_lite.inference.gpu._MEMORY_TOKENS", 1024)
    plan = model._plan(prompts_of(700, 300, 20, 10, 15), job_of(chat, 12), 64)
    assert plan == [([0], 768), ([1, 2], 512), ([4, 3], 256)]
