"""openpi's robot conventions: state, actions and images between an environment and a π0 or π0.5 checkpoint.

In: robot inputs -> delta actions (training) -> normalise -> pad. Out: unnormalise -> absolute actions -> robot outputs.
The same numbers as openpi 15a9616 (Apache-2.0), in float32 and traceable; only the data format was taken from there.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from fpo_jax.images import padded_size
from fpo_jax.types import FpoError

Robot = Literal["aloha", "libero"]
Normalisation = Literal["z-score", "quantile"]

# robot -> {the environment's camera: the model's camera}; gym-aloha's only camera, `top`, plays the real robot's
# `cam_high`. A model camera that no camera of the environment plays is absent: zeros, with mask False.
CAMERAS: dict[Robot, dict[str, str]] = {
    "aloha": {
        "top": "base_0_rgb",
        "cam_high": "base_0_rgb",
        "cam_left_wrist": "left_wrist_0_rgb",
        "cam_right_wrist": "right_wrist_0_rgb",
    },
    "libero": {"image": "base_0_rgb", "wrist_image": "left_wrist_0_rgb"},
}
STATE_DIM: dict[Robot, int] = {"aloha": 14, "libero": 8}  # (6 joints + gripper) x 2; position, axis-angle, 2 fingers
OUTPUT_DIM: dict[Robot, int] = {"aloha": 14, "libero": 7}  # as the state; position, rotation, gripper
# True: this action dimension is relative to the state at the decision. Grippers stay absolute.
DELTA_MASK: dict[Robot, tuple[bool, ...]] = {
    "aloha": 2 * (*(6 * (True,)), False),
    "libero": (*(6 * (True,)), False),
}

_EPSILON = 1e-6  # openpi adds it to std and to q99 - q01
_JOINT_SIGNS = 2 * (1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0)
_GRIPPERS = 2 * (*(6 * (False,)), True)


class NormStats(NamedTuple):
    """Statistics of one unpadded vector, `state` or `actions`, per dimension; they may be longer than the data."""

    mean: Float[Array, " n"]
    std: Float[Array, " n"]
    q01: Float[Array, " n"] | None = None  # 1 % and 99 % quantiles
    q99: Float[Array, " n"] | None = None


def parse_norm_stats(text: str, source: str) -> dict[str, NormStats]:
    """Reads openpi's `norm_stats.json`: `{"norm_stats": {"state": {"mean": [...], ...}, "actions": ...}}`.

    `source` names the file in the FpoError that anything else raises.
    """
    try:
        content = json.loads(text)["norm_stats"]
        stats = {}
        for name in ("state", "actions"):
            fields = {field: content[name].get(field) for field in NormStats._fields}
            fields = {field: np.asarray(v, np.float32) for field, v in fields.items() if v is not None}
            shapes = {values.shape for values in fields.values()}
            if len(shapes) != 1 or len(shapes.pop()) != 1 or not all(np.isfinite(v).all() for v in fields.values()):
                raise ValueError("not vectors of one length")
            stats[name] = NormStats(**{field: jnp.asarray(values) for field, values in fields.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FpoError(
            f"{source} holds no normalisation statistics of state and actions: take the norm_stats.json that belongs "
            "to the checkpoint."
        ) from error
    return stats


def dump_norm_stats(stats: Mapping[str, NormStats]) -> str:
    """The text of openpi's `norm_stats.json` for these statistics."""
    content = {
        name: {field: None if values is None else np.asarray(values).tolist() for field, values in s._asdict().items()}
        for name, s in stats.items()
    }
    return json.dumps({"norm_stats": content}, indent=2) + "\n"


def normalize(x: Float[Array, "*batch n"], stats: NormStats, method: Normalisation) -> Float[Array, "*batch n"]:
    """z-score: (x - mean) / (std + 1e-6); quantile: 2 (x - q01) / (q99 - q01 + 1e-6) - 1.

    Raises FpoError where the statistics are shorter than x or lack the quantiles.
    """
    size = x.shape[-1]
    if stats.mean.shape[-1] < size:
        raise FpoError(
            f"The normalisation statistics cover {stats.mean.shape[-1]} dimensions, but the data have {size}: "
            "choose the statistics of this robot."
        )
    if method == "z-score":
        return (x - _last(stats.mean[:size], x)) / (_last(stats.std[:size], x) + _EPSILON)
    q01, q99 = (_last(q[:size], x) for q in _quantiles(stats))
    return (x - q01) / (q99 - q01 + _EPSILON) * 2.0 - 1.0


def unnormalize(x: Float[Array, "*batch n"], stats: NormStats, method: Normalisation) -> Float[Array, "*batch n"]:
    """The inverse of `normalize`, for padded x too: beyond the statistics mean = 0 and std = 1, or x as it is.

    z-score: x (std + 1e-6) + mean; quantile: (x + 1) / 2 (q99 - q01 + 1e-6) + q01.
    """
    size = x.shape[-1]
    extra = max(0, size - stats.mean.shape[-1])
    if method == "z-score":
        mean = jnp.pad(stats.mean[:size], (0, extra))
        std = jnp.pad(stats.std[:size], (0, extra), constant_values=1.0)
        return x * (_last(std, x) + _EPSILON) + _last(mean, x)
    known = x[..., : size - extra]
    q01, q99 = (_last(q[:size], x) for q in _quantiles(stats))
    known = (known + 1.0) / 2.0 * (q99 - q01 + _EPSILON) + q01
    return jnp.concatenate([known, x[..., size - extra :]], axis=-1)


def gripper_state_to_model(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """ALOHA's gripper opening in [0, 1] -> the angle that π0 was trained on, as a share of its range.

    Opening -> finger position p [m] -> motor angle φ [rad] with sin φ = (r² + p² - l²) / (2 r p), where r = 22 mm is
    the horn and l = 36 mm the arm -> (φ - 0.5476) / (1.6296 - 0.5476).
    """
    position = x * (0.05800 - 0.01844) + 0.01844
    sine = (0.022**2 + position**2 - 0.036**2) / (2 * 0.022 * position)
    return (jnp.arcsin(jnp.clip(sine, -1.0, 1.0)) - 0.5476) / (1.6296 - 0.5476)


def gripper_action_from_model(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """π0's gripper action -> ALOHA's command: (x + 0.5476 + 0.6213) / (1.4910 + 0.6213).

    This isn't the inverse of `gripper_state_to_model`: openpi maps the state through the follower's linkage and the
    action through the leader's joint, whose range [-0.6213, 1.4910] rad it is.
    """
    return (x + 0.5476 + 0.6213) / (1.4910 + 0.6213)


def gripper_action_to_model(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The inverse of `gripper_action_from_model`: x (1.4910 + 0.6213) - 0.6213 - 0.5476."""
    return x * (1.4910 + 0.6213) - 0.6213 - 0.5476


def aloha_state(state: Float[Array, "*batch 14"], adapt: bool) -> Float[Array, "*batch 14"]:
    """ALOHA's joint angles [rad] and gripper openings in π0's convention (`adapt`), or as they are."""
    if not adapt:
        return state
    flipped = state * _last(_JOINT_SIGNS, state)
    return jnp.where(_last(_GRIPPERS, state), gripper_state_to_model(state), flipped)


def aloha_actions_in(actions: Float[Array, "*batch h 14"], adapt: bool) -> Float[Array, "*batch h 14"]:
    """ALOHA's actions in π0's convention, the inverse of `aloha_actions_out`."""
    if not adapt:
        return actions
    flipped = actions * _last(_JOINT_SIGNS, actions)
    return jnp.where(_last(_GRIPPERS, actions), gripper_action_to_model(actions), flipped)


def aloha_actions_out(actions: Float[Array, "*batch h A"], adapt: bool) -> Float[Array, "*batch h 14"]:
    """The first 14 dimensions of the model's actions, back in ALOHA's convention."""
    actions = actions[..., :14]
    if not adapt:
        return actions
    flipped = actions * _last(_JOINT_SIGNS, actions)
    return jnp.where(_last(_GRIPPERS, actions), gripper_action_from_model(actions), flipped)


def delta_actions(
    actions: Float[Array, "*batch h A"], state: Float[Array, "*batch n"], mask: tuple[bool, ...]
) -> Float[Array, "*batch h A"]:
    """action - state in the dimensions of `mask`, for every step of the chunk alike; the others stay."""
    return actions - _offset(actions, state, mask)


def absolute_actions(
    actions: Float[Array, "*batch h A"], state: Float[Array, "*batch n"], mask: tuple[bool, ...]
) -> Float[Array, "*batch h A"]:
    """action + state in the dimensions of `mask`, the inverse of `delta_actions`."""
    return actions + _offset(actions, state, mask)


def pad_last(x: Float[Array, "*batch n"], size: int) -> Float[Array, "*batch m"]:
    """Appends zeros to the last axis up to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def images_to_float(images: UInt8[Array, "*batch y x 3"]) -> Float[Array, "*batch y x 3"]:
    """Pixels 0..255 -> [-1, 1]: x / 255 · 2 - 1."""
    return images.astype(jnp.float32) / 255.0 * 2.0 - 1.0


def resize_with_pad(images: Num[Array, "*batch y x 3"], height: int, width: int) -> Num[Array, "*batch y2 x2 3"]:
    """Resizes on the device to [*batch height width 3], keeping the aspect ratio, with equal black bars around.

    Bilinear, averaging where it shrinks; black is 0 for uint8 and -1 for floats in [-1, 1]. openpi does this inside the
    model to images of another size; its server's resizing (`fpo_jax.images.resize_with_pad`) rounds differently.
    """
    *batch, y, x, _ = images.shape
    if (y, x) == (height, width):
        return images
    inner = padded_size((y, x), (height, width))
    resized = jax.image.resize(images.astype(jnp.float32), (*batch, *inner, 3), jax.image.ResizeMethod.LINEAR)
    if images.dtype == jnp.uint8:
        resized, black = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8), 0
    else:
        resized, black = jnp.clip(resized, -1.0, 1.0).astype(images.dtype), -1
    rows, columns = height - inner[0], width - inner[1]
    bars = [(rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)]
    return jnp.pad(resized, [(0, 0)] * len(batch) + bars + [(0, 0)], constant_values=black)


@dataclasses.dataclass(frozen=True)
class RobotTransform:
    """The whole way from the environment's numbers to the model's and back, for one checkpoint's conventions.

    `stats` is always {"state": NormStats, "actions": NormStats}, as in the checkpoint's `norm_stats.json`.
    Raises FpoError where the model is too narrow for the robot.
    """

    robot: Robot
    normalisation: Normalisation  # z-score for π0, quantile for π0.5
    action_dim: int = 32  # A, the width of the model's state and actions
    adapt_to_pi: bool = True  # ALOHA only: π0's joint directions and gripper angles
    delta_actions: bool = False  # ALOHA: not in simulation; LIBERO: openpi's "extra delta" of old π0 checkpoints

    def __post_init__(self) -> None:
        if self.action_dim < self.state_dim:
            raise FpoError(
                f"A model with {self.action_dim} action dimensions can't hold the {self.state_dim} state dimensions "
                f"of {self.robot}: choose a checkpoint that was made for this robot."
            )

    @property
    def state_dim(self) -> int:
        """Size of the unpadded state, p."""
        return STATE_DIM[self.robot]

    @property
    def output_dim(self) -> int:
        """Size of the actions that `outputs` returns, a."""
        return OUTPUT_DIM[self.robot]

    def robot_state(self, proprio: Float[Array, "*batch p"]) -> Float[Array, "*batch p"]:
        """The state in the checkpoint's convention, not normalised. Raises FpoError for another robot's state."""
        if proprio.shape[-1] != self.state_dim:
            raise FpoError(
                f"The environment shows a robot state of {proprio.shape[-1]} numbers, but the base policy was trained "
                f"on the {self.state_dim} of {self.robot}: choose an environment and a base of the same robot."
            )
        return aloha_state(proprio, self.adapt_to_pi) if self.robot == "aloha" else proprio

    def inputs(self, stats: Mapping[str, NormStats], proprio: Float[Array, "*batch p"]) -> Float[Array, "*batch A"]:
        """The normalised state, padded by zeros; its first `state_dim` numbers are what a π0.5 prompt spells out."""
        state = normalize(self.robot_state(proprio), stats["state"], self.normalisation)
        return pad_last(state, self.action_dim)

    def outputs(
        self, stats: Mapping[str, NormStats], proprio: Float[Array, "*batch p"], actions: Float[Array, "*batch h A"]
    ) -> Float[Array, "*batch h a"]:
        """The model's actions in the environment's units, given the robot state at the decision.

        openpi unnormalises the state that the model saw; `proprio` is the same state without that round trip.
        """
        actions = unnormalize(actions, stats["actions"], self.normalisation)
        if self.delta_actions:
            actions = absolute_actions(actions, self.robot_state(proprio), DELTA_MASK[self.robot])
        if self.robot == "aloha":
            return aloha_actions_out(actions, self.adapt_to_pi)
        return actions[..., : self.output_dim]

    def training_actions(
        self, stats: Mapping[str, NormStats], proprio: Float[Array, "*batch p"], actions: Float[Array, "*batch h a"]
    ) -> Float[Array, "*batch h A"]:
        """The environment's actions as the model shall predict them: the inverse of `outputs`, padded by zeros."""
        if self.robot == "aloha":
            actions = aloha_actions_in(actions, self.adapt_to_pi)
        if self.delta_actions:
            actions = delta_actions(actions, self.robot_state(proprio), DELTA_MASK[self.robot])
        return pad_last(normalize(actions, stats["actions"], self.normalisation), self.action_dim)


def _last(values: Array | tuple[float, ...] | tuple[bool, ...], like: Array) -> Array:
    """`values` on the last of as many axes as `like` has: numbers in its dtype, truth values as they are."""
    values = jnp.asarray(values)
    values = values if values.dtype == bool else values.astype(like.dtype)
    return values.reshape((1,) * (like.ndim - 1) + values.shape)


def _quantiles(stats: NormStats) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    if stats.q01 is None or stats.q99 is None:
        raise FpoError(
            "Normalisation by quantiles needs q01 and q99, which these statistics lack: take the norm_stats.json that "
            "belongs to the checkpoint."
        )
    return stats.q01, stats.q99


def _offset(
    actions: Float[Array, "*batch h A"], state: Float[Array, "*batch n"], mask: tuple[bool, ...]
) -> Float[Array, "*batch 1 A"]:
    """The state where `mask` is True, else 0; as wide as the actions."""
    covered = state[..., : len(mask)]
    return pad_last(jnp.where(_last(mask, covered), covered, 0.0), actions.shape[-1])[..., None, :]
