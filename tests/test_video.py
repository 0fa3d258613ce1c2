import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.envs.aloha_mujoco import simulate
from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import build
from fpo_jax.types import FpoError
from fpo_jax.video import Player, pictures, record_comparison, record_film_strip, take_both, telling_episodes
from opengl import opengl_pool
from tiny import TINY, begin, init_fpo, jit, make_system, run_rollout
from tiny_libero import FAKE, LIBERO, NoisyBase, fake_libero, fpo_system

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


def test_the_take_is_the_evaluated_episode(aloha):
    """Alone, with the same initial state and noise; to rounding, as batches of one may be computed otherwise."""
    evaluator, agent = aloha
    env_keys, key, column = evaluator.keys_of(1)
    system = evaluator.system
    carry, _, _ = run_rollout(system, evaluator.base, agent, begin(system, env_keys), key, 2)
    take = Player(evaluator, system, agent).play(1)
    assert take.actions.shape == (LENGTH, 14) and take.episode == 1 and not take.success
    qpos, _ = simulate(np.float64(take.object_pose[:3]), take.actions)
    np.testing.assert_allclose(qpos[-1], system.env.qpos(carry.env)[column], atol=1e-4)


def test_telling_episodes_are_won_by_the_tuned_policy_alone():
    base = outcomes([1, 0, 0, 0, 0], [0, 0, 1, 0, 0])
    tuned = outcomes([1, 0, 1, 1, 1], [0, 0, 0, 0, 0])
    assert telling_episodes(base, tuned) == [3, 4]
    assert telling_episodes(base, base) == []


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


def test_a_film_strip_is_drawn(aloha, tmp_path):
    evaluator, agent = aloha
    opengl_pool()
    takes = take_both(evaluator, agent, [1])
    assert [take.episode for take in takes] == [1, 1]
    pair = pictures(evaluator, takes[0], [0, LENGTH])
    assert pair.shape == (2, 240, 320, 3) and np.any(pair[0] != pair[1])
    path = record_film_strip(evaluator, takes, tmp_path / "film.svg", frames=3)
    text = path.read_text()
    assert "step 10: failure" in text and text.count("<image") == 6


class Seeker(NoisyBase):
    """Heads for the goal without noise, as fast as its params say."""

    def decode(self, params, context, noise):
        towards = jnp.pad(context[:, 2:] - context[:, :2], ((0, 0), (0, 5)))
        return jnp.broadcast_to(params * towards[:, None], noise.shape)


@pytest.fixture(scope="module")
def suite():
    """(evaluator, agent) on LIBERO with fake workers that have no cameras; every episode succeeds."""
    with fake_libero(options=replace(FAKE, test_inits="3:8")) as env:
        config = replace(LIBERO, num_envs=4)
        system = fpo_system(env, config, Seeker())
        yield Evaluator(system, FrozenBase(jnp.full((), 0.5)), 8, 3), init_fpo(config, system.dims, jax.random.key(0))


def test_a_libero_episode_is_played_and_drawn_again(suite):
    """Without cameras of its own: the same task, initial state, seed, outcome; pictures are turned for people."""
    evaluator, agent = suite
    evaluated = evaluator.play(agent)
    takes = [Player(evaluator, evaluator.system, agent).play(episode) for episode in (2, 5)]
    for take in takes:
        assert take.success and evaluated.success[take.episode]
        assert len(take.actions) == evaluated.control_steps[take.episode] > 3
        steps = [0, 2, len(take.actions)]
        seen = pictures(evaluator, take, steps)
        env_keys, _, column = evaluator.keys_of(take.episode)
        which = evaluator.system.env.test_episodes(jnp.array([take.episode]), env_keys[column][None])
        episode = ["libero_spatial", which.task.item(), which.init.item(), which.seed.item()]
        assert episode[1:3] == [take.episode % 3, 3 + take.episode // 3]
        for step, picture in zip(steps, seen, strict=True):
            drawn = np.frombuffer(random.Random(f"{episode} {step} 0").randbytes(48), np.uint8)
            np.testing.assert_array_equal(picture[0, ::-1].reshape(-1)[:48], drawn)


def test_a_libero_film_names_its_task(suite, tmp_path):
    evaluator, agent = suite
    takes = take_both(evaluator, agent, [4])  # none that only the tuned one solves: what is asked for is shown
    text = record_film_strip(evaluator, takes, tmp_path / "film.svg", frames=3).read_text()
    assert "libero_spatial, evaluation episode 4: reach the blue goal" in text and text.count(": success") == 2


def test_a_film_that_breaks_is_one_sentence():
    with fake_libero(told={"faults": {"step:physics": 1.0}}) as env:
        system = fpo_system(env, replace(LIBERO, num_envs=2))
        evaluator = Evaluator(system, FrozenBase({}), 2, 3)
        with pytest.raises(FpoError, match="Episode 1 broke when it was played again"):
            Player(evaluator, evaluator.base_system, evaluator.base_agent).play(1)


def test_an_environment_without_pictures_is_one_sentence(tmp_path):
    system = make_system()
    evaluator = Evaluator(system, FrozenBase({}), episodes=2, seed=0)
    agent = init_fpo(TINY, system.dims, jax.random.key(0))
    nothing = outcomes([0, 0], [0, 0])
    with pytest.raises(FpoError, match="point_mass has no renderer"):
        record_comparison(evaluator, nothing, nothing, agent, tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())
