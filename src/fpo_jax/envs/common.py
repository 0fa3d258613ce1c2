"""What every environment needs for per-environment keys and next-step autoreset."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, PyTree


def split_each(keys: Key[Array, " N"]) -> tuple[Key[Array, " N"], Key[Array, " N"]]:
    """(the key to keep, the key to draw an initial state from) of each environment.

    Each environment owns its chain of keys, so its episodes do not depend on the batch around it.
    """
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def where_env(mask: Bool[Array, " N"], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Choose whole environments: leaves have leading axis N, `mask` picks rows of `on_true`."""

    def choose(a, b):
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, on_true, on_false)
