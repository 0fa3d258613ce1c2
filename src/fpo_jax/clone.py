"""Behaviour cloning of the small base policy by flow matching.

The base is trained on pairs (observation before step t, actions t .. t+h-1). It predicts the clean chunk, so the
flow-matching loss of its velocity v = (â - x_u)/(1 - u) is the error of â, weighted by 1/(1 - u)²: `flow_loss` and
`flow_weight`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fpo_jax.demos import Demonstrations, Normalisation, normalisation
from fpo_jax.policies.small import SmallPolicy
from fpo_jax.types import FpoError, Metrics, Observation, Params


@dataclasses.dataclass(frozen=True)
class CloneConfig:
    """How a base is cloned; the defaults made `checkpoints/aloha_transfer_cube`."""

    policy: SmallPolicy = dataclasses.field(default_factory=SmallPolicy)
    steps: int = 8000  # gradient steps
    batch_size: int = 256
    learning_rate: float = 1e-3  # peak, after the warm-up
    warmup_fraction: float = 0.02  # of all steps; then cosine decay to 0
    ema_decay: float = 0.999  # of the weights, per step
    gradient_clip: float = 1.0  # global norm
    state_noise: float = 0.02  # std of the noise on the features, in their own std
    decision_steps: int = 50  # control steps between two decisions at test time
    decision_fraction: float = 0.75  # of the samples that start at a multiple of decision_steps, the rest at any t
    heldout_fraction: float = 0.05  # of the episodes
    steps_per_call: int = 200  # gradient steps per compiled call, the rhythm of `on_progress`


class CloneState(NamedTuple):
    """What one gradient step changes."""

    weights: Params
    average: Params  # exponential moving average of the weights: what is kept in the end
    optimizer: PyTree
    step: Int[Array, ""]


class CloneData(NamedTuple):
    """Demonstrations in normalised units."""

    features: Float[Array, "E T f"]
    actions: Float[Array, "E T a"]


def flow_loss(
    target: Float[Array, "B h A"], predicted: Float[Array, "B h A"], weight: Float[Array, " B"]
) -> Float[Array, ""]:
    """L = mean_b w_b ‖â_b - a_b‖² / (h·A), the flow-matching loss of v = (â - x_u)/(1 - u).

    As x_u = (1-u) ε + u a, v - (a - ε) = (â - a)/(1 - u): with w = 1/(1-u)² this is plain flow matching.
    """
    return jnp.mean(weight[:, None, None] * jnp.square(predicted - target))


def sample_chunks(
    config: CloneConfig, data: CloneData, batch_size: int, key: Key[Array, ""]
) -> tuple[Float[Array, "B f"], Float[Array, "B h a"]]:
    """Draws (features at t, actions t .. t+h-1): random episodes and times, the last action repeated past the end."""
    episodes, length = data.actions.shape[:2]
    key_episode, key_time, key_decision, key_which, key_noise = jax.random.split(key, 5)
    episode = jax.random.randint(key_episode, (batch_size,), 0, episodes)
    anywhere = jax.random.randint(key_time, (batch_size,), 0, length)
    decisions = -(-length // config.decision_steps)
    decision = config.decision_steps * jax.random.randint(key_decision, (batch_size,), 0, decisions)
    time = jnp.where(jax.random.uniform(key_which, (batch_size,)) < config.decision_fraction, decision, anywhere)
    steps = jnp.minimum(time[:, None] + jnp.arange(config.policy.horizon)[None], length - 1)
    features = data.features[episode, time]
    features += config.state_noise * jax.random.normal(key_noise, features.shape)
    return features, data.actions[episode[:, None], steps]


def flow_weight(config: CloneConfig, u: Float[Array, " B"]) -> Float[Array, " B"]:
    """w = min(1/(1-u), n)², with n Euler steps: flow matching, capped at the flow time where the last step begins.

    Closer to the data the sampler asks nothing. With w = 1 the network would get away with averaging motions that
    the demonstrations keep apart, since that costs little error at the late flow times where it could tell.
    """
    return jnp.square(jnp.minimum(1.0 / (1.0 - u), config.policy.euler_steps))


def loss(
    config: CloneConfig,
    weights: Params,
    features: Float[Array, "B f"],
    chunk: Float[Array, "B h a"],
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """`flow_loss` at x_u = (1-u) ε + u a, u ~ U(0, 1), ε ~ N(0, I)."""
    key_noise, key_time = jax.random.split(key)
    noise = jax.random.normal(key_noise, chunk.shape)
    u = jax.random.uniform(key_time, chunk.shape[:1])
    x_u = (1.0 - u[:, None, None]) * noise + u[:, None, None] * chunk
    predicted = config.policy.predict({"network": weights}, x_u, u, features)
    return flow_loss(chunk, predicted, flow_weight(config, u))


def make_optimizer(config: CloneConfig) -> optax.GradientTransformation:
    """Adam with a clipped gradient norm and a warm-up and cosine schedule."""
    warmup = max(1, int(config.warmup_fraction * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optax.adam(schedule))


def descend(
    optimizer: optax.GradientTransformation, ema_decay: float, state: CloneState, gradient: Params
) -> CloneState:
    """One gradient step, and its weights into the average."""
    update, optimizer_state = optimizer.update(gradient, state.optimizer, state.weights)
    weights = optax.apply_updates(state.weights, update)
    # A short memory at first, so that the average forgets the random initial weights.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    average = optax.incremental_update(weights, state.average, 1.0 - decay)
    return CloneState(weights, average, optimizer_state, state.step + 1)


def begin(optimizer: optax.GradientTransformation, weights: Params) -> CloneState:
    """The state before the first step."""
    return CloneState(weights, jax.tree.map(jnp.copy, weights), optimizer.init(weights), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("state",))
def train_steps(
    config: CloneConfig, data: CloneData, state: CloneState, key: Key[Array, ""], steps: int
) -> tuple[CloneState, Metrics]:
    """`steps` gradient steps in one compiled scan; returns the mean training loss."""
    optimizer = make_optimizer(config)

    def step(state: CloneState, key: Key[Array, ""]) -> tuple[CloneState, Float[Array, ""]]:
        key_sample, key_loss = jax.random.split(key)
        features, chunk = sample_chunks(config, data, config.batch_size, key_sample)
        value, gradient = jax.value_and_grad(lambda weights: loss(config, weights, features, chunk, key_loss))(
            state.weights
        )
        return descend(optimizer, config.ema_decay, state, gradient), value

    state, losses = jax.lax.scan(step, state, jax.random.split(key, steps))
    return state, {"loss": losses.mean()}


@functools.partial(jax.jit, static_argnames="config")
def heldout_loss(config: CloneConfig, data: CloneData, weights: Params, key: Key[Array, ""]) -> Float[Array, ""]:
    """The training loss on other episodes; the same key draws the same samples, so that values compare."""
    key_sample, key_loss = jax.random.split(key)
    features, chunk = sample_chunks(config, data, 2048, key_sample)
    return loss(config, weights, features, chunk, key_loss)


def statistics(policy: SmallPolicy, demos: Demonstrations) -> Params:
    """`params["stats"]`: mean and standard deviation of each dimension over all episodes and steps."""
    proprio, pose, action = (normalisation(demos)[name] for name in ("proprio", "object_pose", "actions"))
    position = Normalisation(*(values[policy.seen_of_objects] for values in pose))
    columns = {"proprio": proprio, "object": position, "action": action}
    return {
        f"{name}_{part}": jnp.asarray(getattr(values, part))
        for name, values in columns.items()
        for part in values._fields
    }


def prepare_data(policy: SmallPolicy, stats: Params, demos: Demonstrations) -> CloneData:
    """Normalises demonstrations, with the policy's own encoder for the features."""
    proprio, pose = jnp.asarray(demos.proprio, jnp.float32), jnp.asarray(demos.object_pose, jnp.float32)
    observation = Observation(
        proprio=proprio.reshape(-1, proprio.shape[-1]), object_pose=pose.reshape(-1, pose.shape[-1])
    )
    features, _ = policy.encode({"stats": stats}, observation)
    mean, std = stats["action_mean"][None, None], stats["action_std"][None, None]
    actions = (jnp.asarray(demos.actions, jnp.float32) - mean) / std
    return CloneData(features.reshape(*proprio.shape[:2], -1), actions)


def clone(
    config: CloneConfig,
    demos: Demonstrations,
    key: Key[Array, ""],
    on_progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> Params:
    """Trains `config.policy` on demonstrations; returns params (averaged weights and statistics).

    `on_progress(step, {"loss", "heldout_loss"})` is called every `steps_per_call` gradient steps.
    """
    policy = config.policy
    widths = (demos.proprio.shape[-1], demos.actions.shape[-1])
    if widths != (policy.proprio_dim, policy.action_dim):
        raise FpoError(
            f"The demonstrations have (proprio, action) widths {widths}, the policy "
            f"{(policy.proprio_dim, policy.action_dim)}: set policy.proprio_dim and policy.action_dim to match."
        )
    episodes = demos.actions.shape[0]
    heldout = round(config.heldout_fraction * episodes)
    if episodes - heldout < 1:
        raise FpoError("There are no demonstrations left to train on: record more, or lower heldout_fraction.")
    key_init, key_split, key_heldout, key_train = jax.random.split(key, 4)
    order = jax.random.permutation(key_split, episodes)
    params = policy.init(key_init)
    stats = statistics(policy, demos)
    data = prepare_data(policy, stats, demos)
    train = jax.tree.map(lambda leaf: leaf[order[heldout:]], data)
    test = jax.tree.map(lambda leaf: leaf[order[:heldout]], data)
    weights = params["network"]
    state = begin(make_optimizer(config), weights)
    done = 0
    while done < config.steps:
        steps = min(config.steps_per_call, config.steps - done)
        state, metrics = train_steps(config, train, state, jax.random.fold_in(key_train, done), steps)
        done += steps
        report = {name: float(value) for name, value in metrics.items()}
        if heldout:
            report["heldout_loss"] = float(heldout_loss(config, test, state.average, key_heldout))
        on_progress(done, report)
    return {"network": state.average, "stats": stats}
