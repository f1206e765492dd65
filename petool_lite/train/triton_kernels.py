"""The GPU's side of `kernels`: one program a token, or a token and a block of columns. Imported on a GPU only."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, normed, inverse, weight, width, epsilon, BLOCK: tl.constexpr):
    """normed = x / rms * weight; inverse = 1 / rms."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + epsilon)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + columns, (value * scale * factor).to(normed.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def rms_norm_backward(gradient, x, inverse, weight, added, result, width, BLOCK: tl.constexpr):
    """result = added + the gradient of the norm."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(inverse + row)
    given = tl.load(gradient + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    given *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    hat = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
    own = scale * (given - hat * (tl.sum(given * hat, axis=0) / width))
    own += tl.load(added + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * width + columns, own.to(result.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    heads, cos, sin, positions, token_stride, head_stride, count, half,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token, in place."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    columns = tl.arange(0, HALF)
    c = tl.load(cos + position * half + columns, mask=columns < half, other=0.0)[None, :]
    s = tl.load(sin + position * half + columns, mask=columns < half, other=0.0)[None, :]
    if BACKWARD:
        s = -s
    lines = tl.arange(0, HEADS)
    inside = (lines[:, None] < count) & (columns[None, :] < half)
    first = heads + row * token_stride + lines[:, None] * head_stride + columns[None, :]
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate_up, result, width, BLOCK: tl.constexpr):
    """result = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * width + columns, (gate * tl.sigmoid(gate) * up).to(result.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gate_up, gradient, width, BLOCK: tl.constexpr):
    """gate_up becomes its gradient, gradient becomes silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gates = gate_up + row * 2 * width + columns
    place = gradient + row * width + columns
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(place, (gate * share * up).to(gradient.dtype.element_ty), mask=inside)
    tl.store(gates, (given * up * share * (1.0 + gate * (1.0 - share))).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gates + width, (given * gate * share).to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def dropped(x, result, width, chance, seed, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Four blocks of columns a program, so that each of the generator's four numbers is used."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * 4 * BLOCK
    columns = tl.arange(0, BLOCK)
    counter = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * BLOCK + columns
    one, two, three, four = tl.rand4x(seed, counter)
    scale = 1.0 / (1.0 - chance)
    for part in tl.static_range(4):
        place = start + part * BLOCK + columns
        inside = place < width
        number = one
        if part == 1:
            number = two
        if part == 2:
            number = three
        if part == 3:
            number = four
        value = tl.load(x + row * width + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(number >= chance, value * scale, 0.0)
        if ADDED:
            value += tl.load(result + row * width + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + row * width + place, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def unpacked_nf4(packed, codes, nested_codes, nested, outer, offset, result, count, BLOCK: tl.constexpr):
    """NF4 with double quantization (bitsandbytes' layout: blocks of 64 weights, of 256 scales) to bfloat16.

    A byte holds two weights, the first in its high half. A scale is nested_codes[nested] * outer + offset.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    byte = tl.load(packed + index, mask=inside, other=0).to(tl.int32)
    block = index // 32
    scale = tl.load(nested_codes + tl.load(nested + block, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(outer + block // 256, mask=inside, other=0.0) + tl.load(offset)
    high = tl.load(codes + (byte >> 4)) * scale
    low = tl.load(codes + (byte & 15)) * scale
    both = tl.interleave(high, low).to(result.dtype.element_ty)
    places = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(result + places, both, mask=places < 2 * count)
