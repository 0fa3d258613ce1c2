"""Demonstration files: what they hold, reading and writing them, and their normalisation statistics.

Who records them is the environment's business (`envs/aloha_expert.py` for ALOHA); this module knows arrays only.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fpo_jax.types import FpoError


class Demonstrations(NamedTuple):
    """E open-loop episodes of T control steps; the observations at t are those *before* action t.

    Episodes go on after success, so that all have the same length.
    """

    proprio: Float[np.ndarray, "E T p"]  # robot state, in the environment's units
    object_pose: Float[np.ndarray, "E T o"]  # positions [m] and quaternions wxyz
    actions: Float[np.ndarray, "E T a"]
    success: Bool[np.ndarray, " E"]


class Normalisation(NamedTuple):
    """Per-dimension statistics of one field: (value - mean) / std is what networks see."""

    mean: Float[np.ndarray, " n"]
    std: Float[np.ndarray, " n"]


def save(path: str | Path, demos: Demonstrations) -> None:
    """Writes `demos` as a compressed .npz of plain arrays to exactly `path`."""
    with open(path, "wb") as file:  # numpy would append .npz to a bare name
        np.savez_compressed(file, **demos._asdict())


def load(path: str | Path) -> Demonstrations:
    """Reads a file that `save` wrote; never unpickles, and rejects a file with other fields or shapes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            demos = Demonstrations(*(file[name] for name in Demonstrations._fields))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise FpoError(f"{path} is not a demonstration file ({error}); record one with experiments/clone.py") from error
    steps = {array.shape[:2] for array in demos[:3] if array.ndim == 3}
    if len(steps) != 1 or {array.ndim for array in demos[:3]} != {3} or demos.success.shape != demos.actions.shape[:1]:
        raise FpoError(f"{path} is damaged: its arrays disagree on episodes and steps; record it again")
    return demos


def normalisation(demos: Demonstrations, std_floor: float = 1e-2) -> dict[str, Normalisation]:
    """Mean and standard deviation over episodes and steps, for proprio, object_pose and actions.

    A dimension that hardly moves (the unused forearm roll) would turn noise into a large input: `std_floor`, in the
    field's own unit, is the least standard deviation.
    """

    def statistics(values: Float[np.ndarray, "E T n"]) -> Normalisation:
        mean, std = values.mean((0, 1), dtype=np.float64), values.std((0, 1), dtype=np.float64)
        return Normalisation(mean.astype(np.float32), np.maximum(std, std_floor).astype(np.float32))

    return {name: statistics(getattr(demos, name)) for name in ("proprio", "object_pose", "actions")}
