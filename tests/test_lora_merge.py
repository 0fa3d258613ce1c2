"""openpi's low-rank updates, merged into the plain weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import openpi_golden as golden
from fpo_jax.policies.gemma import Gemma, GemmaConfig
from fpo_jax.policies.openpi_checkpoint import merge_lora, restore_params, save_params
from openpi_checkpoints import (  # noqa: F401 (fixtures)
    NORM,
    STATS,
    assert_same,
    no_cache,
    saved,
    small_tree,
    structs,
)

# --- low-rank updates -----------------------------------------------------------------------------------------------


def test_merged_updates_by_hand():
    """The scaling is the expert's own, the feed-forward layers have none, the output sums over heads in B."""
    tree, scaling = small_tree(lora=True), (3.0, 5.0)
    old = {path: np.asarray(leaf, np.float64) for path, leaf in golden.flat(tree).items()}
    new = {path: np.asarray(leaf, np.float64) for path, leaf in golden.flat(merge_lora(tree, scaling=scaling)).items()}
    assert set(new) == set(golden.flat(small_tree()))
    layers = "PaliGemma/llm/layers"

    def close(path: str, update: np.ndarray) -> None:
        np.testing.assert_allclose(new[path], old[path] + update, rtol=2**-8, err_msg=path)  # half a bfloat16 step

    for name, factor in {"q_einsum": 3.0, "kv_einsum_1": 5.0}.items():
        stem = f"{layers}/attn/{name}"
        close(f"{stem}/w", factor * old[f"{stem}/lora_a"] @ old[f"{stem}/lora_b"])
    stem = f"{layers}/attn/attn_vec_einsum"
    summed = old[f"{stem}/lora_b"].sum(axis=1)
    close(f"{stem}/w", 3.0 * np.stack([old[f"{stem}/lora_a"][:, head] @ summed for head in range(4)], axis=1))
    for name in ("mlp/gating_einsum", "mlp_1/linear"):
        close(f"{layers}/{name}", old[f"{layers}/{name}_lora_a"] @ old[f"{layers}/{name}_lora_b"])
    np.testing.assert_array_equal(new[NORM], old[NORM])


def test_merged_weights_give_openpis_outputs():
    """Recorded with alpha 8 and rank 4, here computed by the plain model."""
    facts = golden.facts("gemma_lora.params")
    leaves = {p: golden.fill(f"PaliGemma/llm/{p}", tuple(v["shape"])) for p, v in facts.items() if "embedder" not in p}
    leaves["embedder/input_embedding"] = np.zeros((1, 64), np.float32)
    params = merge_lora(jax.tree.map(jnp.asarray, unflatten_dict(leaves, sep="/")), scaling=(2.0, 2.0))
    assert not any("lora" in path for path in golden.flat(params))
    recorded = {name: jnp.asarray(values) for name, values in golden.arrays("gemma_lora").items()}
    experts = GemmaConfig(64, 4, 128, 8, 1, 16), GemmaConfig(32, 4, 48, 8, 1, 16)
    (prefix, suffix), _ = Gemma(experts, vocab_size=1).apply(
        {"params": params},
        (recorded["x_prefix"], recorded["x_suffix"]),
        recorded["joint_positions"],
        recorded["joint_attn_mask"],
    )
    valid = recorded["prefix_mask"]  # the others' outputs mean nothing
    np.testing.assert_allclose(prefix[valid], recorded["joint_out_prefix"][valid], atol=5e-5)
    np.testing.assert_allclose(suffix, recorded["joint_out_suffix"], atol=5e-5)


def test_every_update_of_the_real_sizes_is_merged():
    tree = golden.facts("param_tree_pi0_lora")["params"]
    shapes = jax.eval_shape(
        merge_lora,
        unflatten_dict({p: jax.ShapeDtypeStruct(tuple(v["shape"]), v["dtype"]) for p, v in tree.items()}, sep="/"),
    )
    plain = golden.facts("param_tree_pi0")["params"]
    assert {p: list(leaf.shape) for p, leaf in golden.flat(shapes).items()} == {p: v["shape"] for p, v in plain.items()}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_merge_while_reading(tmp_path, dtype):
    tree = small_tree(lora=True)
    directory = save_params(tmp_path / "lora", tree, STATS, "robot")
    expected = merge_lora(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
    wanted = structs(small_tree())
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or jnp.float32), expected)
    assert_same(restore_params(directory, wanted, dtype=dtype, merge_lora=True), expected)
    whole = NamedSharding(Mesh(jax.devices()[:2], "x"), PartitionSpec())
    spread = restore_params(directory, wanted, dtype=dtype, sharding=whole, merge_lora=True)
    assert {leaf.sharding for leaf in jax.tree.leaves(spread)} == {whole}
    assert_same(spread, expected)
    assert_same(restore_params(directory, structs(tree), merge_lora=True), tree)  # the model wants them apart


def test_merge_of_a_plain_checkpoint_changes_nothing(saved):
    assert_same(restore_params(saved, structs(small_tree()), merge_lora=True), small_tree())
