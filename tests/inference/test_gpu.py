"""The GPU's replies on a CPU: batches answer as each prompt alone, free or constrained."""

from pathlib import Path
from typing import Any

import pytest
from support_families import family_model

from petool_lite.data.entries import Tool
from petool_lite.inference.constrain import Constrainer, Constraint
from petool_lite.inference.gpu import GpuModel
from petool_lite.inference.parse import parse_call
from petool_lite.prompt.render import chat_from_directory


def exact(folder: Path) -> GpuModel:
    """In float32: with random weights in 16 bits, rounding alone decides between tokens."""
    engine = GpuModel(folder, None, device="cpu")
    engine.model.float()
    return engine


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[(31 * place * place + 7 * length) % 40_000 + 10 for place in range(length)] for length in lengths]


def plain(model: Any, prompt: list[int], most: int, rule: Constraint | None = None) -> list[int]:
    """A reply by transformers' own code, one id a step; all that comes before it is read again for each."""
    import torch

    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (rule and rule.finished):
        logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].detach().numpy()
        ids.append((rule.forced() or [rule.choose(logits)])[0] if rule else int(logits.argmax()))
        if rule:
            rule.accept(ids[-1:])
    return ids[len(prompt) :]


def tool(name: str, *required: str) -> Tool:
    return Tool(name, "", {"properties": {key: {"type": "boolean"} for key in required}, "required": list(required)})


@pytest.mark.parametrize(("family", "jump"), [("Llama", 32), ("Mistral", 5), ("Qwen3", 3), ("Gemma 3", 32)])
def test_replies_are_those_of_a_plain_loop_in_any_batch(family, jump, tiny, tmp_path, monkeypatch) -> None:
    """Prompts longer and shorter than Mistral's and Gemma's window (48); forced ids are read `jump` at once, and
    rows end at different steps."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("petool_lite.inference.gpu._JUMP", jump)
    window = {"sliding_window": 48} if family == "Mistral" else {}
    folder = tiny if family == "Llama" else family_model(family, tiny, tmp_path, **window)
    model, prompts = exact(folder), prompts_of(50, 9, 1, 300)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    wanted = [tuple(plain(alone, prompt, 10)) for prompt in prompts]
    assert len(set(wanted)) > 1
    constrainer = Constrainer.from_directory(tiny, chat_from_directory(tiny).eos_id)
    offered = [[tool("first", "a")], [tool("second")], [tool("third"), tool("fourth", "a", "b")], [tool("fifth", "a")]]
    rules = [constrainer.start(tools, "petool") for tools in offered]
    called = [plain(alone, prompt, 60, rule)[:-1] for prompt, rule in zip(prompts, rules, strict=True)]
    for batch in (1, 3):
        found = dict(model.generate(prompts, 10, batch=batch))
        assert [found[index].ids for index in range(4)] == wanted
        assert {reply.finish for reply in found.values()} == {"length"}
        assert (found[3].prompt_tokens, found[3].prefill_s > 0, found[3].decode_s > 0) == (300, True, True)
        asked = prompts, 60, lambda index: constrainer.start(offered[index], "petool"), batch
        found = dict(model.generate(*asked))
        assert [list(found[index].ids) for index in range(4)] == called
        assert [found[index].confidence for index in range(4)] == [pytest.approx(r.confidence, rel=1e-3) for r in rules]
    for index, reply in found.items():
        assert parse_call(reply.text, offered[index]).name in {item.name for item in offered[index]}
        assert (reply.finish, 0 < reply.confidence <= 1) == ("stop", True)
    assert found[1].text == '<tool_call>\n{"name": "second", "arguments": {}}\n</tool_call>'
    assert found[1].ids == tuple(chat_from_directory(tiny).encode_batch([found[1].text])[0]), "as training has it"
    ((_, cut),) = model.generate(prompts[:1], 7, asked[2])
    assert (list(cut.ids), cut.finish, list(model.generate([], 10))) == (called[0][:7], "length", [])


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_an_adapter_counts_merged_or_on_a_4_bit_base(tiny, tmp_path, precision) -> None:
    """Logits are near those of base and adapter in float32, and not those of the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    exact = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), settings)
    exact.save_pretrained(tmp_path)
    prompt = torch.tensor(prompts_of(40))
    engine = GpuModel(tiny, tmp_path, precision, device="cpu")
    with torch.inference_mode():
        found, wanted = engine.model(prompt).logits[0, -1], exact.eval()(prompt).logits[0, -1]
        bare = GpuModel(tiny, None, precision, device="cpu").model(prompt).logits[0, -1]
    assert found.dtype == torch.float32, "not rounded to 16 bits"
    near, far = (found - wanted).abs().max(), (found - bare).abs().max()
    assert near < (0.02 if precision == "bf16" else 0.5) * wanted.abs().max() < far
