"""Sequences of token ids: what two of them share, and from where a shared one may be read on."""

from collections.abc import Sequence

# llama.cpp's products of 1 to 9 rows were seen to round otherwise than larger ones, those of 10 and more all alike.
FEW_ROWS = 32


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share at their start."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def exact_start(shared: int, length: int, step: int) -> int:
    """The most of `shared` ids to keep so that the rest of `length` is read as a reading from the start reads it.

    That one reads parts of `step` ids and a last one. The part from here to the next multiple of `step` must have as
    many rows as there, or at least FEW_ROWS.
    """
    start = shared // step * step
    rows = min(start + step, length) - start
    return max(start, min(shared, start + rows - FEW_ROWS))
