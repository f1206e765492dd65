"""A loaded PEFT model of the Llama family as a stack of `layers`: what training runs; the modules stay as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from petool_lite.train.attention import Bounds
from petool_lite.train.frozen import Nf4, Plain
from petool_lite.train.layers import Adapter, Layer, Packed, Projection, Shape, attention_block, mlp_block
from petool_lite.train.shelf import Shelf


def unsuited(config: Mapping[str, Any]) -> str:
    """Why `layers` does not compute a model with this config.json, or nothing; such a model goes through Unsloth's."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    reasons = {
        "biases in its linears": config.get("attention_bias") or config.get("mlp_bias"),
        f"the activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        f"rotary angles of the kind {kind}": kind not in ("default", "linear", "llama3"),
        "rotary angles for a part of each head": (rope.get("partial_rotary_factor") or 1) != 1,
    }
    return ", ".join(name for name, found in reasons.items() if found)


def inverse_frequencies(config: Mapping[str, Any], size: int) -> Any:
    """Rotary frequencies (size / 2, float32) by config.json: plain, divided by a factor ("linear"), or Llama 3's,
    whose long waves are divided by the factor, with a smooth passage to the short ones, which stay."""
    import torch

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    plain = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return plain
    slow = plain / rope["factor"]
    if kind == "linear":
        return slow
    turns = rope["original_max_position_embeddings"] * plain / (2 * torch.pi)  # within the first context
    least, most = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - least) / (most - least)).clamp(0, 1)
    return share * plain + (1 - share) * slow


class Stack:
    """Decoder layers of `model` (PEFT, LoRA) over packed rows.

    The adapters are copied to the model's dtype with `refresh`, once an update; gradients go to the model's parameters.
    With `offload` what the backward pass needs waits in the machine's memory, with `heads` rotated q, k and v, too.
    """

    def __init__(self, model: Any, recompute: bool, offload: bool = False, heads: bool = False) -> None:
        causal = model.get_base_model()
        self.embed, self.norm, self.head = causal.model.embed_tokens, causal.model.norm, causal.lm_head
        config = causal.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        counts = (config.num_attention_heads, config.num_key_value_heads, size)
        self.shape = Shape(*counts, config.rms_norm_eps, recompute, heads and offload and recompute)
        self.shelf = Shelf(self.norm.weight.device) if offload else None
        self.frequencies = inverse_frequencies(config.to_dict(), size)
        self.tables: tuple[Any, Any] | None = None
        self._copies: list[tuple[Any, Any]] = []
        count = len(causal.model.layers)
        self.layers = [self._layer(layer, index, index == count - 1) for index, layer in enumerate(causal.model.layers)]

    def _layer(self, layer: Any, index: int, last: bool) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        number = index * 7
        return Layer(
            layer.input_layernorm.weight.data,
            self._projection([q] if last else [q, k, v], number),
            self._projection([k, v], number + 1) if last else None,
            self._projection([attention.o_proj], number + 3),
            layer.post_attention_layernorm.weight.data,
            self._projection([mlp.gate_proj, mlp.up_proj], number + 4),
            self._projection([mlp.down_proj], number + 6),
            self.shape,
        )

    def _projection(self, linears: Sequence[Any], number: int) -> Projection:
        import torch

        bases = [getattr(linear, "base_layer", linear) for linear in linears]
        packed = hasattr(bases[0].weight, "quant_state")
        dtype = self.norm.weight.dtype
        frozen = Nf4(bases, dtype) if packed else Plain(bases)
        tuned = [linear for linear in linears if hasattr(linear, "lora_A")]
        ranks = [linear.r["default"] for linear in tuned]
        device = bases[0].weight.device
        width = bases[0].in_features
        down: Any = torch.empty(sum(ranks), width, dtype=dtype, device=device) if tuned else None
        result = Projection(frozen, [], down, _chance(tuned))
        column = rank = 0
        for offset, (linear, base) in enumerate(zip(linears, bases, strict=True)):
            if linear in tuned:
                a, b = linear.lora_A["default"], linear.lora_B["default"]
                where = slice(rank, rank + len(a.weight))
                up = torch.empty(b.weight.shape, dtype=dtype, device=device)
                columns = slice(column, column + base.out_features)
                result.adapters.append(Adapter(columns, where, up, linear.scaling["default"], number + offset))
                result.modules += [a, b]
                self._copies += [(down[where], a), (up, b)]
                rank += len(a.weight)
            column += base.out_features
        return result

    def refresh(self) -> None:
        """Copy the adapters' parameters to the matrices that the layers multiply with."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(
                [target for target, _ in self._copies], [module.weight.data for _, module in self._copies]
            )

    def rows(
        self, positions: Any, lengths: Sequence[int], chosen: Any, chosen_lengths: Sequence[int], seed: int
    ) -> tuple[Packed, Packed]:
        """Packed rows for all layers but the last, and for the last, which works for the `chosen` tokens; `lengths`
        and `chosen_lengths` are those of each row, `seed` decides what dropout drops."""
        import torch

        if self.shelf:
            self.shelf.clear()
        device = positions.device
        cos, sin = self._angles(max(lengths), device)
        both = torch.tensor([[0, *lengths], [0, *chosen_lengths]], dtype=torch.int32).cumsum(1, dtype=torch.int32)
        ends, chosen_ends = both.to(device, non_blocking=True)
        whole = Bounds(ends, ends, tuple(lengths), tuple(lengths))
        part = Bounds(chosen_ends, ends, tuple(chosen_lengths), tuple(lengths))
        shared = (positions, cos, sin, seed, self.shelf)
        return Packed(whole, *shared), Packed(part, *shared, chosen)

    def forward(self, ids: Any, rows: Packed, last: Packed) -> Any:
        """Hidden states (chosen tokens, width) before the final norm, of `ids` (tokens)."""
        x = self.embed(ids)
        *layers, final = self.layers
        for layer in layers:
            x = mlp_block(attention_block(x, layer, rows), layer, rows)
        return mlp_block(attention_block(x, final, last), final, last)

    def logits(self, hidden: Any) -> Any:
        """The final norm and the output head."""
        import torch

        weight = self.norm.weight
        normed = torch.nn.functional.rms_norm(hidden.float(), weight.shape, weight.float(), self.shape.epsilon)
        return self.head(normed.to(hidden.dtype))

    def _angles(self, length: int, device: Any) -> tuple[Any, Any]:
        """Cosine and sine (positions, size / 2) in float32."""
        import torch

        if self.tables is None or len(self.tables[0]) < length or self.tables[0].device != device:
            rounded = -(-length // 8192) * 8192
            angles = torch.outer(torch.arange(rounded, device=device).float(), self.frequencies.to(device))
            self.tables = (angles.cos(), angles.sin())
        return self.tables


def _chance(linears: Sequence[Any]) -> float:
    """The dropout that these adapters share."""
    found = {getattr(linear.lora_dropout["default"], "p", 0.0) for linear in linears}
    return float(found.pop()) if found else 0.0
