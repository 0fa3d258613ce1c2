"""What several environments need."""

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def num_cpus() -> int:
    """Cores this process may use (all of them where the system cannot tell)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def where_env(mask: Bool[Array, " N"], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Choose whole environments: leaves have leading axis N, `mask` picks rows of `on_true`."""

    def choose(a, b):
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, on_true, on_false)
