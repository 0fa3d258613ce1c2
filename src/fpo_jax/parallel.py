"""Many devices: what lies where, and what is exchanged.

Within `using(mesh)` the environments are split over the mesh's devices and the frozen base over its axis "fsdp"; all
else is on every device. Code under jit says so by `over_devices`, `spread` and `replicate`, which are nothing at all
where there is no mesh: on one device the compiled program is the same as without this file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from fpo_jax import hosts
from fpo_jax.config import ParallelOptions
from fpo_jax.types import FpoError, Params

AXES = ("data", "fsdp")  # devices in a row hold one copy of a base that is split
# Of any type, as they stand in trees where arrays do.
ENVS: Any = P(AXES)  # leading axis N
SLOTS: Any = P(None, AXES)  # [T, N]
WINDOW: Any = P(None, None, AXES)  # [W, T, N]
EVERYWHERE: Any = P()


# --- devices --------------------------------------------------------------------------------------------------------


def make_mesh(options: ParallelOptions, num_envs: int) -> Mesh | None:
    """The devices of this run, None where it is one. Raises FpoError where the environments cannot be split evenly."""
    devices = jax.devices()
    count = options.devices or len(devices)
    if hosts.num_processes() > 1 and count != len(devices):
        raise FpoError(f"A run of several processes uses all {len(devices)} devices: leave --parallel.devices out.")
    if count > len(devices):
        raise FpoError(f"--parallel.devices is {count}, but this machine has {len(devices)}.")
    if num_envs % count:
        raise FpoError(
            f"{num_envs} environments cannot be split evenly over {count} devices: choose --num-envs as a multiple of "
            f"{count}, or fewer --parallel.devices."
        )
    rows = _rows(devices[:count], options.fsdp)
    return None if count == 1 else Mesh(rows, AXES, axis_types=(AxisType.Auto,) * 2)


def _rows(devices: Sequence[Any], fsdp: int) -> np.ndarray:
    """Devices [data, fsdp], the rows within a process each. Raises FpoError where that is impossible."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    rows = [ordered[start : start + fsdp] for start in range(0, len(ordered), fsdp)]
    if any(len(row) < fsdp or len({device.process_index for device in row}) > 1 for row in rows):
        raise FpoError(
            f"--parallel.fsdp is {fsdp}, which does not divide the devices of each process: a base is split within a "
            "host only."
        )
    return np.array(rows, object)


@contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """Within, runs are split over this mesh; None: everything on one device, as it is without this context."""
    if mesh is None and num_devices() == 1:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ()) if mesh is None else mesh):
        yield


def num_devices() -> int:
    """Devices that the environments are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _in_one_device() -> bool:
    """The code being traced is that of a single device, inside `over_devices`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def env_indices(num: int) -> Int[Array, " N"]:
    """The numbers of the environments at hand among those of all devices: 0 to N - 1 where there is one."""
    indices = jnp.arange(num, dtype=jnp.int32)
    return jax.lax.axis_index(AXES) * num + indices if _in_one_device() else indices


def over_devices(function: Callable, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`function` run by each device on its share of the arguments; nothing is exchanged but what it asks for."""
    if num_devices() == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)  # callbacks have none


def spread(tree: PyTree) -> PyTree:
    """Leading axes split over the devices, so that each computes its share; left alone where they don't divide."""
    if num_devices() == 1 or _in_one_device():
        return tree

    def one(leaf: Array) -> Array:
        divides = leaf.shape[0] % num_devices() == 0
        return jax.lax.with_sharding_constraint(leaf, ENVS) if divides else leaf

    return jax.tree.map(one, tree)


def replicate(tree: PyTree) -> PyTree:
    """The whole of it on every device."""
    if num_devices() == 1 or _in_one_device():
        return tree
    return jax.lax.with_sharding_constraint(tree, EVERYWHERE)


def jit(function: Callable, out: PyTree = EVERYWHERE) -> Callable:
    """`jax.jit`; on several devices its results lie as `out` says (a tree of specs, or a prefix of one)."""
    return jax.jit(function) if num_devices() == 1 else jax.jit(function, out_shardings=out)


def placed(shapes: PyTree, specs: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """`shapes` (as of `jax.eval_shape`) with where they shall lie, for a checkpoint to be read onto these devices."""
    if num_devices() == 1:
        return shapes
    mesh = jax.sharding.get_mesh()

    def subtree(spec: P, tree: PyTree) -> PyTree:
        where = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)

    return jax.tree.map(subtree, specs, shapes, is_leaf=lambda x: isinstance(x, P))


def here(tree: PyTree) -> PyTree:
    """Arrays that lie on several devices as whole ones that this process can read and use on one device.

    Every process must come here together.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


# --- the frozen base ------------------------------------------------------------------------------------------------


def _is_split(leaf: Any) -> bool:
    """Of the layers of a stack [L, ...], the matrices; what is left is small, or looked up (the token table)."""
    return leaf.ndim >= 3


def weight_specs(params: PyTree) -> PyTree[P]:
    """How the weights of the base lie: whole on every device, or matrices of layers split by their last axis.

    Stacked layers are those under `layers` and `encoderblock`, which `gathered` puts together one by one.
    Raises FpoError where a last axis cannot be split evenly.
    """
    parts = 1 if num_devices() == 1 else jax.sharding.get_abstract_mesh().shape["fsdp"]

    def one(path: tuple, leaf: Any) -> P:
        stacked = any(getattr(key, "key", None) in _STACKS for key in path)
        if parts == 1 or not stacked or not _is_split(leaf):
            return EVERYWHERE
        if leaf.shape[-1] % parts:
            raise FpoError(
                f"--parallel.fsdp {parts} cannot split the base's weights "
                f"{jax.tree_util.keystr(path, simple=True, separator='.')} {list(leaf.shape)}: choose a divisor of "
                f"{leaf.shape[-1]}."
            )
        return P(*(None,) * (leaf.ndim - 1), "fsdp")

    return jax.tree_util.tree_map_with_path(one, params)


_STACKS = ("layers", "encoderblock")


def gathered(layer: type[nn.Module]) -> type[nn.Module]:
    """The layer of a scan whose weights `weight_specs` split: each device fetches the others' parts when it runs.

    So one whole layer at a time is on a device, not the whole base.
    """
    if not _in_one_device() or jax.sharding.get_abstract_mesh().shape["fsdp"] == 1:
        return layer

    def whole(variables: PyTree) -> PyTree:
        def one(leaf: Array) -> Array:
            matrix = leaf.ndim + 1 >= 3  # the axis of the stack is gone
            return jax.lax.all_gather(leaf, "fsdp", axis=leaf.ndim - 1, tiled=True) if matrix else leaf

        return jax.tree.map(one, variables)

    return nn.map_variables(layer, "params", trans_in_fn=whole)


def weight_shardings(shapes: PyTree) -> PyTree[NamedSharding] | None:
    """`weight_specs` on the mesh at hand; None without one."""
    if num_devices() == 1:
        return None
    return jax.tree.map(lambda spec: NamedSharding(jax.sharding.get_mesh(), spec), weight_specs(shapes))


def place_weights(params: PyTree) -> Params:
    """The base's weights on the devices of the mesh, each process giving what it has read."""
    shardings = weight_shardings(params)
    if shardings is None:
        return params

    def one(leaf: Any, where: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == where:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, params, shardings)
