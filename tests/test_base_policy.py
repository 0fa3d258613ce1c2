"""The base policy that is shipped does what its model card says, and training starts from exactly that."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.algorithms import fpo
from fpo_jax.config import LIBERO_BUTTER, TrainConfig
from fpo_jax.evaluate import Evaluator
from fpo_jax.policies import CHECKPOINTS, load_base
from fpo_jax.policies.small import SmallPolicy
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import build
from fpo_jax.types import HostedEnv, Observation
from libero_venv import installed

EPISODES, BATCH = 256, 32
BAND = (0.30, 0.45)  # success of a base that leaves something to learn and something to learn from


def stated_success(card: str) -> tuple[float, int]:
    """(success rate, episodes) of the line about success alone in a model card, as experiments/clone.py writes it."""
    (line,) = re.findall(r"success alone.*", card, re.IGNORECASE)
    rate, episodes = re.search(r"\b([01]?\.\d+)\b", line), re.search(r"(\d+) episodes", line)
    assert rate and episodes, line
    return float(rate[1]), int(episodes[1])


@pytest.fixture(scope="module")
def shipped():
    """(evaluator, outcomes of the base) on the C engine."""
    system, params = build(TrainConfig(physics="mujoco"))
    evaluator = Evaluator(system, FrozenBase(params), EPISODES, seed=20_240, batch=BATCH)
    return evaluator, evaluator.play_base()


def test_success_is_the_stated_one(shipped):
    """Within three standard deviations of the difference between two samples."""
    _, base = shipped
    rate, episodes = stated_success((CHECKPOINTS / "aloha_transfer_cube" / "README.md").read_text())
    assert not base.invalid.any()
    sigma = np.sqrt(rate * (1 - rate) * (1 / EPISODES + 1 / episodes))
    assert abs(base.success.mean() - rate) <= 3 * sigma, f"{base.success.mean():.3f}, stated {rate:.3f}"
    assert BAND[0] <= rate <= BAND[1]


def test_a_fresh_agent_is_the_base_episode_by_episode(shipped):
    """Whole episodes, success and length alike: one bit of difference in a latent would show in the contacts."""
    evaluator, base = shipped
    system = evaluator.system
    agent = fpo.init(system.config, system.dims, jax.random.key(3))
    env_keys, noise_key, _ = evaluator.keys_of(0)
    fresh = evaluator.play_from(agent, env_keys, noise_key)
    for name, ours, bases in zip(fresh._fields, fresh, base, strict=True):
        np.testing.assert_array_equal(ours, bases[:BATCH], err_msg=name)
    assert 0 < fresh.success.sum() < BATCH


@pytest.mark.parametrize("name", ["aloha_transfer_cube", "libero_butter", "libero_10_basket", "libero_object_basket"])
def test_the_weights_are_small(name):
    size = sum(path.stat().st_size for path in (CHECKPOINTS / name).iterdir())
    assert size < 8e6  # bytes


def test_the_base_of_a_libero_task_is_found_by_its_environment():
    policy, params = load_base(LIBERO_BUTTER.env)
    assert policy == load_base("libero_butter")[0]
    assert isinstance(policy, SmallPolicy) and policy.horizon == LIBERO_BUTTER.execute_steps
    rate, _ = stated_success((CHECKPOINTS / "libero_butter" / "README.md").read_text())
    assert 0.4 <= rate <= 0.6
    scene = np.zeros((2, 224), np.float32)
    scene[:, 28:31] = 0.03, 0.05, 0.445  # the butter
    observation = Observation(
        proprio=params["stats"]["proprio_mean"][None].repeat(2, 0), object_pose=jnp.asarray(scene)
    )
    _, context = policy.encode(params, observation)
    chunk = policy.decode(params, context, jax.random.normal(jax.random.key(0), (2, policy.horizon, 7)))
    assert np.isfinite(chunk).all() and np.abs(chunk).max() < 2


@pytest.mark.libero
def test_the_base_of_the_butter_task_sometimes_succeeds():
    installed()
    system, params = build(replace(LIBERO_BUTTER, num_envs=2))
    try:
        base = Evaluator(system, FrozenBase(params), 12, seed=1).play_base()
    finally:
        assert isinstance(system.env, HostedEnv)
        system.env.close()
    assert not base.invalid.any() and 0 < base.success.sum() < 12


def test_a_card_is_read():
    line = "| success alone, fresh noise per decision, 95 % Wilson interval | 0.412 [0.382, 0.443] (1000 episodes) |"
    assert stated_success(f"# x\n| | |\n{line}\n| success of the demonstrations | .5 |") == (0.412, 1000)
