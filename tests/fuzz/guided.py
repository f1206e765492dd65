"""Coverage-guided fuzzing: `guided.py TARGET RUNS` lets atheris look for bytes that make a reader fail.

Hypothesis (the tests beside this file) makes inputs of a known shape; atheris watches which lines an input reaches and
keeps what reaches new ones. A target may raise what it promises and nothing else; a case may take 10 s and 2 GB.
Runs on Linux, where atheris installs: `make fuzz` does all targets, or says that it skipped them.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["petool_lite"]):
    from petool_lite.export.weights import find_tensors, open_weights

    from petool_lite.data.entries import Parameter, Tool, parse_entry
    from petool_lite.data.files import load_dataset
    from petool_lite.errors import PetoolError
    from petool_lite.inference.parse import CallFailure, parse_call
    from petool_lite.inference.request import request_entry, tools_from_openai
    from petool_lite.models import gguf_fields, open_gguf
    from petool_lite.prompt.render import Chat, Layout, prompt_ids
    from petool_lite.recipe import load_recipe, to_toml
    from petool_lite.scorer import published_call, score_reply
    from petool_lite.serve import _Refusal, engine_request

PLACE = Path(tempfile.mkdtemp(prefix="guided-"))
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = Chat(lambda texts: [[ord(letter) for letter in item] for item in texts], PLAIN, "<s>", "</s>", 2)
TOOLS = (Tool("a.b.c", "", (Parameter("x", "STRING", "", ""),), (Parameter("y", "NUMBER", "", ""),)),)
WORDS = [
    '"tool_name"',
    '"parameters"',
    '"query"',
    '"history"',
    '"rating"',
    '"required_parameters"',
    '"default"',
    '"type"',
]
WORDS += [
    "null",
    "true",
    "1e999",
    "[[",
    "{}",
    "}}",
    "\\u0000",
    "\\ud800",
    "[train]",
    "epochs",
    "base",
    "=",
    "<|im_end|>",
]


def recipe(raw: bytes) -> None:
    """A recipe file is read, and what is written of it reads back as it was."""
    path = PLACE / "any.toml"
    path.write_bytes(raw)
    _, found = load_recipe(str(path))
    path.write_text(to_toml(found))
    assert load_recipe(str(path))[1] == found


def entry(raw: bytes) -> None:
    """An entry is parsed and laid out in both styles."""
    found = parse_entry(_json(raw), "rating", "the file", 0)
    for style in ("published", "compact"):
        prompt_ids(CHAT, found, Layout("rating", style, 4096))


def data(raw: bytes) -> None:
    """A data file is read."""
    path = PLACE / "any.json"
    path.write_bytes(raw)
    load_dataset(str(path), "rating")


def reply(raw: bytes) -> None:
    """A reply is a call or a named failure, and can be scored."""
    said = raw.decode("utf-8", "surrogateescape")
    with contextlib.suppress(CallFailure):
        assert "x" in parse_call(said, TOOLS, "stop").parameters
    published_call(said)
    score_reply(said, {"tool_name": "a.b.c", "parameters": {"x": ""}})


def request(raw: bytes) -> None:
    """Tools and history of a request become an entry."""
    found = _json(raw)
    request_entry("q", found.get("tools"), found.get("history"), "rating")
    request_entry("q", tools_from_openai(found.get("tools")), [], "rating")


def body(raw: bytes) -> None:
    """The body of an HTTP request is understood or refused."""
    with contextlib.suppress(_Refusal):
        engine_request(_json(raw))


def gguf(raw: bytes) -> None:
    """The header of a GGUF file is read."""
    path = PLACE / "any.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    gguf_fields(open_gguf(path))


def weights(raw: bytes) -> None:
    """A safetensors file is read."""
    (PLACE / "model.safetensors").write_bytes(raw)
    tensors = find_tensors(
        PLACE, {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "tie_word_embeddings": True}
    )
    with open_weights(tensors) as reader:
        for tensor in tensors:
            reader.whole(tensor)


def _json(raw: bytes) -> dict[str, Any]:
    """What the bytes say; a PetoolError where that is no object, as those targets are not about parsing JSON."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise PetoolError("no JSON") from error
    if not isinstance(found, dict):
        raise PetoolError("no object")
    return found


def seeds(target: str) -> list[bytes]:
    """Sound inputs to begin from."""
    tool = {
        "tool_name": "<A>.<B>.<c>",
        "tool_description": "does",
        "required_parameters": [],
        "optional_parameters": [],
    }
    tool["required_parameters"] = [{"name": "x", "type": "STRING", "description": "one", "default": "a"}]
    call = {"tool_name": "<A>.<B>.<c>", "parameters": {"x": "y"}}
    past = [{"instruction": "do", "tool_call": call, "rating": 1}]
    prompt = f"Past: {json.dumps(past)} Tools: {json.dumps([tool])} End"
    row = {
        "query": "q",
        "instruction_ratings": prompt,
        "api_call_ground_truth": call,
        "apis_candidate": json.dumps([tool]),
    }
    function = {"name": "c", "parameters": {"properties": {"x": {"type": "string"}}, "required": ["x"]}}
    asked = {"messages": [{"role": "user", "content": "q"}], "tools": [{"type": "function", "function": function}]}
    found: dict[str, list[Any]] = {
        "entry": [row, {"instruction": prompt, "input": "q", "output": json.dumps(call)}],
        "data": [[row, row]],
        "reply": [call, {"tool_name": "a.b.c", "parameters": {"x": "1", "y": 2}}],
        "request": [{"tools": [tool], "history": past}, asked],
        "body": [asked | {"history": past, "tool_choice": "required", "max_tokens": 5, "user": "ann", "stream": False}],
    }
    if target == "recipe":
        return [b'[train]\nepochs = 2\nobjective = "sft"\n[lora]\ntargets = ["q_proj"]\n[data]\nlimit = 3\n']
    if target == "gguf":
        return [
            b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\x04\0\0\0\0\0\0\0name\x08\0\0\0\1\0\0\0\0\0\0\0a"
        ]
    if target == "weights":
        parts = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo")]
        parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        names = [*(f"model.layers.0.{part}.weight" for part in parts), "model.embed_tokens.weight", "model.norm.weight"]
        shapes = [[1] if "norm" in name else [1, 1] for name in names]
        told = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [4 * place, 4 * place + 4]}
            for place, (name, shape) in enumerate(zip(names, shapes, strict=True))
        }
        head = json.dumps(told).encode()
        return [len(head).to_bytes(8, "little") + head + b"\0\0\x80\x3f" * len(names)]
    return [json.dumps(item).encode() for item in found[target]]


TARGETS: dict[str, Callable[[bytes], None]] = {
    check.__name__: check for check in (recipe, entry, data, reply, request, body, gguf, weights)
}


def main() -> None:
    """Run one target; atheris ends the process, with a code other than 0 for a finding."""
    target, runs = sys.argv[1], int(sys.argv[2])

    def one(raw: bytes) -> None:
        with contextlib.suppress(PetoolError):
            TARGETS[target](raw)

    corpus = PLACE / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(target)):
        one(seed)
        (corpus / str(number)).write_bytes(seed)
    words = PLACE / "words"
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in WORDS)  # as libFuzzer reads them
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    limits = [
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
        f"-artifact_prefix={PLACE}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-dict={words}", *limits, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
