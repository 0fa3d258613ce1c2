"""What several environments need."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

# A callback's operand above 100 KiB is copied by a thread of XLA's pool; when all of them wait for callbacks
# (few cores, several devices) that is a deadlock. So operands are cut into pieces below that size.
_OPERAND_BYTES = 64 * 1024


def num_cpus() -> int:
    """Cores this process may use (all of them where the system cannot tell)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def no_actions(actions: Float[Array, "N k a"]) -> Bool[Array, " N"]:
    """Where a number is not finite: nothing of such a chunk is executed, and its episode ends as a failure.

    It is the policy that broke: an invalid episode would take its own failures out of its success rate.
    """
    return ~jnp.isfinite(actions).all(axis=(1, 2))


def where_env(mask: Bool[Array, " N"], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Choose whole environments: leaves have leading axis N, `mask` picks rows of `on_true`."""

    def choose(a, b):
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, on_true, on_false)


def pieces(operand: Array) -> list[Array]:
    """An operand of a callback, cut along its leading axis so that no piece is larger than `_OPERAND_BYTES`."""
    return jnp.array_split(operand, max(1, -(-operand.nbytes // _OPERAND_BYTES)))


def join(pieces: list[Array]) -> np.ndarray:
    """In the callback: the operand that `pieces` cut."""
    return np.concatenate([np.asarray(piece) for piece in pieces])
