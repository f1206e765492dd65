"""The weights that 4-bit training saw: through bitsandbytes' NF4 with double quantization and back."""

from typing import Any


def round_trip(weight: Any) -> Any:
    """Quantize a float32 matrix (rows, columns) to NF4 and back; returns bfloat16 on the CPU.

    The settings are those of training: blocks of 64, scales quantized again, bfloat16 weights and compute.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(
        weight.to(device, torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state).to("cpu", torch.bfloat16)
