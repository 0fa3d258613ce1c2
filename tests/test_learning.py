"""Does it learn? Point mass with small networks; the base reaches its goal in about 30 % of the episodes."""

from dataclasses import replace

import numpy as np
import pytest

from fpo_jax.config import PRESETS, UpdateConfig
from tiny import begin_training, iterate, make_system

DEFAULT, NO_RATIO = PRESETS["default"], PRESETS["no_ratio"]
CONFIGS = {
    "fpo": replace(
        DEFAULT,
        env="point_mass",
        num_envs=64,
        actor=replace(DEFAULT.actor, hidden=(32, 32), cfm_draws=4, sampler_steps=4),
        critic=replace(DEFAULT.critic, num_critics=2, hidden=(64,), learning_rate=1e-3, value_samples=4),
        rollout=replace(DEFAULT.rollout, decisions=5),
    ),
    "sac": replace(
        NO_RATIO,
        env="point_mass",
        num_envs=64,
        sac=replace(NO_RATIO.sac, hidden=(32, 32), learning_rate=1e-3, initial_temperature=0.3),
        critic=replace(NO_RATIO.critic, num_critics=2, hidden=(64,), learning_rate=1e-3),
        rollout=replace(NO_RATIO.rollout, decisions=5, window=20),
        update=UpdateConfig(epochs=1, minibatch_size=128, minibatches=60),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def system(request):
    """One system for all seeds, so that each algorithm compiles once."""
    return make_system(CONFIGS[request.param])


@pytest.mark.parametrize("seed", range(3))
def test_success_rises(system, seed):
    """24 iterations of 64 episodes; measured rises are .35 to .5 (fpo) and .65 to .7 (sac)."""
    state, rates = begin_training(make_system(replace(system.config, seed=seed)), {}), []
    for _ in range(24):
        state, metrics = iterate(system, {}, state)
        rates.append(float(metrics["success_rate"]))
    begin, end = np.mean(rates[:5]), np.mean(rates[-5:])
    assert 0.2 < begin < 0.45  # the base, in five iterations hardly changed
    assert end >= begin + 0.2, f"{begin:.2f} -> {end:.2f}: {np.round(rates, 2)}"
