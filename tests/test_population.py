"""A population against its members as runs of their own."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from fpo_jax import population
from fpo_jax.config import PRESETS, PopulationOptions
from fpo_jax.types import FpoError
from test_train import plain
from tiny import TINY, begin_training, iterate, jit, make_system, shrink

ITERATIONS = 2


def with_population(config, size=1, vary=()):
    return replace(config, population=PopulationOptions(size, vary))


def train_population(config):
    """(members' configurations, first state, last state, metrics of the last iteration)."""
    configs, system = population.members(config), make_system(config)
    first, values = population.init(system, {}, configs), population.differing(configs)
    step = jit(partial(population.iteration, system))
    state = first
    for _ in range(ITERATIONS):
        state, metrics = step({}, values, state)
    return configs, first, state, metrics


def assert_close(one, other):
    """Exact where it counts, floats to the rounding of batched matrix products."""

    def compare(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, plain(one), plain(other))


@pytest.mark.parametrize(
    "config",
    [
        with_population(TINY, 3),
        with_population(TINY, 1, ("actor.learning-rate=1e-3,1e-2", "fpo.epsilon=.05:.2:2")),
        with_population(shrink(PRESETS["no_ratio"]), 2, ("sac.scale=2,1",)),
    ],
    ids=["seeds", "settings", "sac"],
)
def test_every_member_is_the_run_it_would_be_alone(config):
    configs, first, state, metrics = train_population(config)
    for index, one in enumerate(configs):
        system = make_system(one)
        alone = begin_training(system, {})
        assert_close(population.member(first, index), alone)
        for _ in range(ITERATIONS):
            alone, last = iterate(system, {}, alone)
        assert_close(population.member(state, index), alone)
        assert_close(population.member(metrics, index), last)
    agents = [plain(population.member(state, index)).agent.actor for index in (0, -1)]
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), *agents)
    assert max(jax.tree.leaves(differences)) > 1e-4


def test_a_member_does_not_depend_on_the_others():
    _, _, three, _ = train_population(with_population(TINY, 3))
    _, _, two, _ = train_population(with_population(replace(TINY, seed=1), 2))
    assert_close(population.member(three, 1), population.member(two, 0))


def test_members_are_all_seeds_of_each_setting():
    config = with_population(TINY, 2, ("fpo.epsilon=.1,.2", "critic.polyak=.01:.04:3"))
    configs = population.members(config)
    found = [(one.fpo.epsilon, one.critic.polyak, one.seed) for one in configs]
    expected = [(e, p, s) for e in (0.1, 0.2) for p in (0.01, 0.02, 0.04) for s in (0, 1)]
    np.testing.assert_allclose(found, expected)
    assert all(one.population == PopulationOptions() for one in configs)
    values = population.differing(configs)
    assert set(values) == {"fpo.epsilon", "critic.polyak"} and values["fpo.epsilon"].shape == (12,)


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ("fpo.epsilo=.1", "did you mean 'fpo.epsilon'"),
        ("actor.hidden=8,16", "only in numbers that leave every array's shape"),
        ("rollout.gamma=.9,.99", "cannot differ in 'rollout.gamma'"),
        ("fpo.epsilon=a,b", "neither a list"),
        ("fpo.epsilon=.1:.2", "neither a list"),
        ("fpo.epsilon=.1:.2:0", "count of at least 1"),
        ("fpo.epsilon=.1,-.2", "fpo.epsilon must be greater than 0"),
    ],
)
def test_settings_that_cannot_vary_get_one_sentence(vary, sentence):
    with pytest.raises(FpoError, match=sentence):
        population.members(with_population(TINY, 1, (vary,)))


def test_a_setting_varies_once():
    with pytest.raises(FpoError, match="names a setting twice"):
        population.members(with_population(TINY, 1, ("actor.learning-rate=.1", "actor.learning_rate=.2")))


def test_bases_and_environments_that_do_not_fit_are_refused():
    system = make_system()
    standardized = replace(system, base=replace(system.base, standardize=True))
    with pytest.raises(FpoError, match="runs of their own"):
        population.init(standardized, {}, population.members(with_population(TINY, 2)))
