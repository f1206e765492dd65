"""Decoder layers of the Llama family with LoRA on frozen linears: forward, and a backward that is written out.

Every layer is two blocks, attention and MLP. A block keeps its input and little else, recomputes the rest where the
recipe asks for it, unpacks a frozen matrix once a pass, and multiplies by q, k and v (gate and up) in one go. The last
layer works for the tokens that answers are predicted from, since nothing reads the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from petool_lite.train import kernels
from petool_lite.train.attention import Bounds, attend, attend_backward
from petool_lite.train.shelf import Shelf

CHUNK = 8192  # tokens that go through an MLP at once where its activations are recomputed: bounds the memory


@dataclass
class Adapter:
    """LoRA of one linear in a Projection: outputs `columns`, ranks `ranks` of the joint down matrix."""

    columns: slice
    ranks: slice
    up: Any
    scale: float
    number: int  # of the linear in the model: parts its dropout from others'


@dataclass
class Projection:
    """Linears that share an input: frozen weights, and the adapters on some of them, in the model's dtype.

    `down` is (ranks of all, inputs), the matrices up lie in the adapters. `modules` hold the float32 parameters that
    they are copies of, in the order down, up for each adapter; a loaded checkpoint may replace the parameters.
    """

    frozen: Any
    adapters: list[Adapter]
    down: Any
    chance: float
    modules: list[Any] = field(default_factory=list)

    @property
    def sources(self) -> list[Any]:
        """The adapters' parameters, whose gradients `adapter_gradients` finds."""
        return [module.weight for module in self.modules]

    def forward(self, x: Any, seed: int) -> tuple[Any, Any]:
        """Outputs (tokens, outputs of all) and the adapters' inner values (tokens, ranks)."""
        y = self.frozen.forward(x)
        if not self.adapters:
            return y, None
        inner = self._inner(x, seed)
        for adapter in self.adapters:
            y[:, adapter.columns].addmm_(inner[:, adapter.ranks], adapter.up.T, alpha=adapter.scale)
        return y, inner

    def _inner(self, x: Any, seed: int) -> Any:
        import torch

        if not self.chance:
            return x @ self.down.T
        return torch.cat(
            [kernels.dropped(x, self.chance, seed + a.number) @ self.down[a.ranks].T for a in self.adapters], 1
        )

    def input_gradient(self, gradient: Any, seed: int, wanted: bool = True) -> tuple[Any, Any]:
        """Gradient of the input (None unless `wanted`), and of the adapters' inner values."""
        import torch

        result: Any = self.frozen.backward(gradient) if wanted else None
        if not self.adapters:
            return result, None
        middle = torch.empty(len(gradient), len(self.down), dtype=gradient.dtype, device=gradient.device)
        for adapter in self.adapters:
            torch.mm(gradient[:, adapter.columns], adapter.up * adapter.scale, out=middle[:, adapter.ranks])
        if wanted and not self.chance:
            result.addmm_(middle, self.down)
        elif wanted:
            for a in self.adapters:
                kernels.dropped(middle[:, a.ranks] @ self.down[a.ranks], self.chance, seed + a.number, result)
        return result, middle

    def adapter_gradients(self, gradient: Any, middle: Any, x: Any, inner: Any, seed: int) -> list[Any]:
        """Gradients of `sources`; `middle` is the second result of `input_gradient`, `inner` that of `forward`."""
        found: list[Any] = []
        whole = _product(middle.T, x) if self.adapters and not self.chance else None
        for a in self.adapters:
            if whole is None:
                found.append(_product(middle[:, a.ranks].T, kernels.dropped(x, self.chance, seed + a.number)))
            else:
                found.append(whole[a.ranks])
            found.append(_product(gradient[:, a.columns].T, inner[:, a.ranks]).mul_(a.scale))
        return found

    def backward(self, gradient: Any, x: Any, inner: Any, seed: int, wanted: bool = True) -> tuple[Any, list[Any]]:
        """Gradient of x (None unless `wanted`), and of `sources`."""
        result, middle = self.input_gradient(gradient, seed, wanted)
        return result, self.adapter_gradients(gradient, middle, x, inner, seed)


def _product(a: Any, b: Any) -> Any:
    """a @ b as float32."""
    import torch

    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


@dataclass(frozen=True)
class Shape:
    """What the layers share."""

    heads: int
    key_heads: int
    size: int  # of a head
    epsilon: float
    recompute: bool  # projections and MLP again in the backward pass, instead of keeping them
    shelved: bool  # rotated heads go to the shelf, too, and are not computed again

    @property
    def again(self) -> bool:
        """Whether heads are computed a second time in the backward pass."""
        return self.recompute and not self.shelved


@dataclass
class Layer:
    """One decoder layer. The last has `query` and `keys` apart, the others both in `query`."""

    first_norm: Any
    query: Projection
    keys: Projection | None
    out: Projection
    second_norm: Any
    gate_up: Projection
    down: Projection
    shape: Shape

    @property
    def attention_sources(self) -> list[Any]:
        """Parameters of the attention block's adapters."""
        return [*self.query.sources, *(self.keys.sources if self.keys else ()), *self.out.sources]

    @property
    def mlp_sources(self) -> list[Any]:
        """Parameters of the MLP block's adapters."""
        return [*self.gate_up.sources, *self.down.sources]


@dataclass(frozen=True)
class Packed:
    """Rows of a micro-step on the device: their bounds, positions (tokens), rotary tables, the seed of dropout; where
    blocks keep their largest tensors (None: on the device); which tokens the last layer works for (None: all)."""

    bounds: Bounds
    positions: Any
    cos: Any
    sin: Any
    seed: int
    shelf: Shelf | None = None
    chosen: Any = None


def _projected(layer: Layer, rows: Packed, normed: Any) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
    """Heads, queries and keys rotated, as `_parted` takes them, and the adapters' inner values of each projection."""
    shape = layer.shape
    if layer.keys is None:
        whole, inner = layer.query.forward(normed, rows.seed)
        heads = whole.view(len(whole), -1, shape.size)
        kernels.rotate(heads[:, : shape.heads + shape.key_heads], rows.cos, rows.sin, rows.positions)
        return (heads,), (inner, None)
    q, inner = layer.query.forward(normed[rows.chosen], rows.seed)
    kv, more = layer.keys.forward(normed, rows.seed)
    query, both = q.view(len(q), shape.heads, shape.size), kv.view(len(kv), -1, shape.size)
    kernels.rotate(query, rows.cos, rows.sin, rows.positions[rows.chosen])
    kernels.rotate(both[:, : shape.key_heads], rows.cos, rows.sin, rows.positions)
    return (query, both), (inner, more)


def _parted(heads: Sequence[Any], shape: Shape) -> tuple[Any, Any, Any]:
    """Query, key and value heads, views of what `_projected` found."""
    query, both = heads if len(heads) == 2 else heads[0].split((shape.heads, 2 * shape.key_heads), 1)
    return query, *both.split(shape.key_heads, 1)


def attention_block(x: Any, layer: Layer, rows: Packed) -> Any:
    """x + attention, (tokens, width); in the last layer for the chosen tokens only."""
    return _functions()[0].apply(x, layer, rows, *layer.attention_sources)


def mlp_block(x: Any, layer: Layer, rows: Packed) -> Any:
    """x + MLP, (tokens, width)."""
    return _functions()[1].apply(x, layer, rows, *layer.mlp_sources)


def _attention_forward(ctx: Any, x: Any, layer: Layer, rows: Packed) -> Any:
    shape = layer.shape
    normed, _ = kernels.rms_norm(x, layer.first_norm, shape.epsilon)
    heads, inner = _projected(layer, rows, normed)
    out, kept = attend(*_parted(heads, shape), rows.bounds, shape.size**-0.5)
    flat = out.view(len(out), -1)
    y, inner_out = layer.out.forward(flat, rows.seed)
    y.add_(x if layer.keys is None else x[rows.chosen])
    sums, *ctx.state = kept or (None,)
    ctx.layer, ctx.rows = layer, rows
    # in the order of their use; x last, so first on the shelf, which measures by it
    _keep(ctx, (out, inner_out, sums, x) if shape.again else (out, inner_out, sums, *heads, *inner, x))
    return y


def _attention_backward(ctx: Any, gradient: Any) -> tuple[Any, list[Any]]:
    import torch

    layer, rows, shape = ctx.layer, ctx.rows, ctx.layer.shape
    take = _taker(ctx)
    out, inner_out, sums = take(), take(), take()
    gradient = gradient.contiguous()
    flat, last = layer.out.backward(gradient, out.view(len(out), -1), inner_out, rows.seed)
    if shape.again:
        x = take()
        normed, _ = kernels.rms_norm(x, layer.first_norm, shape.epsilon)
        heads, (inner, inner_keys) = _projected(layer, rows, normed)
        del normed
    else:
        heads = tuple(take() for _ in range(1 if layer.keys is None else 2))
    query, key, value = _parted(heads, shape)
    kept = (sums, *ctx.state) if ctx.state else None
    dq, dk, dv = attend_backward(flat.view(out.shape), query, key, value, out, kept, rows.bounds, shape.size**-0.5)
    del heads, query, key, value, flat, out
    if not shape.again:
        inner, inner_keys, x = take(), take(), take()
    normed, inverse = kernels.rms_norm(x, layer.first_norm, shape.epsilon)  # again: memory counts, the time does not
    kernels.rotate(dk, rows.cos, rows.sin, rows.positions, backward=True)
    wanted = ctx.needs_input_grad[0]
    if layer.keys is None:
        kernels.rotate(dq, rows.cos, rows.sin, rows.positions, backward=True)
        whole = torch.cat([item.reshape(len(item), -1) for item in (dq, dk, dv)], 1)
        dx, first = layer.query.backward(whole, normed, inner, rows.seed, wanted)
        beside = gradient
    else:
        kernels.rotate(dq, rows.cos, rows.sin, rows.positions[rows.chosen], backward=True)
        own, first = layer.query.backward(dq.reshape(len(dq), -1), normed[rows.chosen], inner, rows.seed)
        both = torch.cat([item.reshape(len(item), -1) for item in (dk, dv)], 1)
        dx, more = layer.keys.backward(both, normed, inner_keys, rows.seed)
        first += more
        dx.index_add_(0, rows.chosen, own)
        beside = torch.zeros_like(x).index_copy_(0, rows.chosen, gradient)
    if wanted:
        dx = kernels.rms_norm_backward(dx, x, inverse, layer.first_norm, beside)
    return dx, first + last


def _mlp_forward(ctx: Any, x: Any, layer: Layer, rows: Packed) -> Any:
    import torch

    keep = not layer.shape.recompute
    parts, kept = [], []
    for number, part in enumerate(_chunks(x, keep)):
        seed = rows.seed + number * 1_000_003
        normed, _ = kernels.rms_norm(part, layer.second_norm, layer.shape.epsilon)
        gate_up, inner = layer.gate_up.forward(normed, seed)
        y, inner_down = layer.down.forward(kernels.swiglu(gate_up), seed)
        parts.append(y.add_(part))
        kept.append((gate_up if keep else None, inner if keep else None, inner_down))
        del gate_up, inner, normed, y
    ctx.layer, ctx.rows, ctx.kept = layer, rows, kept
    _keep(ctx, (x,))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mlp_backward(ctx: Any, gradient: Any) -> tuple[Any, list[Any]]:
    import torch

    layer, rows = ctx.layer, ctx.rows
    x = _taker(ctx)()
    keep = not layer.shape.recompute
    gradient = gradient.contiguous()
    parts: list[Any] = []
    sums: list[Any] = []
    for number, (part, given) in enumerate(zip(_chunks(x, keep), _chunks(gradient, keep), strict=True)):
        gate_up, inner, inner_down = ctx.kept[number]
        ctx.kept[number] = None
        seed = rows.seed + number * 1_000_003
        normed, inverse = kernels.rms_norm(part, layer.second_norm, layer.shape.epsilon)
        if gate_up is None:
            gate_up, inner = layer.gate_up.forward(normed, seed)
        dx, first, last = _mlp_inner(layer, given, gate_up, normed, (inner, inner_down), seed)
        parts.append(kernels.rms_norm_backward(dx, part, inverse, layer.second_norm, given))
        found = first + last
        sums = found if not sums else [a.add_(b) for a, b in zip(sums, found, strict=True)]
        del gate_up, inner, normed, dx
    return parts[0] if len(parts) == 1 else torch.cat(parts), sums


def _mlp_inner(
    layer: Layer, given: Any, gate_up: Any, normed: Any, inner: tuple[Any, Any], seed: int
) -> tuple[Any, list[Any], list[Any]]:
    # The activation comes out of the gradient's kernel, in the place of what went in.
    between, middle = layer.down.input_gradient(given, seed)
    kernels.swiglu_backward(gate_up, between)
    last = layer.down.adapter_gradients(given, middle, between, inner[1], seed)
    del between
    dx, first = layer.gate_up.backward(gate_up, normed, inner[0], seed)
    return dx, first, last


def _keep(ctx: Any, items: Sequence[Any]) -> None:
    """Keep tensors, or None for one that there is not, for the backward pass; on the shelf where there is one.

    Small ones, too: lying among the large ones that come and go, they would part the device's memory.
    """
    shelf = ctx.rows.shelf
    if shelf is None:
        ctx.save_for_backward(*items)
    else:
        ctx.places = [None if item is None else shelf.put(item) for item in reversed(items)]


def _taker(ctx: Any) -> Callable[[], Any]:
    """What gives the items of `_keep`, one a call, in their order."""
    shelf = ctx.rows.shelf
    waiting = iter(ctx.saved_tensors if shelf is None else reversed(ctx.places))

    def take() -> Any:
        item = next(waiting)
        return item if shelf is None or item is None else shelf.take(item)

    return take


def _chunks(x: Any, whole: bool) -> Sequence[Any]:
    return [x] if whole or len(x) <= CHUNK else x.split(CHUNK)


def _functions() -> tuple[Any, Any]:
    global _made
    if _made is None:
        import torch

        def block(forward: Any, backward: Any) -> Any:
            class Block(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, x: Any, layer: Layer, rows: Packed, *sources: Any) -> Any:
                    return forward(ctx, x, layer, rows)

                @staticmethod
                def backward(ctx: Any, gradient: Any) -> Any:
                    dx, rest = backward(ctx, gradient)
                    return dx, None, None, *rest

            return Block

        _made = block(_attention_forward, _attention_backward), block(_mlp_forward, _mlp_backward)
    return _made


_made: tuple[Any, Any] | None = None
