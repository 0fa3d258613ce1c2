"""How well one iteration of training scales: work per device and bytes exchanged, from the compiled program.

python experiments/scaling.py --out docs/scaling.md

Nothing is run: the program of an iteration is compiled for 1 to 64 simulated devices, with the environments and the
minibatch growing with them. Efficiency is that of a model, which hides no exchange behind work: time = operations /
rate + received bytes / bandwidth + collectives x latency, against one device.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from hlo_counts import Counts, count

from fpo_jax import parallel, train
from fpo_jax.algorithms import fpo
from fpo_jax.config import ParallelOptions, TrainConfig, UpdateConfig
from fpo_jax.latent import LatentSpace
from fpo_jax.policies.openpi import OpenpiPolicy
from fpo_jax.policies.openpi_configs import OPENPI_CONFIGS
from fpo_jax.policies.pi0 import param_shapes
from fpo_jax.policies.transforms import NormStats
from fpo_jax.rollout import System
from fpo_jax.runs import build
from fpo_jax.types import EnvSpec, EnvState, FpoError, Observation

PI0_PROMPT_TOKENS = 6  # of "Transfer cube"


@dataclass(frozen=True)
class Args:
    """What to compile, and the machine of the model."""

    bases: tuple[Literal["pi0", "pi0_fsdp", "small"], ...] = ("pi0", "small")
    """pi0: full size, on one 224-pixel camera; pi0_fsdp: split over the 8 devices of a host; small: the shipped one."""
    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of devices."""
    out: Path | None = None
    """Write the tables to this file too."""
    teraflops: float = 400.0
    """Sustained rate of a device [1e12 operations per second]."""
    host_devices: int = 8
    """Devices in a host."""
    inside: float = 300.0
    """Bandwidth between the devices of a host [GB/s per device]."""
    between: float = 50.0
    """Bandwidth between hosts [GB/s per device]; all exchanges have it as soon as there are two hosts."""
    latency: float = 20.0
    """Of one collective [µs]."""


class Elsewhere:
    """ALOHA with simulators that take no time: a constant picture and state."""

    def __init__(self, image_size: int):
        self.size = image_size
        self.spec = EnvSpec("aloha_elsewhere", 14, 14, 0, episode_length=300, execute_steps=50, control_hz=50.0)

    def reset(self, keys: jax.Array) -> EnvState:
        return self._state(keys, jnp.zeros(len(keys), jnp.int32))

    def step(self, state: EnvState, chunk: jax.Array) -> EnvState:
        return self._state(state.key, jnp.where(state.done, 0, state.control_steps + self.spec.execute_steps))

    def _state(self, keys: jax.Array, steps: jax.Array) -> EnvState:
        num, nobody = len(keys), steps < 0
        images = {"top": jnp.zeros((num, self.size, self.size, 3), jnp.uint8)}
        seen = Observation(jnp.zeros((num, 14)), images=images)
        over = steps >= self.spec.episode_length
        return EnvState((), seen, jnp.zeros(num), nobody, over, nobody, nobody, steps, 0 * steps, keys)


def pi0_system(config: TrainConfig) -> tuple[System, Any]:
    """π0 at full size with the shapes of its weights."""
    openpi = OPENPI_CONFIGS["pi0_aloha_sim"]
    base = OpenpiPolicy(openpi, ("top",), tuple(range(PI0_PROMPT_TOKENS)))
    space = LatentSpace(config.latent.space, base.horizon, base.output_dim, config.latent.rank)
    vector: Any = jax.ShapeDtypeStruct((base.output_dim,), jnp.float32)
    norm = NormStats(vector, vector, vector, vector)
    weights = {"model": param_shapes(openpi.model), "norm": {"state": norm, "actions": norm}}
    return System(config, Elsewhere(base.image_size), base, space, fpo), weights


def compiled(base: str, devices: int) -> str:
    """The program of one iteration on so many devices: environments and minibatch grow with them."""
    fsdp = min(devices, 8) if base == "pi0_fsdp" else 1
    per_device = 64 if base == "small" else 16
    num_envs = per_device * devices
    update = replace(UpdateConfig(), minibatch_size=2 * num_envs)  # as by default: 64 environments, minibatches of 128
    config = TrainConfig(num_envs=num_envs, update=update)
    mesh = parallel.make_mesh(ParallelOptions(devices=devices, fsdp=fsdp), num_envs)
    with parallel.using(mesh):
        if base == "small":
            system, params = build(config)
            params = jax.eval_shape(lambda: params)
        else:
            system, params = pi0_system(config)
        state = parallel.placed(jax.eval_shape(partial(train.init, system), params), train.PLACES)
        params = parallel.placed(params, parallel.weight_specs(params))
        iterate = parallel.jit(partial(train.train_iteration, system), (train.PLACES, parallel.EVERYWHERE))
        return iterate.lower(params, state).compile().as_text()


def seconds(args: Args, counts: Counts, devices: int) -> tuple[float, float, float]:
    """(work, exchange, latency) of an iteration by the model."""
    bandwidth = args.inside if devices <= args.host_devices else args.between
    number = sum(counts.collectives.values())
    return counts.flops / args.teraflops / 1e12, counts.bytes / bandwidth / 1e9, number * args.latency * 1e-6


HEAD = (
    "| devices | environments | operations per device [1e12] | against one device | all-reduce [MB] | all-gather [MB] "
    "| other [MB] | collectives | efficiency | with latency |\n" + "|---" * 10 + "|"
)


def row(args: Args, base: str, devices: int, counts: Counts, alone: Counts) -> str:
    """A line of the table."""
    one = sum(seconds(args, alone, 1))
    work, exchange, latency = seconds(args, counts, devices)
    megabytes = {kind: size / 1e6 for kind, size in counts.received.items()}
    reduced, gathered = megabytes.pop("all-reduce", 0.0), megabytes.pop("all-gather", 0.0)
    cells = [
        *(devices, (64 if base == "small" else 16) * devices, f"{counts.flops / 1e12:.4g}"),
        *(f"{counts.flops / alone.flops:.4f}", f"{reduced:.1f}", f"{gathered:.1f}", f"{sum(megabytes.values()):.1f}"),
        *(sum(counts.collectives.values()), f"{one / (work + exchange):.3f}"),
        f"{one / (work + exchange + latency):.3f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")  # simulated devices, also where there is a GPU
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if args.out is not None:
            args.out.write_text("\n".join(lines) + "\n")

    for base in args.bases:
        say(f"\n{base}\n\n{HEAD}")
        alone = count(compiled(base, 1), 1)
        for devices in args.devices:
            counts = alone if devices == 1 else count(compiled(base, devices), devices)
            say(row(args, base, devices, counts, alone))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
