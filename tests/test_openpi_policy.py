"""π0 behind the BasePolicy protocol: once through the prefix, features, prompts, and the robot's own units."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.config import OpenpiOptions
from fpo_jax.policies import load_base
from fpo_jax.policies.openpi import OpenpiPolicy, open_openpi
from fpo_jax.policies.pi0 import Pi0, sample_actions
from fpo_jax.types import BasePolicy, FpoError, Observation
from tiny import jit
from tiny_pi0 import ALOHA, MODEL, STATS, write_checkpoint

NUM = 3
close = np.testing.assert_allclose


def observation(seed: int = 0, size: int = 28) -> Observation:
    rng = np.random.default_rng(seed)
    images = {"top": jnp.asarray(rng.integers(0, 256, (NUM, size, size, 3)), jnp.uint8)}
    return Observation(jnp.asarray(rng.normal(0, 0.5, (NUM, 14)), jnp.float32), images=images)


def noise(seed: int = 1):
    return jax.random.normal(jax.random.key(seed), (NUM, MODEL.horizon, MODEL.action_dim))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("pi0") / "micro")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_base(folder)


@pytest.fixture(scope="module")
def encoded(loaded):
    policy, params = loaded
    return jit(policy.encode)(params, observation())


def test_it_is_a_base_policy(loaded):
    policy, _ = loaded
    assert isinstance(policy, BasePolicy) and isinstance(policy, OpenpiPolicy)
    assert (policy.horizon, policy.action_dim, policy.output_dim) == (10, 16, 14)
    assert (policy.cameras, policy.image_size, policy.standardize) == (("top",), 28, True)


def test_the_chunk_is_openpis_sample_in_the_robots_units(loaded, encoded):
    """Step by step what openpi does: normalise, pad, sample from the same noise, unnormalise, cut."""
    policy, params = loaded
    chunk = jit(policy.decode)(params, encoded[1], noise())
    seen = observation()
    state = jnp.pad((seen.proprio - STATS["state"].mean[None]) / (STATS["state"].std[None] + 1e-6), ((0, 0), (0, 2)))
    images = {"base_0_rgb": seen.images["top"].astype(jnp.float32) / 255 * 2 - 1}
    prompt = jnp.broadcast_to(jnp.asarray(policy.prompt)[None], (NUM, len(policy.prompt)))
    model = Pi0(MODEL)
    prefix, _ = model.apply(
        {"params": params["model"]},
        images,
        {"base_0_rgb": jnp.ones(NUM, bool)},
        prompt,
        jnp.ones(prompt.shape, bool),
        method="prefix",
    )
    actions = sample_actions(model, params["model"], prefix, state, noise(), num_steps=10)
    mean, std = STATS["actions"].mean[None, None], STATS["actions"].std[None, None]
    close(chunk, actions[..., :14] * (std + 1e-6) + mean, atol=2e-5)
    assert chunk.shape == (NUM, 10, 14)
    assert float(jnp.abs(chunk - jit(policy.decode)(params, encoded[1], noise(2))).max()) > 1e-3  # noise matters


def test_images_prompt_and_state_matter(loaded, encoded, folder):
    policy, params = loaded
    other = observation(seed=5)
    for changed in (observation()._replace(images=other.images), observation()._replace(proprio=other.proprio)):
        features, _ = jit(policy.encode)(params, changed)
        assert float(jnp.abs(features - encoded[0]).max()) > 1e-3
    renamed, _ = load_base(folder, options=OpenpiOptions(prompt="Drop the cube"))
    assert renamed.prompt != policy.prompt
    features, _ = jit(renamed.encode)(params, observation())
    assert float(jnp.abs(features - encoded[0]).max()) > 1e-4


def test_a_prompt_of_the_environment_comes_before_the_default(loaded, encoded):
    policy, params = loaded
    ids = jnp.broadcast_to(jnp.asarray([*policy.prompt, 0, 0])[None], (NUM, len(policy.prompt) + 2))
    padded = observation()._replace(
        prompt=ids, prompt_mask=jnp.arange(ids.shape[1])[None] < jnp.full((NUM, 1), len(policy.prompt))
    )
    close(jit(policy.encode)(params, padded)[0], encoded[0], atol=2e-5)  # padding changes nothing
    other = padded._replace(prompt=ids.at[:, 1].set(7))
    assert float(jnp.abs(jit(policy.encode)(params, other)[0] - encoded[0]).max()) > 1e-4


@pytest.mark.parametrize(("kind", "width"), [("mean", 16), ("last_token", 16), ("proprio", 0)])
def test_features(loaded, kind, width):
    policy, params = loaded
    policy = replace(policy, features=kind)
    features, _ = policy.encode(params, observation())
    assert features.shape == (NUM, policy.feature_dim) == (NUM, width + 14)
    assert features.dtype == jnp.float32
    close(features[:, width:], observation().proprio, atol=2e-6)  # these statistics change nothing
    hidden = jax.random.normal(jax.random.key(0), (2, 4, 16))
    mask = jnp.array([[True, True, False, False], [True, False, True, False]])
    expected = {
        "mean": jnp.stack([hidden[0, :2].mean(0), (hidden[1, 0] + hidden[1, 2]) / 2]),
        "last_token": jnp.stack([hidden[0, 1], hidden[1, 2]]),
        "proprio": jnp.zeros((2, 0)),
    }[kind]
    close(policy._summary(hidden.at[0, 3].set(jnp.nan), mask), expected, atol=1e-6)  # invalid rows are not read


def test_several_latents_share_one_prefix(loaded, encoded):
    """Fresh noises on the same context: the same chunks as one by one, and the prefix is not run."""
    policy, params = loaded
    noises = jnp.stack([noise(seed) for seed in range(4)])
    many = jax.vmap(policy.decode, in_axes=(None, None, 0))
    # Nothing of the prefix is read: its weights may be anything.
    text = jax.tree_util.keystr
    poisoned = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "_1" in text(path) or "PaliGemma" not in text(path) else leaf * jnp.nan,
        params["model"],
    )
    assert bool(jnp.isnan(poisoned["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["w"]).all())
    assert bool(jnp.isfinite(jit(many)(params | {"model": poisoned}, encoded[1], noises)).all())
    together = jit(many)(params, encoded[1], noises)
    for one, chunk in zip(noises, together, strict=True):
        close(chunk, jit(policy.decode)(params, encoded[1], one), atol=2e-5)


def test_a_camera_that_the_environment_lacks(loaded):
    policy, params = loaded
    with pytest.raises(FpoError, match="'top', which the environment does not show"):
        policy.encode(params, observation()._replace(images=None))


def test_images_of_another_size_are_resized(loaded):
    policy, params = loaded
    features, _ = policy.encode(params, observation(size=56))
    assert bool(jnp.isfinite(features).all())


# --- π0.5 writes the state into its prompt


def test_pi05_spells_out_the_state(tmp_path):
    config = replace(
        ALOHA,
        model=replace(MODEL, pi05=True),
        normalisation="quantile",
        discrete_state_input=True,
        max_token_len=120,
    )
    policy, params = load_base(write_checkpoint(tmp_path / "pi05", config))
    assert policy.writes_state and policy.tokenizer is not None
    seen = observation()
    state = policy.transform.inputs(params["norm"], seen.proprio)
    ids, mask = jax.jit(policy._prompt)(seen, state)
    for row in range(NUM):
        expected = policy.tokenizer.encode("Transfer cube", np.asarray(state[row, :14]))
        assert ids[row][mask[row]].tolist() == expected[:120]
    _, context = jit(policy.encode)(params, seen)
    chunk = jit(policy.decode)(params, context, noise())
    assert chunk.shape == (NUM, 10, 14) and bool(jnp.isfinite(chunk).all())


# --- suites of tasks: an observation says which, the base knows the words

PROMPTS = ("pick up the butter", "open the top drawer and put the bowl inside", "Transfer cube")
LIBERO = replace(ALOHA, robot="libero", prompt=None, delta_actions=True)


def libero_observation(task: list[int]) -> Observation:
    rng = np.random.default_rng(0)
    images = {name: jnp.asarray(rng.integers(0, 256, (NUM, 28, 28, 3)), jnp.uint8) for name in ("image", "wrist_image")}
    proprio = jnp.asarray(rng.normal(0, 0.5, (NUM, 8)), jnp.float32)
    return Observation(proprio, images=images, task=jnp.asarray(task, jnp.int32))


@pytest.fixture(scope="module")
def libero(tmp_path_factory):
    return load_base(write_checkpoint(tmp_path_factory.mktemp("libero") / "micro", LIBERO))


def test_every_task_of_a_suite_has_its_prompt(libero):
    policy, params = libero
    assert (policy.output_dim, policy.cameras) == (7, ("image", "wrist_image"))
    suite, order = policy.with_prompts(PROMPTS), [2, 0, 1]
    seen = libero_observation(order)
    ids, mask = suite._prompt(seen, jnp.zeros((NUM, 16)))
    for row, task in enumerate(order):
        assert ids[row][mask[row]].tolist() == policy.tokenizer.encode(PROMPTS[task])
    assert bool(mask.all(axis=-1).any())  # no longer than the longest
    features, _ = jit(suite.encode)(params, seen)
    single, _ = jit(replace(policy, config=replace(policy.config, prompt=PROMPTS[0])).with_prompts(PROMPTS[:1]).encode)(
        params, seen._replace(task=jnp.zeros(NUM, jnp.int32))
    )
    close(features[1], single[1], atol=1e-5)  # padding changes nothing
    assert float(jnp.abs(features[0] - single[0]).max()) > 1e-3  # words do


def test_a_base_without_a_task_must_be_told(libero):
    policy, params = libero
    with pytest.raises(FpoError, match=r"--openpi\.prompt"):
        policy.encode(params, libero_observation([0, 0, 0]))
    with pytest.raises(FpoError, match="cannot read the tasks' prompts"):
        replace(policy, tokenizer=None).with_prompts(PROMPTS)


def test_pi05_spells_out_the_state_behind_each_prompt(libero):
    policy, params = libero
    config = replace(
        policy.config,
        model=replace(MODEL, pi05=True),
        normalisation="quantile",
        discrete_state_input=True,
        max_token_len=150,
    )
    suite = replace(policy, config=config).with_prompts(PROMPTS)
    seen = libero_observation([2, 0, 1])
    state = suite.transform.inputs(params["norm"], seen.proprio)
    ids, mask = jax.jit(suite._prompt)(seen, state)
    for row, task in enumerate((2, 0, 1)):
        assert ids[row][mask[row]].tolist() == policy.tokenizer.encode(PROMPTS[task], np.asarray(state[row, :8]))


# --- loading


def test_loading_names_what_is_wrong(folder, tmp_path):
    with pytest.raises(FpoError, match="--checkpoint belongs to openpi bases"):
        load_base("point_mass", checkpoint="somewhere")
    with pytest.raises(FpoError, match="did you mean 'pi0_aloha_sim'"):
        load_base("pi0_aloha_sin")
    with pytest.raises(FpoError, match=r"--openpi\.prompt"):
        open_openpi(replace(ALOHA, prompt=None, checkpoint=str(folder)))
    with pytest.raises(FpoError, match="'legs': choose one of arms"):
        load_base(folder, options=OpenpiOptions(asset_id="legs"))
    with pytest.raises(FpoError, match=r"tokens, but the model knows 32"):
        open_openpi(replace(ALOHA, model=replace(MODEL, vocab_size=32), checkpoint=str(folder)))
    with pytest.raises(FpoError, match="There is no checkpoint at"):
        load_base("pi0_aloha_sim", checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(FpoError, match=r"has shape \(8,\), but this configuration's has \(1152,\)"):
        # A real configuration on the micro model's weights.
        load_base("pi0_aloha_sim", checkpoint=str(folder), options=OpenpiOptions(asset_id="arms"))
    for place in (str(folder / "params"), "gs://bucket/pi0"):
        with pytest.raises(FpoError, match=r"--base pi0_aloha_sim --checkpoint "):
            load_base(place)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "model.safetensors").touch()
    with pytest.raises(FpoError, match="is a PyTorch checkpoint"):
        load_base("pi0_aloha_sim", checkpoint=str(tmp_path / "torch"))


def test_a_configuration_file_with_weights_elsewhere(folder):
    policy, params = load_base(str(folder / "openpi.json"), checkpoint=str(folder))
    assert policy.config.model == replace(MODEL, dtype="float32")
    assert params["model"]["action_in_proj"]["kernel"].dtype == jnp.float32


def test_bfloat16_on_request(folder):
    policy, params = load_base(folder, options=OpenpiOptions(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params["model"])} == {jnp.dtype(jnp.bfloat16)}
    features, context = jit(policy.encode)(params, observation())
    chunk = jit(policy.decode)(params, context, noise())
    assert features.dtype == chunk.dtype == jnp.float32
    reference, reference_params = load_base(folder)
    _, context = jit(reference.encode)(reference_params, observation())
    close(chunk, jit(reference.decode)(reference_params, context, noise()), atol=0.005)  # a tenth of the actions' std
