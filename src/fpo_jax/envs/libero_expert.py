"""Scripted expert for LIBERO's pick-and-place tasks: closed loop on robot state and object poses, by OSC_POSE actions.

It moves above the object, turns the fingers to its narrow side, descends, closes, lifts, carries, lowers and opens, each
phase until the hand is where it should be. Displacing the grasp (`Plan.grasp_offset`) leaves the rest of the motion as
it is: the raw material of a steerable base policy, one that contains the right behaviour but does not choose it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fpo_jax.config import LiberoOptions
from fpo_jax.demos import Demonstrations
from fpo_jax.envs import libero
from fpo_jax.envs.common import num_cpus
from fpo_jax.envs.host import Episode
from fpo_jax.envs.workers import WorkerPool
from fpo_jax.types import FpoError

REACH = 0.05  # [m] by which an action of 1 moves the controller's goal away from the hand
TURN = 0.5  # [rad] the same for rotations
OPEN, CLOSED = -1.0, 1.0
ARRIVED = 0.012  # [m] from a phase's goal, sideways and in height
ALIGNED = 0.06  # [rad]
CLOSING_STEPS = 10  # control steps until the fingers hold
OPENING_STEPS = 8
CLEARANCE = 0.10  # [m] above the grasp: where the hand waits before it descends

PHASES = ("above", "descend", "close", "lift", "carry", "lower", "open", "retreat")


@dataclass(frozen=True)
class Shape:
    """How a kind of object is grasped, in its body's frame."""

    narrow: tuple[float, float, float]  # the axis along which the fingers close
    height: float = 0.0  # [m] of the grasp above the body's origin


@dataclass(frozen=True)
class Container:
    """Where things are put down in a kind of container."""

    centre: tuple[float, float]  # [m] from its origin, in world axes: LIBERO's containers are not turned
    carry: float  # [m] height of the hand over it while carrying, from its origin
    lower: float  # [m] height of the hand when it opens


SHAPES: Mapping[str, Shape] = {
    "butter": Shape((0.0, 1.0, 0.0)),
}
CONTAINERS: Mapping[str, Container] = {
    "wooden_tray": Container((0.0086, -0.0047), carry=0.20, lower=0.10),
    "basket": Container((0.0, 0.0), carry=0.30, lower=0.20),
}


class Plan(NamedTuple):
    """One episode's task: which object goes where, and how it is grasped."""

    item: int  # its row among the observed objects
    target: int  # the container's
    shape: Shape
    container: Container
    grasp_offset: tuple[float, float] = (0.0, 0.0)  # [m] x and y of the grasp beside where it should be


class State(NamedTuple):
    """What the expert remembers between control steps."""

    phase: int = 0  # in PHASES
    steps: int = 0  # in this phase
    yaw: float = 0.0  # [rad] of the fingers' axis, chosen in the first step
    grasp: tuple[float, float, float] = (0.0, 0.0, 0.0)  # [m] where the hand closes, chosen in the first step


def rotation(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a rotation vector [rad] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_of_quaternion(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a unit quaternion wxyz."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def axis_yaw(axis: Float[np.ndarray, "3"]) -> float:
    """Angle [rad] of a finger axis about the vertical, from world y; an axis has no sign, so it is within ±π/2."""
    yaw = float(np.arctan2(-axis[0], axis[1]))
    return (yaw + np.pi / 2) % np.pi - np.pi / 2
