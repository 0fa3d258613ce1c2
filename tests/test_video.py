from dataclasses import replace

import jax
import numpy as np
import pytest

from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.fit import build
from fpo_jax.rollout import FrozenBase
from fpo_jax.types import FpoError
from fpo_jax.video import episode_qpos, most_telling_episode, record_comparison
from opengl import opengl_pool
from tiny import TINY, begin, init_fpo, jit, make_system, run_rollout

LENGTH = 10  # control steps


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        yield


def outcomes(success, invalid) -> Outcomes:
    success = np.array(success, bool)
    return Outcomes(success, np.full(len(success), LENGTH), success.astype(np.float32), np.array(invalid, bool))


@pytest.fixture(scope="module")
def aloha():
    """(evaluator, fresh FPO agent) of the shipped base in short episodes."""
    config = replace(TINY, env="aloha_transfer_cube", episode_length=LENGTH, execute_steps=5)
    system, params = build(config)
    return Evaluator(system, FrozenBase(params), episodes=2, seed=0), init_fpo(config, system.dims, jax.random.key(0))


def test_the_replayed_episode_is_the_evaluated_one(aloha):
    """To the last bit: the video shows what was counted."""
    evaluator, agent = aloha
    env_keys, key, column = evaluator.keys_of(1)
    system = evaluator.system
    carry, _, _ = run_rollout(system, evaluator.base, agent, begin(system, env_keys), key, 2)
    qpos = episode_qpos(evaluator, system, agent, episode=1, length=LENGTH)
    assert qpos.shape == (LENGTH + 1, 23)
    np.testing.assert_array_equal(qpos[-1], system.env.qpos(carry.env)[column])
    assert episode_qpos(evaluator, system, agent, episode=1, length=7).shape == (8, 23)


def test_the_most_telling_episode_is_won_by_the_tuned_policy_alone():
    base = outcomes([1, 0, 0, 0, 0], [0, 0, 1, 0, 0])
    tuned = outcomes([1, 0, 1, 1, 1], [0, 0, 0, 0, 0])
    assert most_telling_episode(base, tuned) == 3
    assert most_telling_episode(base, base) == 0


def test_a_video_is_written(aloha, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    evaluator, agent = aloha
    base, tuned = evaluator.play_base(), evaluator.play(agent)
    target = tmp_path / "video.mp4"
    opengl_pool()
    path = record_comparison(evaluator, base, tuned, agent, target)
    assert path == target and target.stat().st_size > 1000
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(target))
    assert frames >= (LENGTH + 1) // 2 and seconds == pytest.approx(frames / 25.0, abs=0.05)


def test_an_environment_without_pictures_is_one_sentence(tmp_path):
    system = make_system()
    evaluator = Evaluator(system, FrozenBase({}), episodes=2, seed=0)
    agent = init_fpo(TINY, system.dims, jax.random.key(0))
    nothing = outcomes([0, 0], [0, 0])
    with pytest.raises(FpoError, match="point_mass has no renderer"):
        record_comparison(evaluator, nothing, nothing, agent, tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())
