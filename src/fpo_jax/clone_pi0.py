"""Behaviour cloning of a small π0 from scratch: plain flow matching on demonstrations with camera images.

One observation is encoded once and serves several draws of noise and time, as in `policies.pi0.flow_losses`, so the
images cost little. Time runs as in openpi: t = 1 is noise, t = 0 the action chunk.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from fpo_jax.clone import CloneState, begin, descend
from fpo_jax.demos import Demonstrations, normalisation
from fpo_jax.policies import OPENPI_FILE
from fpo_jax.policies.gemma import GemmaConfig
from fpo_jax.policies.openpi_checkpoint import save_params
from fpo_jax.policies.openpi_configs import OpenpiConfig, write_openpi_config
from fpo_jax.policies.pi0 import CAMERAS, Pi0, Pi0Config, flow_losses, init
from fpo_jax.policies.siglip import SiglipConfig, siglip_config
from fpo_jax.policies.tokenizer import TOKENIZER_FILE, Tokenizer, train_tiny_tokenizer
from fpo_jax.policies.transforms import NormStats, RobotTransform, images_to_float
from fpo_jax.types import FpoError, Metrics, Params

CAMERA = CAMERAS[0]  # the one that a base cloned here sees through
TINY_PI0 = Pi0Config(
    paligemma=GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    image_tower=SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=2, patch=14),
    action_dim=14,
    horizon=50,
    image_size=56,
    vocab_size=256,
)
_SAMPLE = 256  # observations to measure on


@dataclasses.dataclass(frozen=True)
class ClonePi0Config:
    """How a π0 is cloned; the defaults made `checkpoints/pi0_tiny`."""

    model: Pi0Config = TINY_PI0
    steps: int = 4400  # gradient steps
    batch_size: int = 32  # observations
    draws: int = 4  # S: (noise, t) per observation, which share its prefix
    time_exponent: float = 1.5  # t ~ 0.001 + 0.999 Beta(this, 1); openpi's 1.5 prefers t near 1, the noise
    learning_rate: float = 2e-3  # peak, after the warm-up
    warmup_steps: int = 160
    decay_steps: int = 8000  # where the cosine decay of the learning rate would reach 0; the average needs no such end
    ema_decay: float = 0.999  # of the weights, per step
    gradient_clip: float = 1.0  # global norm
    patch_gain: float = 10.0  # of the fresh patch embedding, see `centre_patches`
    state_noise: float = 0.02  # std of the noise on the robot state, in its own std
    decision_steps: int = 50  # control steps between two decisions: images are needed only there
    decision_weights: tuple[float, ...] = (3.0, 2.0, 1.0, 1.0, 1.0, 1.0)  # how often each is drawn, relative
    heldout_fraction: float = 0.05  # of the episodes
    steps_per_call: int = 200  # gradient steps per compiled call, the rhythm of `on_progress`


class Pi0Data(NamedTuple):
    """Demonstrations as the model sees them; K decisions in each of E episodes."""

    images: UInt8[Array, "E K s s 3"]
    state: Float[Array, "E K A"]  # normalised and padded
    actions: Float[Array, "E K h A"]  # likewise; the last action repeated past the episode's end


class Batch(NamedTuple):
    """B observations with what the demonstrator did next."""

    images: UInt8[Array, "B s s 3"]
    state: Float[Array, "B A"]
    actions: Float[Array, "B h A"]


def tiny_openpi_config(
    model: Pi0Config, prompt: str, asset_id: str, render: Literal["official", "fast"] = "fast"
) -> OpenpiConfig:
    """A simulated ALOHA's conventions: absolute actions in its own units, z-scores."""
    return OpenpiConfig(
        model=model,
        robot="aloha",
        asset_id=asset_id,
        prompt=prompt,
        normalisation="z-score",
        delta_actions=False,
        adapt_to_pi=False,
        discrete_state_input=False,
        max_token_len=model.max_token_len,
        render=render,
    )


def norm_stats(demos: Demonstrations) -> dict[str, NormStats]:
    """Mean and standard deviation of `state` and `actions` over all episodes and steps, as openpi stores them."""
    found = normalisation(demos)
    columns = {"state": found["proprio"], "actions": found["actions"]}
    return {name: NormStats(jnp.asarray(values.mean), jnp.asarray(values.std)) for name, values in columns.items()}


def prepare_data(
    config: ClonePi0Config, transform: RobotTransform, demos: Demonstrations, images: UInt8[np.ndarray, "E K s s 3"]
) -> Pi0Data:
    """The observations and chunks at the decisions 0, decision_steps, ...; `images` are of these moments.

    Raises FpoError where images, demonstrations and model don't fit each other.
    """
    episodes, length, _ = demos.actions.shape
    begin = np.arange(0, length, config.decision_steps)
    size = config.model.image_size
    expected = (episodes, len(begin), size, size, 3)
    if images.shape != expected:
        raise FpoError(
            f"The images have shape {images.shape}, and {episodes} episodes of {length} steps with a decision every "
            f"{config.decision_steps} need {expected}: render them again."
        )
    if len(config.decision_weights) != len(begin):
        raise FpoError(
            f"There are {len(config.decision_weights)} decision_weights for {len(begin)} decisions: give one for each."
        )
    steps = np.minimum(begin[:, None] + np.arange(config.model.horizon)[None], length - 1)
    stats = norm_stats(demos)
    proprio = jnp.asarray(demos.proprio[:, begin], jnp.float32)
    chunks = jnp.asarray(demos.actions[:, steps], jnp.float32)
    return Pi0Data(
        jnp.asarray(images), transform.inputs(stats, proprio), transform.training_actions(stats, proprio, chunks)
    )


def centre_patches(config: ClonePi0Config, weights: Params, images: UInt8[Array, "n s s 3"]) -> Params:
    """Fresh weights whose patch embeddings are zero on average over `images`, and `patch_gain` times as large.

    The pictures of a fixed camera hardly differ: a small cube on an unchanging table is one thousandth of the variance
    of a fresh embedding, and gradient descent from there takes thousands of steps to find it. The table of positions
    has one row per patch, so it can take up the mean picture: kernel <- g kernel, row <- row - g kernel * mean.
    """
    tower = weights["PaliGemma"]["img"]
    embedding, positions = tower["embedding"], tower["pos_embedding"]
    mean = jnp.mean(images_to_float(images), axis=0, keepdims=True)
    stride = (siglip_config(config.model.image_tower).patch,) * 2
    patches = jax.lax.conv_general_dilated(
        mean, embedding["kernel"], stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    gain = config.patch_gain
    tower = tower | {
        "embedding": embedding | {"kernel": gain * embedding["kernel"]},
        "pos_embedding": positions - gain * patches.reshape(positions.shape),
    }
    return weights | {"PaliGemma": weights["PaliGemma"] | {"img": tower}}


def sample_batch(
    config: ClonePi0Config, data: Pi0Data, episodes: Int[Array, " n"], batch_size: int, key: Key[Array, ""]
) -> Batch:
    """Random ones of these episodes, decisions by their weights, and noise on the robot state."""
    key_episode, key_decision, key_noise = jax.random.split(key, 3)
    episode = jax.random.choice(key_episode, episodes, (batch_size,))
    logits = jnp.log(jnp.asarray(config.decision_weights))
    decision = jax.random.categorical(key_decision, logits, shape=(batch_size,))
    batch = Batch(*(column[episode, decision] for column in data))
    noise = config.state_noise * jax.random.normal(key_noise, batch.state.shape)
    return batch._replace(state=batch.state + noise)


def sample_times(config: ClonePi0Config, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """t = 0.001 + 0.999 Beta(a, 1), a = `time_exponent`: u^(1/a) of a uniform u has that distribution."""
    return 0.001 + 0.999 * jax.random.uniform(key, shape) ** (1.0 / config.time_exponent)


def loss(
    config: ClonePi0Config, weights: Params, prompt: Int[Array, " l"], batch: Batch, key: Key[Array, ""]
) -> Float[Array, ""]:
    """Mean over draws, batch and chunk of ‖v(x_t, t) - (noise - actions)‖² / A."""
    key_noise, key_time = jax.random.split(key)
    noises = jax.random.normal(key_noise, (config.draws, *batch.actions.shape))
    times = sample_times(config, key_time, noises.shape[:2])
    model, everyone = Pi0(config.model), jnp.ones(len(batch.state), bool)
    ids = jnp.broadcast_to(prompt[None], (len(batch.state), len(prompt)))
    images, masks = {CAMERA: images_to_float(batch.images)}, {CAMERA: everyone}
    valid: Bool[Array, "B l"] = jnp.ones(ids.shape, bool)
    prefix, _ = model.apply({"params": weights}, images, masks, ids, valid, method=Pi0.prefix)
    return jnp.mean(flow_losses(model, weights, prefix, batch.state, batch.actions, noises, times))


def make_optimizer(config: ClonePi0Config) -> optax.GradientTransformation:
    """Adam with openpi's moments (0.9, 0.95), a clipped gradient norm and a warm-up and cosine schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.decay_steps)
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), optax.adam(schedule, b1=0.9, b2=0.95))


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("state",))
def train_steps(
    config: ClonePi0Config,
    data: Pi0Data,
    episodes: Int[Array, " n"],
    prompt: Int[Array, " l"],
    state: CloneState,
    key: Key[Array, ""],
    steps: int,
) -> tuple[CloneState, Metrics]:
    """`steps` gradient steps in one compiled scan; returns the mean training loss."""
    optimizer = make_optimizer(config)

    def step(state: CloneState, key: Key[Array, ""]) -> tuple[CloneState, Float[Array, ""]]:
        key_sample, key_loss = jax.random.split(key)
        batch = sample_batch(config, data, episodes, config.batch_size, key_sample)
        value, gradient = jax.value_and_grad(lambda weights: loss(config, weights, prompt, batch, key_loss))(
            state.weights
        )
        return descend(optimizer, config.ema_decay, state, gradient), value

    state, losses = jax.lax.scan(step, state, jax.random.split(key, steps))
    return state, {"loss": losses.mean()}


@functools.partial(jax.jit, static_argnames="config")
def heldout_losses(
    config: ClonePi0Config,
    data: Pi0Data,
    episodes: Int[Array, " n"],
    prompt: Int[Array, " l"],
    weights: Params,
    key: Key[Array, ""],
) -> Metrics:
    """The training loss on other episodes, and the same with the images of one another.

    How much worse the second is shows how much the policy looks. The same key draws the same samples, so that values
    compare.
    """
    key_sample, key_loss = jax.random.split(key)
    batch = sample_batch(config, data, episodes, _SAMPLE, key_sample)
    exchanged = batch._replace(images=jnp.roll(batch.images, 1, axis=0))
    return {
        "heldout_loss": loss(config, weights, prompt, batch, key_loss),
        "wrong_image_loss": loss(config, weights, prompt, exchanged, key_loss),
    }


def prompt_ids(tokenizer: Tokenizer, config: OpenpiConfig) -> Int[Array, " l"]:
    """Token ids of the task, without padding."""
    ids, valid = tokenizer.tokenize(config.prompt or "", None, config.max_token_len)
    return jnp.asarray(ids[valid])


def clone_pi0(
    config: ClonePi0Config,
    data: Pi0Data,
    prompt: Int[Array, " l"],
    key: Key[Array, ""],
    on_progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> Params:
    """Trains `config.model` from fresh weights; returns the averaged weights, openpi's tree.

    `on_progress(step, {"loss", "heldout_loss", "wrong_image_loss"})` is called every `steps_per_call` gradient steps.
    Raises FpoError where no episode is left to train on.
    """
    episodes = len(data.actions)
    heldout = round(config.heldout_fraction * episodes)
    if episodes - heldout < 1:
        raise FpoError("There are no demonstrations left to train on: record more, or lower heldout_fraction.")
    key_init, key_images, key_split, key_heldout, key_train = jax.random.split(key, 5)
    order = jax.random.permutation(key_split, episodes)
    test, train = order[:heldout], order[heldout:]
    some = jax.random.choice(key_images, data.images.reshape(-1, *data.images.shape[2:]), (_SAMPLE,))
    weights = centre_patches(config, init(config.model, key_init), some)
    state = begin(make_optimizer(config), weights)
    done = 0
    while done < config.steps:
        steps = min(config.steps_per_call, config.steps - done)
        state, metrics = train_steps(config, data, train, prompt, state, jax.random.fold_in(key_train, done), steps)
        done += steps
        if heldout:
            metrics |= heldout_losses(config, data, test, prompt, state.average, key_heldout)
        on_progress(done, {name: float(value) for name, value in metrics.items()})
    return state.average


def save_pi0(
    directory: str | Path, config: OpenpiConfig, weights: Params, stats: dict[str, NormStats], model_card: str
) -> None:
    """Writes a base that `load_base` reads: openpi's `params/` and `assets/`, and beside them `openpi.json`, the
    tokenizer of the prompt (`train_tiny_tokenizer`) and the model card `README.md`.

    Raises FpoError where the directory is there already.
    """
    directory = Path(directory)
    save_params(directory, weights, stats, config.asset_id)
    write_openpi_config(directory / OPENPI_FILE, config)
    train_tiny_tokenizer(directory / TOKENIZER_FILE, [config.prompt or ""])
    (directory / "README.md").write_text(model_card.rstrip() + "\n")
