"""openpi's checkpoints: reading them from disk or straight from a bucket, and writing their released layout.

    <checkpoint>/params/                              weights, by Orbax: the tree {"params": {...}}
    <checkpoint>/assets/<asset id>/norm_stats.json    normalisation statistics
    <experiment>/<step>/                              the same, with train_state/ beside, which is never read

Training stores every leaf under one more component, `value`. Format: openpi 15a9616 (Apache-2.0); the code is our own.
"""

import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from fpo_jax.policies.storage import children_of, is_remote, locate, names_in, plain_errors
from fpo_jax.policies.transforms import NormStats, dump_norm_stats, parse_norm_stats
from fpo_jax.types import FpoError, Params

_BATCH_BYTES = 2**30  # leaves are read together up to this size: few round trips, and little memory beside the result


class _Stored(NamedTuple):
    """A leaf as the checkpoint describes it."""

    keys: tuple[str, ...]  # its path in the file
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- weights --------------------------------------------------------------------------------------------------------


def restore_params(
    directory: str | os.PathLike[str],
    shapes: PyTree,
    *,
    dtype: DTypeLike | None = None,
    sharding: PyTree[Sharding] | None = None,
    merge_lora: bool = False,
) -> Params:
    """Reads the weights that `shapes` names, each leaf straight into its dtype and sharding.

    `directory`: path or bucket URL of a checkpoint, of an experiment (its newest step is taken) or of `params/` itself.
    `shapes`: nested dict of `jax.ShapeDtypeStruct`; `dtype` replaces their dtypes. `sharding`: one for all leaves, or a
    tree like `shapes`; by default all go to the first device. `merge_lora` adds openpi's low-rank updates (alpha equal
    to the rank) to the plain weights. Leaves that `shapes` lacks are never read. Raises FpoError where the checkpoint
    is not reachable, not whole, or not this model's.
    """
    folder = params_folder(directory)
    handler = ocp.PyTreeCheckpointHandler()  # not a Checkpointer: that one refuses buckets without its own marker file
    stored = _stored_leaves(folder, handler)
    wanted = _flat(shapes)
    dtypes = {path: jnp.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in wanted.items()}
    targets = _shardings(sharding, wanted)
    _require_leaves(folder, stored, wanted, merge_lora)
    _require_divisible(wanted, targets)

    params = {}
    for batch in _batches(wanted, stored):
        updates = {path: _lora_factors(path, stored) for path in batch if merge_lora}
        updates = {path: factors for path, factors in updates.items() if factors and factors[0] not in wanted}
        reads = {}
        for path in batch:
            # Where an update follows, the weight is rounded once, after the sum.
            reads[path] = stored[path].dtype if path in updates else dtypes[path], targets[path]
            for factor in updates.get(path, ()):
                reads[factor] = jnp.dtype(jnp.float32), _replicated(targets[path])
        leaves = _read(folder, handler, {stored[path].keys: how for path, how in reads.items()})
        for path in batch:
            leaf = leaves.pop(stored[path].keys)
            if path in updates:
                first, second = (leaves.pop(stored[factor].keys) for factor in updates[path])
                leaf = jax.device_put(_merged(path, leaf, first, second, (1.0, 1.0), dtypes[path]), targets[path])
            params[path] = jax.block_until_ready(leaf)  # the host's copy goes before the next one comes
    return unflatten_dict(params, sep="/")


def _stored_leaves(folder: epath.Path, handler: ocp.PyTreeCheckpointHandler) -> dict[str, _Stored]:
    """The model's path of every array in the checkpoint, without `params` and `value`."""
    with plain_errors(folder):
        tree = handler.metadata(folder).tree
        leaves: dict[tuple[str, ...], Any] = {
            tuple(map(str, keys)): leaf for keys, leaf in flatten_dict(tree).items() if hasattr(leaf, "shape")
        }
    if any(keys[0] != "params" for keys in leaves) or not leaves:
        raise FpoError(f"{folder} holds no weights of a model: give the directory in which params/ lies.")
    # `value` is also the name of a module, so it is dropped only where it ends every path.
    end = -1 if all(keys[-1] == "value" for keys in leaves) else None
    return {
        "/".join(keys[1:end]): _Stored(keys, tuple(leaf.shape), jnp.dtype(leaf.dtype)) for keys, leaf in leaves.items()
    }


def _flat(tree: PyTree) -> dict[str, Any]:
    """A nested dict as {path: leaf}, with paths such as `PaliGemma/img/head/bias`."""
    return dict(flatten_dict(tree, sep="/"))


def _shardings(sharding: PyTree[Sharding] | None, wanted: Iterable[str]) -> dict[str, Sharding]:
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, Sharding):
        return dict.fromkeys(wanted, sharding)
    return _flat(sharding)


def _replicated(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def _require_leaves(
    folder: epath.Path, stored: Mapping[str, _Stored], wanted: Mapping[str, Any], merge_lora: bool
) -> None:
    """Raises FpoError unless every wanted leaf is there in its shape and no low-rank update would be lost."""
    lora = [path for path in stored if "lora_" in path and path not in wanted]
    if lora and not merge_lora:
        raise FpoError(
            f"{folder} holds low-rank updates ({lora[0]}), which this configuration lacks: add them to the weights "
            "with merge_lora=True, or choose the configuration with LoRA."
        )
    for path, leaf in wanted.items():
        if path not in stored:
            raise FpoError(f"{folder} has no weight {path!r}: {_advice(stored, path)}.")
        if stored[path].shape != tuple(leaf.shape):
            raise FpoError(
                f"The weight {path!r} in {folder} has shape {stored[path].shape}, but this configuration's has "
                f"{tuple(leaf.shape)}: {_advice(stored, path)}."
            )


def _require_divisible(wanted: Mapping[str, Any], targets: Mapping[str, Sharding]) -> None:
    for path, leaf in wanted.items():
        try:
            targets[path].shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise FpoError(
                f"The weight {path!r} of shape {tuple(leaf.shape)} can't be split as {targets[path]}: split another "
                "axis of it, or none."
            ) from error


def _advice(stored: Mapping[str, _Stored], path: str) -> str:
    """What to do about a weight that doesn't fit, from the weights that are there."""
    if "lora_" in path:
        return "choose the configuration without LoRA, or give a checkpoint that was fine-tuned with it"
    if "action_in_proj/kernel" not in stored:
        return "it is no π0 or π0.5 checkpoint (π0-FAST is not supported)"
    kind = "π0.5" if "time_mlp_in/kernel" in stored else "π0"
    return f"it is a {kind} checkpoint, so choose the configuration (--base) it was trained with"


def _batches(wanted: Iterable[str], stored: Mapping[str, _Stored]) -> Iterator[list[str]]:
    """Paths in groups that are read together, large leaves first, when the most memory is free."""
    batch, size = [], 0
    for path in sorted(wanted, key=lambda path: -stored[path].size_bytes):
        if batch and size + stored[path].size_bytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += stored[path].size_bytes
    if batch:
        yield batch


def _read(
    folder: epath.Path,
    handler: ocp.PyTreeCheckpointHandler,
    leaves: Mapping[tuple[str, ...], tuple[jnp.dtype, Sharding]],
) -> dict[tuple[str, ...], Array]:
    """Exactly these leaves, in these dtypes and shardings."""
    arguments = {keys: ocp.ArrayRestoreArgs(dtype=dtype, sharding=where) for keys, (dtype, where) in leaves.items()}
    item = unflatten_dict(dict.fromkeys(leaves, 0))
    with plain_errors(folder):
        restore = ocp.args.PyTreeRestore(item, restore_args=unflatten_dict(arguments), partial_restore=True)
        restored: Any = flatten_dict(handler.restore(folder, args=restore))
        return dict(restored)


# --- low-rank updates -----------------------------------------------------------------------------------------------


def merge_lora(params: Params, *, scaling: Sequence[float] = (1.0, 1.0)) -> Params:
    """W + scaling · A B for every weight that has a low-rank update, without the updates: a plain model's tree.

    `scaling`: alpha / rank of both experts. As openpi applies them, the feed-forward updates are not scaled, and that
    of `attn_vec_einsum` sums over the heads inside each factor: W_h + scaling · A_h Σ_k B_k. Sums are in float32.
    """
    leaves = _flat(params)
    for path in list(leaves):
        if factors := _lora_factors(path, leaves):
            first, second = (leaves.pop(factor) for factor in factors)
            leaves[path] = _merged(path, leaves[path], first, second, scaling, leaves[path].dtype)
    return unflatten_dict(leaves, sep="/")


def _lora_factors(path: str, leaves: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of A and B of the weight at `path`, or () where it has no update."""
    stem = path.removesuffix("w") if path.endswith(("einsum/w", "einsum_1/w")) else f"{path}_"
    pair = f"{stem}lora_a", f"{stem}lora_b"
    return pair if pair[0] in leaves and pair[1] in leaves else ()


def _merged(
    path: str,
    weight: Float[Array, "L *w"],
    first: Float[Array, "L *a"],
    second: Float[Array, "L *b"],
    scaling: Sequence[float],
    dtype: jnp.dtype,
) -> Float[Array, "L *w"]:
    """The weight at `path` with its update A B."""
    name = path.split("/")[-2]
    factor = scaling[name.endswith("_1")] if "/attn/" in f"/{path}" else 1.0
    return _merge(weight, first, second, factor=factor, over_heads=name.startswith("attn_vec"), dtype=dtype)


def _merge_layers(
    weight: Array, first: Array, second: Array, *, factor: float, over_heads: bool, dtype: jnp.dtype
) -> Array:
    def layer(leaves: tuple[Array, Array, Array]) -> Array:
        w, a, b = (leaf.astype(jnp.float32) for leaf in leaves)
        b = jnp.sum(b, axis=-3, keepdims=True) if over_heads else b
        return (w + factor * jnp.matmul(a, b, precision="highest")).astype(dtype)

    return jax.lax.map(layer, (weight, first, second))  # one layer at a time: float32 needs memory


_merge = jax.jit(_merge_layers, static_argnames=("factor", "over_heads", "dtype"))


# --- normalisation statistics ---------------------------------------------------------------------------------------


def load_norm_stats(directory: str | os.PathLike[str], asset_id: str) -> dict[str, NormStats]:
    """The statistics of `state` and `actions`; `directory` as in `restore_params`, or the folder that holds assets/.

    Raises FpoError that lists the asset ids that are there, or where the file is damaged.
    """
    path = locate(directory)
    if is_remote(path) and not is_remote(cached := locate(path / "assets")):
        path = cached.parent
    top, names = checkpoint_root(path)
    if not names:
        raise FpoError(f"There is no checkpoint at {top}: give a directory that has assets/, or a gs:// URL.")
    assets = top / "assets"
    file = assets / asset_id / "norm_stats.json"
    with plain_errors(file):
        try:
            text = file.read_text()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            patterns = ("*/norm_stats.json", "*/*/norm_stats.json")
            found = [found.parent for pattern in patterns if "assets" in names for found in assets.glob(pattern)]
            known = ", ".join(sorted(str(folder.relative_to(assets)) for folder in found))
            advice = f"choose one of {known}" if known else "it has no statistics at all, so give another checkpoint"
            raise FpoError(f"{top} has no normalisation statistics for the asset id {asset_id!r}: {advice}.") from None
    return parse_norm_stats(text, str(file))


# --- writing --------------------------------------------------------------------------------------------------------


def save_params(
    directory: str | os.PathLike[str], params: Params, norm_stats: Mapping[str, NormStats], asset_id: str
) -> Path:
    """Writes a checkpoint in openpi's released layout, whole or not at all; about fifteen files.

    Raises FpoError where `directory` is there already (an empty one may be), or the disk is full.
    """
    target = Path(directory).expanduser().resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FpoError(f"{target} exists already: delete it or choose another directory for the checkpoint.")
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        file = partial / "assets" / asset_id / "norm_stats.json"
        file.parent.mkdir(parents=True)
        file.write_text(dump_norm_stats(norm_stats))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = {"params": jax.tree.map(jnp.asarray, params)}
            checkpointer.save(epath.Path(partial / "params"), args=ocp.args.PyTreeSave(tree))
        # Orbax's marker names the temporary place; openpi's released checkpoints have none.
        (partial / "params" / "commit_success.txt").unlink(missing_ok=True)
        partial.replace(target)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):  # TensorStore raises ValueError
            raise FpoError(f"The disk is full, so {target} was not written: free some space and try again.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


# --- where things are -----------------------------------------------------------------------------------------------


def checkpoint_root(path: epath.Path) -> tuple[epath.Path, set[str]]:
    """(the directory in which params/ and assets/ lie, its names): `path`, its newest step, or its parent."""
    names = names_in(path)
    if "_METADATA" in names and path.name == "params":
        return path.parent, names_in(path.parent)
    steps = [int(name) for name in names if name.isdigit()]
    if steps and not names & {"params", "assets"}:
        return path / str(max(steps)), names_in(path / str(max(steps)))
    return path, names


def params_folder(directory: str | os.PathLike[str]) -> epath.Path:
    """The directory that Orbax reads; raises FpoError that says what is there instead."""
    path = locate(directory)
    if is_remote(path) and not is_remote(cached := locate(path / "params")):
        path = cached
    names = names_in(path)
    unfinished = ".orbax-checkpoint-tmp"
    if "_METADATA" in names and unfinished not in path.name:
        return path
    path, names = checkpoint_root(path)
    if unfinished in path.name or (any(unfinished in name for name in names) and "params" not in names):
        raise FpoError(f"The checkpoint {path} was not written to its end: give an earlier step, or copy it again.")
    if "params" in names:
        inner = names_in(path / "params")
        if "_METADATA" not in inner:
            raise FpoError(f"{path / 'params'} was not written to its end: copy or download the checkpoint again.")
        return path / "params"
    if any(name.endswith(".safetensors") for name in names):
        raise FpoError(f"{path} is a PyTorch checkpoint: give openpi's JAX checkpoint, a directory that has params/.")
    if not names:
        raise FpoError(f"There is no checkpoint at {path}: give a directory that has params/, or a gs:// URL.")
    near = [path / name for name in sorted(names) if "params" in children_of(path / name)]
    near += [path.parent] if "params" in children_of(path.parent) else []
    found = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
    advice = f"did you mean {near[0]}?" if near else "give the directory of a checkpoint, which has params/."
    raise FpoError(f"{path} is no openpi checkpoint (it holds {found}){'; ' if near else ': '}{advice}")
