"""The scripted expert: kinematics against MuJoCo's, success over fresh cubes, displaced grasps, recording."""

from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import pytest

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import GRIPPER_LINK_TO_TOOL, Mixture, inverse_kinematics, plan, record_mixture
from fpo_jax.envs.aloha_mujoco import load_model, simulate


def successes(cubes: np.ndarray, offsets: np.ndarray) -> int:
    """Episodes in which the cube changes hands."""

    def transfers(cube, offset):
        return (simulate(cube, plan(cube, offset))[1] == aloha.SUCCESS_REWARD).any()

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(transfers, cubes, offsets))


def fresh_cubes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(aloha.CUBE_LOW, aloha.CUBE_HIGH, (count, 3))


@pytest.mark.parametrize(("side", "name", "arm"), [(-1, "left", slice(0, 6)), (1, "right", slice(8, 14))])
def test_inverse_kinematics_inverts_mujoco(side, name, arm):
    model = load_model()
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    for point in rng.uniform([0, 0.4, 0.01], [0.2, 0.6, 0.3], (50, 3)):
        point[0] *= side
        pitch, roll = rng.uniform(0, 1.2), rng.uniform(-1.5, 1.5)
        data.qpos[arm] = inverse_kinematics(point, pitch, roll, side)
        mujoco.mj_kinematics(model, data)
        gripper = data.body(f"vx300s_{name}/gripper_link")
        axis = gripper.xmat.reshape(3, 3)[:, 0]
        np.testing.assert_allclose(gripper.xpos + GRIPPER_LINK_TO_TOOL * axis, point, atol=1e-5)
        assert np.arcsin(-axis[2]) == pytest.approx(pitch, abs=1e-5)
        assert data.qpos[arm][5] == roll


def test_success_on_fresh_cubes():
    assert successes(fresh_cubes(48, seed=1), np.zeros((48, 3))) >= 47


@pytest.mark.slow
def test_success_on_200_fresh_cubes():
    assert successes(fresh_cubes(200, seed=2), np.zeros((200, 3))) >= 198


def test_displaced_grasps_miss_the_cube():
    offsets = np.array([[0.0, sign * 0.05, 0.0] for sign in (-1, 1) for _ in range(6)])
    assert successes(fresh_cubes(12, seed=3), offsets) == 0


def test_offset_moves_the_grasp_only():
    cube = np.array([0.1, 0.45, 0.05])
    plain, displaced = plan(cube), plan(cube, np.array([0.0, 0.05, 0.0]))
    assert plain.shape == (300, 14)
    differs = np.abs(plain - displaced).max(1) > 1e-9
    np.testing.assert_array_equal(plain[:, :7], displaced[:, :7])  # the left arm
    assert differs[:189].all() and not differs[189:].any()  # from the meeting on


def test_mixture_draws_by_the_rule():
    mixture = Mixture(displaced_fraction=0.5, displacement=0.14, jitter=0.001)
    rng = np.random.default_rng(0)
    for y, sign in ((0.45, -1), (0.55, 1)):
        offsets = np.stack([mixture.grasp_offset(np.array([0.1, y, 0.05]), rng) for _ in range(400)])
        displaced = np.abs(offsets[:, 1]) > 0.025
        assert abs(displaced.mean() - 0.5) < 0.1  # four standard errors
        # (-.369, ±.05) turned by ∓.14 rad: x -.369 cos + .05 sin = -.35841, y ±(.369 sin + .05 cos) = ±.10100
        np.testing.assert_allclose(offsets[displaced, 0], 0.01059, atol=0.006)
        np.testing.assert_allclose(offsets[displaced, 1], sign * 0.05100, atol=0.006)
        np.testing.assert_allclose(offsets[~displaced, 1], 0, atol=0.006)
        np.testing.assert_array_equal(offsets[:, 2], 0)


@pytest.mark.parametrize("y", [0.42, 0.58])
def test_a_displaced_grasp_moves_the_waist_alone(y):
    """On both sides by the same motion with opposite signs, so that no constant latent can undo both."""
    mixture = Mixture(displaced_fraction=1.0, displacement=0.14, jitter=0.0)
    cube = np.array([0.1, y, 0.05])
    plain, displaced = plan(cube), plan(cube, mixture.grasp_offset(cube, np.random.default_rng(0)))
    difference = displaced - plain
    np.testing.assert_allclose(np.delete(difference, 7, axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(np.abs(difference[50:150, 7]), 0.14, atol=1e-9)
    assert np.sign(difference[100, 7]) == -np.sign(y - 0.5)


def test_recording_does_not_depend_on_threads():
    progress = []
    one = record_mixture(Mixture(displaced_fraction=0.5), 4, seed=0, workers=1)
    two = record_mixture(Mixture(displaced_fraction=0.5), 4, seed=0, workers=2, on_progress=progress.append)
    assert progress == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert two.proprio.shape == two.actions.shape == (4, 300, 14) and two.object_pose.shape == (4, 300, 7)
    # The observation is the one before the action: at t = 0 the reset pose.
    np.testing.assert_allclose(two.proprio[:, 0, :6], np.tile(aloha.START_ARMS[:6], (4, 1)), atol=1e-6)
    np.testing.assert_allclose(two.object_pose[:, 0, 2], 0.05, atol=1e-6)
    # An undisplaced grasp succeeds, a displaced one doesn't.
    rngs = [np.random.default_rng([0, i]) for i in range(4)]
    offsets = [Mixture().grasp_offset(rng.uniform(aloha.CUBE_LOW, aloha.CUBE_HIGH), rng) for rng in rngs]
    np.testing.assert_array_equal(two.success, [abs(offset[1]) < 0.02 for offset in offsets])
