"""The adapter alone as a GGUF LoRA, which llama.cpp applies to a GGUF of the base."""

from pathlib import Path
from typing import Any

from petool_lite.export.gguf import file_order, gguf_name, permute
from petool_lite.export.merge import Adapter


def write_lora(path: Path, adapter: Adapter, config: dict[str, Any], extra: dict[str, str]) -> None:
    """Write A and B of every module in float32, B's rows in llama.cpp's order for q and k.

    llama.cpp scales by alpha / rank, so alpha is written such that this is the adapter's own scale.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
    for key, value in extra.items():
        writer.add_string(key, value)
    heads = config["num_attention_heads"]
    for name in sorted(adapter.modules, key=lambda name: file_order(gguf_name(name))):
        low, high = adapter.modules[name]
        if name.endswith("q_proj.weight"):
            high = permute(high, heads)
        elif name.endswith("k_proj.weight"):
            high = permute(high, config.get("num_key_value_heads", heads))
        writer.add_tensor(f"{gguf_name(name)}.lora_a", low.contiguous().numpy())
        writer.add_tensor(f"{gguf_name(name)}.lora_b", high.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
