"""Reading and writing openpi's checkpoints: recorded ones, our own, in a bucket, and everything that may go wrong."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import openpi_golden as golden
from fpo_jax.policies import openpi_checkpoint
from fpo_jax.policies.openpi_checkpoint import load_norm_stats, restore_params, save_params
from fpo_jax.types import FpoError
from openpi_checkpoints import (  # noqa: F401 (fixtures)
    ACTION,
    IMAGE_VALUE,
    NORM,
    SHARED,
    STATS,
    TRAIN,
    assert_recorded,
    assert_same,
    needs_shared,
    no_cache,
    pattern,
    saved,
    shapes,
    small_tree,
    structs,
)

# --- recorded checkpoints -------------------------------------------------------------------------------------------


def test_training_checkpoint_has_the_recorded_values():
    """Every leaf is stored under one more component `value`; a module is called so too."""
    params = restore_params(TRAIN, shapes())
    assert_recorded(params, "float32", 50)
    device = jax.local_devices()[0]
    assert all(leaf.sharding.device_set == {device} for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("where", ["", "100", "100/params", "100/params/"])
def test_every_directory_of_a_checkpoint_will_do(where, monkeypatch):
    monkeypatch.chdir(TRAIN.parent)
    assert_recorded(restore_params(f"pi0_dummy_train/{where}", shapes(IMAGE_VALUE, NORM)), "float32", 2)
    assert load_norm_stats(f"pi0_dummy_train/{where}", "trossen")["state"].mean.shape == (14,)


def test_newest_step_of_an_experiment(tmp_path):
    for step, value in {"9": 1.0, "10": 2.0}.items():
        save_params(tmp_path / "experiment" / step, {"x": jnp.full(2, value)}, STATS, "robot")
    (tmp_path / "experiment" / "11.orbax-checkpoint-tmp-7").mkdir()
    (tmp_path / "experiment" / "wandb_id.txt").touch()
    params = restore_params(tmp_path / "experiment", {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert params["x"][0] == 2.0


@needs_shared
def test_released_checkpoint_has_the_recorded_values():
    paths = [IMAGE_VALUE, NORM, ACTION]
    tree = golden.facts("pi0_dummy_so400m.params")
    wanted = {path: jax.ShapeDtypeStruct(tuple(tree[path]["shape"]), jnp.float32) for path in paths}
    params = restore_params(SHARED / "checkpoints" / "pi0_dummy_released", unflatten_dict(wanted, sep="/"))
    assert_recorded(params, "float32", 3)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_dtype(dtype):
    params = restore_params(TRAIN, shapes(IMAGE_VALUE, NORM, ACTION), dtype=dtype)
    assert_recorded(params, jnp.dtype(dtype).name, 3)


def test_mixed_dtypes(tmp_path):
    """As a LoRA run leaves them: frozen weights in bfloat16, the others in float32."""
    tree = small_tree(lora=True)
    directory = save_params(tmp_path / "mixed", tree, STATS, "robot")
    assert_same(restore_params(directory, structs(tree)), tree)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    assert_same(restore_params(directory, structs(tree), dtype=jnp.float32), widened)


def test_sharding():
    mesh = Mesh(jax.devices()[:2], "x")
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    some = shapes(ACTION, NORM)
    params = restore_params(TRAIN, some, sharding=split)
    assert_recorded(params, "float32", 2)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {split}
    assert params["action_in_proj"]["kernel"].addressable_shards[1].data.shape == (16, 64)
    tree = {"action_in_proj": {"kernel": split}, "PaliGemma": {"llm": {"final_norm": {"scale": whole}}}}
    params = restore_params(TRAIN, some, sharding=tree)
    assert_recorded(params, "float32", 2)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == tree


def test_sharding_that_does_not_divide():
    mesh = Mesh(jax.devices()[:2], "x")
    with pytest.raises(FpoError, match=r"weight 'x' of shape \(3,\) can't be split as .*: split another axis of"):
        openpi_checkpoint._require_divisible({"x": jnp.ones(3)}, {"x": NamedSharding(mesh, PartitionSpec("x"))})


def test_leaves_that_the_model_lacks_are_not_read(tmp_path):
    noise = jax.random.normal(jax.random.key(0), (1024, 1024))
    directory = save_params(tmp_path / "wide", {"extra": noise, "x": jnp.arange(4.0)}, STATS, "robot")

    def read_bytes() -> int:
        metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in metrics for value in metric["values"])

    before = read_bytes()
    params = restore_params(directory, {"x": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert 0 < read_bytes() - before < 100_000 < noise.nbytes
    assert set(params) == {"x"}


_MEASURE = """
import json, resource, sys, time
import jax, jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from fpo_jax.policies.openpi_checkpoint import restore_params
tree = json.load(open(sys.argv[2]))["params"]
tree = {path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.float32) for path, leaf in tree.items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.devices()
before, wall, cpu = peak(), time.time(), time.process_time()
params = restore_params(sys.argv[1], unflatten_dict(tree, sep="/"), dtype="bfloat16")
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps([size, peak() - before, time.time() - wall, time.process_time() - cpu]))
"""


@pytest.mark.slow
@needs_shared
def test_full_size_needs_little_memory_beside_the_weights():
    """All 3.24 billion parameters of π0, in a fresh process."""
    files = SHARED / "checkpoints" / "pi0_full_bf16_pattern", golden.FOLDER / "param_tree_pi0.json"
    done = subprocess.run([sys.executable, "-c", _MEASURE, *files], capture_output=True, text=True, check=True)
    size, growth, wall, cpu = json.loads(done.stdout)
    print(f"{size / 1e9:.2f} GB of weights, peak +{growth / 1e9:.2f} GB, {wall:.0f} s wall, {cpu:.0f} s CPU")
    assert size == 2 * 3_238_048_528
    assert growth < 1.2 * size


# --- checkpoints that don't fit -------------------------------------------------------------------------------------


def without(tree: dict, path: str) -> dict:
    return unflatten_dict({name: leaf for name, leaf in golden.flat(tree).items() if name != path}, sep="/")


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        (
            small_tree(),
            {"state_proj": {"bias": jnp.ones(3)}},
            "no weight 'state_proj/bias': it is a π0 checkpoint, so ",
        ),
        (
            small_tree(),
            {"action_in_proj": {"kernel": jnp.ones((3, 8))}},
            r"has shape \(3, 6\).*\(3, 8\): it is a π0 ch",
        ),
        (
            small_tree() | {"time_mlp_in": {"kernel": jnp.ones(3)}},
            {"state_proj": {"bias": jnp.ones(3)}},
            "it is a π0.5 checkpoint, so choose the configuration",
        ),
        (without(small_tree(), ACTION), small_tree(), "it is no π0 or π0.5 checkpoint"),
        (small_tree(), small_tree(lora=True), "lora_a'?: choose the configuration without LoRA"),
        (small_tree(lora=True), small_tree(), "holds low-rank updates .*merge_lora=True"),
    ],
    ids=["missing", "shape", "pi05", "foreign", "no_lora", "lora"],
)
def test_weights_that_are_not_the_models(tmp_path, stored, wanted, message):
    directory = save_params(tmp_path / "saved", stored, STATS, "robot")
    with pytest.raises(FpoError, match=message):
        restore_params(directory, structs(wanted))


def test_top_level_must_be_params(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "train_state", {"step": jnp.ones(2)})
    with pytest.raises(FpoError, match="train_state holds no weights of a model: give the directory"):
        restore_params(tmp_path / "train_state", structs(small_tree()))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"There is no checkpoint at .*/here: give a directory that has params/"),
        (["model.safetensors", "config.json"], "is a PyTorch checkpoint: give openpi's JAX checkpoint"),
        (["params/d/0123"], "here/params was not written to its end"),
        (["params.orbax-checkpoint-tmp-12/d/0"], "here was not written to its end: give an earlier step"),
        (["100.orbax-checkpoint-tmp-12/params/_METADATA"], "here was not written to its end: give an earlier step"),
        (["b.txt", "a.txt"], r"is no openpi checkpoint \(it holds a.txt, b.txt\): give the directory of a checkpoint"),
        ([f"{i}.txt" for i in range(9)], r"\(it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...\)"),
        (["pi0/params/_METADATA"], "is no openpi checkpoint .*; did you mean .*/here/pi0?"),
        (["100/train_state/_METADATA"], "here/100 is no openpi checkpoint .it holds train_state.: give"),
        (["../params/_METADATA", "trossen/norm_stats.json"], "holds trossen.; did you mean [^ ]*[^e].$"),
    ],
)
def test_wrong_directories(tmp_path, files, message):
    for name in files:
        (tmp_path / "outer" / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outer" / "here" / name).touch()
    with pytest.raises(FpoError, match=message):
        restore_params(tmp_path / "outer" / "here", structs(small_tree()))


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "ocdbt.process_0/d/*"])
@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_damaged_files(tmp_path, name, harm):
    tree = {"x": jax.random.normal(jax.random.key(0), (100, 100))}
    directory = save_params(tmp_path / "saved", tree, STATS, "robot")
    for file in (directory / "params").glob(name):
        file.unlink() if harm == "delete" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FpoError, match=r"^/.*params (is damaged or )?was not written to its end: copy or download the"):
        restore_params(directory, structs(tree))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "may not be read by this user"),
        (MemoryError(), "don't fit into memory: use dtype=bfloat16"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), "don't fit into memory"),
    ],
)
def test_what_the_machine_refuses(saved, monkeypatch, error, message):
    def fail(*_, **__):
        raise Exception("Encountered error while reading array index") from error  # as Orbax does

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(FpoError, match=message):
        restore_params(saved, structs(small_tree()))


# --- statistics -----------------------------------------------------------------------------------------------------


def test_norm_stats_are_those_of_the_file():
    content = json.loads((TRAIN / "100/assets/trossen/norm_stats.json").read_text())["norm_stats"]
    stats = load_norm_stats(TRAIN, "trossen")
    assert set(stats) == {"state", "actions"}
    for name, fields in content.items():
        for field, values in fields.items():
            np.testing.assert_array_equal(getattr(stats[name], field), np.asarray(values, np.float32))


def test_norm_stats_of_another_robot(saved):
    with pytest.raises(FpoError, match="for the asset id 'other': choose one of some/robot"):
        load_norm_stats(saved, "other")
    with pytest.raises(FpoError, match="for the asset id 'some': choose one of some/robot"):
        load_norm_stats(saved, "some")
    shutil.rmtree(saved / "assets")
    with pytest.raises(FpoError, match="it has no statistics at all"):
        load_norm_stats(saved, "some/robot")
    with pytest.raises(FpoError, match=r"There is no checkpoint at .*: give a directory that has assets/"):
        load_norm_stats(saved.parent / "nowhere", "some/robot")


@pytest.mark.parametrize("text", ["{", "{}", '{"norm_stats": {"state": {"mean": [0], "std": [1]}}}', b"\xff\xfe\xff"])
def test_damaged_norm_stats(saved, text):
    file = saved / "assets/some/robot/norm_stats.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FpoError, match=r"norm_stats.json (holds no normalisation statistics|is damaged)"):
        load_norm_stats(saved, "some/robot")


# --- writing --------------------------------------------------------------------------------------------------------


def test_saved_checkpoint_is_the_same_when_read_back(saved):
    assert_same(restore_params(saved, structs(small_tree())), small_tree())
    stats = load_norm_stats(saved, "some/robot")
    assert stats["state"].q01 is None
    assert_same(stats["actions"]._asdict(), STATS["actions"]._asdict())
    files = [file for file in saved.rglob("*") if file.is_file()]
    assert len(files) < 20
    assert sum(file.stat().st_size for file in files) < 50_000
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_saved_checkpoint_is_read_as_openpi_reads_it(saved):
    """One entry `params`, and restore arguments made from the file's own metadata."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        item = {"params": checkpointer.metadata(saved / "params").item_metadata["params"]}
        how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(restore_type=np.ndarray, dtype=jnp.bfloat16), item)
        tree = checkpointer.restore(saved / "params", ocp.args.PyTreeRestore(item=item, restore_args=how))
    assert_same(tree["params"], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_tree()))


def test_nothing_is_overwritten(saved):
    with pytest.raises(FpoError, match="exists already: delete it or choose another directory"):
        save_params(saved, small_tree(), STATS, "robot")
    (saved.parent / "empty").mkdir()
    assert restore_params(save_params(saved.parent / "empty", {"x": jnp.ones(1)}, STATS, "r"), {}) == {}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(28, "No space left on device"), FpoError, "The disk is full, so .*saved was not written"),
        (ValueError("UNKNOWN: No space left on device"), FpoError, "The disk is full"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, error, kind, message):
    save = ocp.Checkpointer.save

    def fail(self, directory, **how):
        save(self, directory, **how)
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(kind, match=message):
        save_params(tmp_path / "saved", small_tree(), STATS, "robot")
    assert list(tmp_path.iterdir()) == []
