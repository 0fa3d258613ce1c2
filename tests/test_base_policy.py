"""The base policy that is shipped does what its model card says, and training starts from exactly that."""

import re

import jax
import numpy as np
import pytest

from fpo_jax.algorithms import fpo
from fpo_jax.config import TrainConfig
from fpo_jax.evaluate import Evaluator
from fpo_jax.fit import build
from fpo_jax.policies import CHECKPOINTS
from fpo_jax.rollout import FrozenBase

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


def test_the_weights_are_small():
    size = sum(path.stat().st_size for path in (CHECKPOINTS / "aloha_transfer_cube").iterdir())
    assert size < 8e6  # bytes


def test_a_card_is_read():
    line = "| success alone, fresh noise per decision, 95 % Wilson interval | 0.412 [0.382, 0.443] (1000 episodes) |"
    assert stated_success(f"# x\n| | |\n{line}\n| success of the demonstrations | .5 |") == (0.412, 1000)
