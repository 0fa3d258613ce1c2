"""LIBERO with fake workers (tests/fake_worker.py), and systems on it."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fpo_jax.algorithms import fpo
from fpo_jax.config import LiberoOptions, TrainConfig
from fpo_jax.envs import libero, wire
from fpo_jax.envs.host import HostEnv
from fpo_jax.envs.workers import WorkerPool
from fpo_jax.latent import LatentSpace
from fpo_jax.rollout import System
from fpo_jax.types import LatentSample
from tiny import TINY

COMMAND = (sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_worker.py")), wire.__file__)
FAKE = LiberoOptions(start_seconds=300.0, reset_seconds=300.0, step_seconds=300.0)  # on a machine that is busy, too


def use_fake_workers(patch: pytest.MonkeyPatch, **told: Any) -> None:
    """Whatever makes LIBERO environments now starts fake workers, which read `told` (see fake_worker.py)."""
    patch.setattr(libero, "worker_command", lambda options: (COMMAND, {"assets": ""}))
    patch.setenv("FAKE_WORKER", json.dumps(told))


@contextmanager
def fake_libero(
    name: str = "libero_spatial", options: LiberoOptions = FAKE, *, told: dict[str, Any] | None = None, **settings: Any
) -> Iterator[HostEnv]:
    """An environment whose workers end with the block; a short one unless told otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        use_fake_workers(patch, **(told or {}))
        env = libero.make_libero(name, options=options, **{"episode_length": 12, "execute_steps": 3} | settings)
        try:
            yield env
        finally:
            env.close()


def pool_of(env: HostEnv) -> WorkerPool:
    assert isinstance(env.vector, WorkerPool)
    return env.vector


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What all workers wrote."""
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z"
    except OSError:
        return False


class NoisyBase(SimpleNamespace):
    """A base that sees position and goal and heads there, but for the noise."""

    horizon, action_dim, output_dim, feature_dim = 4, 7, 7, 4
    standardize, cameras, image_size = False, (), 0

    def encode(self, params, observation):
        seen = jnp.concatenate([observation.proprio[:, :2], observation.object_pose[:, :2]], axis=-1)
        return seen, seen

    def decode(self, params, context, noise):
        towards = jnp.pad(context[:, 2:] - context[:, :2], ((0, 0), (0, 5)))
        return 0.6 * noise + 0.4 * towards[:, None]


def base_system(env: HostEnv, config: TrainConfig | None = None, base: Any = None) -> System:
    """A system whose algorithm draws every latent from N(0, I) and has no agent (None)."""

    def act(config, agent, state, keys):
        latent = jax.vmap(lambda key: jax.random.normal(key, (28,)))(keys)
        return LatentSample(latent, jnp.zeros((len(keys), 0)), keys)

    space = LatentSpace("full", 4, 7)
    return System(config or TINY, env, base or NoisyBase(), space, SimpleNamespace(act=act))


def fpo_system(env: HostEnv, config: TrainConfig, base: Any = None) -> System:
    return System(config, env, base or NoisyBase(), LatentSpace("dct", 4, 7, 1), fpo)


LIBERO = replace(TINY, env="libero_spatial", libero=FAKE, episode_length=12, execute_steps=3)
assert os.path.exists(COMMAND[3])
