"""Checkpoints of a run: whole on disk or not there at all, and bitwise the same when read back.

Layout of a run directory:
    checkpoints/<step>/   rolling, the newest `keep` of them
    best/<step>/          one, the best so far
    milestones/<step>/    all of them, for figures
and of one checkpoint:
    state/                the arrays, by Orbax
    extra.npz             plain arrays that are no part of the state (latents of a milestone), optional
    config.json           the run's configuration, optional
    manifest.json         shape, dtype and PRNG kind of every array; size and CRC-32 of every file

A checkpoint is written as `.<step>.partial` and renamed when the manifest is on disk, so a directory whose name is a
number is complete; the checksums find what was damaged later. Nothing is pickled. Runs write theirs by `saver.Saver`,
which goes on when the arrays have left the device; `save` waits for the disk, for scripts and tests.
"""

import contextlib
import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from fpo_jax import hosts
from fpo_jax.types import FpoError

Shelf = Literal["checkpoints", "best", "milestones"]

_KEEP: dict[str, int | None] = {"checkpoints": 3, "best": 1, "milestones": None}  # None: all
_DISK_RESERVE_BYTES = 32 * 2**20  # left free for logs and for the file system itself


def save(
    run_dir: str | Path,
    step: int,
    tree: PyTree,
    *,
    shelf: Shelf = "checkpoints",
    keep: int | None = None,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `tree` as checkpoint `step`, atomically, and delete the oldest ones beyond `keep`.

    Leaves are arrays of any shape and dtype (typed PRNG keys and sizes of 0 included) or Python numbers. `keep` is how
    many checkpoints stay on this shelf (default: 3 rolling, 1 best, all milestones). Every host of a multi-host run
    calls this with the same arguments and sees the same `run_dir`. Returns the checkpoint's directory.

    Raises FpoError when the disk is full; earlier checkpoints are then still there.
    """
    path = begin(run_dir, step, tree, shelf, keep, config, extra).finish()
    hosts.wait_for_all("the checkpoint is whole")
    return path


@dataclass(frozen=True)
class Writing:
    """A checkpoint whose arrays Orbax is writing; there is nothing to load before `finish`."""

    partial: Path
    target: Path
    keep: int | None
    described: Mapping[str, Any]
    checkpointer: ocp.StandardCheckpointer

    def finish(self) -> Path:
        """Wait for the arrays, write the manifest, give the directory its name; in any thread."""
        with _cleaned_up(self.partial), self.checkpointer:
            self.checkpointer.wait_until_finished()  # on the first host: for all hosts
            if jax.process_index() == 0:
                manifest = {"arrays": self.described, "files": _checksums(self.partial)}
                _write_synced(self.partial / "manifest.json", manifest)
                shutil.rmtree(self.target, ignore_errors=True)  # only after a resume from before this step
                self.partial.rename(self.target)
                _sync_directory(self.target.parent)
                _prune(self.target.parent, int(self.target.name), self.keep)
        return self.target


def begin(
    run_dir: str | Path,
    step: int,
    tree: PyTree,
    shelf: Shelf,
    keep: int | None,
    config: Mapping[str, Any] | None,
    extra: Mapping[str, np.ndarray] | None,
) -> Writing:
    """Copy the arrays off the device and let Orbax begin to write them."""
    folder = Path(run_dir).resolve() / shelf
    partial = folder / f".{step}.partial"
    leaves = _named_leaves(tree)
    arrays = {name: _to_array(leaf) for name, leaf in leaves.items()}
    _require_disk(folder, sum(x.nbytes for x in arrays.values()) + sum(x.nbytes for x in (extra or {}).values()))
    with _cleaned_up(partial):
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if config is not None:
                (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            if extra:
                np.savez(partial / "extra.npz", allow_pickle=False, **dict(extra))
        hosts.wait_for_all("the checkpoint's directory is there")
        checkpointer = ocp.StandardCheckpointer()
        # Orbax refuses arrays of size 0; their shape and dtype are in the manifest, and there is nothing else.
        checkpointer.save(partial / "state", {name: x for name, x in arrays.items() if x.size})
    described = {name: _describe(leaf, arrays[name]) for name, leaf in leaves.items()}
    return Writing(partial, folder / str(step), _KEEP[shelf] if keep is None else keep, described, checkpointer)


@contextlib.contextmanager
def _cleaned_up(partial: Path) -> Iterator[None]:
    """Leave nothing half-written behind an error, and say where the disk is full."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise FpoError(
                f"The disk became full while a checkpoint was being written to {partial.parent}; earlier checkpoints "
                "are untouched: free some space and go on with --resume auto."
            ) from error
        raise


def restore(run_dir: str | Path, step: int, like: PyTree, *, shelf: Shelf = "checkpoints") -> PyTree:
    """Read checkpoint `step` into the structure, dtypes and shardings of `like`.

    `like` is a tree of the same structure with arrays, `jax.ShapeDtypeStruct`s or Python numbers as leaves; each
    comes back as what it is there (NumPy array, JAX array on the same devices, number), with the saved bits.

    Raises FpoError when the checkpoint is missing or damaged, or holds other arrays than `like`.
    """
    path = Path(run_dir).resolve() / shelf / str(step)
    if not path.is_dir():
        raise FpoError(f"There is no checkpoint {step} in {path.parent}; there are: {steps(run_dir, shelf) or 'none'}.")
    if damage := _damage(path):
        raise FpoError(f"Checkpoint {path} is damaged ({damage}); choose another one.")
    saved = json.loads((path / "manifest.json").read_text())["arrays"]
    leaves = _named_leaves(like)
    structs = {name: _to_struct(leaf) for name, leaf in leaves.items()}
    _require_same_arrays(path, saved, leaves, structs)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path / "state", {n: s for n, s in structs.items() if np.prod(s.shape)})
    restored = [_from_array(leaf, arrays.get(name), saved[name]) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def latest_step(run_dir: str | Path, shelf: Shelf = "checkpoints") -> int | None:
    """The newest checkpoint whose files are all there and intact, or None; warns of each damaged one it passes over."""
    for step in reversed(steps(run_dir, shelf)):
        path = Path(run_dir) / shelf / str(step)
        if not (damage := _damage(path)):
            return step
        warnings.warn(f"Checkpoint {path} is damaged ({damage}); trying the one before.", stacklevel=2)
    return None


def is_whole(run_dir: str | Path, step: int, shelf: Shelf = "checkpoints") -> bool:
    """Whether that checkpoint's files are all there and intact."""
    return not _damage(Path(run_dir) / shelf / str(step))


def steps(run_dir: str | Path, shelf: Shelf = "checkpoints") -> list[int]:
    """The steps of a shelf in ascending order; half-written checkpoints are not among them."""
    folder = Path(run_dir) / shelf
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def load_config(run_dir: str | Path, step: int, *, shelf: Shelf = "checkpoints") -> dict[str, Any]:
    """The configuration saved with a checkpoint. Raises FpoError where there is none."""
    path = Path(run_dir) / shelf / str(step) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FpoError(f"{path} is missing or damaged: this checkpoint has no readable configuration.") from error


def load_extra(run_dir: str | Path, step: int, *, shelf: Shelf = "milestones") -> dict[str, np.ndarray]:
    """The plain arrays saved as `extra` with a checkpoint; empty where none were."""
    path = Path(run_dir) / shelf / str(step) / "extra.npz"
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def forget_later(run_dir: str | Path, step: int) -> None:
    """Delete the rolling checkpoints after `step`, where a run goes on from there."""
    _delete_later(Path(run_dir) / "checkpoints", step)


# --- leaves ---------------------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path ("agent.actor.Dense_0.kernel"), so that a checkpoint is readable without this package."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in named}
    if len(leaves) != len(named):
        raise ValueError("two leaves of the tree have the same path: a dict key contains a dot")
    return leaves


def _to_array(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _to_struct(leaf: Any) -> Any:
    """What Orbax needs in order to restore an array like this leaf: NumPy arrays stay on the host."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        struct = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        # The data of a key has one more axis than the key, which a spec by names of axes leaves whole.
        by_name = isinstance(leaf.sharding, jax.sharding.NamedSharding)
        sharding = leaf.sharding if by_name or not _is_key(leaf) else None
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
    array = _to_array(leaf)
    if isinstance(array, jax.Array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    return array


def _from_array(leaf: Any, array: Any, description: Mapping[str, Any]) -> Any:
    if array is None:  # size 0
        xp = jnp if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) else np
        array = xp.zeros(description["shape"], description["dtype"])
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=description["key"])
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(array)
    return array if isinstance(array, jax.Array) else np.asarray(array)


def _describe(leaf: Any, array: Any) -> dict[str, Any]:
    description: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    return description | {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else description


def _require_same_arrays(
    path: Path, saved: Mapping[str, Any], leaves: Mapping[str, Any], structs: Mapping[str, Any]
) -> None:
    for name in [*leaves, *saved]:
        old = saved.get(name)
        there = f"{old['dtype']}{old['shape']}" + (" (PRNG key)" if "key" in old else "") if old else "nothing"
        here = "nothing"
        if name in leaves:
            here = f"{structs[name].dtype}{list(structs[name].shape)}" + (
                " (PRNG key)" if _is_key(leaves[name]) else ""
            )
        if there != here:
            raise FpoError(
                f"Checkpoint {path} does not fit this configuration: it holds {there} for '{name}', needed is {here}."
            )


# --- files ----------------------------------------------------------------------------------------------------------


def _checksums(path: Path) -> dict[str, list[int]]:
    """Size [bytes] and CRC-32 of every file of a checkpoint but the manifest; each is on disk when this returns."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(path).as_posix(): list(_size_and_crc(p, sync=True)) for p in files}


def _size_and_crc(file: Path, *, sync: bool = False) -> tuple[int, int]:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(stream.fileno())
        return stream.tell(), crc


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, or ''."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            if list(_size_and_crc(path / name)) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is unreadable"
    return ""


def _write_synced(file: Path, content: Any) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(folder: Path) -> None:
    """Make a rename survive a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, step: int, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, the one just written.

    Later ones are of a continuation that was given up: they would outlive those that `step` came from.
    """
    for partial in folder.glob(".*.partial"):  # of processes that were killed; later steps may be on their way
        if int(partial.name.split(".")[1]) <= step:
            shutil.rmtree(partial, ignore_errors=True)
    if keep is not None:
        _delete_later(folder, step)
        kept = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
        for old_step in kept[: -max(keep, 1)]:
            shutil.rmtree(folder / str(old_step), ignore_errors=True)


def _delete_later(folder: Path, step: int) -> None:
    for name in [path.name for path in folder.iterdir()] if folder.is_dir() else []:
        if name.isdigit() and int(name) > step:
            shutil.rmtree(folder / name, ignore_errors=True)


def _require_disk(folder: Path, size_bytes: int) -> None:
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size_bytes + _DISK_RESERVE_BYTES:
        raise FpoError(
            f"Not enough disk space for a checkpoint in {folder}: it needs {size_bytes / 1e6:.0f} MB and "
            f"{_DISK_RESERVE_BYTES / 1e6:.0f} MB in reserve, {free / 1e6:.0f} MB are free; free some and go on with "
            "--resume auto."
        )


def _is_disk_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)  # TensorStore raises ValueError
