"""π0 and π0.5 against openpi's recorded numbers, and what the cache of the prefix promises."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import openpi_golden as golden
from fpo_jax.policies.gemma import GemmaConfig
from fpo_jax.policies.pi0 import (
    CAMERAS,
    Pi0,
    Pi0Config,
    Prefix,
    attention_mask,
    flow_losses,
    init,
    param_shapes,
    sample_actions,
    time_embedding,
)
from fpo_jax.policies.siglip import SiglipConfig
from fpo_jax.types import FpoError

DUMMY = Pi0Config(paligemma="dummy", expert="dummy", image_tower="Ti/14")
CONFIGS = {"pi0_dummy_ti": DUMMY, "pi05_dummy_ti": replace(DUMMY, pi05=True)}
both = pytest.mark.parametrize("name", CONFIGS)

SMALL = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
TOWER = SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2, patch=14)
TINY = Pi0Config(False, SMALL, replace(SMALL, width=8), TOWER, action_dim=3, horizon=4, image_size=28, vocab_size=32)


def near(actual, expected, tolerance: float = 5e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@cache
def setting(name: str) -> SimpleNamespace:
    """A recorded model: its numbers `z` and `weights`, `run(method, *inputs)`, and the encoded `prefix`."""
    model = Pi0(CONFIGS[name])
    weights = jax.tree.map(jnp.asarray, golden.params(name))
    observation = jax.tree.map(jnp.asarray, golden.observation(name))

    def apply(method, weights, *inputs):
        return model.apply({"params": weights}, *inputs, method=method)

    def run(method, *inputs):
        return jitted(method, weights, *inputs)

    jitted = jax.jit(apply, static_argnums=0)
    sample = partial(jax.jit(partial(sample_actions, model)), weights)
    prefix, hidden = run("prefix", *observation)
    z = jax.tree.map(jnp.asarray, golden.arrays(name))
    return SimpleNamespace(
        model=model, weights=weights, observation=observation, run=run, sample=sample, prefix=prefix, hidden=hidden, z=z
    )


# --- parameters


@pytest.mark.parametrize(
    ("tree", "config"),
    [
        ("pi0", Pi0Config()),
        ("pi05", Pi0Config(pi05=True)),
        ("pi0_lora", Pi0Config(paligemma="gemma_2b_lora", expert="gemma_300m_lora")),
    ],
)
def test_parameter_tree_at_full_size(tree, config):
    shapes = golden.flat(param_shapes(config))
    actual = {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in shapes.items()}
    assert actual == golden.facts(f"param_tree_{tree}")["params"]


def test_defaults():
    assert (Pi0Config().max_token_len, Pi0Config(pi05=True).max_token_len, Pi0Config().width) == (48, 200, 2048)
    assert hash(TINY) == hash(replace(TINY))


# --- parts


def test_time_embedding():
    # width 4: periods 0.004 and 4, so the angles at t = 1/2 are 125 turns, and an eighth of a turn.
    half = np.sqrt(0.5)
    near(time_embedding(jnp.array([0.5, 0.0]), 4), [[0, half, 1, half], [0, 0, 1, 1]])


def test_attention_mask():
    starts, valid = jnp.array([0, 0, 1, 1, 0], bool), jnp.array([[1, 0, 1, 1, 1]], bool)
    expected = [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]
    np.testing.assert_array_equal(attention_mask(starts, valid)[0], np.array(expected, bool))


@both
def test_prefix_tokens(name):
    s = setting(name)
    tokens, mask = s.run("embed_prefix", *s.observation)
    np.testing.assert_array_equal(mask, s.z["prefix/mask"])
    near(tokens[..., :8], s.z["prefix/tokens_ch8"])
    near(tokens.mean(axis=-1), s.z["prefix/tokens_mean"])
    near(tokens.std(axis=-1), s.z["prefix/tokens_std"])


@both
def test_suffix_tokens_and_mask(name):
    s = setting(name)
    tokens, condition = s.run("embed_suffix", s.z["state"], s.z["loss/x_t"], s.z["loss/time"])
    near(tokens, s.z["suffix/tokens"])
    if s.model.config.pi05:
        near(condition, s.z["suffix/adarms_cond"])
    else:
        assert condition is None
    starts = s.model.suffix_starts(tokens.shape[1])
    np.testing.assert_array_equal(starts, s.z["suffix/ar_mask"])
    starts = jnp.concatenate([s.z["prefix/ar_mask"], starts])
    valid = jnp.concatenate([s.z["prefix/mask"], s.z["suffix/mask"]], axis=1)
    recorded = np.unpackbits(s.z["loss/attn_mask_packedbits"], axis=-1, count=len(starts)).astype(bool)
    np.testing.assert_array_equal(attention_mask(starts, valid), recorded)


# --- the whole model


@both
def test_joint_pass(name):
    s = setting(name)
    valid = np.concatenate([s.z["prefix/mask"], s.z["suffix/mask"]], axis=1)[:, ::16]
    seen = s.z["prefix/mask"][:, ::16]
    first, second, (k, v) = s.run("joint", *s.observation, s.z["state"], s.z["loss/x_t"], s.z["loss/time"])
    near(first[:, ::16][seen], s.z["loss/prefix_out_every16"][seen])
    near(second, s.z["loss/suffix_out"])
    near(k[:, :, ::16][:, valid], s.z["loss/k_every16"][:, valid])
    near(v[:, :, ::16][:, valid], s.z["loss/v_every16"][:, valid])


@both
def test_prefix_cache(name):
    s = setting(name)
    valid = s.z["prefix/mask"][:, ::16]
    near(s.prefix.k[:, :, ::16][:, valid], s.z["sample/cache_k_every16"][:, valid])
    near(s.hidden[:, ::16][valid], s.z["loss/prefix_out_every16"][valid])


@both
def test_velocity_on_the_cache(name):
    s = setting(name)
    near(s.run("velocity", s.prefix, s.z["state"], s.z["loss/x_t"], s.z["loss/time"]), s.z["loss/v_t"])
    for time, noise, expected in zip(s.z["multi/time"], s.z["multi/noise"], s.z["multi/v_t"], strict=True):
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * s.z["loss/actions"]
        near(s.run("velocity", s.prefix, s.z["state"], x_t, time), expected)


@pytest.mark.parametrize(("name", "path"), [("pi0_dummy_ti", "joint"), ("pi05_dummy_ti", "cache")])
def test_flow_loss_and_its_gradient(name, path):
    s = setting(name)

    def loss(weights):
        inputs, draw = (s.z["state"], s.z["loss/actions"]), (s.z["loss/noise"], s.z["loss/time"])
        if path == "joint":
            losses = s.model.apply({"params": weights}, *s.observation, *inputs, *draw, method="flow_loss")
        else:
            prefix, _ = s.model.apply({"params": weights}, *s.observation, method="prefix")
            losses = flow_losses(s.model, weights, prefix, *inputs, *jax.tree.map(lambda leaf: leaf[None], draw))
        return losses.mean(), losses

    gradients, losses = jax.jit(jax.grad(loss, has_aux=True))(s.weights)
    near(losses.reshape(2, 50), s.z["loss/loss"])
    gradients = golden.flat(gradients)
    recorded = golden.facts(f"{name}.grads")["grad"]
    largest = max(fact["l2"] for fact in recorded.values())
    assert gradients.keys() == recorded.keys()
    for place, fact in recorded.items():
        gradient = np.asarray(gradients[place], np.float64)
        norm = np.linalg.norm(gradient)
        if fact["l2"] < 1e-6 * largest:  # exactly 0 but for rounding: the biases of keys, and the last prefix norm
            assert norm < 1e-6 * largest, place
            continue
        np.testing.assert_allclose(norm, fact["l2"], rtol=1e-4, err_msg=place)
        rms = norm / np.sqrt(gradient.size)
        np.testing.assert_allclose(gradient.ravel()[:4], fact["first4"], rtol=0, atol=5e-5 * rms, err_msg=place)


# --- sampling


@both
def test_sample_actions(name):
    s = setting(name)
    near(s.sample(s.prefix, s.z["state"], s.z["sample/noise"]), s.z["sample/actions"], 2e-4)


def test_time_is_summed_in_float32():
    times = []

    class Clock(Pi0):
        def velocity(self, prefix, state, x_t, time):
            times.append(time[0])
            return jnp.zeros_like(x_t)

    with jax.disable_jit():
        nothing = Prefix(jnp.zeros((2, 1, 0, 1, 8)), jnp.zeros((2, 1, 0, 1, 8)), jnp.zeros((1, 0), bool))
        sample_actions(Clock(TINY), {}, nothing, jnp.zeros((1, 3)), jnp.zeros((1, 4, 3)))
    np.testing.assert_array_equal(times, golden.arrays("pi0_dummy_ti")["sample/trace_time"])


@both
def test_what_is_masked_can_be_left_out(name):
    s = setting(name)
    second = slice(1, 2)  # the one without a right wrist camera
    images, masks, prompt, prompt_mask = jax.tree.map(lambda leaf: leaf[second], s.observation)
    length = int(prompt_mask.sum())
    assert not masks["right_wrist_0_rgb"].any() and length < prompt.shape[1]
    kept = ("left_wrist_0_rgb", "base_0_rgb")  # in any order
    images, masks = {c: images[c] for c in kept}, {c: masks[c] for c in kept}
    prefix, hidden = s.run("prefix", images, masks, prompt[:, :length], prompt_mask[:, :length])
    assert hidden.shape[1] == 2 * 256 + length and prefix.mask.all()
    near(hidden[0], s.hidden[1][s.prefix.mask[1]], 1e-5)

    rest = s.z["state"], s.z["sample/noise"]
    everything = s.sample(s.prefix, *rest)[second]
    actions = s.sample(prefix, *(leaf[second] for leaf in rest))
    near(actions, everything, 1e-5)
    near(actions, s.z["sample/actions"][second], 2e-4)


@both
def test_serving_precision(name):
    """Activations and weights in bfloat16: catches gross errors only, for openpi differs from itself by 0.016."""
    s, recorded = setting(name), golden.arrays(name.replace("_ti", "_bf16_ti"))
    model = Pi0(replace(s.model.config, dtype="bfloat16"))
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), s.weights)

    @jax.jit
    def sample(weights):
        prefix, hidden = model.apply({"params": weights}, *s.observation, method="prefix")
        velocity = model.apply(
            {"params": weights}, prefix, s.z["state"], s.z["loss/x_t"], s.z["loss/time"], method="velocity"
        )
        return prefix, hidden, velocity, sample_actions(model, weights, prefix, s.z["state"], s.z["sample/noise"])

    prefix, hidden, velocity, actions = sample(weights)
    assert {prefix.k.dtype, prefix.v.dtype, hidden.dtype, velocity.dtype} == {jnp.dtype("bfloat16")}
    suffix = jax.eval_shape(
        partial(model.apply, method="embed_suffix"),
        {"params": weights},
        s.z["state"],
        s.z["loss/x_t"],
        s.z["loss/time"],
    )
    # The projections into the suffix and the Euler state stay in float32.
    assert {leaf.dtype for leaf in jax.tree.leaves((suffix, actions))} == {jnp.dtype("float32")}
    near(velocity.astype(jnp.float32), recorded["loss/v_t"], 0.05)
    near(actions, recorded["sample/actions"], 0.05)


# --- several draws on one prefix, with a tiny model


@cache
def tiny(pi05: bool) -> SimpleNamespace:
    """Two observations of one camera and three words; `weights` are the `fresh` ones without their zeros."""
    model = Pi0(replace(TINY, pi05=pi05))
    fresh = jax.jit(lambda key: init(model.config, key))(jax.random.key(0))
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    weights = jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape), fresh)
    camera = "left_wrist_0_rgb"
    prompt, prompt_mask = jnp.array([[2, 5, 31], [2, 7, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]], bool)
    return SimpleNamespace(
        model=model,
        fresh=fresh,
        weights=weights,
        observation=({camera: jnp.tanh(normal(2, 28, 28, 3))}, {camera: jnp.ones(2, bool)}, prompt, prompt_mask),
        inputs=(normal(2, 3), normal(2, 4, 3)),
        draws=(normal(5, 2, 4, 3), jnp.linspace(0, 1, 10).reshape(5, 2)),
    )


both_models = pytest.mark.parametrize("pi05", [False, True])


def joint_losses(s: SimpleNamespace, weights):
    """One joint pass per draw, [5 2 4]."""

    def loss(noise, time):
        return s.model.apply({"params": weights}, *s.observation, *s.inputs, noise, time, method="flow_loss")

    return jax.vmap(loss)(*s.draws)


def cached_losses(s: SimpleNamespace, weights):
    """One prefix pass for all draws, [5 2 4]."""
    prefix, _ = s.model.apply({"params": weights}, *s.observation, method="prefix")
    return flow_losses(s.model, weights, prefix, *s.inputs, *s.draws)


@both_models
def test_draws_on_one_prefix_are_joint_passes(pi05):
    s = tiny(pi05)
    losses = jax.jit(lambda weights: (cached_losses(s, weights), joint_losses(s, weights)))(s.weights)
    assert losses[0].shape == (5, 2, 4) and losses[0].min() > 0
    near(*losses, 2e-5)


def test_draws_on_one_prefix_train_like_joint_passes():
    s = tiny(False)
    expected = jax.jit(jax.grad(lambda weights: joint_losses(s, weights).mean()))(s.weights)
    gradients = jax.jit(jax.grad(lambda weights: cached_losses(s, weights).mean()))(s.weights)
    for (path, gradient), reference in zip(golden.flat(gradients).items(), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=2e-5, err_msg=path)
        idle = ("llm/final_norm/scale", "key/bias")  # no action reads the one, and softmax cancels the other
        assert np.abs(gradient).max() > 1e-4 or path.endswith(idle), path


@both_models
def test_noises_on_one_prefix_sample_like_one_after_the_other(pi05):
    s = tiny(pi05)
    prefix, _ = jax.jit(lambda weights: s.model.apply({"params": weights}, *s.observation, method="prefix"))(s.weights)
    sample = jax.jit(lambda noise: sample_actions(s.model, s.weights, prefix, s.inputs[0], noise, num_steps=3))
    together = jax.jit(jax.vmap(sample))(s.draws[0])
    near(together, jnp.stack([sample(noise) for noise in s.draws[0]]), 1e-5)


def test_draws_share_the_cache():
    """Under vmap over the noise, no array as large as one cache per draw comes into being."""
    s, draws = tiny(False), 64
    prefix, _ = jax.eval_shape(lambda: s.model.apply({"params": s.weights}, *s.observation, method="prefix"))
    prefix = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), prefix)

    def velocities(noises):
        one = lambda noise: s.model.apply(  # noqa: E731
            {"params": s.weights}, prefix, s.inputs[0], noise, jnp.ones(2), method="velocity"
        )
        return jax.vmap(one)(noises)

    jaxpr = str(jax.make_jaxpr(velocities)(jnp.zeros((draws, 2, 4, 3))))
    _, num, length, heads, size = prefix.k.shape
    assert f"f32[{num},{length},{heads},{size}]" in jaxpr
    assert f"f32[{draws},{num},{length},{heads},{size}]" not in jaxpr
    assert f"[{draws},{num},{length + 5},{heads},{size}]" not in jaxpr


# --- other


@both_models
def test_fresh_weights(pi05):
    s = tiny(pi05)
    shapes = golden.flat(param_shapes(s.model.config))
    fresh = golden.flat(s.fresh)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in fresh.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }
    for path, leaf in fresh.items():
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf) or path.endswith(("scale", "bias")) or "norm_1/Dense_0" in path, path


def test_an_unknown_camera_is_an_error():
    s = tiny(False)
    images, masks, prompt, prompt_mask = s.observation
    images = {"top": images["left_wrist_0_rgb"]}
    with pytest.raises(FpoError, match=f"no camera 'top'; choose one of {', '.join(CAMERAS)}"):
        s.model.apply({"params": s.weights}, images, masks, prompt, prompt_mask, method="prefix")


@pytest.mark.slow
def test_the_full_image_tower():
    """openpi's own image tower, So400m/14 (429 million parameters)."""
    model = Pi0(replace(DUMMY, image_tower="So400m/14"))
    z = jax.tree.map(jnp.asarray, golden.arrays("pi0_dummy_ti") | golden.arrays("pi0_dummy_so400m"))
    weights = jax.tree.map(jnp.asarray, golden.params("pi0_dummy_so400m"))
    observation = jax.tree.map(jnp.asarray, golden.observation("pi0_dummy_ti"))

    @jax.jit
    def run(weights):
        tokens, mask = model.apply({"params": weights}, *observation, method="embed_prefix")
        prefix, hidden = model.apply({"params": weights}, tokens, mask, method="prefix_of_tokens")
        inputs = prefix, z["state"], z["loss/x_t"], z["loss/time"]
        velocity = model.apply({"params": weights}, *inputs, method="velocity")
        return tokens, prefix, hidden, velocity, sample_actions(model, weights, prefix, z["state"], z["sample/noise"])

    tokens, prefix, hidden, velocity, actions = run(weights)
    valid = prefix.mask[:, ::16]
    near(tokens[..., :8], z["prefix/tokens_ch8"])
    near(tokens.std(axis=-1), z["prefix/tokens_std"])
    near(prefix.k[:, :, ::16][:, valid], z["sample/cache_k_every16"][:, valid])
    near(hidden[:, ::16][valid], z["loss/prefix_out_every16"][valid])
    near(velocity, z["loss/v_t"])
    near(actions, z["sample/actions"], 2e-4)
