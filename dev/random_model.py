"""A random model of Llama-3.2-3B's shape and an adapter for it: right for time and memory, silent on the rest.

`python dev/random_model.py WORK TOKENIZER [TARGET.gguf]` writes WORK/Llama-3B-random and WORK/adapter; TOKENIZER is a
folder with tokenizer.json and tokenizer_config.json. TARGET is a q4_k_m file of it, with the petool prompt.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

SHAPE = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 128_000, "eos_token_id": 128_009,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip


def make(work: Path, tokenizer: Path) -> Path:
    """Write base and adapter; takes minutes and 13 GB of memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    base, model = work / "Llama-3B-random", LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(base, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, base / name)
    tuned = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, matrix in tuned.named_parameters():
        if "lora_B" in name:
            matrix.data.normal_(0, 0.01)
    tuned.save_pretrained(work / "adapter")
    return base


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python dev/random_model.py WORK TOKENIZER [TARGET.gguf]")
    made = make(Path(sys.argv[1]), Path(sys.argv[2]))
    if len(sys.argv) == 4:
        from petool_lite.export import load_source, write_targets

        from petool_lite.families import chat_template
        from petool_lite.models import resolve_base
        from petool_lite.prompt.render import LAYOUTS, exported_template

        source = load_source(resolve_base(str(made)))
        source = replace(source, template=exported_template(chat_template(made), "petool"))
        keys = {"petool_lite.prompt_style": "petool", "petool_lite.prompt_layout": str(LAYOUTS["petool"])}
        write_targets(source, {"q4_k_m": Path(sys.argv[3])}, keys)
