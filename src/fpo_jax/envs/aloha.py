"""The ALOHA Transfer Cube task of gym-aloha 0.1.5, computed from physics arrays alone.

Both physics backends (`aloha_mujoco`, `aloha_mjx`) share this file. Functions on arrays take NumPy and JAX alike.
qpos[23] = left arm 6 joints [rad] and 2 fingers [m], right arm likewise, cube position [m] and quaternion wxyz.
action[14] = left arm 6 joint targets [rad] and gripper (0 closed, 1 open), right arm likewise.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fpo_jax.types import EnvSpec, FpoError, Observation

AnyArray = Array | np.ndarray

SUBSTEPS = 10  # physics steps of 2 ms in one control step of 20 ms
SUCCESS_REWARD = 4  # the cube is in the left gripper and off the table

_ARM_START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239)
START_ARMS = np.array(_ARM_START * 2)  # qpos[:16] and ctrl after a reset
CUBE_LOW = np.array([0.0, 0.4, 0.05])  # [m]; the cube starts 3 cm above its rest
CUBE_HIGH = np.array([0.2, 0.6, 0.05])
CUBE_QUATERNION = np.array([1.0, 0.0, 0.0, 0.0])
CUBE = slice(16, 23)  # the cube's pose in qpos

CUBE_GEOM = "red_box"
TABLE_GEOM = "table"
RIGHT_FINGER_GEOM = "vx300s_right/10_right_gripper_finger"
LEFT_FINGER_GEOM = "vx300s_left/10_left_gripper_finger"

GRIPPER_CLOSED, GRIPPER_OPEN = 0.01844, 0.05800  # finger position [m] at normalised 0 and 1
# Joints pass unchanged, (x - 0) / 1; grippers are normalised: one formula for all 14 entries.
_OFFSET = np.array(([0.0] * 6 + [GRIPPER_CLOSED]) * 2)
_SPAN = np.array(([1.0] * 6 + [GRIPPER_OPEN - GRIPPER_CLOSED]) * 2)
_PROPRIO_OF_QPOS = np.array([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14])
_ACTION_OF_CTRL = np.array([0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 13, 13])
_CTRL_SIGN = np.array(([1.0] * 7 + [-1.0]) * 2)  # the second finger of each gripper mirrors the first


def spec(episode_length: int = 300, execute_steps: int = 50) -> EnvSpec:
    """Static facts of the task; 300 steps is gym-aloha's and openpi's limit, LeRobot uses 400."""
    return EnvSpec(
        name="aloha_transfer_cube",
        action_dim=14,
        proprio_dim=14,
        object_pose_dim=7,
        episode_length=episode_length,
        execute_steps=execute_steps,
        control_hz=50.0,
    )


def xml_path() -> Path:
    """The scene's XML inside the installed gym-aloha; found without importing it (it would start a renderer)."""
    package = importlib.util.find_spec("gym_aloha")
    if package is None or package.origin is None:
        raise FpoError("The package gym-aloha is missing: install it with `pip install gym-aloha==0.1.5`.")
    return Path(package.origin).parent / "assets" / "bimanual_viperx_transfer_cube.xml"


def sample_cube_position(key: Key[Array, ""]) -> Float[Array, "3"]:
    """The cube's initial position [m], uniform in gym-aloha's 20 cm square."""
    return jax.random.uniform(key, (3,), minval=CUBE_LOW.astype(np.float32), maxval=CUBE_HIGH.astype(np.float32))


def initial_qpos(cube_position: Float[AnyArray, "*batch 3"]) -> Float[AnyArray, "*batch 23"]:
    """Arms at the start pose, the cube upright at `cube_position` [m]."""
    xp = cube_position.__array_namespace__()
    batch, dtype = cube_position.shape[:-1], cube_position.dtype

    def repeat(row):
        return xp.broadcast_to(xp.asarray(row, dtype=dtype), (*batch, len(row)))

    return xp.concatenate([repeat(START_ARMS), cube_position, repeat(CUBE_QUATERNION)], axis=-1)


def control_from_action(action: Float[AnyArray, "*batch 14"]) -> Float[AnyArray, "*batch 16"]:
    """Actuator targets [rad, m]; out-of-range targets are left to MuJoCo's ctrlrange, as in gym-aloha."""
    target = (action * _like(_SPAN, action) + _like(_OFFSET, action))[..., _ACTION_OF_CTRL]
    return _like(_CTRL_SIGN, target) * target


def proprio_from_qpos(qpos: Float[AnyArray, "*batch 23"]) -> Float[AnyArray, "*batch 14"]:
    """gym-aloha's `agent_pos`: joints [rad] and normalised grippers, in the order of the action."""
    selected = qpos[..., _PROPRIO_OF_QPOS]
    return (selected - _like(_OFFSET, selected)) / _like(_SPAN, selected)


def observe(qpos: Float[Array, "N 23"]) -> Observation:
    """What the policy sees: `agent_pos`, and the cube's pose (privileged)."""
    return Observation(proprio=jnp.asarray(proprio_from_qpos(qpos)), object_pose=qpos[..., CUBE])


def reward_stage(
    touch_right: Bool[AnyArray, "*batch"], touch_left: Bool[AnyArray, "*batch"], touch_table: Bool[AnyArray, "*batch"]
) -> Int[AnyArray, "*batch"]:
    """Stage of the transfer, from the cube's contacts with the two inner fingers and the table.

    0 nothing, 1 right gripper touches, 2 and lifted, 3 left gripper touches, 4 and off the table (success).
    """
    lifted = (touch_right | touch_left) & ~touch_table
    return 3 * touch_left + 1 * (touch_right & ~touch_left) + 1 * lifted


def _like(row: np.ndarray, x: AnyArray) -> np.ndarray:
    # Explicit: JAX may be set to refuse broadcasting between ranks.
    return np.broadcast_to(row, x.shape)
