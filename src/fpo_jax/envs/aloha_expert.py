"""Scripted expert for ALOHA Transfer Cube: open-loop episodes by closed-form inverse kinematics.

The right arm grasps the cube and carries it to the middle; the left arm takes it there (reward 4). With the forearm
unrolled a ViperX is a planar three-link arm on a turning waist, so a keyframe (tool point, pitch, roll) has a
closed-form solution and an episode costs milliseconds. Between keyframes the joints follow a smoothstep; the position
actuators are P-controllers, so each command adds the gravity load divided by its gain.

Displacing the grasp (`grasp_offset`) makes the right arm close beside the cube and leaves the rest of the motion as
it is: the raw material of a steerable base policy, one that contains the right behaviour but does not choose it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mujoco
import numpy as np
from jaxtyping import Float

from fpo_jax.demos import Demonstrations
from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_mujoco import load_model, simulate
from fpo_jax.envs.common import num_cpus

# Geometry of the ViperX 300 [m], from gym_aloha/assets/vx300s_*.xml.
BASE_X = 0.469  # the bases stand at x = ∓BASE_X, y = BASE_Y and face each other
BASE_Y = 0.5
SHOULDER_HEIGHT = 0.079 + 0.04805
UPPER_ARM = float(np.hypot(0.05955, 0.3))  # shoulder to elbow
UPPER_ARM_ELEVATION = float(np.arctan2(0.3, 0.05955))  # [rad] above the horizon when the shoulder joint is 0
FOREARM = 0.2 + 0.1  # elbow to wrist
GRIPPER_LINK_TO_TOOL = 0.135  # along the gripper's axis, to the point between the finger pads
HAND = 0.069744 + GRIPPER_LINK_TO_TOOL  # wrist to tool point

CUBE_REST_HEIGHT = 0.02  # [m] the cube is dropped and comes to rest on the table
GRASP_HEIGHT = CUBE_REST_HEIGHT - 0.005  # [m] a low grasp keeps the cube from tipping out
HOVER_HEIGHT = GRASP_HEIGHT + 0.1
MEETING = np.array([0.0, 0.5, 0.25])  # [m] where the cube changes hands
APPROACH = np.array([-0.12, 0.0, 0.0])  # [m] from there: where the left arm waits
RETREAT = np.array([0.08, 0.0, 0.08])  # [m] from there: where the right arm goes in the end
PITCH = np.pi / 3  # [rad] below the horizon: how the right gripper points from grasp to hand-over

NO_OFFSET = np.zeros(3)

OPEN, CLOSED = 1.0, 0.0  # normalised gripper commands; the pads meet the cube near 0.6

# (first control step at the keyframe, keyframe, gripper command until then). The actuators lag about 170 ms (8 steps),
# so the arm waits before the fingers close, and the fingers need 0.6 s to close.
RIGHT_SCRIPT = (
    (50, "hover", OPEN),
    (75, "grasp", OPEN),
    (89, "grasp", OPEN),
    (128, "grasp", CLOSED),
    (150, "hover", CLOSED),
    (190, "meeting", CLOSED),
    (255, "meeting", CLOSED),
    (275, "meeting", OPEN),
    (300, "retreat", OPEN),
)
LEFT_SCRIPT = (
    (100, "home", CLOSED),
    (160, "approach", OPEN),
    (190, "approach", OPEN),
    (210, "meeting", OPEN),
    (222, "meeting", OPEN),
    (300, "meeting", CLOSED),
)


@dataclass(frozen=True)
class Mixture:
    """Which grasps the demonstrations hold: right ones, and ones that turn too far about the right arm's base.

    They turn outwards, so the sign of the angle is that of y - 0.5: a base cloned from them can be steered to success,
    but not by the same noise on both sides of the table. It must be a turn: it changes the waist alone, by the same
    motion with opposite signs. (A shift in y also stretches the arm, on both sides alike, and a constant latent that
    says "stretch less" then solves every state: measured, .40 -> .99.)
    """

    displaced_fraction: float = 0.51  # of all episodes
    displacement: float = 0.14  # [rad] 4 to 7 cm at the cube; the fingers miss it from 3 cm on
    jitter: float = 0.004  # [m] standard deviation of every grasp in x and y

    def grasp_offset(self, cube_position: Float[np.ndarray, "3"], rng: np.random.Generator) -> Float[np.ndarray, "3"]:
        """Draws where one episode grasps, relative to the cube [m]."""
        displaced = rng.random() < self.displaced_fraction
        x, y = cube_position[0] - BASE_X, cube_position[1] - BASE_Y  # seen from the right arm, which faces -x
        angle = -np.sign(y) * displaced * self.displacement
        turned = np.array([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)])
        offset = turned - (x, y) + self.jitter * rng.standard_normal(2)
        return np.array([*offset, 0.0])


def inverse_kinematics(point: Float[np.ndarray, "3"], pitch: float, roll: float, side: int) -> Float[np.ndarray, "6"]:
    """Joint angles [rad] that put the tool point at `point` [m], gripper `pitch` below the horizon, turned by `roll`.

    The waist faces the point, the forearm does not roll, and the elbow is up: waist by atan2, then the law of cosines
    for shoulder and elbow; a point out of reach stretches the arm towards it. `side` is -1 for the left arm (base at
    x = -BASE_X) and +1 for the right arm.
    """
    forward, sideways = -side * (point[0] - side * BASE_X), -side * (point[1] - BASE_Y)
    reach = np.hypot(forward, sideways) - HAND * np.cos(pitch)
    height = point[2] - SHOULDER_HEIGHT + HAND * np.sin(pitch)
    distance = np.hypot(reach, height)
    cosine = (distance**2 + UPPER_ARM**2 - FOREARM**2) / (2 * distance * UPPER_ARM)
    elevation = np.arctan2(height, reach) + np.arccos(np.clip(cosine, -1, 1))  # of the upper arm
    elbow_reach, elbow_height = UPPER_ARM * np.cos(elevation), UPPER_ARM * np.sin(elevation)
    descent = np.arctan2(elbow_height - height, reach - elbow_reach)  # of the forearm
    shoulder = UPPER_ARM_ELEVATION - elevation
    return np.array([np.arctan2(sideways, forward), shoulder, descent - shoulder, 0.0, pitch - descent, roll])


def _hold(model: mujoco.MjModel, data: mujoco.MjData, arm: slice, joints: Float[np.ndarray, "6"]) -> np.ndarray:
    """Command [rad] whose position actuators rest at `joints` under gravity: q + load(q) / kp."""
    data.qpos[arm] = joints
    mujoco.mj_forward(model, data)
    return joints + data.qfrc_bias[arm] / model.actuator_gainprm[arm, 0]


def _interpolate(
    script: tuple[tuple[int, str, float], ...], keyframes: dict[str, np.ndarray]
) -> Float[np.ndarray, "T 7"]:
    """Commands [T, 7] of one arm: arm joints move by smoothstep between keyframes, the gripper command jumps."""
    commands, begin, previous = [], 0, keyframes["home"]
    for end, name, gripper in script:
        phase = np.arange(1, end - begin + 1)[:, None] / (end - begin)
        blend = phase**2 * (3 - 2 * phase)
        joints = previous + blend * (keyframes[name] - previous)
        commands.append(np.concatenate([joints, np.full((end - begin, 1), gripper)], axis=1))
        begin, previous = end, keyframes[name]
    return np.concatenate(commands)


def plan(
    cube_position: Float[np.ndarray, "3"], grasp_offset: Float[np.ndarray, "3"] = NO_OFFSET
) -> Float[np.ndarray, "T 14"]:
    """Actions [T=300, 14] (gym-aloha's order and units) of one open-loop episode.

    `cube_position` [m] is where the cube is dropped. `grasp_offset` [m] displaces the right arm's grasp only: from
    3 cm in y on it misses the cube. The hand-over keyframes don't depend on it.
    """
    cube = np.array([cube_position[0], cube_position[1], GRASP_HEIGHT]) + grasp_offset
    above = np.array([0.0, 0.0, HOVER_HEIGHT - GRASP_HEIGHT])
    right = {
        "home": aloha.START_ARMS[:6],
        "hover": inverse_kinematics(cube + above, PITCH, 0.0, 1),
        "grasp": inverse_kinematics(cube, PITCH, 0.0, 1),
        "meeting": inverse_kinematics(MEETING, PITCH, 0.0, 1),
        "retreat": inverse_kinematics(MEETING + RETREAT, PITCH, 0.0, 1),
    }
    left = {
        "home": aloha.START_ARMS[:6],
        "approach": inverse_kinematics(MEETING + APPROACH, 0.0, np.pi / 2, -1),
        "meeting": inverse_kinematics(MEETING, 0.0, np.pi / 2, -1),
    }
    model = load_model()
    data = mujoco.MjData(model)
    arms = (
        _interpolate(script, {k: _hold(model, data, arm, q) for k, q in keyframes.items()})
        for script, keyframes, arm in ((LEFT_SCRIPT, left, slice(0, 6)), (RIGHT_SCRIPT, right, slice(8, 14)))
    )
    return np.concatenate(list(arms), axis=1)


def record_mixture(
    mixture: Mixture,
    num_episodes: int,
    seed: int = 0,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda episodes: None,
) -> Demonstrations:
    """Records `num_episodes` episodes of 300 steps, with cubes where the environment would drop them.

    Episode i depends on (seed, i) only, not on the number of threads (`workers`, default: one per CPU). The physics
    runs without the interpreter's lock. `on_progress(i + 1)` is called as episode i arrives, in order.
    """

    def episode(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        rng = np.random.default_rng([seed, index])
        cube = rng.uniform(aloha.CUBE_LOW, aloha.CUBE_HIGH)
        actions = plan(cube, mixture.grasp_offset(cube, rng)).astype(np.float32)
        qpos, reward = simulate(cube, actions)
        before = qpos[:-1]  # the state each action was chosen in
        proprio, object_pose = np.asarray(aloha.proprio_from_qpos(before)), before[:, aloha.CUBE]
        return proprio, object_pose, actions, bool((reward == aloha.SUCCESS_REWARD).any())

    episodes = []
    with ThreadPoolExecutor(workers or num_cpus()) as pool:
        for result in pool.map(episode, range(num_episodes)):
            episodes.append(result)
            on_progress(len(episodes))
    proprio, object_pose, actions, success = (np.stack(column) for column in zip(*episodes, strict=True))
    return Demonstrations(proprio.astype(np.float32), object_pose.astype(np.float32), actions, success)
