"""The language model of π0 and its action expert: two Gemma transformers that share every attention, in Flax Linen.

Each token belongs to one *expert*: 0 is the language model, 1 the action expert. Experts have their own projections,
norms and feed-forward layers, and all tokens attend to all keys that the mask allows. A pass may leave one expert
out, and it may see the keys and values of an earlier pass as its cache.

Paths and shapes of the parameters, and the numbers, are those of openpi's JAX model (π0: arXiv:2410.24164, PaliGemma:
arXiv:2407.07726). Symbols used in shapes: T tokens in this pass, C tokens in the cache, L layers, H heads, K key-value
heads, d head size, w width.
"""

from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fpo_jax.parallel import gathered
from fpo_jax.types import FpoError, suggestion

MASKED = -2.3819763e38  # logit of a key that may not be seen; finite, so that a row without any key stays finite

Pair = tuple[Float[Array, "N _ _"] | None, Float[Array, "N _ _"] | None]  # tokens of both experts, None where left out
Cache = tuple[Float[Array, "L N C K d"], Float[Array, "L N C K d"]]  # rotated keys, and values, of every layer


@dataclass(frozen=True)
class Lora:
    """Size of a low-rank update; the update is multiplied by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one expert. Both experts of a model must agree on depth, heads and head size."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_lora: Lora | None = None
    mlp_lora: Lora | None = None


def _with_lora(config: GemmaConfig, rank: int) -> GemmaConfig:
    return replace(config, attention_lora=Lora(rank, float(rank)), mlp_lora=Lora(rank, float(rank)))


_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
_300M = replace(_2B, width=1024, mlp_dim=4096)
GEMMA = {
    "gemma_2b": _2B,
    "gemma_300m": _300M,
    "gemma_2b_lora": _with_lora(_2B, rank=16),
    "gemma_300m_lora": _with_lora(_300M, rank=32),
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
}


def gemma_config(variant: str | GemmaConfig) -> GemmaConfig:
    """The sizes of a variant in `GEMMA`; explicit sizes are returned as they are."""
    if isinstance(variant, GemmaConfig):
        return variant
    if variant not in GEMMA:
        raise FpoError(f"There is no Gemma variant {variant!r}{suggestion(variant, GEMMA)}")
    return GEMMA[variant]


def rotary(x: Float[Array, "N T H d"], positions: Int[Array, "N T"]) -> Float[Array, "N T H d"]:
    """Rotates the pair (x_i, x_{i + d/2}) by position · 10000^(-2i/d), in float32 (RoPE, arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    period = 10_000.0 ** (2.0 / x.shape[-1] * jnp.arange(half, dtype=jnp.float32))
    angle = (positions[..., None] / period[None, None])[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    queries: Float[Array, "N T H d"],
    keys: list[Float[Array, "N _ K d"]],
    values: list[Float[Array, "N _ K d"]],
    mask: Bool[Array, "N T S"],
) -> Float[Array, "N T H d"]:
    """Softmax attention over the S keys of all groups together; logits and softmax in float32.

    The groups (cache and new tokens) are never concatenated: under `vmap` over the new tokens alone, the cache is
    neither copied nor multiplied once per copy, and its gradient is summed inside the product.
    """
    num, length, heads, size = queries.shape
    grouped = queries.reshape(num, length, keys[0].shape[2], -1, size)
    logits = jnp.concatenate(
        [jnp.einsum("ntkgd,nskd->nktgs", grouped, k, preferred_element_type=jnp.float32) for k in keys], axis=-1
    )
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None], logits, MASKED), axis=-1).astype(queries.dtype)
    out = jnp.zeros((), jnp.float32)
    for value in values:
        part, weights = weights[..., : value.shape[1]], weights[..., value.shape[1] :]
        out = out + jnp.einsum("nktgs,nskd->ntkgd", part, value, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(num, length, heads, size)


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + scale), or adaptive: x / rms(x) · (1 + scale) + shift, with a gate for the residual.

    Adaptive norms get scale, shift and gate from the condition; the gate of a plain one is None. Statistics in float32.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T w"], condition: Float[Array, "N c"] | None
    ) -> tuple[Float[Array, "N T w"], Float[Array, "N 1 w"] | None]:
        mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(mean_square + 1e-6)
        if condition is None:
            scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
            return (normed * (1 + scale)[None, None]).astype(x.dtype), None
        dense = nn.Dense(3 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=x.dtype, name="Dense_0")
        scale, shift, gate = jnp.split(dense(condition)[:, None], 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate


class Einsum(nn.Module):
    """x · w by the first equation, plus alpha / rank · (x · lora_a) · lora_b by the other two where `lora` is given."""

    shape: tuple[int, ...]
    equations: tuple[str, str, str]
    in_axes: tuple[int, ...]  # axes of w that are summed over
    lora: Lora | None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        batch_axes = tuple(axis for axis in range(-len(self.shape), -1) if axis not in self.in_axes)
        init = nn.initializers.lecun_normal(in_axis=self.in_axes, out_axis=-1, batch_axis=batch_axes)
        y = jnp.einsum(self.equations[0], x, self.param("w", init, self.shape).astype(x.dtype))
        if self.lora is None:
            return y
        rank, small = self.lora.rank, nn.initializers.normal(0.01)
        first = self.param("lora_a", small, (*self.shape[:-1], rank)).astype(x.dtype)
        second = self.param("lora_b", small, (*self.shape[:-2], rank, self.shape[-1])).astype(x.dtype)
        low = jnp.einsum(self.equations[2], jnp.einsum(self.equations[1], x, first), second)
        return y + low * (self.lora.alpha / rank)


_QUERY = ("ntw,hwd->nthd", "ntw,hwr->nthr", "nthr,hrd->nthd")
_KEY_VALUE = ("ntw,ckwd->cntkd", "ntw,ckwr->cntkr", "cntkr,ckrd->cntkd")
# The low-rank path sums over the heads inside each factor, so it is no product per head. openpi's LoRA weights were
# trained like this.
_OUTPUT = ("nthd,hdw->ntw", "nthd,hdr->ntr", "ntr,hrw->ntw")


class Attention(nn.Module):
    """One attention over the tokens of all experts, and the cache."""

    configs: tuple[GemmaConfig, GemmaConfig]

    @nn.compact
    def __call__(
        self,
        tokens: Pair,
        positions: Int[Array, "N T"],
        mask: Bool[Array, "N T S"],
        cache: tuple[Float[Array, "N C K d"], Float[Array, "N C K d"]] | None,
    ) -> tuple[Pair, tuple[Float[Array, "N T K d"], Float[Array, "N T K d"]]]:
        queries, keys_values = [], []
        for x, config, suffix in zip(tokens, self.configs, ("", "_1"), strict=True):
            if x is None:
                continue
            heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
            shape, lora = (heads, config.width, size), config.attention_lora
            queries.append(Einsum(shape, _QUERY, (-2,), lora, name=f"q_einsum{suffix}")(x))
            shape = (2, kv_heads, config.width, size)
            keys_values.append(Einsum(shape, _KEY_VALUE, (-2,), lora, name=f"kv_einsum{suffix}")(x))
        key, value = jnp.concatenate(keys_values, axis=2)
        query = rotary(jnp.concatenate(queries, axis=1), positions)
        key = rotary(key, positions)
        query = query * query.shape[-1] ** -0.5
        keys, values = ([key], [value]) if cache is None else ([cache[0], key], [cache[1], value])
        mixed = attend(query, keys, values, mask)

        outputs: list[Array | None] = []
        for x, config, suffix in zip(tokens, self.configs, ("", "_1"), strict=True):
            if x is None:
                outputs.append(None)
                continue
            own, mixed = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
            shape, lora = (config.num_heads, config.head_dim, config.width), config.attention_lora
            outputs.append(Einsum(shape, _OUTPUT, (-3, -2), lora, name=f"attn_vec_einsum{suffix}")(own))
        return (outputs[0], outputs[1]), (key, value)


class FeedForward(nn.Module):
    """(gelu(x · gate) ∘ x · value) · linear, with the tanh form of gelu (GeGLU, arXiv:2002.05202)."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N T w"]) -> Float[Array, "N T w"]:
        width, hidden = x.shape[-1], self.config.mlp_dim
        gating = self.param("gating_einsum", nn.initializers.lecun_normal(batch_axis=0), (2, width, hidden))
        gate, value = (x @ matrix.astype(x.dtype) for matrix in gating)
        if self.config.mlp_lora is not None:
            low_gate, low_value = self._low_rank(x, "gating_einsum", (2,), hidden)
            gate, value = gate + low_gate, value + low_value
        mixed = nn.gelu(gate) * value
        linear = self.param("linear", nn.initializers.lecun_normal(), (hidden, width))
        y = mixed @ linear.astype(x.dtype)
        if self.config.mlp_lora is not None:
            y = y + self._low_rank(mixed, "linear", (), width)
        return y

    def _low_rank(self, x: Float[Array, "N T i"], name: str, stack: tuple[int, ...], out: int) -> Float[Array, "..."]:
        """x · lora_a · lora_b, *not* multiplied by alpha / rank: openpi's LoRA weights were trained like this."""
        assert self.config.mlp_lora is not None
        rank, small = self.config.mlp_lora.rank, nn.initializers.normal(0.01)
        first = self.param(f"{name}_lora_a", small, (*stack, x.shape[-1], rank)).astype(x.dtype)
        second = self.param(f"{name}_lora_b", small, (*stack, rank, out)).astype(x.dtype)
        return jnp.einsum("...ntr,...ro->...nto", jnp.einsum("nti,...ir->...ntr", x, first), second)


class Layer(nn.Module):
    """One pre-norm transformer layer of both experts; the signature is that of the body of a scan over layers."""

    configs: tuple[GemmaConfig, GemmaConfig]

    @nn.compact
    def __call__(
        self,
        tokens: Pair,
        cache: tuple[Float[Array, "N C K d"], Float[Array, "N C K d"]] | None,
        positions: Int[Array, "N T"],
        mask: Bool[Array, "N T S"],
        conditions: tuple[Float[Array, "N c"] | None, Float[Array, "N c"] | None],
    ) -> tuple[Pair, tuple[Float[Array, "N T K d"], Float[Array, "N T K d"]]]:
        experts = list(zip(tokens, conditions, ("", "_1"), strict=True))
        norms = [RMSNorm(name=f"pre_attention_norm{s}")(x, c) if x is not None else None for x, c, s in experts]
        normed = [None if norm is None else norm[0] for norm in norms]
        attended, new = Attention(self.configs, name="attn")((normed[0], normed[1]), positions, mask, cache)
        out: list[Array | None] = []
        for (x, condition, suffix), norm, y, config in zip(experts, norms, attended, self.configs, strict=True):
            if x is None or norm is None or y is None:
                out.append(None)
                continue
            x = _residual(x, y, norm[1])
            y, gate = RMSNorm(name=f"pre_ffw_norm{suffix}")(x, condition)
            out.append(_residual(x, FeedForward(config, name=f"mlp{suffix}")(y), gate))
        return (out[0], out[1]), new


def _residual(
    x: Float[Array, "N T w"], y: Float[Array, "N T w"], gate: Float[Array, "N 1 w"] | None
) -> Float[Array, "N T w"]:
    return x + y if gate is None else x + y * gate


class Embedder(nn.Module):
    """The table of token embeddings, scaled by √w."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "N l"]) -> Float[Array, "N l w"]:
        # Normal with variance 1/w, so that the scaled rows have variance 1.
        init = nn.initializers.normal(self.width**-0.5)
        table = self.param("input_embedding", init, (self.vocab_size, self.width))
        # A token outside the vocabulary gives NaN, not another token's row.
        return jnp.take(table, tokens, axis=0) * jnp.asarray(self.width**0.5, table.dtype)


class Gemma(nn.Module):
    """Both experts, layers stacked on a leading axis. Activations have type `dtype`."""

    configs: tuple[GemmaConfig, GemmaConfig]
    vocab_size: int
    dtype: str = "float32"

    def setup(self) -> None:
        first, second = self.configs
        shared = [(c.depth, c.num_heads, c.num_kv_heads, c.head_dim) for c in self.configs]
        if shared[0] != shared[1]:
            raise FpoError(
                f"The language model and the action expert share their attention, but (depth, heads, key-value heads, "
                f"head size) are {shared[0]} and {shared[1]}: choose variants in which they are equal."
            )
        self.embedder = Embedder(self.vocab_size, first.width)
        self.layers = nn.scan(
            gathered(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=second.depth,
        )((first, second))
        self.final_norm = RMSNorm()
        self.final_norm_1 = RMSNorm()

    def embed(self, tokens: Int[Array, "N l"]) -> Float[Array, "N l w"]:
        """Embeddings of token ids, in the type of the table."""
        return self.embedder(tokens)

    def __call__(
        self,
        tokens: Pair,
        positions: Int[Array, "N T"],
        mask: Bool[Array, "N T S"],
        conditions: tuple[Float[Array, "N c"] | None, Float[Array, "N c"] | None] = (None, None),
        cache: Cache | None = None,
    ) -> tuple[Pair, tuple[Float[Array, "L N T K d"], Float[Array, "L N T K d"]]]:
        """Returns the outputs of both experts, and the keys and values of these T tokens.

        T counts the tokens of both experts together, in their order; S = C + T, the cache first. `conditions` make
        the norms of an expert adaptive.
        """
        dtype = jnp.dtype(self.dtype)
        tokens, conditions = jax.tree.map(lambda leaf: leaf.astype(dtype), (tokens, conditions))
        (first, second), new = self.layers(tokens, cache, positions, mask, conditions)
        if first is not None:
            first = self.final_norm(first, conditions[0])[0]
        if second is not None:
            second = self.final_norm_1(second, conditions[1])[0]
        return (first, second), new
