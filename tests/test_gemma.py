"""The language model and its action expert against openpi's recorded numbers."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import openpi_golden as golden
from fpo_jax.policies.gemma import GEMMA, Gemma, Lora, attend, gemma_config, rotary
from fpo_jax.types import FpoError

DUMMY = GEMMA["dummy"]
NARROW = replace(DUMMY, width=32, mlp_dim=48)
LORA = {"attention_lora": Lora(4, 8.0), "mlp_lora": Lora(4, 8.0)}
EXPERTS = {
    "gemma_dummy_dummy": (DUMMY, DUMMY),
    "gemma_dummy_dummy_adarms": (DUMMY, DUMMY),
    "gemma_mixed_width": (DUMMY, NARROW),
    "gemma_lora": (replace(DUMMY, **LORA), replace(NARROW, **LORA)),
}
every_file = pytest.mark.parametrize("name", EXPERTS)


def near(actual, expected, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@cache
def setting(name: str):
    """(numbers, weights, the jitted model, conditions of the adaptive norms) of a file."""
    numbers = golden.arrays(name)
    model = Gemma(EXPERTS[name], vocab_size=257152)
    weights = jax.tree.map(jnp.asarray, golden.params(name, "PaliGemma/llm/"))
    condition = numbers.get("adarms_cond")
    run = jax.jit(lambda weights, *inputs: model.apply({"params": weights}, *inputs))
    return numbers, weights, run, (None, None if condition is None else jnp.asarray(condition))


@every_file
def test_joint_pass(name):
    z, weights, run, conditions = setting(name)
    (prefix, suffix), (k, v) = run(
        weights, (z["x_prefix"], z["x_suffix"]), z["joint_positions"], z["joint_attn_mask"], conditions
    )
    valid = np.concatenate([z["prefix_mask"], z["suffix_mask"]], axis=1)
    near(prefix[z["prefix_mask"]], z["joint_out_prefix"][z["prefix_mask"]])
    near(suffix, z["joint_out_suffix"])
    near(k[:, valid], z["joint_k"][:, valid])
    near(v[:, valid], z["joint_v"][:, valid])


@every_file
def test_suffix_on_the_cache_of_the_prefix(name):
    z, weights, run, conditions = setting(name)
    valid = z["prefix_mask"]
    (prefix, nothing), cache = run(
        weights, (z["x_prefix"], None), z["prefix_positions"], z["prefix_attn_mask"], (None, None)
    )
    assert nothing is None
    near(prefix[valid], z["prefix_only_out"][valid])
    near(cache[0][:, valid], z["cache_k"][:, valid])
    near(cache[1][:, valid], z["cache_v"][:, valid])
    (nothing, suffix), new = run(
        weights, (None, z["x_suffix"]), z["suffix_positions"], z["suffix_attn_mask"], conditions, cache
    )
    assert nothing is None
    near(suffix, z["cached_out_suffix"])
    near(suffix, z["joint_out_suffix"])
    near(new[0], z["joint_k"][:, :, valid.shape[1] :])


@every_file
def test_embeddings(name):
    z, weights, _, _ = setting(name)
    model = Gemma(EXPERTS[name], vocab_size=257152)
    near(model.apply({"params": weights}, jnp.asarray(z["token_ids"]), method="embed"), z["token_embeddings"])


def test_a_token_outside_the_vocabulary_is_nan():
    model = Gemma((DUMMY, DUMMY), vocab_size=3)
    weights = {"embedder": {"input_embedding": jnp.ones((3, 64))}}
    rows = model.apply({"params": weights}, jnp.array([[2, 3]]), method="embed")
    assert np.isfinite(rows[0, 0]).all() and np.isnan(rows[0, 1]).all()


@every_file
def test_fresh_parameters_have_the_recorded_shapes(name):
    z, _, _, conditions = setting(name)
    model = Gemma(EXPERTS[name], vocab_size=257152)

    def init(key):
        tokens = (jnp.asarray(z["x_prefix"]), jnp.asarray(z["x_suffix"]))
        joint = (tokens, jnp.asarray(z["joint_positions"]), jnp.asarray(z["joint_attn_mask"]), conditions)
        tokens = jnp.asarray(z["token_ids"])
        return model.init(key, *joint, method=lambda model, *joint: (model(*joint), model.embed(tokens)))

    shapes = golden.flat(jax.eval_shape(init, jax.random.key(0))["params"])
    recorded = golden.facts(f"{name}.params")
    assert {path: leaf.shape for path, leaf in shapes.items()} == {p: tuple(r["shape"]) for p, r in recorded.items()}


def test_rotary_turns_pairs_by_the_position():
    x = jnp.array([[[[1.0, 2.0, 0.0, 0.0]]]])  # pairs (1, 0) and (2, 0), periods 1 and 100
    expected = [np.cos(3.0), 2 * np.cos(0.03), np.sin(3.0), 2 * np.sin(0.03)]
    near(rotary(x, jnp.array([[3]]))[0, 0, 0], expected, 1e-6)


def test_attention_to_two_groups_is_attention_to_their_concatenation():
    key = jax.random.split(jax.random.key(0), 3)
    q, k, v = jax.random.normal(key[0], (2, 3, 4, 8)), *jax.random.normal(key[1], (2, 2, 5, 2, 8))
    mask = jax.random.bernoulli(key[2], 0.7, (2, 3, 5)).at[0, 0].set(False)
    out = attend(q, [k], [v], mask)
    near(attend(q, [k[:, :2], k[:, 2:]], [v[:, :2], v[:, 2:]], mask), out, 1e-6)
    near(out[0, 0].reshape(2, 2, 8), np.broadcast_to(v[0].mean(axis=0)[:, None], (2, 2, 8)), 1e-6)
    # Head 3 belongs to the second pair of keys and values, whose head 1 it is.
    weights = jax.nn.softmax(jnp.where(mask[1, 0], k[1, :, 1] @ q[1, 0, 3], -jnp.inf))
    near(out[1, 0, 3], weights @ v[1, :, 1], 1e-6)


def test_activations_have_the_compute_type():
    z, weights, _, _ = setting("gemma_dummy_dummy")
    model = Gemma(EXPERTS["gemma_dummy_dummy"], vocab_size=257152, dtype="bfloat16")
    tokens = (jnp.asarray(z["x_prefix"]), None)
    inputs = tokens, jnp.asarray(z["prefix_positions"]), jnp.asarray(z["prefix_attn_mask"])
    (out, _), (k, v) = jax.eval_shape(model.apply, {"params": weights}, *inputs)
    assert {out.dtype, k.dtype, v.dtype} == {jnp.dtype("bfloat16")}


def test_variants():
    assert gemma_config("gemma_2b_lora") == replace(
        gemma_config("gemma_2b"), attention_lora=Lora(16, 16.0), mlp_lora=Lora(16, 16.0)
    )
    assert gemma_config(NARROW) is NARROW
    with pytest.raises(FpoError, match="no Gemma variant 'gemma_2B'; did you mean 'gemma_2b'"):
        gemma_config("gemma_2B")


def test_experts_must_fit_each_other():
    model = Gemma((DUMMY, replace(DUMMY, depth=3)), vocab_size=4)
    with pytest.raises(FpoError, match="share their attention"):
        model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method="embed")
