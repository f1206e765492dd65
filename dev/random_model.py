"""A GGUF file of Llama-3.2-3B's shape in q4_k_m with random weights: right for time and memory, silent on the rest.

`python dev/random_model.py FROM.gguf TARGET.gguf`: tokenizer, template and the keys of petool-lite come from FROM.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD, WORDS = 28, 3072, 8192, 24, 8, 128, 128_256
Q4, Q6 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
_BLOCK = 256  # weights of one block of either type


def random_blocks(rows: int, columns: int, kind: gguf.GGMLQuantizationType, draw: np.random.Generator) -> np.ndarray:
    """Blocks of random numbers whose scales make weights of about 1/sqrt(columns): uint8 (rows, bytes of a row)."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = draw.integers(0, 256, (rows * columns // _BLOCK, size), dtype=np.uint8)
    scale = np.float16(columns**-0.5 / (256 if kind == Q4 else 2048)).tobytes()
    if kind == Q4:  # d, dmin, then scales and numbers
        blocks[:, :4] = np.frombuffer(scale + np.float16(0).tobytes(), np.uint8)
    else:  # numbers and scales, then d
        blocks[:, -2:] = np.frombuffer(scale, np.uint8)
    return blocks.reshape(rows, -1)


def write(source: Path, target: Path) -> None:
    """Write the file; takes a minute and 2 GB."""
    writer, draw = gguf.GGUFWriter(target, "llama"), np.random.default_rng(0)
    for function, value in (
        (writer.add_context_length, 131_072), (writer.add_embedding_length, WIDTH), (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS),
        (writer.add_rope_dimension_count, HEAD), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 5e5), (writer.add_vocab_size, WORDS),
    ):  # fmt: skip
        function(value)
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith(("tokenizer.", "petool_lite.")):
            value = field.contents()
            if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
                more = range(len(value), WORDS)
                value += [f"[{number}]" for number in more] if key.endswith("s") else [5 for _ in more]  # 5: unused
            kind = field.types[0]
            writer.add_key_value(key, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (KV_HEADS * HEAD, WIDTH), "attn_v": (KV_HEADS * HEAD, WIDTH),
              "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
              "ffn_down": (WIDTH, INNER)}  # fmt: skip
    writer.add_tensor("token_embd.weight", random_blocks(WORDS, WIDTH, Q6, draw), raw_dtype=Q6)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            kind = Q6 if name in ("attn_v", "ffn_down") and layer % 2 else Q4
            writer.add_tensor(f"blk.{layer}.{name}.weight", random_blocks(*shape, kind, draw), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FROM.gguf", type=Path)
    parser.add_argument("target", metavar="TARGET.gguf", type=Path)
    write(**vars(parser.parse_args()))
