"""Can noise steer this base? Success over noises against success over states, and the cheap floors to beat.

Reinforcement learning in noise space can only choose among what the base already does, and needs a learned actor only
where the right noise depends on the state. This measures both before anything is trained.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from fpo_jax.algorithms import fixed
from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.metrics import Interval, wilson_interval
from fpo_jax.rollout import FrozenBase, System


class CrossEntropySettings(NamedTuple):
    """Budget of the search: generations x population x episodes_per_candidate episodes."""

    generations: int = 8
    population: int = 64
    elites: int = 8
    episodes_per_candidate: int = 8
    std_floor: float = 0.1


def cross_entropy_method(
    score: Callable[[Float[np.ndarray, "P D"], int], Float[np.ndarray, " P"]],
    dim: int,
    key: Key[Array, ""],
    settings: CrossEntropySettings,
) -> Float[np.ndarray, " D"]:
    """Maximise `score(candidates, generation)`: refit a diagonal Gaussian to the elites of each generation.

    Starts from N(0, I); returns the last mean (Rubinstein 1999).
    """
    mean, std = np.zeros(dim), np.ones(dim)
    for generation in range(settings.generations):
        noise = jax.random.normal(jax.random.fold_in(key, generation), (settings.population, dim))
        candidates = mean + std * np.asarray(noise)
        elites = candidates[np.argsort(-score(candidates, generation), kind="stable")[: settings.elites]]
        mean = elites.mean(axis=0)
        std = np.maximum(elites.std(axis=0), settings.std_floor)
    return mean


def best_constant_latent(
    system: System, base: FrozenBase, seed: int, settings: CrossEntropySettings, num_envs: int | None = None
) -> Float[np.ndarray, " D"]:
    """The one latent for all states that the cross-entropy method finds.

    Within a generation all candidates meet the same initial states; each generation draws new ones. `num_envs`: how
    many environments are simulated side by side, by default a whole generation.
    """
    per_candidate = settings.episodes_per_candidate
    total = settings.population * per_candidate
    batch = min(num_envs or total, total)
    evaluator = Evaluator(system, base, batch, seed, batch=batch)

    def score(candidates, generation):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), generation), per_candidate)
        noise_key = jax.random.fold_in(jax.random.key(seed + 1), generation)
        rows = np.arange(-(-total // batch) * batch) % total  # the last batch is filled up by the first rows
        env_keys = jnp.tile(keys, settings.population)
        latents = jnp.repeat(jnp.asarray(candidates, jnp.float32), per_candidate, axis=0)
        success = []
        for some in rows.reshape(-1, batch):
            agent = fixed.FixedLatent(latents[some], jnp.zeros(()))
            played = evaluator.play_from(agent, env_keys[some], noise_key, evaluator.fixed_system)
            success.append(success_of_valid(played))
        rates = np.ma.concatenate(success)[:total].reshape(settings.population, per_candidate).mean(axis=1)
        return np.ma.filled(rates, 0.0)  # a candidate that breaks every simulation is no candidate

    return cross_entropy_method(score, system.dims.latent, jax.random.key(seed + 2), settings)


def success_of_valid(outcomes: Outcomes) -> Bool[np.ma.MaskedArray, " E"]:
    """Success of each episode, masked where it is invalid."""
    return np.ma.masked_array(outcomes.success, outcomes.invalid)


def success_table(evaluator: Evaluator, num_noises: int) -> Bool[np.ma.MaskedArray, "K E"]:
    """Success of the base from each of E initial states under each of K noise seeds; invalid episodes are masked."""
    return np.ma.stack([success_of_valid(evaluator.play_base(noise_seed)) for noise_seed in range(num_noises)])


def variance_shares(table: Bool[np.ndarray, "K E"]) -> tuple[float, float]:
    """(across states, across noise within a state): the parts of the success variance p(1-p), as shares of it.

    Var(success) = Var_states(p_s) + E_states[p_s (1 - p_s)], the first corrected for the finite number K of noises.
    Masked episodes do not count; states with less than two that do say nothing of the noise.
    """
    num_noises = np.ma.count(table, axis=0)
    rates = table.mean(axis=0)
    within = float(np.ma.mean(rates * (1 - rates) * np.ma.divide(num_noises, num_noises - 1)))
    total = float(table.mean() * (1 - table.mean()))
    if total == 0:
        return 0.0, 0.0
    return max(total - within, 0.0) / total, min(within / total, 1.0)


def floors(
    evaluator: Evaluator, table: Bool[np.ma.MaskedArray, "K E"], constant: Float[np.ndarray, " D"]
) -> dict[str, Interval]:
    """Success of everything that needs no learned actor, from the same initial states, over the valid episodes.

    `best of K` is the share of states that any of the K noise seeds solves: an oracle, no policy.
    """
    dim = evaluator.system.dims.latent

    def rate(success: Bool[np.ma.MaskedArray, " E"]) -> Interval:
        return wilson_interval(int(success.compressed().sum()), int(success.count()))

    def fixed_rate(mean, scale):
        agent = fixed.FixedLatent(jnp.asarray(mean, jnp.float32), jnp.float32(scale))
        return rate(success_of_valid(evaluator.play(agent, evaluator.fixed_system)))

    return {
        "base": rate(table[0]),
        "zero noise": fixed_rate(np.zeros(dim), 0.0),
        "half noise": fixed_rate(np.zeros(dim), 0.5),
        "best constant latent": fixed_rate(constant, 0.0),
        f"best of {len(table)} noises": rate(np.ma.asarray(table.any(axis=0))),
    }
