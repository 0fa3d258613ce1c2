"""LIBERO's suites as an `Env`: which episodes are played, by the official protocol, and how results state it.

The simulators are `libero_worker` processes in a virtual environment of their own (`libero_setup`), one per
environment. Protocol: openpi's LIBERO client, which is OpenVLA's: 10 wait steps, 50 initial states per task in order,
pictures of 256 x 256 pixels turned by 180° and resized with padding, the task's name as the prompt, a new chunk every 5
steps.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from fpo_jax.config import LiberoOptions
from fpo_jax.envs import wire
from fpo_jax.envs.host import Episode, HostEnv
from fpo_jax.envs.workers import StartError, WorkerPool, WorkerSettings
from fpo_jax.types import Camera, EnvSpec, FpoError, suggestion

EPISODE_LENGTH = {  # control steps until truncation, the wait steps not counted
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
EXECUTE_STEPS = 5
RENDER_SIZE = 256  # [pixels]
PICTURE_SIZE = 320  # [pixels] of pictures for people
CAMERAS = ("image", "wrist_image")
CONTROL_HZ = 20.0
OPENPI_SEED = 7
# Of a worker with cameras [MiB], the mean over the suite's tasks (docs/libero_tasks.md), and of one without.
CAMERA_MEMORY = {
    "libero_spatial": 1060,
    "libero_object": 1470,
    "libero_goal": 1050,
    "libero_10": 1510,
    "libero_90": 1370,
}
BLIND_MEMORY = 256
_NO_CAMERA_SIZE = 8  # [pixels] of pictures that nobody takes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiberoSampler:
    """Which episodes are played (`host.Sampler`): tasks, and of each the initial states first <= i < last."""

    tasks: tuple[int, ...]  # env_id -> index in the suite
    train_inits: tuple[int, int] | None  # None: sampled from the task's regions
    test_inits: tuple[int, int]
    train_tasks: Literal["uniform", "success", "spread"] = "uniform"
    openpi_seeds: bool = False

    def check(self, num_envs: int) -> None:
        """Raises FpoError where a task would never be drawn."""
        if self.train_tasks == "spread" and num_envs < len(self.tasks):
            raise FpoError(
                f"With --libero.tasks spread each environment has one task, and {num_envs} environments are too few "
                f"for {len(self.tasks)} tasks: choose --num-envs {len(self.tasks)} or more, or --libero.tasks uniform."
            )

    def draw(self, keys: Key[Array, " N"], tally: Float[Array, "K 2"], slots: Int[Array, " N"]) -> Episode:
        """A task: any, mostly one that is neither hopeless nor solved, or the slot's own; and where it begins."""
        weight = jnp.ones(len(self.tasks))
        if self.train_tasks == "success":
            rate = (tally[:, 0] + 1) / (tally[:, 1] + 2)
            weight = rate * (1 - rate) + 0.05  # a solved task must show when it no longer is

        def one(key, slot):
            task_key, init_key, seed_key = jax.random.split(key, 3)
            drawn = jax.random.categorical(task_key, jnp.log(weight))
            env_id = slot % len(self.tasks) if self.train_tasks == "spread" else drawn
            first, last = self.train_inits or (-1, 0)
            return env_id, jax.random.randint(init_key, (), first, last), _seed(seed_key)

        return self._episode(*jax.vmap(one)(keys, slots), test=False)

    def test(self, numbers: Int[Array, " N"], keys: Key[Array, " N"]) -> Episode:
        """Initial state after initial state, every task in turn; beyond the last they begin anew, with other seeds."""
        first, last = self.test_inits
        env_id, trial = numbers % len(self.tasks), numbers // len(self.tasks)
        seed = jax.vmap(_seed)(keys)
        seed = jnp.full_like(seed, OPENPI_SEED) if self.openpi_seeds else seed
        return self._episode(env_id, first + trial % (last - first), seed, test=True)

    def _episode(self, env_id, init, seed, test: bool) -> Episode:
        env_id = env_id.astype(jnp.int32)
        task = jnp.asarray(self.tasks, jnp.int32)[env_id]
        return Episode(env_id, task, init.astype(jnp.int32), seed, jnp.full(env_id.shape, test))


def _seed(key: Key[Array, ""]) -> Int[Array, ""]:
    return jax.random.randint(key, (), 0, jnp.iinfo(jnp.int32).max)


def make_libero(
    name: str,
    cameras: Sequence[Camera] = (),
    options: LiberoOptions | None = None,
    episode_length: int | None = None,
    execute_steps: int | None = None,
) -> HostEnv:
    """The suite, or the task `suite/name` or `suite/index`, with its first worker started.

    Raises FpoError for what there is not, and where LIBERO is not installed.
    """
    options = options or LiberoOptions()
    suite, _, wanted = name.partition("/")
    if suite not in EPISODE_LENGTH:
        raise FpoError(f"LIBERO has no suite {suite!r}{suggestion(suite, EPISODE_LENGTH)}")
    length, chunk = episode_length or EPISODE_LENGTH[suite], execute_steps or EXECUTE_STEPS
    pool = start_pool(suite, cameras, chunk, options)
    try:
        known = pool.ask({"op": "tasks"})["suites"][suite]
        chosen = [find_task(suite, wanted, [task["name"] for task in known])] if wanted else list(range(len(known)))
        num_inits = min(known[index]["inits"] for index in chosen)
        train_inits = None if options.train_inits == "sampled" else parse_inits(options.train_inits, num_inits)
        test_inits = parse_inits(options.test_inits, num_inits)
    except BaseException:
        pool.close()
        raise
    spec = EnvSpec(
        name,
        action_dim=wire.ACTION_DIM,
        proprio_dim=wire.PROPRIO_DIM,
        object_pose_dim=wire.MAX_OBJECTS * wire.POSE_DIM,
        episode_length=length,
        execute_steps=chunk,
        control_hz=CONTROL_HZ,
        tasks=tuple(known[index]["name"] for index in chosen),
        prompts=tuple(known[index]["prompt"] for index in chosen),
        test_episodes=len(chosen) * (test_inits[1] - test_inits[0]),
        protocol=protocol(name, length, pool, options, seen=_overlap(train_inits, test_inits)),
    )
    sampler = LiberoSampler(tuple(chosen), train_inits, test_inits, options.tasks, options.seeds == "openpi")
    hello = pool.settings.hello
    return HostEnv(pool, spec, sampler, tuple(hello["cameras"]), hello["image_size"], options.overlap)


def _overlap(train_inits: tuple[int, int] | None, test_inits: tuple[int, int]) -> bool:
    """Whether training begins from initial states that evaluation plays."""
    return train_inits is not None and max(train_inits[0], test_inits[0]) < min(train_inits[1], test_inits[1])


def protocol(
    name: str, episode_length: int, pool: WorkerPool, options: LiberoOptions, seen: bool = False
) -> dict[str, Any]:
    """All that results depend on, as they state it; `deviations` names what is not as the official protocol has it.

    `seen`: training begins from initial states that evaluation plays.
    """
    asked, said = pool.settings.hello, pool.hello
    ours = {
        "env": name,
        "episode_length": episode_length,
        "execute_steps": asked["max_chunk"],
        "wait_steps": said.get("wait_steps"),
        "train_inits": options.train_inits,
        "test_inits": options.test_inits,
        "train_tasks": options.tasks,
        "seeds": options.seeds,
        "prompt": "task name",
        "cameras": asked["cameras"],
        "image_size": asked["image_size"] if asked["cameras"] else 0,
        "render_size": asked["render_size"],
        "quality": asked["quality"],
        "stand_ins": said.get("stand_ins", 0) if asked["cameras"] else 0,  # files of assets that only look different
        "opengl": said.get("opengl"),
        "versions": said.get("versions"),
    }
    official = {
        "episode_length": EPISODE_LENGTH[name.partition("/")[0]],
        "execute_steps": EXECUTE_STEPS,
        "test_inits": "all",
        "seeds": "openpi",
        "quality": "official",
        "stand_ins": 0,
    }
    differ = {
        option: f"{ours[option]} instead of {value}" for option, value in official.items() if ours[option] != value
    }
    if seen:
        differ["train_inits"] = f"{options.train_inits}, some of which are evaluated"
    if not asked["cameras"]:
        differ["observation"] = "object poses instead of pictures"
    elif set(asked["cameras"]) != set(CAMERAS):
        differ["cameras"] = f"{' and '.join(asked['cameras'])} instead of {' and '.join(CAMERAS)}"
    return ours | {"deviations": differ}


def worker_command(options: LiberoOptions) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(command that starts a worker, what its hello says about the installation). Raises FpoError without LIBERO."""
    from fpo_jax.envs import libero_setup

    python, assets = libero_setup.find(options.python, options.assets)
    return libero_setup.worker_command(python), {"assets": str(assets)}


def start_pool(suite: str, cameras: Sequence[Camera], max_chunk: int, options: LiberoOptions) -> WorkerPool:
    """The suite's pool with its first worker; where OpenGL's EGL takes it down, with OSMesa."""
    size, quality = _check_cameras(cameras)
    command, installed = worker_command(options)
    hello = {
        "image_size": size,
        "render_size": RENDER_SIZE,
        "cameras": [camera.name for camera in cameras],
        "max_chunk": max_chunk,
        "quality": quality,
    }
    settings = WorkerSettings(
        command,
        hello | installed,
        reset={"suite": suite, "order": "episode"},
        test_reset={"order": options.seeds},
        start_seconds=options.start_seconds,
        reset_seconds=options.reset_seconds,
        step_seconds=options.step_seconds,
        max_restarts=options.max_restarts,
        memory=(CAMERA_MEMORY[suite] if cameras else BLIND_MEMORY) * 2**20,
        slot_environments=_drawing_devices(options),
    )
    pool = pool_by_any_renderer(settings)
    opengl, failed = pool.hello.get("opengl"), pool.hello.get("opengl_failed")
    why = f" ({failed})" if failed else ""
    if options.egl_devices and cameras and opengl != "egl":
        pool.close()
        raise FpoError(f"--libero.egl-devices needs EGL, but {opengl} draws here{why}: mend that, or leave it out.")
    if failed:
        logger.warning("The simulators draw with %s, as another OpenGL library does not work%s.", opengl, why)
    return pool


def _drawing_devices(options: LiberoOptions) -> tuple[dict[str, str], ...]:
    """What tells workers on which GPU to draw: the variables of slots 0, 1, ... in turn. Raises FpoError."""
    if options.egl_devices and "MUJOCO_EGL_DEVICE_ID" in os.environ:
        raise FpoError("--libero.egl-devices and the variable MUJOCO_EGL_DEVICE_ID both say what draws: give one.")
    if wrong := [device for device in options.egl_devices if device < 0]:
        raise FpoError(f"--libero.egl-devices are numbers from 0, not {wrong[0]}.")
    return tuple({"MUJOCO_EGL_DEVICE_ID": str(device)} for device in options.egl_devices)


def pool_by_any_renderer(settings: WorkerSettings) -> WorkerPool:
    """The pool; where a graphics driver takes its first worker down and nobody chose a library, with OSMesa.

    Raises StartError. (Drivers that only say that they do not work are the worker's own affair.)
    """
    try:
        return WorkerPool(settings)
    except StartError as error:
        crashed = error.reason.startswith("died: exit status -")  # by a signal
        if not crashed or not settings.hello["cameras"] or os.environ.get("MUJOCO_GL"):
            raise
        first = error.reason
    try:
        return WorkerPool(replace(settings, environment={"MUJOCO_GL": "osmesa"}))
    except StartError as error:
        raise StartError(f"render: first it {first}; with MUJOCO_GL=osmesa {error.reason}") from error


def picture_episode(
    env: HostEnv, number: Int[Array, ""], key: Key[Array, ""], actions: Float[np.ndarray, "t 7"], steps: Sequence[int]
) -> UInt8[np.ndarray, "k y x 3"]:
    """A test episode played again, as people see it: a picture after each of `steps`, which rise from 0 to at most t.

    A worker of its own simulates and draws, so `env` needs no cameras. Raises FpoError where the replay breaks.
    """
    assert isinstance(env.vector, WorkerPool)
    settings, seen = env.vector.settings, {"cameras": CAMERAS[:1], "quality": "official", "max_chunk": len(actions)}
    sizes = dict.fromkeys(("image_size", "render_size"), PICTURE_SIZE)
    pool = pool_by_any_renderer(replace(settings, hello={**settings.hello, **seen, **sizes}))
    columns = env.test_episodes(number[None], key[None])
    try:
        pool.submit_reset(0, Episode(*(column.item() for column in columns)))
        pictures = [_picture(pool)]
        for first, last in pairwise(steps):
            pool.submit_step(0, actions[first:last])
            pictures.append(_picture(pool))
    finally:
        pool.close()
    return np.stack(pictures)[:, :, ::-1]  # openpi's pictures are mirrored


def _picture(pool: WorkerPool) -> UInt8[np.ndarray, "y x 3"]:
    outcome = pool.collect(0)
    if outcome.arrays is None:
        raise FpoError(f"The episode could not be drawn ({outcome.failed}).")
    return outcome.arrays["images"][0]


def parse_inits(text: str, num_inits: int) -> tuple[int, int]:
    """(first, last + 1) of `all` or `first:last+1`. Raises FpoError for anything else."""
    try:
        first, last = (0, num_inits) if text == "all" else map(int, text.split(":"))
    except ValueError:
        first = last = -1
    if not 0 <= first < last <= num_inits:
        raise FpoError(
            f"{text!r} are no initial states: give all, or a part of the {num_inits} that there are, as 0:{num_inits}."
        )
    return first, last


def find_task(suite: str, wanted: str, names: Sequence[str]) -> int:
    if wanted in names:
        return names.index(wanted)
    if wanted.isdigit() and int(wanted) < len(names):
        return int(wanted)
    if wanted.isdigit():
        raise FpoError(f"{suite} has the tasks 0 to {len(names) - 1}, so there is no {suite}/{wanted}.")
    raise FpoError(f"{suite} has no task {wanted!r}{suggestion(wanted, names)}")


def _check_cameras(cameras: Sequence[Camera]) -> tuple[int, str]:
    """(edge of the pictures [pixels], quality); FpoError for what the scenes do not have."""
    for camera in cameras:
        if camera.name not in CAMERAS:
            raise FpoError(f"LIBERO has no camera {camera.name!r}; it has {' and '.join(CAMERAS)}.")
        if (camera.size, camera.quality) != (cameras[0].size, cameras[0].quality) or camera.size < 1:
            raise FpoError("LIBERO's cameras share one size of at least 1 pixel and one quality.")
    return (cameras[0].size, cameras[0].quality) if cameras else (_NO_CAMERA_SIZE, "official")
