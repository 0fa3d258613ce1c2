"""π0 and π0.5 in Flax Linen: image tower, language model and action expert as one velocity field over action chunks.

Time runs as in openpi, *in this file only*: t = 1 is noise, t = 0 is the action chunk, x_t = t · noise + (1 - t) ·
actions, and the velocity is that of dx/dt = noise - actions. Actions, states and images are normalised and padded
already. Parameters, and numbers, are those of openpi's JAX model (π0: arXiv:2410.24164, π0.5: arXiv:2504.16054).

The sequence is a *prefix* (images, then prompt; expert 0) and a *suffix* (the state for π0, then the noisy actions;
expert 1). The prefix never sees the suffix, so its keys and values are computed once per observation and serve every
noise, step and draw. Symbols used in shapes: P prefix tokens, Q suffix tokens, s edge of the images [pixels], w width;
for N, h, A, S see `fpo_jax.types`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fpo_jax.policies.gemma import Cache, Gemma, GemmaConfig, gemma_config
from fpo_jax.policies.siglip import Siglip, SiglipConfig, siglip_config
from fpo_jax.types import FpoError, Params, suggestion

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # in the order of their tokens


@dataclass(frozen=True)
class Pi0Config:
    """Static facts of a model; variants by name (`GEMMA`, `SIGLIP`) or by explicit sizes."""

    pi05: bool = False  # time by adaptive norms, and no state token
    paligemma: str | GemmaConfig = "gemma_2b"
    expert: str | GemmaConfig = "gemma_300m"
    image_tower: str | SiglipConfig = "So400m/14"
    action_dim: int = 32  # A, also of the state
    horizon: int = 50  # h, actions in a chunk
    image_size: int = 224  # s
    vocab_size: int = 257152
    dtype: str = "float32"  # of the activations; "bfloat16" on accelerators

    @property
    def width(self) -> int:
        """Width of the language model, whose outputs `Pi0.prefix` returns."""
        return gemma_config(self.paligemma).width

    @property
    def max_token_len(self) -> int:
        """Length to which openpi pads prompts; a shorter prompt gives the same numbers."""
        return 200 if self.pi05 else 48


class Prefix(NamedTuple):
    """What every suffix of an observation attends to."""

    k: Float[Array, "L N P K d"]
    v: Float[Array, "L N P K d"]
    mask: Bool[Array, "N P"]  # False: padding, or a masked camera


def time_embedding(time: Float[Array, " N"], width: int) -> Float[Array, "N {width}"]:
    """Sines, then cosines, of 2π t / period, with width/2 periods spaced evenly in the logarithm from 0.004 to 4."""
    period = 4e-3 * (4.0 / 4e-3) ** jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    angle = time[:, None] * (1.0 / period * 2.0 * jnp.pi)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def attention_mask(starts: Bool[Array, " T"], valid: Bool[Array, "N T"]) -> Bool[Array, "N T T"]:
    """[query, key]: a token sees the valid tokens of its own block and of earlier ones; `starts` begins a block."""
    block = jnp.cumsum(starts)
    return (block[None, :] <= block[:, None])[None] & valid[:, None, :] & valid[:, :, None]


class PaliGemma(nn.Module):
    """The image tower and both language experts; exists for the names of the parameters."""

    config: Pi0Config

    def setup(self) -> None:
        experts = gemma_config(self.config.paligemma), gemma_config(self.config.expert)
        self.img = Siglip(siglip_config(self.config.image_tower), experts[0].width, self.config.dtype)
        self.llm = Gemma(experts, self.config.vocab_size, self.config.dtype)


class Pi0(nn.Module):
    """The velocity field. Call its methods by `model.apply({"params": params}, ..., method="velocity")`."""

    config: Pi0Config

    def setup(self) -> None:
        width = gemma_config(self.config.expert).width
        self.PaliGemma = PaliGemma(self.config)
        # Without a type of their own: float32 inputs give float32 outputs, also with bfloat16 weights.
        self.action_in_proj = nn.Dense(width)
        self.action_out_proj = nn.Dense(self.config.action_dim)
        if self.config.pi05:
            self.time_mlp_in = nn.Dense(width)
            self.time_mlp_out = nn.Dense(width)
        else:
            self.state_proj = nn.Dense(width)
            self.action_time_mlp_in = nn.Dense(width)
            self.action_time_mlp_out = nn.Dense(width)

    def embed_prefix(
        self,
        images: dict[str, Float[Array, "N s s 3"]],
        image_masks: dict[str, Bool[Array, " N"]],
        prompt: Int[Array, "N l"],
        prompt_mask: Bool[Array, "N l"],
    ) -> tuple[Float[Array, "N P w"], Bool[Array, "N P"]]:
        """Tokens of the images, in the order of CAMERAS, and of the prompt; and which of them are valid.

        Images are in -1..1; a camera is absent where its mask is False. A camera that is always absent can be left
        out of both dictionaries, and padding off the prompt: that saves their tokens and changes no valid number.
        """
        for name in images:
            if name not in CAMERAS:
                raise FpoError(f"The model knows no camera {name!r}{suggestion(name, CAMERAS)}")
        names = [name for name in CAMERAS if name in images]
        tokens, masks = [], []
        if names:
            # All cameras as one batch: the tower is compiled once.
            stacked = self.PaliGemma.img(jnp.concatenate([images[name] for name in names]))
            tokens = jnp.split(stacked, len(names))
            masks = [
                jnp.broadcast_to(image_masks[name][:, None], some.shape[:2])
                for name, some in zip(names, tokens, strict=True)
            ]
        tokens = [*tokens, self.PaliGemma.llm.embed(prompt)]
        return jnp.concatenate(tokens, axis=1), jnp.concatenate([*masks, prompt_mask], axis=1)

    def prefix_of_tokens(
        self, tokens: Float[Array, "N P w"], mask: Bool[Array, "N P"]
    ) -> tuple[Prefix, Float[Array, "N P w"]]:
        """The prefix pass on the result of `embed_prefix`, by the language model alone; see `prefix`."""
        starts = jnp.zeros(tokens.shape[1], bool)
        (hidden, _), (k, v) = self.PaliGemma.llm(
            (tokens, None), jnp.cumsum(mask, axis=1) - 1, attention_mask(starts, mask)
        )
        assert hidden is not None
        return Prefix(k, v, mask), hidden

    def prefix(
        self,
        images: dict[str, Float[Array, "N s s 3"]],
        image_masks: dict[str, Bool[Array, " N"]],
        prompt: Int[Array, "N l"],
        prompt_mask: Bool[Array, "N l"],
    ) -> tuple[Prefix, Float[Array, "N P w"]]:
        """Encodes an observation; also the outputs of the language model, which mean nothing where mask is False."""
        return self.prefix_of_tokens(*self.embed_prefix(images, image_masks, prompt, prompt_mask))

    def embed_suffix(
        self, state: Float[Array, "N A"], x_t: Float[Array, "N h A"], time: Float[Array, " N"]
    ) -> tuple[Float[Array, "N Q w"], Float[Array, "N w"] | None]:
        """Tokens of the state (π0) and the noisy actions, and the condition of the adaptive norms (π0.5)."""
        actions = self.action_in_proj(x_t)
        embedded = time_embedding(time, actions.shape[-1])
        if self.config.pi05:
            return actions, nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded))))
        embedded = jnp.broadcast_to(embedded[:, None], actions.shape)
        hidden = nn.swish(self.action_time_mlp_in(jnp.concatenate([actions, embedded], axis=-1)))
        return jnp.concatenate([self.state_proj(state)[:, None], self.action_time_mlp_out(hidden)], axis=1), None

    def suffix_starts(self, num_tokens: int) -> Bool[Array, " Q"]:
        """Which suffix tokens begin a block: the state, and the first action."""
        return jnp.asarray(np.arange(num_tokens) < (1 if self.config.pi05 else 2))

    def velocity(
        self, prefix: Prefix, state: Float[Array, "N A"], x_t: Float[Array, "N h A"], time: Float[Array, " N"]
    ) -> Float[Array, "N h A"]:
        """v(x_t, t) on an encoded observation; π0.5 ignores the state, which its prompt may spell out.

        For several draws per observation, `jax.vmap` this over x_t and time alone: the prefix is then shared.
        """
        tokens, condition = self.embed_suffix(state, x_t, time)
        shape = tokens.shape[:2]
        own = attention_mask(self.suffix_starts(shape[1]), jnp.ones(shape, bool))
        seen = jnp.broadcast_to(prefix.mask[:, None], (*shape, prefix.mask.shape[1]))
        positions = jnp.sum(prefix.mask, axis=1, keepdims=True) + jnp.arange(shape[1])[None]
        (_, hidden), _ = self.PaliGemma.llm(
            (None, tokens), positions, jnp.concatenate([seen, own], axis=-1), (None, condition), (prefix.k, prefix.v)
        )
        assert hidden is not None
        return self.action_out_proj(hidden[:, -x_t.shape[1] :])

    def joint(
        self,
        images: dict[str, Float[Array, "N s s 3"]],
        image_masks: dict[str, Bool[Array, " N"]],
        prompt: Int[Array, "N l"],
        prompt_mask: Bool[Array, "N l"],
        state: Float[Array, "N A"],
        x_t: Float[Array, "N h A"],
        time: Float[Array, " N"],
    ) -> tuple[Float[Array, "N P w"], Float[Array, "N Q v"], Cache]:
        """Prefix and suffix in one pass, as openpi trains: outputs of both experts, and all keys and values."""
        prefix, valid = self.embed_prefix(images, image_masks, prompt, prompt_mask)
        suffix, condition = self.embed_suffix(state, x_t, time)
        starts = jnp.concatenate([jnp.zeros(prefix.shape[1], bool), self.suffix_starts(suffix.shape[1])])
        valid = jnp.concatenate([valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
        (first, second), cache = self.PaliGemma.llm(
            (prefix, suffix), jnp.cumsum(valid, axis=1) - 1, attention_mask(starts, valid), (None, condition)
        )
        assert first is not None and second is not None
        return first, second, cache

    def flow_loss(
        self,
        images: dict[str, Float[Array, "N s s 3"]],
        image_masks: dict[str, Bool[Array, " N"]],
        prompt: Int[Array, "N l"],
        prompt_mask: Bool[Array, "N l"],
        state: Float[Array, "N A"],
        actions: Float[Array, "N h A"],
        noise: Float[Array, "N h A"],
        time: Float[Array, " N"],
    ) -> Float[Array, "N h"]:
        """mean_A (v(x_t, t) - (noise - actions))² in one joint pass; all action dimensions count, also padded ones."""
        t = time[:, None, None]
        _, hidden, _ = self.joint(images, image_masks, prompt, prompt_mask, state, t * noise + (1 - t) * actions, time)
        return jnp.mean(jnp.square(self.action_out_proj(hidden[:, -actions.shape[1] :]) - (noise - actions)), axis=-1)


def sample_actions(
    model: Pi0,
    params: Params,
    prefix: Prefix,
    state: Float[Array, "N A"],
    noise: Float[Array, "N h A"],
    num_steps: int = 10,
) -> Float[Array, "N h A"]:
    """Integrates the flow from `noise` at t = 1 to t = 0 by equal Euler steps.

    For several noises per observation, `jax.vmap` this over `noise` alone: the prefix is then shared.
    """
    dt = -1.0 / num_steps

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        x, t = carry
        time = jnp.broadcast_to(t, x.shape[:1])
        velocity = jnp.asarray(model.apply({"params": params}, prefix, state, x, time, method="velocity"))
        return (x + dt * velocity, t + dt), None

    # t is summed in float32, like openpi's, so its last values are not exactly 0.2 and 0.1.
    return jax.lax.scan(step, (noise, jnp.ones((), jnp.float32)), length=num_steps)[0][0]


def flow_losses(
    model: Pi0,
    params: Params,
    prefix: Prefix,
    state: Float[Array, "N A"],
    actions: Float[Array, "N h A"],
    noises: Float[Array, "S N h A"],
    times: Float[Array, "S N"],
) -> Float[Array, "S N h"]:
    """`Pi0.flow_loss` for S draws per observation, which share one prefix pass; gradients reach the prefix."""

    def loss(noise: Float[Array, "N h A"], time: Float[Array, " N"]) -> Float[Array, "N h"]:
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * actions
        velocity = jnp.asarray(model.apply({"params": params}, prefix, state, x_t, time, method="velocity"))
        return jnp.mean(jnp.square(velocity - (noise - actions)), axis=-1)

    return jax.vmap(loss)(noises, times)


def init(config: Pi0Config, key: Key[Array, ""]) -> Params:
    """Fresh float32 weights for training from scratch. Under `jit`, nothing but the weights is computed."""
    images = {CAMERAS[0]: jnp.zeros((1, config.image_size, config.image_size, 3))}
    prompt, valid = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    actions, time = jnp.zeros((1, config.horizon, config.action_dim)), jnp.ones(1)
    inputs = (images, {CAMERAS[0]: valid[0]}, prompt, valid, actions[:, 0], actions, actions, time)
    return Pi0(config).init(key, *inputs, method="flow_loss")["params"]


def param_shapes(config: Pi0Config) -> PyTree[jax.ShapeDtypeStruct]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without any memory."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))
