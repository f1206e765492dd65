"""A Llama-family model as greedy decoding of many prompts needs it: prompts read one by one, replies decoded together.

transformers' generate pads the prompts of a batch to one length, launches some 600 kernels a token from Python, and
rounds logits to 16 bits; what it answers depends on the batch. Here a prompt is read alone, without padding, straight
into its slot of a fixed memory; a decode step is one CUDA graph over all slots. The matrix products of a step always
have a multiple of `ROWS` rows, the idle ones filled with padding, so they are the same products for one prompt and
for `ROWS`; attention is per slot. A reply therefore does not depend on what else is in the batch, as far as the
kernels treat rows alike, which `gpu.flips` checks.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

ROWS = 64  # rows of the matrix products of a decode step: reading the weights takes longer than 64 rows of arithmetic

Attend = Callable[[int, Any, Any, Any], Any]  # layer, query, key, value -> (tokens, heads, head size)


class Memory:
    """Keys and values of `slots` sequences of up to `length` tokens, a tensor (slots, heads, length, head size) a
    layer; views of buffers that all batches share."""

    def __init__(self, buffers: Sequence[Any], slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        heads, size = buffers[0].shape[2:]
        count = slots * length
        views = [buffer[:, :count].view(2, slots, heads, length, size) for buffer in buffers]
        self.layers = [(view[0], view[1]) for view in views]


class _Layer:
    """One layer's modules, with adapters beside their linears in two products."""

    def __init__(self, layer: Any) -> None:
        own, mlp = layer.self_attn, layer.mlp
        self.first_norm, self.second_norm, self.act = layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn
        linears = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.query, self.key, self.value, self.output, self.gate, self.up, self.down = map(_linear, linears)


def _linear(module: Any) -> Callable[[Any], Any]:
    """A linear as a function; a plain LoRA layer without peft's forward, whose Python takes longer than a GPU does."""
    import torch

    active = getattr(module, "active_adapters", None)
    if not active or getattr(module, "lora_variant", None):
        return module  # type: ignore[no-any-return]
    name = active[0]
    base, down = module.base_layer, module.lora_A[name].weight.t()
    up = (module.lora_B[name].weight * module.scaling[name]).t()
    return lambda states: torch.addmm(base(states), states @ down, up)


class Decoder:
    """The forward pass of a LlamaForCausalLM, with a PEFT adapter on it or not, on the device where it is."""

    def __init__(self, model: Any) -> None:
        """`model` from transformers or peft; its own modules do the arithmetic, quantized or with adapters."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._body, self._head = base.model, base.lm_head
        self._layers = [_Layer(layer) for layer in self._body.layers]
        config = base.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.device, self.dtype = self._head.weight.device, self._head.weight.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of memory that one token of one sequence takes."""
        return int(2 * len(self._layers) * self._kv_heads * self._size * self.dtype.itemsize)

    def buffers(self, tokens: int) -> list[Any]:
        """Zeroed room for keys and values of `tokens` tokens, one tensor a layer.

        Zeroed once, since what a mask hides is still multiplied by 0, and 0 times garbage may be no number.
        """
        import torch

        shape = (2, tokens, self._kv_heads, self._size)
        return [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in self._layers]

    def read(self, ids: Sequence[int], memory: Memory, slot: int) -> Any:
        """Read a whole prompt into a slot; float32 logits (vocabulary,) of what follows it."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        count = len(ids)
        tokens = torch.tensor(ids, device=self.device)

        def attend(layer: int, query: Any, key: Any, value: Any) -> Any:
            query, key, value = (item.transpose(0, 1) for item in (query, key, value))
            keys, values = memory.layers[layer]
            keys[slot, :, :count], values[slot, :, :count] = key, value
            # Each key head for all its query heads: not every fast kernel knows grouped heads.
            key, value = (item.repeat_interleave(self._heads // self._kv_heads, dim=0) for item in (key, value))
            found = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
            return found[0].transpose(0, 1)

        states = self._forward(tokens, torch.arange(count, device=self.device), attend)
        return self._logits(states[-1:])[0]

    def step(self, tokens: Any, positions: Any, memory: Memory) -> Any:
        """Read one token more in every slot; float32 logits (slots, vocabulary) of what follows.

        `tokens` and `positions` are int64 (`ROWS`' next multiple of slots,); what is beyond the slots is padding.
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        slots = memory.slots
        row, place = torch.arange(slots, device=self.device), positions[:slots]
        seen = torch.arange(memory.length, device=self.device) <= place[:, None]
        mask = torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, float("-inf"))[:, None, None]

        def attend(layer: int, query: Any, key: Any, value: Any) -> Any:
            keys, values = memory.layers[layer]
            keys[row, :, place], values[row, :, place] = key[:slots], value[:slots]
            # The query heads that share a key head stand as its rows, so that no key is copied for them.
            grouped = query[:slots].view(slots, self._kv_heads, -1, self._size)
            shown = mask.expand(-1, self._kv_heads, grouped.shape[2], -1)
            found = scaled_dot_product_attention(grouped, keys, values, attn_mask=shown)
            filled = torch.zeros_like(query)
            filled[:slots] = found.reshape(slots, self._heads, self._size)
            return filled

        # On a GPU always the kernel that does not split long sequences by how many there are.
        kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(kernels) if self.device.type == "cuda" else nullcontext():
            return self._logits(self._forward(tokens, positions, attend))[:slots]

    def _forward(self, tokens: Any, positions: Any, attend: Attend) -> Any:
        """States (tokens, hidden) after the last layer, normed."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        states = self._body.embed_tokens(tokens)
        cos, sin = self._body.rotary_emb(states, positions[None])
        for index, layer in enumerate(self._layers):
            normed = layer.first_norm(states)
            query = layer.query(normed).view(-1, self._heads, self._size)
            key, value = (item(normed).view(-1, self._kv_heads, self._size) for item in (layer.key, layer.value))
            query, key = apply_rotary_pos_emb(query, key, cos[0], sin[0])
            states = states + layer.output(attend(index, query, key, value).reshape(len(tokens), -1))
            normed = layer.second_norm(states)
            states = states + layer.down(layer.act(layer.gate(normed)) * layer.up(normed))
        return self._body.norm(states)

    def _logits(self, states: Any) -> Any:
        """Logits in float32: rounded to bfloat16, two tokens often get the same."""
        import torch

        weight = self._head.weight
        if weight.is_cuda and self.dtype != torch.float32:
            return torch.mm(states, weight.t(), out_dtype=torch.float32)
        return states.float() @ weight.float().t()


class Steps:
    """Decode steps over one memory: the first as it is, the others as a CUDA graph where there is a GPU."""

    def __init__(self, decoder: Decoder, memory: Memory) -> None:
        import torch

        self.memory, self._decoder = memory, decoder
        rows = -(-memory.slots // ROWS) * ROWS
        self._inputs = torch.zeros((2, rows), dtype=torch.int64, device=decoder.device)
        self._graph: Any = None
        self._logits: Any = None
        self._done = 0

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Any:
        """Logits (slots, vocabulary) after one token more a slot; valid until the next call."""
        import torch

        fresh = torch.tensor([tokens, positions])
        self._inputs[:, : self.memory.slots].copy_(fresh)
        self._done += 1
        if self._done == 1 or not self._inputs.is_cuda:
            return self._decoder.step(self._inputs[0], self._inputs[1], self.memory)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._decoder.step(self._inputs[0], self._inputs[1], self.memory)
        self._graph.replay()
        return self._logits
