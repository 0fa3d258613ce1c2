"""The sliding window of the newest W rollouts (paper §III-A-a). It holds states and latents, never pixels."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from fpo_jax.parallel import spread
from fpo_jax.types import Transition


def _blank(leaf: Array | jax.ShapeDtypeStruct, window: int) -> Array:
    shape = (window, *leaf.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    return jnp.zeros(shape, leaf.dtype)


def init(rollout: Transition, window: int) -> Transition:
    """An empty window [W, T, N], nothing valid, for rollouts shaped like this one (arrays or structs, [T, N])."""
    return jax.tree.map(lambda leaf: _blank(leaf, window), rollout)


def append(window: Transition, rollout: Transition) -> Transition:
    """Drop the oldest rollout [T, N] and put the newest at the end."""
    return jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), window, rollout)


def flatten(tree: PyTree, num_axes: int = 3) -> PyTree:
    """Merge the leading axes [W, T, N] into one, of which each device has its share."""

    def merge(leaf: Array) -> Array:
        return leaf.reshape(math.prod(leaf.shape[:num_axes]), *leaf.shape[num_axes:])

    return spread(jax.tree.map(merge, tree))


def minibatch_indices(
    key: Key[Array, ""], valid: Bool[Array, " n"], num_minibatches: int, size: int
) -> Int[Array, "m B"]:
    """Shuffled indices of the valid samples, cut into minibatches; repeated in the same order if there are too few.

    Repeating keeps the number of gradient steps fixed (one compiled program) while no step sees an invalid sample,
    unless there is no valid sample at all.
    """
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), 2.0))
    position = jnp.arange(num_minibatches * size) % jnp.maximum(jnp.sum(valid), 1)
    return order[position].reshape(num_minibatches, size)
