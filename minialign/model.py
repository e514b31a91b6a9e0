"""The policy: a small decoder-only transformer in the Llama layout, and its KV cache.

Pre-norm blocks with RMSNorm, rotary positions (RoPE, in halves), causal attention with
optionally grouped keys and values, and a SwiGLU MLP; no biases, no dropout. Parameters
are named as in a Llama checkpoint without its leading `model.`.

`forward` returns hidden states and `logits` projects them: a loss projects only the
positions that it scores, a sampler only the last one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model; they decide the names and shapes of its weights."""

    vocab_size: int = 768
    context: int = 256  # most columns a sequence may have
    dim: int = 128  # width of the residual stream
    layers: int = 4
    heads: int = 4  # query heads; the width of a head is dim / heads
    kv_heads: int = 4  # key and value heads; each serves heads / kv_heads query heads
    hidden: int = 344  # width of the MLP, about 8/3 dim
    rope_theta: float = 10_000.0  # RoFormer's
    norm_eps: float = 1e-5  # Llama 2's
    tied: bool = False  # whether the embedding is the output projection too

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "layers", "kv_heads", "hidden"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if self.heads < 1 or self.dim % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"dim must be a multiple of 2 * heads >= 2 and heads of kv_heads, "
                f"got dim {self.dim}, heads {self.heads}, kv_heads {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.dim // self.heads


class KVCache:
    """Keys and values of the columns that a model has read, in storage allocated once.

    The first forward records its left padding here; the later ones follow it.
    """

    def __init__(self, model: "GPT", batch: int, capacity: int) -> None:
        config = model.config
        # Keys, then values: (2, layers, B, kv_heads, capacity, head_dim).
        shape = (2, config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.store = model.embed_tokens.weight.new_empty(shape)
        self.padding: Tensor | None = None  # (B,) left padding; None: no row has any
        self.capacity = capacity  # columns there are
        self.used = 0  # columns filled

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new columns; return those of every column.

        Shapes: k, v (B, kv_heads, T, head_dim) -> (B, kv_heads, used + T, head_dim).
        """
        end = self.used + k.shape[2]
        keys, values = self.store[:, layer]
        keys[:, :, self.used : end] = k
        values[:, :, self.used : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order, in the storage there is."""
        for layer in self.store[..., : self.used, :].flatten(0, 1):
            layer[: len(rows)] = layer[rows]
        self.store = self.store[:, :, : len(rows)]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def repeat(self, k: int) -> None:
        """Give every row k copies, side by side: B rows become B * k."""
        self.store = self.store.repeat_interleave(k, dim=2)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(k)


class Embedding(nn.Embedding):
    """A vector for each token, its values left to `GPT.initialise`."""

    def reset_parameters(self) -> None:
        """Draw nothing: torch would draw here, and from its global generator."""


class Linear(nn.Linear):
    """A projection without bias, its values left to `GPT.initialise`."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing: torch would draw here, and from its global generator."""


def rotation(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which `rotate` turns each column of a sequence.

    A vector's first half is paired with its second half. Pair i of column t is turned
    by the angle t * rope_theta^(-2i / head_dim). The first half of the sines is
    negated: to turn a vector, `rotate` has only to multiply and add.

    Shapes: cos and sin (context, head_dim), of double precision.
    """
    exponent = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    column = torch.arange(config.context).double()[:, None]  # (context, 1)
    angle = column * config.rope_theta**-exponent  # (context, head_dim / 2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=1)  # (context, head_dim)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoPE): turn each pair (x_i, x_{i + d/2}) of the last dimension.

    Shapes: x (B, T, heads, head_dim), cos and sin (T, 1, head_dim) -> as x.
    """
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # the halves change places
    return x * cos + partner * sin


class Attention(nn.Module):
    """Causal attention; with fewer kv_heads than heads, several queries share a key."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads < config.heads
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, config.kv_heads * config.head_dim)
        self.v_proj = Linear(config.dim, config.kv_heads * config.head_dim)
        self.o_proj = Linear(config.dim, config.dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """What each column gathers from those it sees. Shapes: x (B, T, D) -> as x."""
        B, T, D = x.shape
        by_head = (B, T, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(by_head), cos, sin).transpose(1, 2)
        k = rotate(self.k_proj(x).view(by_head), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(by_head).transpose(1, 2)  # (B, kv_heads, T, head_dim)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (B, kv_heads, used + T, head_dim)
        causal = visible is None and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=self.grouped
        )  # (B, heads, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """SwiGLU: one projection up, gated by the SiLU of another, and one back down."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.hidden)
        self.up_proj = Linear(config.dim, config.hidden)
        self.down_proj = Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """What each column makes of itself. Shapes: x (B, T, D) -> as x."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each of which reads a norm and adds to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """The residual stream after this block. Shapes: x (B, T, D) -> as x."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The policy. `generator` draws the initial weights; None: torch's global one."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.dim, config.vocab_size)
        self.initialise(generator)

        cos, sin = rotation(config)  # (context, head_dim)
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw every matrix from a normal distribution of variance 1 / fan-in.

        The two matrices of each layer that write into the residual stream have this
        variance divided by their number, 2 * layers: the stream is their sum, and does
        not grow with the depth.
        """
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue  # the gains of the norms stay 1
            std = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.config.layers) ** 0.5
            weight.normal_(0.0, std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; `logits` projects them.

        Right padding needs nothing, for attention is causal. `padding` (B,) int64 is
        the number of pad columns at the *left* of each row: they are hidden, and the
        row's shift costs nothing, for RoPE sees only differences of positions. With a
        cache, `tokens` are the columns after those it holds.

        Shapes: tokens (B, T) int64 -> (B, T, D).
        Raises: TypeError for ids that are not int64; ValueError for other shapes, for
            more columns than the context or the cache holds, for a cache outside
            `torch.no_grad()`, and for padding after a cache's first call.
        """
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64 ids, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (B, T), got {tuple(tokens.shape)}")
        if padding is not None and padding.shape != tokens.shape[:1]:
            raise ValueError(f"padding must be (B,), got {tuple(padding.shape)}")
        T = tokens.shape[1]
        start = 0  # columns that the model has read before
        most = self.config.context
        if cache is not None:
            start = cache.used
            most = min(most, cache.capacity)
            if torch.is_grad_enabled():
                raise ValueError("a cache holds no gradient: call in torch.no_grad()")
            if start > 0 and padding is not None:
                raise ValueError("padding belongs to the first call with a cache")
            if start == 0:
                cache.padding = padding
            padding = cache.padding
        if start + T > most:
            raise ValueError(f"room for {most} columns of tokens, got {start} + {T}")

        visible = self.visible(start, T, padding)
        cos = self.cos[start : start + T, None]  # (T, 1, head_dim)
        sin = self.sin[start : start + T, None]
        x = self.embed_tokens(tokens)  # (B, T, D)
        for block in self.layers:
            x = block(x, cos, sin, visible, cache)
        if cache is not None:
            cache.used += T
        return self.norm(x)

    def visible(self, start: int, T: int, padding: Tensor | None) -> Tensor | None:
        """Which columns (last dimension) each new column sees; None: all before it.

        Shapes: (T, start + T) bool, or (B, 1, T, start + T) where rows are padded.
        """
        if padding is None and (start == 0 or T == 1):
            return None
        key = torch.arange(start + T, device=self.cos.device)  # (start + T,)
        query = key[start:, None]  # (T, 1)
        before = key <= query  # (T, start + T)
        if padding is None:
            return before
        # A pad column sees itself: not every kernel's softmax over nothing is finite.
        real = (key >= padding[:, None, None]) | (key == query)  # (B, T, start + T)
        return (real & before)[:, None]  # (B, 1, T, start + T)

    def logits(self, hidden: Tensor) -> Tensor:
        """The next token's scores before the softmax. Shapes: (..., D) -> (..., V)."""
        head = self.embed_tokens if self.config.tied else self.lm_head
        return F.linear(hidden, head.weight)


class ScalarHead(nn.Module):
    """One number per position, 0 at first: a weighted sum of the hidden state.

        value = hidden · weight + bias

    Shapes: (B, T, D) -> (B, T). Gradient: through the head and `hidden`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """The number at each position."""
        return hidden @ self.weight + self.bias
