from dataclasses import replace
from functools import cache
from pathlib import Path

import clone_pi0 as script
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.clone_pi0 import (
    Batch,
    ClonePi0Config,
    centre_patches,
    clone_pi0,
    loss,
    norm_stats,
    prepare_data,
    prompt_ids,
    sample_batch,
    sample_times,
    save_pi0,
    tiny_openpi_config,
)
from fpo_jax.demos import Demonstrations
from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import plan
from fpo_jax.envs.aloha_mujoco import simulate
from fpo_jax.policies import CHECKPOINTS, load_base
from fpo_jax.policies.openpi import OpenpiPolicy
from fpo_jax.policies.pi0 import Pi0, init
from fpo_jax.policies.tokenizer import train_tiny_tokenizer
from fpo_jax.types import FpoError, Observation
from tiny import jit
from tiny_pi0 import MODEL as WIDE

close = np.testing.assert_allclose
MODEL = replace(WIDE, action_dim=14, horizon=4)
EPISODES, LENGTH, DECISIONS = 12, 6, 2
CONFIG = ClonePi0Config(
    model=MODEL,
    steps=60,
    batch_size=8,
    draws=2,
    learning_rate=1e-2,
    warmup_steps=1,
    decay_steps=60,
    state_noise=0.0,
    decision_steps=4,
    decision_weights=(1.0, 3.0),
    heldout_fraction=0.5,
    steps_per_call=30,
)
# Almost pure noise: nothing but the image tells which way to go.
NOISY = replace(CONFIG, time_exponent=100.0)
OPENPI = tiny_openpi_config(MODEL, "Transfer cube", "arms")


def demonstrations() -> tuple[Demonstrations, np.ndarray]:
    """Actions with noise around a value that only the image tells: bright ones go up, dark ones down."""
    rng = np.random.default_rng(0)
    bright = np.arange(EPISODES) % 2 == 0
    actions = np.where(bright, 1.0, -1.0)[:, None, None] + 0.1 * rng.normal(size=(EPISODES, LENGTH, 14))
    demos = Demonstrations(
        proprio=rng.normal(size=(EPISODES, LENGTH, 14)).astype(np.float32),
        object_pose=np.zeros((EPISODES, LENGTH, 7), np.float32),
        actions=actions.astype(np.float32),
        success=bright,
    )
    images = np.where(bright, 200, 50)[:, None, None, None, None] + rng.integers(
        0, 20, (EPISODES, DECISIONS, 28, 28, 3)
    )
    return demos, images.astype(np.uint8)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    return prompt_ids(
        train_tiny_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer.model", ["Transfer cube"]), OPENPI
    )


@pytest.fixture(scope="module")
def policy(prompt):
    return OpenpiPolicy(OPENPI, ("top",), tuple(prompt.tolist()))


@pytest.fixture(scope="module")
def data(policy):
    return prepare_data(CONFIG, policy.transform, *demonstrations())


@cache
def fresh():
    return jax.jit(init, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def cloned(data, prompt):
    history = []
    weights = clone_pi0(NOISY, data, prompt, jax.random.key(1), lambda step, metrics: history.append((step, metrics)))
    return weights, history


def test_data_are_what_the_model_sees_at_the_decisions(data):
    demos, images = demonstrations()
    state, actions = (jax.device_get(norm_stats(demos)[name]) for name in ("state", "actions"))
    assert data.images.shape == (EPISODES, DECISIONS, 28, 28, 3) and data.images.dtype == jnp.uint8
    close(data.images, images)
    close(data.state[:, 1], (demos.proprio[:, 4] - state.mean) / (state.std + 1e-6), atol=1e-5)
    # The second chunk begins at step 4 of 6: two of its actions, then the last one again.
    chunk = demos.actions[:, [4, 5, 5, 5]]
    close(data.actions[:, 1], (chunk - actions.mean) / (actions.std + 1e-6), atol=1e-5)


def test_statistics_are_those_of_all_steps():
    demos, _ = demonstrations()
    stats = norm_stats(demos)
    close(stats["actions"].mean, demos.actions.reshape(-1, 14).mean(0), atol=1e-6)
    close(stats["state"].std, demos.proprio.reshape(-1, 14).std(0), atol=1e-6)


def test_batches_follow_the_decision_weights(data):
    marked = data._replace(state=jnp.broadcast_to(jnp.arange(2.0)[None, :, None], data.state.shape))
    sample = jit(sample_batch, static_argnums=(0, 3))
    some = jnp.array([2, 5])
    batch = sample(CONFIG, marked, some, 2000, jax.random.key(0))
    assert float(batch.state[:, 0].mean()) == pytest.approx(0.75, abs=0.04)
    noisy = sample(replace(CONFIG, state_noise=0.5), marked, some, 2000, jax.random.key(0))
    assert float((noisy.state - batch.state).std()) == pytest.approx(0.5, rel=0.02)


def test_patches_start_at_zero_on_average(data):
    """Mean over images of (patch embedding + position) is the fresh position, and deviations are 10 times as large."""
    images = data.images[:, 0]
    centred = centre_patches(CONFIG, fresh(), images)

    def tokens(weights):
        tower = weights["PaliGemma"]["img"]
        conv = nn.Conv(8, (14, 14), strides=(14, 14), padding="VALID")
        patches = conv.apply({"params": tower["embedding"]}, images.astype(jnp.float32) / 255 * 2 - 1)
        return np.asarray(patches).reshape(EPISODES, 4, 8), np.asarray(tower["pos_embedding"])

    (before, positions), (after, moved) = tokens(fresh()), tokens(centred)
    close((after + moved).mean(0), positions[0], atol=1e-5)
    close(after - after.mean(0), 10 * (before - before.mean(0)), atol=1e-4)


def test_times_have_openpis_distribution():
    """Beta(1.5, 1) has mean 1.5 / 2.5 = .6 and P(t < .5) = .5^1.5 = .354."""
    times = sample_times(CONFIG, jax.random.key(0), (20_000,))
    assert float(times.mean()) == pytest.approx(0.6, abs=0.01)
    assert float((times < 0.5).mean()) == pytest.approx(0.354, abs=0.015)
    assert float(times.min()) >= 0.001 and float(times.max()) <= 1.0


def test_loss_by_hand(data, prompt):
    """With the last layer at zero the velocity is 0: the loss is the mean square of noise - actions."""
    batch = Batch(*(column[:, 1] for column in data))
    weights = fresh() | {"action_out_proj": jax.tree.map(jnp.zeros_like, fresh()["action_out_proj"])}
    key = jax.random.key(3)
    noises = jax.random.normal(jax.random.split(key)[0], (CONFIG.draws, EPISODES, 4, 14))
    expected = np.mean(np.square(np.asarray(noises) - np.asarray(batch.actions)[None]))
    close(jit(loss, static_argnums=0)(CONFIG, weights, prompt, batch, key), expected, rtol=1e-5)


def test_loss_is_openpis_joint_flow_loss(data, prompt):
    """The mean of `Pi0.flow_loss`, one joint pass per draw, which the golden files check against openpi."""
    batch = Batch(*(column[:, 0] for column in data))
    key = jax.random.key(4)
    key_noise, key_time = jax.random.split(key)
    noises = jax.random.normal(key_noise, (CONFIG.draws, EPISODES, 4, 14))
    times = sample_times(CONFIG, key_time, (CONFIG.draws, EPISODES))
    images = {"base_0_rgb": batch.images.astype(jnp.float32) / 255 * 2 - 1}
    ids = jnp.broadcast_to(prompt[None], (EPISODES, len(prompt)))
    joint = jax.jit(
        lambda noise, time: Pi0(MODEL).apply(
            {"params": fresh()},
            *(images, {"base_0_rgb": jnp.ones(EPISODES, bool)}, ids, jnp.ones(ids.shape, bool)),
            *(batch.state, batch.actions, noise, time),
            method="flow_loss",
        )
    )
    expected = np.mean([joint(noise, time) for noise, time in zip(noises, times, strict=True)])
    close(jit(loss, static_argnums=0)(CONFIG, fresh(), prompt, batch, key), expected, rtol=1e-5)


def test_cloning_lowers_the_loss_and_reads_the_images(cloned):
    _, history = cloned
    assert [step for step, _ in history] == [30, 60]
    first, last = history[0][1], history[1][1]
    # Predicting nothing costs 2 per dimension: 1 for the noise, 1 for the actions.
    assert last["loss"] < first["loss"] < 2.0
    assert last["heldout_loss"] < 1.2
    assert last["wrong_image_loss"] > last["heldout_loss"] + 1.0


def test_cloning_is_reproducible(cloned, data, prompt):
    again = clone_pi0(NOISY, data, prompt, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, cloned[0])


def test_what_is_saved_loads_as_a_base_that_acts_alike(cloned, policy, tmp_path):
    demos, images = demonstrations()
    save_pi0(tmp_path / "tiny", OPENPI, cloned[0], norm_stats(demos), "A model card.")
    loaded, params = load_base(tmp_path / "tiny")
    assert (loaded.horizon, loaded.action_dim, loaded.output_dim, loaded.image_size) == (4, 14, 14, 28)
    observation = Observation(jnp.asarray(demos.proprio[:, 0]), images={"top": jnp.asarray(images[:, 0])})
    noise = jax.random.normal(jax.random.key(0), (EPISODES, 4, 14))

    def act(policy, params):
        _, context = jit(policy.encode)(params, observation)
        return jit(policy.decode)(params, context, noise)

    close(act(loaded, params), act(policy, {"model": cloned[0], "norm": norm_stats(demos)}), atol=1e-6)
    assert (tmp_path / "tiny" / "README.md").read_text() == "A model card.\n"


def test_the_shipped_base_loads_and_acts():
    policy, params = load_base("pi0_tiny")
    assert (policy.horizon, policy.action_dim, policy.output_dim, policy.cameras) == (50, 14, 14, ("top",))
    size = sum(file.stat().st_size for file in (CHECKPOINTS / "pi0_tiny").rglob("*") if file.is_file())
    assert size < 5e6
    qpos = jnp.asarray(aloha.initial_qpos(np.array([[0.1, 0.5, 0.05]] * 2)), jnp.float32)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, policy.image_size, policy.image_size, 3), dtype=np.uint8)
    observation = aloha.observe(qpos)._replace(images={"top": jnp.asarray(images)})
    features, context = jit(policy.encode)(params, observation)
    act = jit(policy.decode)
    chunk, other = (act(params, context, jax.random.normal(jax.random.key(i), (2, 50, 14))) for i in range(2))
    assert features.shape == (2, policy.feature_dim) and chunk.shape == (2, 50, 14)
    assert bool(jnp.isfinite(features).all()) and bool(jnp.isfinite(chunk).all())
    assert float(jnp.abs(chunk - other).max()) > 0.01  # the noise decides


def test_a_picture_shows_what_was_recorded():
    """Everything but the second fingers is in the observation."""
    cube = np.array([0.1, 0.45, 0.05])
    qpos, _ = simulate(cube, plan(cube)[:150])
    rebuilt = script.qpos_from_observation(np.asarray(aloha.proprio_from_qpos(qpos)), qpos[:, aloha.CUBE])
    fingers = [7, 15]
    close(np.delete(rebuilt, fingers, axis=1), np.delete(qpos, fingers, axis=1), atol=1e-9)
    close(rebuilt[:, fingers], qpos[:, fingers], atol=2e-3)


def test_images_that_do_not_fit_are_refused(policy):
    demos, images = demonstrations()
    with pytest.raises(FpoError, match=r"images have shape .* render them again"):
        prepare_data(CONFIG, policy.transform, demos, images[:, :1])
    with pytest.raises(FpoError, match=r"1 decision_weights for 2 decisions"):
        prepare_data(replace(CONFIG, decision_weights=(1.0,)), policy.transform, demos, images)


def test_no_episodes_left_to_train_on(data, prompt):
    with pytest.raises(FpoError, match="no demonstrations left"):
        clone_pi0(replace(CONFIG, heldout_fraction=1.0), data, prompt, jax.random.key(0))


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(FpoError, match="exists already"):
        save_pi0(tmp_path / "tiny", OPENPI, fresh(), norm_stats(demonstrations()[0]), "")
    assert {path.name for path in Path(tmp_path / "tiny").iterdir()} == {"notes.txt"}


@pytest.mark.slow
def test_the_script_makes_a_base_with_its_card(tmp_path):
    """From recording and rendering to the measured success, all of it far too little to be any good."""
    model = replace(MODEL, horizon=50)
    config = replace(CONFIG, model=model, steps=2, decision_steps=50, decision_weights=(1.0,) * 6)
    script.main(script.Args(out=tmp_path / "made", record_episodes=4, eval_episodes=2, eval_envs=2, clone=config))
    policy, _ = load_base(tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert policy.config.prompt == "Transfer cube"
    assert "success alone" in card and "(2 episodes)" in card
    with pytest.raises(FpoError, match="exists already"):
        script.main(script.Args(out=tmp_path / "made"))
