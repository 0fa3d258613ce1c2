"""Many devices, many hosts: everything that knows of them.

Within `using(mesh)` the environments are split over the mesh's devices and the frozen base over its axis "fsdp"; all
else is on every device. Code under jit says so by `over_devices`, `spread` and `replicate`, which are nothing at all
where there is no mesh: on one device the compiled program is the same as without this file.
"""

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the only way to the store that its own checkpoints go too
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from fpo_jax.config import ParallelOptions
from fpo_jax.types import FpoError, Params

AXES = ("data", "fsdp")  # devices in a row hold one copy of a base that is split
# Of any type, as they stand in trees where arrays do.
ENVS: Any = P(AXES)  # leading axis N
SLOTS: Any = P(None, AXES)  # [T, N]
WINDOW: Any = P(None, None, AXES)  # [W, T, N]
EVERYWHERE: Any = P()
PEER_LOST = 75  # exit code (EX_TEMPFAIL: try again)
SILENCE_SECONDS = 30  # after so long without a sign of life a process counts as gone, and the others end


# --- hosts ----------------------------------------------------------------------------------------------------------


def connect(options: ParallelOptions) -> None:
    """Join the other processes of this run, where there are any; must come before anything else asks JAX for devices.

    Raises FpoError for half an address, and where the others cannot be found.
    """
    explicit = (options.coordinator, options.num_processes, options.process_id)
    if any(part is not None for part in explicit) and None in explicit:
        raise FpoError(
            "Several processes need all three of --parallel.coordinator host:port, --parallel.num-processes and "
            "--parallel.process-id (or none of them where SLURM, Open MPI or a TPU slice says it)."
        )
    several = options.coordinator is not None or options.hosts == "many"
    if options.hosts == "one" or not (several or tasks_announced(os.environ) > 1) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            # JAX's own end of a run whose processes are gone is an abort; it comes where ours does not.
            *explicit,
            heartbeat_timeout_seconds=2 * SILENCE_SECONDS,
            shutdown_timeout_seconds=SILENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise FpoError(
            f"The processes of this run did not find each other ({str(error).splitlines()[0]}): start all of them, and "
            "give --parallel.coordinator where nothing announces it."
        ) from error
    _first_exchange()


@contextmanager
def one_for_all() -> Iterator[None]:
    """Within, a process ends as soon as another one is gone, and says so; without this it would wait for it for ever.

    Mistakes of the user (`FpoError`) are raised as always. Everybody leaves together.
    """
    if num_processes() == 1:
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), name="fpo_jax watch", daemon=True).start()
    try:
        yield
        wait_for_all("the end")
    except FpoError:
        raise
    except Exception as error:
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
        _leave(str(error).splitlines()[0])
    finally:
        over.set()


def _leave(reason: str) -> NoReturn:
    """End this process at once: leaving as usual would wait for the others, dead ones too."""
    print(
        f"Process {jax.process_index()} of {num_processes()} stopped, because the run is no longer whole ({reason}): "
        "start all processes again with --resume.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PEER_LOST)


def _watch(over: threading.Event) -> None:
    """Show every second that this process lives; end it when another one has not done so for `SILENCE_SECONDS`.

    The first process looks at all, the others at what it says.
    """
    store, me, seen = _store(), jax.process_index(), {}
    for beat in itertools.count():
        if over.wait(1.0):
            return
        try:
            store.key_value_set(f"fpo_jax/alive/{me}", str(beat), allow_overwrite=True)
            if me == 0:
                now = time.monotonic()
                for name, beats in store.key_value_dir_get("fpo_jax/alive/"):
                    if seen.get(name, ("", 0.0))[0] != beats:
                        seen[name] = (beats, now)
                gone = [name.rsplit("/", 1)[1] for name, (_, since) in seen.items() if now - since > SILENCE_SECONDS]
                store.key_value_set("fpo_jax/gone", ", ".join(gone), allow_overwrite=True)
            else:
                gone = [name for name in (_value(store, "fpo_jax/gone"),) if name]
        except jax.errors.JaxRuntimeError:
            gone = ["0"]
        if gone and not over.is_set():
            if me == 0:
                over.wait(3.0)  # until all have read it
            _leave(f"no sign of life from process {', '.join(gone)}")


def _value(store: Any, key: str) -> str:
    """The value of a key of the store, "" where there is none yet."""
    return dict(store.key_value_dir_get(key.rsplit("/", 1)[0] + "/")).get(key, "")


def tasks_announced(environment: Mapping[str, str]) -> int:
    """How many processes SLURM's srun or Open MPI's mpirun say there are; 1 where they say nothing."""
    slurm = environment.get("SLURM_STEP_NUM_TASKS") if "SLURM_PROCID" in environment else None
    return int(slurm or environment.get("OMPI_COMM_WORLD_SIZE") or 1)


def num_processes() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """This process writes the files and talks; in a run of one process it is always this one."""
    return jax.process_index() == 0


def _first_exchange() -> None:
    """Connect the devices now: Gloo gives up where processes are half a minute apart, as when they compile."""
    mesh = Mesh(np.array(jax.devices()), "all")
    ones = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.float32))
    program = jax.jit(jnp.sum).lower(ones).compile()
    wait_for_all("ready to exchange")
    jax.block_until_ready(program(ones))


def wait_for_all(where: str) -> None:
    """Go on when all processes have come here, however long that takes."""
    if num_processes() > 1:
        _store().wait_at_barrier(f"fpo_jax/{where}/{next(_meetings)}", _DAY)


_meetings = itertools.count()  # the same in all processes, as they come to the same places
_DAY = 24 * 3600 * 1000  # [ms]


def _exchanged(value: str) -> list[str]:
    """What each process gave."""
    place = f"fpo_jax/exchange/{next(_meetings)}/"
    _store().key_value_set(f"{place}{jax.process_index()}", value)
    wait_for_all("exchange")
    values = [value for _, value in _store().key_value_dir_get(place)]
    wait_for_all("exchanged")
    _store().key_value_delete(f"{place}{jax.process_index()}")
    return values


def _store() -> Any:
    """The key-value store and barriers of JAX's coordination service, which lives in the first process."""
    return distributed.global_state.client


def largest(number: int) -> int:
    """The largest of the processes' numbers: what one of them knows, all must act on together."""
    if num_processes() == 1:
        return number
    return max(map(int, _exchanged(str(int(number)))))


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes; all have the same names."""
    if num_processes() == 1:
        return dict(counts)
    given = [json.loads(text) for text in _exchanged(json.dumps(dict(counts)))]
    return {name: sum(one[name] for one in given) for name in counts}


# --- devices --------------------------------------------------------------------------------------------------------


def make_mesh(options: ParallelOptions, num_envs: int) -> Mesh | None:
    """The devices of this run, None where it is one. Raises FpoError where the environments cannot be split evenly."""
    devices = jax.devices()
    count = options.devices or len(devices)
    if num_processes() > 1 and count != len(devices):
        raise FpoError(f"A run of several processes uses all {len(devices)} devices: leave --parallel.devices out.")
    if count > len(devices):
        raise FpoError(f"--parallel.devices is {count}, but this machine has {len(devices)}.")
    if num_envs % count:
        raise FpoError(
            f"{num_envs} environments cannot be split evenly over {count} devices: choose --num-envs as a multiple of "
            f"{count}, or fewer --parallel.devices."
        )
    if min(count, jax.local_device_count()) % options.fsdp:
        raise FpoError(
            f"--parallel.fsdp is {options.fsdp}, which does not divide the {min(count, jax.local_device_count())} "
            "devices of one process: a base is split within a host only."
        )
    if count == 1:
        return None
    shape = (count // options.fsdp, options.fsdp)
    return Mesh(np.array(devices[:count]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


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
