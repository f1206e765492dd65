"""Check a finished GGUF against the base it came from: same template, same end token, same token ids, it decodes."""

from pathlib import Path
from typing import Any

from petool_lite.base import Base
from petool_lite.console import Report
from petool_lite.data.demo import generate
from petool_lite.data.entries import parse_entry
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.prompt import Layout, chat_from_directory, prompt_ids

PROMPTS = 50


def verify(path: Path, base: Base, report: Report) -> dict[str, Any]:
    """Raise PetoolError unless `PROMPTS` rendered prompts give the same ids here and in the training tokenizer.

    The prompts mix letters, digits and JSON; the reply decoded at the end proves that the file loads and runs.
    """
    trained = chat_from_directory(base.directory)
    layout = Layout("rating", "published", 4096)
    entries = [parse_entry(row, "rating", "demo", index) for index, row in enumerate(generate("test", PROMPTS))]
    with LlamaModel(path, n_ctx=2048) as model:
        exported = model.chat()
        if (exported.template, exported.eos_id) != (trained.template, trained.eos_id):
            raise PetoolError(f"{path}: chat template or end token differ from the base's")
        for number, entry in enumerate(entries, 1):
            if prompt_ids(exported, entry, layout) != prompt_ids(trained, entry, layout):
                raise PetoolError(f"{path}: llama.cpp and the training tokenizer disagree on a prompt")
            report("checking token ids", number, PROMPTS, "")
        reply = model.generate(exported.encode("Hello"), 4)
    return {"prompts_with_equal_ids": PROMPTS, "decoded_tokens": len(reply.ids)}
