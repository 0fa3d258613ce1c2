"""Reading and writing openpi's checkpoints: recorded ones, our own, in a bucket, and everything that may go wrong."""

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils.epath import backend
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import openpi_golden as golden
from fpo_jax.policies import openpi_checkpoint
from fpo_jax.policies.gemma import Gemma, GemmaConfig
from fpo_jax.policies.openpi_checkpoint import load_norm_stats, merge_lora, restore_params, save_params
from fpo_jax.policies.storage import locate, plain_errors
from fpo_jax.policies.transforms import NormStats
from fpo_jax.types import FpoError

TRAIN = golden.FOLDER / "checkpoints" / "pi0_dummy_train"  # written by openpi's own training code, tower Ti/14
SHARED = Path(__file__).parents[2] / "shared" / "openpi_reference"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"openpi's larger checkpoints are not in {SHARED}")

IMAGE_VALUE = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel"
NORM = "PaliGemma/llm/final_norm/scale"
ACTION = "action_in_proj/kernel"
STATS = {
    "state": NormStats(jnp.arange(3.0), jnp.ones(3)),
    "actions": NormStats(jnp.zeros(2), jnp.ones(2), -jnp.ones(2), jnp.ones(2)),
}


def shapes(*paths: str) -> dict:
    """Shapes of the recorded training checkpoint, of all leaves or of these."""
    tree = golden.facts("pi0_dummy_ti.params")
    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(tuple(tree[path]["shape"]), jnp.float32) for path in paths or tree}, sep="/"
    )


def pattern(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded values: 61 numbers, repeated."""
    scale, offset = golden.scale_and_offset(path, shape)
    numbers = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(61, dtype=np.float32)
    return np.resize((numbers * np.float32(scale) + np.float32(offset)).astype(jnp.bfloat16), shape)


def assert_recorded(params: dict, dtype: str, num: int) -> None:
    leaves = golden.flat(params)
    assert len(leaves) == num
    for path, leaf in leaves.items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), pattern(path, leaf.shape).astype(dtype), path)


def small_tree(lora: bool = False) -> dict:
    """Random weights with the names of a π0, tiny; of mixed dtypes where they have low-rank updates."""
    sizes = {
        "PaliGemma/llm/layers/attn/q_einsum/w": (2, 4, 6, 3),
        "PaliGemma/llm/layers/attn/kv_einsum_1/w": (2, 2, 1, 6, 3),
        "PaliGemma/llm/layers/attn/attn_vec_einsum/w": (2, 4, 3, 6),
        "PaliGemma/llm/layers/mlp/gating_einsum": (2, 2, 6, 5),
        "PaliGemma/llm/layers/mlp_1/linear": (2, 5, 6),
        "PaliGemma/llm/final_norm/scale": (6,),
        "action_in_proj/kernel": (3, 6),
        "action_time_mlp_in/kernel": (6, 6),
    }
    if lora:
        for path in [path for path in sizes if "layers" in path]:
            stem, (*stack, rows, columns) = path.removesuffix("w") if path.endswith("/w") else f"{path}_", sizes[path]
            sizes |= {f"{stem}lora_a": (*stack, rows, 2), f"{stem}lora_b": (*stack, 2, columns)}
    random = np.random.default_rng(0)
    leaves = {path: jnp.asarray(random.normal(size=size), jnp.float32) for path, size in sizes.items()}
    frozen = {path: leaf.astype(jnp.bfloat16) for path, leaf in leaves.items() if "llm" in path and "lora" not in path}
    return unflatten_dict(leaves | frozen if lora else leaves, sep="/")


def structs(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(tree: dict, other: dict) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), tree, other)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_params(tmp_path / "saved", small_tree(), STATS, "some/robot")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))


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


# --- where things are -----------------------------------------------------------------------------------------------


def test_locate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(locate("some/where/")) == str(tmp_path / "some/where")
    assert os.fspath(locate("~/x")) == os.path.expanduser("~/x")
    url, cached = "gs://bucket/checkpoints/pi0", tmp_path / "cache/bucket/checkpoints/pi0"
    assert os.fspath(locate(url)) == url
    (cached / "params").mkdir(parents=True)  # openpi's training downloads no more
    assert os.fspath(locate(url)) == url
    assert os.fspath(locate(f"{url}/params/")) == str(cached / "params")
    (cached / "assets").mkdir()
    assert os.fspath(locate(url)) == str(cached)
    monkeypatch.delenv("OPENPI_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.move(tmp_path / "cache", tmp_path / ".cache" / "openpi")
    assert os.fspath(locate(url)) == str(tmp_path / ".cache/openpi/bucket/checkpoints/pi0")


@pytest.mark.parametrize(
    ("place", "message"), [("", "has no public weights"), ("https://x/y", "can't be read: give a")]
)
def test_places_that_are_none(place, message):
    with pytest.raises(FpoError, match=message):
        locate(place)


def test_halves_of_a_cached_download_are_used(saved, tmp_path):
    shutil.copytree(saved / "params", tmp_path / "cache/bucket/a/params")
    shutil.copytree(saved / "assets", tmp_path / "cache/bucket/b/assets")
    assert_same(restore_params("gs://bucket/a", structs(small_tree())), small_tree())
    assert load_norm_stats("gs://bucket/b", "some/robot")["state"].mean.shape == (3,)


# --- buckets --------------------------------------------------------------------------------------------------------


class Bucket(BaseHTTPRequestHandler):
    """As much of Google's storage protocol as reading needs: list a folder, describe an object, send (part of) it."""

    root = Path()
    denied = "-"  # objects with this in their name are not for us

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        name = urllib.parse.unquote(url.path.partition("/o/")[2])
        file = self.root / name
        if self.denied in name:
            self.reply(403, {"error": {"code": 403, "message": "no storage.objects.get access"}})
        elif url.path.endswith("/o"):
            folder = query.get("prefix", "").rpartition("/")[0]
            depth = "*" if query.get("delimiter") else "**/*"
            found = [path for path in (self.root / folder).glob(depth) if str(path) > str(self.root / query["prefix"])]
            prefixes = [f"{path.relative_to(self.root).as_posix()}/" for path in found if path.is_dir()]
            files = [self.describe(path) for path in found if path.is_file()]
            self.reply(200, {"items": files, "prefixes": prefixes if depth == "*" else []})
        elif not file.is_file():
            self.reply(404, {"error": {"code": 404, "message": "No such object"}})
        elif query.get("alt") == "media":
            content = file.read_bytes()
            first, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")
            start, stop = int(first), int(last or len(content) - 1) + 1
            self.reply(206 if "Range" in self.headers else 200, content[start:stop], start, len(content))
        else:
            self.reply(200, self.describe(file))

    def describe(self, file: Path) -> dict:
        time = "2026-01-01T00:00:00Z"
        facts = {"name": file.relative_to(self.root).as_posix(), "size": str(file.stat().st_size), "generation": "1"}
        return facts | {"bucket": "bucket", "metageneration": "1", "updated": time, "timeCreated": time}

    def reply(self, status: int, content: bytes | dict, start: int = 0, total: int = 0) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def served(root: Path, monkeypatch: pytest.MonkeyPatch, denied: str = "-"):
    """The folder as gs://bucket."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Bucket,), {"root": root, "denied": denied}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        type(backend.fsspec_backend)._get_filesystem.cache_clear()


def test_straight_from_a_bucket(saved, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs, of the extra gcs, is not installed")
    gcsfs.GCSFileSystem.clear_instance_cache()
    with served(saved.parent, monkeypatch):
        assert_same(restore_params("gs://bucket/saved", structs(small_tree())), small_tree())
        assert_same(restore_params("gs://bucket/saved/params", structs(small_tree())), small_tree())
        assert load_norm_stats("gs://bucket/saved/", "some/robot")["state"].mean.shape == (3,)
        with pytest.raises(FpoError, match=r"^gs://bucket/saved has no .*'other': choose one of some/robot\.$"):
            load_norm_stats("gs://bucket/saved", "other")
        with pytest.raises(FpoError, match=r"^There is no checkpoint at gs://bucket/save: give"):
            restore_params("gs://bucket/save", structs(small_tree()))


@pytest.mark.parametrize("denied", ["_METADATA", "manifest.ocdbt"])
def test_bucket_that_refuses(tmp_path, monkeypatch, denied):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs, of the extra gcs, is not installed")
    gcsfs.GCSFileSystem.clear_instance_cache()
    tree = {"x": jnp.ones(4)}  # one leaf: where several fail, Orbax's threads complain about each other
    save_params(tmp_path / "saved", tree, STATS, "robot")
    with (
        served(tmp_path, monkeypatch, denied),
        pytest.raises(FpoError, match=r"^Access to gs://bucket/saved/params was refused: check the address, or log"),
    ):
        restore_params("gs://bucket/saved", structs(tree))


class HttpError(Exception):
    """As gcsfs' own."""

    def __init__(self, code: int):
        self.code = code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Install gcsfs to access Google Storage"), r"needs the package gcsfs: .*'fpo_jax\[gcs\]'"),
        (ConnectionError("Cannot connect to host storage.googleapis.com:443"), "can't be reached: check the network"),
        (HttpError(503), "can't be reached: check the network"),
        (TimeoutError(), "can't be reached: check the network"),
        (HttpError(401), "Access to gs://bucket/pi0 was refused: check the address, or log in"),
        (OSError("Forbidden: https://storage.googleapis.com/"), "Access to gs://bucket/pi0 was refused"),
        (FileNotFoundError("bucket/pi0"), "There is no checkpoint at gs://bucket/pi0"),
    ],
)
@pytest.mark.parametrize("load", [lambda url: restore_params(url, {}), lambda url: load_norm_stats(url, "trossen")])
def test_bucket_out_of_reach(monkeypatch, error, message, load):
    def fail(*_):
        raise error

    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", fail)
    with pytest.raises(FpoError, match=message) as raised:
        load("gs://bucket/pi0")
    assert "\n" not in str(raised.value)


def test_a_bug_stays_a_bug(saved, monkeypatch):
    def fail(*_, **__):
        raise AttributeError("typing error")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(AttributeError, match="typing error"):
        restore_params(saved, structs(small_tree()))


def test_bucket_lost_while_reading(monkeypatch):
    error = ValueError("UNAVAILABLE: CURL error Couldn't resolve host name")
    place = locate("gs://bucket/pi0")
    with pytest.raises(FpoError, match="can't be reached"), plain_errors(place):
        raise error
