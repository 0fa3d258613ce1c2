import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import steerability as steerability_script

from fpo_jax import steerability
from fpo_jax.algorithms import fixed
from fpo_jax.envs.common import num_cpus
from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.metrics import wilson_interval
from fpo_jax.rollout import FrozenBase
from fpo_jax.steerability import (
    CrossEntropySettings,
    best_constant_latent,
    cross_entropy_method,
    floors,
    success_table,
    variance_shares,
)
from fpo_jax.types import FpoError
from tiny import jit, make_system
from tiny_libero import FAKE, fake_libero


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        yield


# --- the search


def test_cross_entropy_finds_the_top_of_a_quadratic():
    top = np.array([1.5, -0.7, 0.2])
    seen = []

    def score(candidates, generation):
        seen.append((generation, candidates))
        return -np.sum((candidates - top) ** 2, axis=1)

    settings = CrossEntropySettings(generations=20, population=64, elites=8, std_floor=0.01)
    found = cross_entropy_method(score, 3, jax.random.key(0), settings)
    np.testing.assert_allclose(found, top, atol=0.03)
    assert [generation for generation, _ in seen] == list(range(20))
    first, last = seen[0][1], seen[-1][1]
    assert first.shape == (64, 3)
    assert np.all(np.abs(first.mean(axis=0)) < 0.4) and np.all(np.abs(first.std(axis=0) - 1) < 0.3)  # N(0, I)
    assert np.all(last.std(axis=0) < 0.03)


def test_one_generation_by_hand():
    """Returns the mean of the elites, and ties keep the order of the candidates."""
    settings = CrossEntropySettings(generations=1, population=6, elites=2)
    seen = []

    def score(candidates, _):
        seen.append(candidates)
        return np.array([0, 2, 1, 2, 2, 0])

    found = cross_entropy_method(score, 2, jax.random.key(1), settings)
    np.testing.assert_allclose(found, seen[0][[1, 3]].mean(axis=0))


def test_the_spread_has_a_floor():
    spreads = []

    def score(candidates, _):
        spreads.append(candidates.std(axis=0))
        return -np.sum(candidates**2, axis=1)

    cross_entropy_method(score, 2, jax.random.key(2), CrossEntropySettings(generations=15, std_floor=0.5))
    assert np.all(spreads[-1] > 0.35)


def test_all_candidates_of_a_generation_meet_the_same_initial_states(monkeypatch):
    calls = []
    play_from = Evaluator.play_from

    def spy(self, agent, env_keys, noise_key, system):
        assert system.algorithm is fixed and float(agent.scale) == 0.0
        calls.append(
            (np.asarray(agent.mean), np.asarray(jax.random.key_data(env_keys)), jax.random.key_data(noise_key))
        )
        return play_from(self, agent, env_keys, noise_key, system)

    monkeypatch.setattr(Evaluator, "play_from", spy)
    system = make_system()
    settings = CrossEntropySettings(generations=3, population=5, elites=2, episodes_per_candidate=4)
    constant = best_constant_latent(system, FrozenBase({}), seed=0, settings=settings)
    assert constant.shape == (system.dims.latent,) and len(calls) == 3
    for mean, env_keys, _ in calls:
        per_candidate = env_keys.reshape(5, 4, 2)
        assert np.all(per_candidate == per_candidate[:1])
        assert len(np.unique(per_candidate[0], axis=0)) == 4
        latents = mean.reshape(5, 4, -1)
        assert np.all(latents == latents[:, :1]) and len(np.unique(latents[:, 0], axis=0)) == 5
    assert len({env_keys.tobytes() for _, env_keys, _ in calls}) == 3  # each generation draws new ones
    assert len({np.asarray(noise).tobytes() for _, _, noise in calls}) == 3


def test_fewer_environments_side_by_side_find_the_same(monkeypatch):
    """20 episodes a generation in batches of 8: the last one is filled up, and what fills it does not count."""
    batches, play_from = [], Evaluator.play_from

    def spy(self, agent, env_keys, noise_key, system=None):
        batches.append(len(env_keys))
        outcomes = play_from(self, agent, env_keys, noise_key, system)
        # Success that depends on latent and initial state alone, not on the place in the batch.
        score = np.asarray(agent.mean).sum(axis=1) + np.asarray(jax.random.key_data(env_keys))[:, 0] % 7
        return outcomes._replace(success=score > 3)

    monkeypatch.setattr(Evaluator, "play_from", spy)
    settings = CrossEntropySettings(generations=2, population=5, elites=2, episodes_per_candidate=4)
    found = [
        best_constant_latent(make_system(), FrozenBase({}), seed=0, settings=settings, num_envs=num_envs)
        for num_envs in (None, 8)
    ]
    np.testing.assert_array_equal(*found)
    assert batches == [20] * 2 + [8] * 6


# --- where the variance of success comes from


def test_all_variance_is_noise():
    """Four noises, every state solved by two of them: p_s = 1/2 everywhere."""
    table = np.array([[1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0]], bool)
    assert variance_shares(table) == (0.0, 1.0)


def test_all_variance_is_states():
    table = np.tile(np.array([1, 0, 0, 1, 1], bool), (3, 1))
    assert variance_shares(table) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("value", [True, False])
def test_no_variance(value):
    assert variance_shares(np.full((3, 4), value)) == (0.0, 0.0)


def test_a_mixture_by_hand():
    """Rates 1, 0, 1/3 over K = 3 noises: within = (0 + 0 + 2/9)/3 · 3/2 = 9/81, total = 4/9 · 5/9 = 20/81."""
    table = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0]], bool)
    assert variance_shares(table) == (pytest.approx(11 / 20), pytest.approx(9 / 20))


def test_few_noises_do_not_look_like_different_states():
    """Every state has p = .3; the rates over four noises spread all the same, which the correction takes off."""
    table = np.random.default_rng(0).random((4, 20_000)) < 0.3
    across_states, across_noise = variance_shares(table)
    assert across_states < 0.02 and across_noise > 0.98


# --- the cheap policies


def test_floors():
    evaluator = Evaluator(make_system(), FrozenBase({}), episodes=12, seed=1, batch=12)
    table = success_table(evaluator, 3)
    assert table.shape == (3, 12) and table.dtype == bool
    np.testing.assert_array_equal(table[2], evaluator.play_base(noise_seed=2).success)
    assert np.any(table[0] != table[1])
    constant = np.array([2.0, 0.0, 0.0, 0.0])
    rates = floors(evaluator, table, constant)
    assert list(rates) == ["base", "zero noise", "half noise", "best constant latent", "best of 3 noises"]
    assert rates["base"] == wilson_interval(int(table[0].sum()), 12)
    assert rates["best of 3 noises"] == wilson_interval(int(table.any(axis=0).sum()), 12)
    assert rates["best of 3 noises"].estimate >= table.mean(axis=1).max()


def test_invalid_episodes_count_neither_as_success_nor_as_failure(monkeypatch):
    """State 0 is solved in every valid episode; state 2 has none at all."""
    settings = CrossEntropySettings(generations=1, population=2, elites=1, episodes_per_candidate=2)
    played = Outcomes(
        np.array([True, False, False, False]),
        np.ones(4, np.int32),
        np.ones(4, np.float32),
        np.array([0, 1, 0, 0], bool),
    )
    monkeypatch.setattr(Evaluator, "play_from", lambda *_: played)
    scores = []

    def search(score, dim, *_):
        scores.extend(score(np.zeros((2, dim)), 0))
        return np.zeros(dim)

    monkeypatch.setattr(steerability, "cross_entropy_method", search)
    best_constant_latent(make_system(), FrozenBase({}), seed=0, settings=settings)
    assert scores == [1.0, 0.0]

    invalid = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 1]], bool)
    success = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    rows = [played._replace(success=s, invalid=i) for s, i in zip(success, invalid, strict=True)]
    monkeypatch.setattr(Evaluator, "play_base", lambda _, noise_seed: rows[noise_seed])
    monkeypatch.setattr(Evaluator, "play", lambda *_: rows[1])
    evaluator = Evaluator(make_system(), FrozenBase({}), episodes=3, seed=1)
    table = success_table(evaluator, 3)
    # Rates 1 over 2 noises and 1/3 over 3: within = (0 + 2/9 · 3/2)/2 = 1/6, total = 3/5 · 2/5
    assert variance_shares(table) == (pytest.approx(11 / 36), pytest.approx(25 / 36))
    rates = floors(evaluator, table, np.zeros(evaluator.system.dims.latent))
    assert rates["base"] == wilson_interval(1, 2) and rates["zero noise"] == wilson_interval(1, 1)
    assert rates["best of 3 noises"] == wilson_interval(2, 2)


def test_simulators_that_are_processes_are_few_by_default(monkeypatch):
    asked = []

    def search(system, base, seed, settings, num_envs):
        asked.append(num_envs)
        raise FpoError("enough")

    monkeypatch.setattr(steerability_script, "best_constant_latent", search)
    with fake_libero() as env:
        for of_env in (env, make_system().env):
            monkeypatch.setattr(steerability_script, "build", lambda config, e=of_env: (SimpleNamespace(env=e), {}))
            with pytest.raises(FpoError, match="enough"):
                steerability_script.measure(steerability_script.Args(libero=FAKE))
    assert asked == [min(64, 2 * num_cpus()), None]


def test_the_command(tmp_path, capsys):
    search = ["--search.generations", "2", "--search.population", "6", "--search.elites", "2"]
    options = ["--env", "point_mass", "--states", "8", "--noises", "3", *search, "--search.episodes-per-candidate", "2"]
    assert steerability_script.main([*options, "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "steerability.json").read_text())
    assert (figures["env"], figures["states"], figures["noises"]) == ("point_mass", 8, 3)
    assert figures["search_episodes"] == 2 * 6 * 2 and len(figures["constant_latent"]) == 4
    assert len(figures["state_rate_deciles"]) == 9
    assert figures["floors"].keys() >= {"base", "zero noise", "half noise", "best constant latent"}
    assert all(0 <= f["low"] <= f["estimate"] <= f["high"] <= 1 for f in figures["floors"].values())
    assert (tmp_path / "out" / "steerability.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "best constant latent" in printed and "Noise decides" in printed


def test_an_unknown_environment_is_one_sentence(capsys):
    assert steerability_script.main(["--env", "point_mas"]) == 2
    assert "did you mean 'point_mass'" in capsys.readouterr().err
