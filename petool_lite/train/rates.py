"""How fast this GPU is, measured in half a second: what the planner predicts speeds from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What a GPU does a second: operations in bfloat16 products and in attention, bytes moved within it and to the
    machine's memory."""

    products: float
    attention: float
    moved: float
    copied: float


def measured_rates() -> Rates:
    """Rates of the current GPU, in half a second."""
    import torch

    from petool_lite.train.attention import Bounds, attend

    def seconds(work: Any, times: int = 8) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        begin.record()
        for _ in range(times):
            work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / times

    numbers = {"device": "cuda", "dtype": torch.bfloat16}
    a, b = torch.randn(4096, 4096, **numbers), torch.randn(8192, 4096, **numbers)
    products = 2 * 4096 * 4096 * 8192 / seconds(lambda: a @ b.T)
    copied = torch.empty_like(b)
    moved = 2 * b.nbytes / seconds(lambda: copied.copy_(b))
    q, length = torch.randn(4096, 16, 128, **numbers), 4096
    ends = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    bounds = Bounds(ends, ends, (length,), (length,))
    attention = 2 * 16 * 128 * length**2 / seconds(lambda: attend(q, q, q, bounds, 0.1))
    there = torch.empty(b.shape, dtype=b.dtype, pin_memory=True)
    copied_out = max(
        b.nbytes / seconds(lambda: there.copy_(b, non_blocking=True)) for _ in range(3)
    )  # others copy, too
    # what whole updates reached of such short measurements, by twelve runs of a 3B model on one H200: products among
    # other work run slower (less power is left), attention over many heads faster
    return Rates(0.85 * products, 1.35 * attention, moved, copied_out)
