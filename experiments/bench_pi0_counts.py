"""Operations and bytes of the frozen π0, counted by hand, for bench_pi0.py.

2 operations per weight and token, 4 per query-key pair and channel; bytes are the least traffic: weights, inputs and
results once (by decode: once per Euler step).
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax.policies.gemma import gemma_config
from fpo_jax.policies.pi0 import Pi0Config, param_shapes
from fpo_jax.policies.siglip import siglip_config

STEPS = 10  # of Euler, as in openpi


class Work(NamedTuple):
    """What a program has to do at least."""

    flops: int
    bytes: int


@cache
def weights(config: Pi0Config) -> dict[str, Work]:
    """Operations per token, and bytes, of the weights, by the tokens that pass through them.

    image: patches; table: only looked up; prefix: images and prompt; suffix: state and actions; action: actions;
    single: one vector per observation (the state, or the time of π0.5).
    """
    found = dict.fromkeys(["image", "table", "prefix", "suffix", "action", "single"], Work(0, 0))
    for path, leaf in jax.tree.leaves_with_path(param_shapes(config)):
        names = [key.key for key in path]
        if "llm" in names:
            expert = "suffix" if any(name.endswith("_1") for name in names) else "prefix"
            # Adaptive norms have a dense layer, which only the time passes through.
            group = "single" if "Dense_0" in names else "table" if names[-1] == "input_embedding" else expert
        else:
            group = "image" if "img" in names else "action" if names[0].startswith("action") else "single"
        flops = 2 * leaf.size if names[-1] in ("kernel", "w", "gating_einsum", "linear") else 0
        size = leaf.size * jnp.dtype(config.dtype).itemsize
        found[group] = Work(found[group].flops + flops, found[group].bytes + size)
    return found


def cache_bytes(config: Pi0Config, tokens: int) -> int:
    """Keys and values of so many tokens."""
    gemma = gemma_config(config.paligemma)
    return 2 * gemma.depth * tokens * gemma.num_kv_heads * gemma.head_dim * jnp.dtype(config.dtype).itemsize


def image_tokens(config: Pi0Config, cameras: int) -> int:
    return cameras * (config.image_size // siglip_config(config.image_tower).patch) ** 2


def encode_work(config: Pi0Config, batch: int, cameras: int, prompt: int) -> Work:
    """Of `Pi0.prefix`."""
    gemma, tower, parts = gemma_config(config.paligemma), siglip_config(config.image_tower), weights(config)
    images = image_tokens(config, cameras)
    tokens = images + prompt
    attention = 4 * tower.depth * tower.width * images * image_tokens(config, 1)
    attention += 4 * gemma.depth * gemma.num_heads * gemma.head_dim * tokens**2
    flops = batch * (parts["image"].flops * images + parts["prefix"].flops * tokens + attention)
    read = parts["image"].bytes + parts["prefix"].bytes + 4 * batch * cameras * config.image_size**2 * 3
    # The embeddings that are looked up, and the hidden states.
    rows = batch * (prompt + tokens) * config.width * jnp.dtype(config.dtype).itemsize
    return Work(flops, read + rows + cache_bytes(config, batch * tokens))


def decode_work(config: Pi0Config, batch: int, prefix: int, latents: int = 1, steps: int = STEPS) -> Work:
    """Of `sample_actions`, vectorised over `latents` noises on a context of `prefix` tokens."""
    expert, parts, horizon = gemma_config(config.expert), weights(config), config.horizon
    tokens = horizon + (not config.pi05)
    per_latent = parts["suffix"].flops * tokens + parts["action"].flops * horizon
    per_latent += 4 * expert.depth * expert.num_heads * expert.head_dim * tokens * (prefix + tokens)
    read = sum(parts[group].bytes for group in ("suffix", "action", "single")) + cache_bytes(config, batch * prefix)
    ends = 2 * latents * batch * horizon * config.action_dim * 4  # noise and actions, in float32
    return Work(steps * batch * (latents * per_latent + parts["single"].flops), steps * read + ends)


def loops_once(config: Pi0Config) -> Pi0Config:
    """The model with one layer per stack: all that XLA counts where it counts the bodies of loops once."""
    language, expert = (replace(gemma_config(variant), depth=1) for variant in (config.paligemma, config.expert))
    tower = replace(siglip_config(config.image_tower), depth=1)
    return replace(config, paligemma=language, expert=expert, image_tower=tower)


@cache
def xla_counts_loops() -> bool:
    """Whether XLA multiplies the body of a loop by its length, tried on ten matrix products."""

    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, length=10)[0]

    counted = jax.jit(chain).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().cost_analysis() or {}
    return counted.get("flops", 0) > 5 * 2 * 64**3
