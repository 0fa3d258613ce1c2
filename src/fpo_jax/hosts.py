"""Several processes as one run: how they find each other, what they tell each other, and how they end together."""

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the only way to the store that its own checkpoints go too
from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks, too
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpo_jax.config import ParallelOptions
from fpo_jax.signals import TRY_AGAIN
from fpo_jax.types import FpoError

MISTAKE = 2  # exit code: the same would happen again
SILENCE_SECONDS = 30  # after so long without a sign of life a process counts as gone, and the others end
MEETING_SECONDS = 300  # that processes wait for each other at the start


# --- finding each other ---------------------------------------------------------------------------------------------


def connect(options: ParallelOptions) -> None:
    """Join the other processes of this run, where there are any; must come before anything else asks JAX for devices.

    Raises FpoError for half an address, and where process 0 cannot be reached. Where another process never comes, JAX
    itself aborts all that wait, after `MEETING_SECONDS`: process 0 has said before whom it waits for.
    """
    _check(options)
    several = options.coordinator is not None or options.hosts == "many"
    if options.hosts == "one" or not (several or tasks_announced(os.environ) > 1) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `signals`
    local = local_gpus(os.environ, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    coordinator = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, count, index, local = ClusterEnv.auto_detect_unset_distributed_params(
            *(coordinator, options.num_processes, options.process_id, local), None, MEETING_SECONDS
        )
        if index == 0 and count != 1:
            print(f"Waiting for {(count or 0) - 1} of {count} processes at {address} ...", flush=True)
        elif index and address:
            _reach(address, MEETING_SECONDS)
        jax.distributed.initialize(
            # JAX's own end of a run whose processes are gone is an abort; it comes where ours does not.
            *(address, count, index, local),
            initialization_timeout=MEETING_SECONDS,
            heartbeat_timeout_seconds=2 * SILENCE_SECONDS,
            shutdown_timeout_seconds=SILENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise FpoError(
            f"The processes of this run did not find each other ({_first_line(error)}): start all of them, and give "
            "--parallel.coordinator where nothing announces it."
        ) from error
    _first_exchange()


def _check(options: ParallelOptions) -> None:
    explicit = (options.coordinator, options.num_processes, options.process_id)
    if any(part is not None for part in explicit) and None in explicit:
        raise FpoError(
            "Several processes need all three of --parallel.coordinator host:port, --parallel.num-processes and "
            "--parallel.process-id (or none of them where SLURM, Open MPI or a TPU slice says it)."
        )
    if options.coordinator is None or options.num_processes is None or options.process_id is None:
        return
    if not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):\d{1,5}", options.coordinator):
        raise FpoError(
            f"--parallel.coordinator is {options.coordinator!r}: give host:port of process 0, as first-machine:8476."
        )
    if not 0 <= options.process_id < options.num_processes:
        raise FpoError(
            f"--parallel.process-id is {options.process_id}: processes are numbered from 0, and "
            f"--parallel.num-processes is {options.num_processes}."
        )


def _reach(address: str, seconds: float) -> None:
    """Wait until process 0 listens. Raises FpoError where it does not: JAX would abort without a word of ours."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise FpoError(
                    f"No process 0 at {address} after {seconds:g} s ({_first_line(error)}): start it there, or correct "
                    "--parallel.coordinator."
                ) from error
        time.sleep(0.5)


def tasks_announced(environment: Mapping[str, str]) -> int:
    """How many processes SLURM's srun or Open MPI's mpirun say there are; 1 where they say nothing."""
    slurm = environment.get("SLURM_STEP_NUM_TASKS") if "SLURM_PROCID" in environment else None
    return int(slurm or environment.get("OMPI_COMM_WORLD_SIZE") or 1)


def local_gpus(environment: Mapping[str, str], installed: int) -> list[int] | None:
    """The GPUs of this process, numbered among those that it sees; None: as JAX decides.

    JAX takes the one that has the number of the task on its host, also where the task is the only one, or sees no GPU
    but its own. `installed`: GPUs of this host. Raises FpoError where tasks cannot share them.
    """
    if chosen := environment.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(number) for number in chosen.split(",")]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        seen = len([word for word in visible.split(",") if word.strip() not in ("", "-1", "NoDevFiles")])
    else:
        seen = installed
    tasks, task = _tasks_here(environment)
    if seen == 0 or tasks is None:
        return None
    own = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
    if tasks == 1 or seen == 1 or own == str(seen):
        return list(range(seen))
    if seen < tasks:
        raise FpoError(f"{tasks} processes on this host see {seen} GPUs: start one per GPU, or one per host.")
    share = seen // tasks
    return list(range(task * share, (task + 1) * share))


def _tasks_here(environment: Mapping[str, str]) -> tuple[int | None, int]:
    """(processes of this run on this host, which of them this is); None where the launcher does not say."""
    if "SLURM_LOCALID" in environment:
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_NTASKS_PER_NODE") or ""
        counts = []  # of each node, from 8(x4),3
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
            counts += [int(tasks)] * int(times or 1)
        node = int(environment.get("SLURM_NODEID", 0))
        tasks = counts[node] if node < len(counts) else (counts or [None])[0]
        return tasks, int(environment["SLURM_LOCALID"])
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    return None, 0


def _first_exchange() -> None:
    """Connect the devices now: Gloo gives up where processes are half a minute apart, as when they compile."""
    mesh = Mesh(np.array(jax.devices()), "all")
    ones = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.float32))
    program = jax.jit(jnp.sum).lower(ones).compile()
    wait_for_all("ready to exchange")
    jax.block_until_ready(program(ones))


# --- ending together ------------------------------------------------------------------------------------------------


@contextmanager
def one_for_all(raised_by_all: type[Exception]) -> Iterator[None]:
    """Within, a process ends as soon as another one is gone, and says so; without this it would wait for it for ever.

    A mistake in one process (FpoError, OSError) ends all of them with its sentence. Exceptions that all processes raise
    together pass. Everybody leaves together.
    """
    if num_processes() == 1:
        yield
        return
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), name="fpo_jax watch", daemon=True).start()
    try:
        yield
        wait_for_all("the end")
    except raised_by_all:
        raise
    except (FpoError, OSError) as error:
        over.set()
        _store().key_value_set(_SENTENCE, str(error) or type(error).__name__, allow_overwrite=True)
        _leave("")
    except Exception as error:
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
        over.set()
        _leave(_first_line(error))
    finally:
        over.set()


_SENTENCE = "fpo_jax/mistake"


def _leave(reason: str) -> NoReturn:
    """End this process at once: leaving as usual would wait for the others, dead ones too."""
    try:
        mistake = _value(_SENTENCE)
    except jax.errors.JaxRuntimeError:  # process 0 is gone, and the store with it
        mistake = ""
    lost = (
        f"Process {jax.process_index()} of {num_processes()} stopped, because the run is no longer whole ({reason}): "
        "start all processes again with --resume auto."
    )
    print(f"Error: {mistake}" if mistake else lost, file=sys.stderr, flush=True)
    if is_first():
        time.sleep(3.0)  # until all have read it
    os._exit(MISTAKE if mistake else TRY_AGAIN)


def _watch(over: threading.Event) -> None:
    """Show every second that this process lives; end it when another one has not done so for `SILENCE_SECONDS`.

    The first process looks at all, the others at what it says.
    """
    store, me, seen = _store(), jax.process_index(), {}
    for beat in itertools.count():
        if over.wait(1.0):
            return
        mistake = ""
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
                gone = [name for name in (_value("fpo_jax/gone"),) if name]
            mistake = _value(_SENTENCE)
        except jax.errors.JaxRuntimeError:
            gone = ["0"]
        if (gone or mistake) and not over.is_set():
            _leave(f"no sign of life from process {', '.join(gone)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- telling each other ---------------------------------------------------------------------------------------------


def num_processes() -> int:
    """Processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """This process writes the files and talks; in a run of one process it is always this one."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Go on when all processes have come here, however long that takes."""
    if num_processes() > 1:
        _store().wait_at_barrier(f"fpo_jax/{where}/{next(_meetings)}", _DAY)


_meetings = itertools.count()  # the same in all processes, as they come to the same places
_DAY = 24 * 3600 * 1000  # [ms]


def largest(number: int) -> int:
    """The largest of the processes' numbers: what one of them knows, all must act on together."""
    if num_processes() == 1:
        return number
    return max(map(int, _exchanged(str(int(number)))))


def require_same(number: int, what: str) -> None:
    """Raises FpoError, in every process, where they don't give the same number."""
    if largest(number) != -largest(-number):
        raise FpoError(f"The processes of this run do not agree on {what}.")


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes; all have the same names."""
    if num_processes() == 1:
        return dict(counts)
    given = [json.loads(text) for text in _exchanged(json.dumps(dict(counts)))]
    return {name: sum(one[name] for one in given) for name in counts}


def _exchanged(value: str) -> list[str]:
    """What each process gave."""
    place = f"fpo_jax/exchange/{next(_meetings)}/"
    _store().key_value_set(f"{place}{jax.process_index()}", value)
    wait_for_all("exchange")
    values = [value for _, value in _store().key_value_dir_get(place)]
    wait_for_all("exchanged")
    _store().key_value_delete(f"{place}{jax.process_index()}")
    return values


def _value(key: str) -> str:
    """The value of a key of the store, "" where there is none yet."""
    try:
        return _store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return ""
        raise


def _store() -> Any:
    """The key-value store and barriers of JAX's coordination service, which lives in the first process."""
    return distributed.global_state.client
