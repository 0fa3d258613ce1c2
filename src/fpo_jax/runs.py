"""A run apart from its training: its parts by its configuration, its directory, and how it is opened again."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from fpo_jax import checkpoint, hosts, parallel, train
from fpo_jax.algorithms import fpo, sac
from fpo_jax.config import LiberoOptions, PopulationOptions, TrainConfig, check, differences, from_dict
from fpo_jax.envs import make_env, resolve_physics
from fpo_jax.latent import LatentSpace
from fpo_jax.policies import ANALYTIC, CHECKPOINTS, SHIPPED, open_base
from fpo_jax.policies.openpi import compute_dtype
from fpo_jax.policies.openpi_configs import OPENPI_CONFIGS
from fpo_jax.policies.small import check_action_space
from fpo_jax.provenance import tree_crc32
from fpo_jax.rollout import FrozenBase, System
from fpo_jax.train import TrainState
from fpo_jax.types import Camera, FpoError, Params, Quality

ALGORITHMS = {"fpo": fpo, "sac": sac}
# On resume, with all that is under them; the base is known by its checksum.
FREE_TO_CHANGE = (
    *("iterations", "resume", "run_dir", "checkpoint", "parallel", "saving", "evaluation.video"),
    *("libero.python", "libero.assets", "libero.start_seconds", "libero.reset_seconds", "libero.step_seconds"),
    *("libero.max_restarts", "libero.overlap", "libero.egl_devices"),
)


def build(config: TrainConfig) -> tuple[System, Params]:
    """Environment, frozen base, latent space and algorithm of a configuration. Raises FpoError for unknown names."""
    check(config)
    resolve_physics(config.env, config.physics)
    base, load = open_base(config.base or config.env, checkpoint=config.checkpoint, options=config.openpi)
    trained_on: Quality = getattr(base, "render", "official")
    cameras = tuple(Camera(name, base.image_size, config.render or trained_on) for name in base.cameras)
    env = make_env(config.env, config.physics, config.episode_length, config.execute_steps, cameras, config.libero)
    check_action_space(base, env.spec)
    with_prompts = getattr(base, "with_prompts", None)  # of bases that read words
    if env.spec.prompts and with_prompts is not None and config.openpi.prompt is None:
        base = with_prompts(env.spec.prompts)
    steered = base.action_dim if config.latent.steer_padding else min(base.action_dim, base.output_dim)
    space = LatentSpace(config.latent.space, base.horizon, steered, config.latent.rank)
    return System(config, env, base, space, ALGORITHMS[config.algorithm]), parallel.place_weights(load())


def default_run_dir(config: TrainConfig) -> Path:
    env = config.env.replace("/", "-")
    base = f"-{Path(config.base).stem}" if config.base else ""
    several = "-population" if config.population != PopulationOptions() else ""
    return Path("runs") / f"{env}{base}-{config.preset}-s{config.seed}{several}"


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration as a run keeps it: what depends on this machine is decided, local paths are absolute."""

    def absolute(where: str | None) -> str | None:
        return str(Path(where).expanduser().resolve()) if where and "://" not in where else where

    def unlinked(python: str | None) -> str | None:
        """A virtual environment's Python is a link; where it leads is the system's own."""
        return python and str(Path(python).expanduser().absolute())

    openpi, libero = config.openpi, config.libero
    return replace(
        config,
        base=absolute(config.base) if config.base and _is_path(config.base) else config.base,
        libero=replace(libero, python=unlinked(libero.python), assets=absolute(libero.assets)),
        physics=resolve_physics(config.env, config.physics),
        checkpoint=absolute(config.checkpoint),
        openpi=replace(openpi, dtype=compute_dtype(openpi.dtype), tokenizer=absolute(openpi.tokenizer)),
    )


def _is_path(base: str) -> bool:
    """Whether `open_base` takes it for a directory or file of the user's, not for a name."""
    is_name = base in {*OPENPI_CONFIGS, *ANALYTIC, *SHIPPED} or (CHECKPOINTS / base).is_dir()
    return not is_name and Path(base).expanduser().exists()


def load_run(
    run_dir: Path,
    shelf: checkpoint.Shelf = "checkpoints",
    base_checkpoint: str | None = None,
    libero: LiberoOptions | None = None,
) -> tuple[TrainConfig, System, FrozenBase, TrainState]:
    """(config, system, base, state) of a run at its newest whole checkpoint on `shelf`.

    `base_checkpoint`: where the weights of an openpi base lie now, if not where they did when the run began; `libero`:
    other options than the run had. Raises FpoError where the directory holds no run or no whole checkpoint, or the base
    is another one.
    """
    config = read_config(run_dir)
    config = replace(config, checkpoint=base_checkpoint or config.checkpoint, libero=libero or config.libero)
    step = checkpoint.latest_step(run_dir, shelf)
    hosts.require_same(-1 if step is None else step, f"the newest checkpoint in {run_dir}: all must see the same files")
    if step is None:
        raise FpoError(
            f"{run_dir} has no whole checkpoint in {shelf}/; train first, give one member of a population, or start "
            "again in another --run-dir."
        )
    system, base_params = build(config)
    check_base(run_dir, base_params)
    like = parallel.placed(jax.eval_shape(partial(train.init, system), base_params), train.PLACES)
    state = checkpoint.restore(run_dir, step, like, shelf=shelf)
    return config, system, FrozenBase(base_params, state.features), state


def check_base(run_dir: Path, base_params: Params) -> None:
    """Raises FpoError where the run was trained on another base than this one."""
    try:
        expected = json.loads((run_dir / "provenance.json").read_text())["base_crc32"]
    except (OSError, ValueError, KeyError):
        return  # without a record there is nothing to compare
    if expected != whole_crc32(base_params):
        raise FpoError(
            f"The base policy is not the one that {run_dir} was trained on: its latents mean nothing to another base. "
            "Restore the base, or train anew."
        )


def whole_crc32(tree: PyTree) -> int:
    """Checksum of weights, also where they are split over devices."""
    whole = parallel.here(tree)
    with parallel.using(None):
        return tree_crc32(whole)


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration that a run was started with. Raises FpoError where there is none."""
    path = run_dir / "config.json"
    try:
        return from_dict(json.loads(path.read_text()) | {"resume": "no"})  # how it was started is no part of it
    except OSError as error:
        raise FpoError(
            f"{run_dir} holds no run ({path.name} is missing); give the directory that train.py wrote."
        ) from error
    except ValueError as error:
        raise FpoError(f"{path} is damaged; restore it or start a new run.") from error


def check_resumable(saved: TrainConfig, config: TrainConfig) -> None:
    """Raises FpoError naming every difference that would change what is trained, or on what."""

    def is_free(difference: str) -> bool:
        name = difference.partition(":")[0]
        return any(name == free or name.startswith(f"{free}.") for free in FREE_TO_CHANGE)

    if changed := [one for one in differences(settled(saved), config) if not is_free(one)]:
        raise FpoError(
            f"--resume continues a run as it was; changed here: {'; '.join(changed)}. "
            "Drop these options, or start a new run in another --run-dir."
        )


def holds_run(config: TrainConfig, run_dir: Path) -> bool:
    """Whether to go on with the run in `run_dir`; raises FpoError where `config.resume` does not allow that."""
    begun = (run_dir / "config.json").exists()
    if begun and config.resume == "no":
        raise FpoError(f"{run_dir} already holds a run; add --resume to continue it or choose another --run-dir.")
    if begun or config.resume == "yes":
        check_resumable(read_config(run_dir), config)
    return begun


@contextlib.contextmanager
def lock(run_dir: Path, begun: bool) -> Iterator[None]:
    """Within, no other job writes this directory; held by the first process. Raises FpoError where one does.

    `begun`: whether it held a run when this job looked.
    """
    if not hosts.is_first():
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".in_use").open("w") as file:  # a sweep has a lock of its own, for its trials
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FpoError(f"Another job writes {run_dir}; wait for its end, or choose another --run-dir.") from error
        except OSError:
            pass  # not every file system has locks
        if begun != (run_dir / "config.json").exists():
            raise FpoError(f"Another job has begun a run in {run_dir} meanwhile; start again with --resume auto.")
        yield


def resume_advice(run_dir: Path) -> str:
    return f"Continue with: python experiments/train.py --resume --run-dir {run_dir}"
