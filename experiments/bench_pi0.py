"""How fast, and how large: the frozen π0 and π0.5, against what the machine can do at best in the same run.

python experiments/bench_pi0.py

python experiments/bench_pi0.py --model dummy-so400m --batch-sizes 1 --repeats 3   # minutes on two CPU cores

python experiments/bench_pi0.py --model pi05 --batch-sizes 1 8 32 64               # on a GPU, in bfloat16

Four programs are timed in turns (A B C D A B C D ...), and with them a large matrix product and the reading of a large
array, which are the machine's limits: *encode* (three images and the prompt, once per observation), the same with one
image, *decode* (ten Euler steps for one noise per observation), and the same for four noises on one context. Rates and
ratios are per CPU second of the whole process on a CPU, which may be busy with other things, and per second elsewhere.
Every figure becomes a line of benchmarks/<machine>.jsonl.

Operations and bytes are counted by hand: 2 operations per weight and token, 4 per query-key pair and channel; and the
least traffic, i.e. weights, inputs and results once (by decode: once per Euler step). XLA's own count stands beside it
as a check; where XLA counts the body of a loop once, so does the hand count that it is divided by.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench import circumstances, default_machine, measure_and_append, peak_memory, timed
from bench_pi0_counts import STEPS, Work, decode_work, encode_work, loops_once, xla_counts_loops
from rich.console import Console
from rich.table import Table

from fpo_jax.policies.pi0 import CAMERAS, Pi0, Pi0Config, param_shapes, sample_actions
from fpo_jax.types import FpoError, Params

Record = dict[str, Any]

MODELS = {
    "pi0": Pi0Config(),
    "pi05": Pi0Config(pi05=True),
    "dummy-ti": Pi0Config(paligemma="dummy", expert="dummy", image_tower="Ti/14"),
    "dummy-so400m": Pi0Config(paligemma="dummy", expert="dummy"),
}
LATENTS = 4  # noises on one context
CAMERAS_TARGET = 0.45  # most time of encode with one camera, as a multiple of that with three
ENCODE, ONE_CAMERA, DECODE, SEVERAL = "encode", "encode 1 camera", "decode", f"decode {LATENTS} latents"
# Edge of the matrix product and size of the read array [bytes] that show the machine's limits.
LIMIT_SIZES = {"cpu": (2048, 2**28), "accelerator": (12288, 2**30)}
# CPU seconds of openpi's own `sample_actions`: batch 1, 3 cameras, 48 prompt tokens, 10 steps, float32.
REFERENCE = {"dummy-ti": 0.32, "dummy-so400m": 7.9}
REFERENCE_SOURCE = "reference table (openpi 15a9616, two busy cores of another machine; not measured here)"


@dataclass(frozen=True)
class Args:
    out: Path = Path("benchmarks")
    """Directory of the result file."""
    machine: str | None = None
    """Name of the result file; by default the kind of machine, e.g. cpu-2core-x86_64 or nvidia-h200."""
    model: Literal["pi0", "pi05", "dummy-ti", "dummy-so400m"] | None = None
    """pi0 and pi05 in their real sizes; dummy-*: tiny language models with the image tower Ti/14 or So400m/14. By
    default dummy-ti on a CPU, else pi0."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and activations; by default float32 on a CPU, else bfloat16."""
    batch_sizes: tuple[int, ...] | None = None
    """Observations per call, measured in rising order; by default 1 8 on a CPU, else 1 8 32 64. The option without a
    value only loads --checkpoint."""
    prompt_tokens: int | None = None
    """Tokens of the prompt; by default as many as openpi pads to (pi0 48, pi05 200)."""
    repeats: int | None = None
    """Rounds; the figures are medians over them. By default 5 on a CPU, else 20."""
    checkpoint: Path | None = None
    """Directory of an openpi checkpoint of --model: loading it is measured too, and its weights take the place of
    random ones."""


def resolve(args: Args) -> Args:
    """Fills in what depends on the machine. Raises FpoError."""
    if jax.default_backend() == "cpu":
        defaults = {"model": "dummy-ti", "dtype": "float32", "batch_sizes": (1, 8), "repeats": 5}
    else:
        defaults = {"model": "pi0", "dtype": "bfloat16", "batch_sizes": (1, 8, 32, 64), "repeats": 20}
    defaults["prompt_tokens"] = MODELS[args.model or defaults["model"]].max_token_len
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    for name in ("batch_sizes", "prompt_tokens", "repeats"):
        if np.min(getattr(args, name), initial=1) < 1:
            raise FpoError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if not args.batch_sizes and args.checkpoint is None:
        raise FpoError("There is nothing to measure: give --batch-sizes or --checkpoint.")
    return args


# --- programs -------------------------------------------------------------------------------------------------------


class Program:
    """A function compiled for its inputs; calling it waits for the result."""

    def __init__(self, function: Callable, inputs: tuple, work: Work, by_xla: Work | None = None) -> None:
        """work: counted by hand; by_xla: the same, loops counted as XLA does."""
        self.inputs, self.work, self.by_xla = inputs, work, by_xla or work
        self.compiled, _, self.compile_seconds = timed(lambda: jax.jit(function).lower(*inputs).compile())

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.inputs))


def random_params(config: Pi0Config) -> Params:
    """Small normal weights, made on the device; with equal numbers a GPU would draw less power and clock higher."""
    leaves, tree = jax.tree.flatten(param_shapes(config))
    fill = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, config.dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    return jax.tree.unflatten(tree, [fill(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def observation(config: Pi0Config, batch: int, cameras: int, prompt: int) -> tuple:
    """What `Pi0.prefix` takes: all valid."""
    shape = (batch, config.image_size, config.image_size, 3)
    images = {n: jax.random.uniform(jax.random.key(i), shape, minval=-1.0) for i, n in enumerate(CAMERAS[:cameras])}
    ids = jax.random.randint(jax.random.key(3), (batch, prompt), 0, config.vocab_size)
    return images, dict.fromkeys(images, jnp.ones(batch, bool)), ids, jnp.ones((batch, prompt), bool)


def programs(args: Args, config: Pi0Config, params: Params, batch: int) -> dict[str, Program]:
    """The four programs, run once. Raises JaxRuntimeError where they don't fit into memory."""
    model, prompt = Pi0(config), args.prompt_tokens or 0
    small, steps = (config, STEPS) if xla_counts_loops() else (loops_once(config), 1)

    def encode(params: Params, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs, method=Pi0.prefix)

    def decode(params: Params, prefix: Any, state: jax.Array, noise: jax.Array) -> jax.Array:
        return sample_actions(model, params, prefix, state, noise, STEPS)

    found = {}
    for name, cameras in ((ONE_CAMERA, 1), (ENCODE, len(CAMERAS))):
        work = [encode_work(counted, batch, cameras, prompt) for counted in (config, small)]
        found[name] = Program(encode, (params, *observation(config, batch, cameras, prompt)), *work)
        context, _ = found[name]()  # in the end, of all cameras
    length = context.mask.shape[1]
    state = jnp.zeros((batch, config.action_dim))
    noise = jax.random.normal(jax.random.key(4), (LATENTS, batch, config.horizon, config.action_dim))
    several = jax.vmap(decode, in_axes=(None, None, None, 0))
    for name, function, noises, num in ((DECODE, decode, noise[0], 1), (SEVERAL, several, noise, LATENTS)):
        work = decode_work(config, batch, length, num), decode_work(small, batch, length, num, steps)
        found[name] = Program(function, (params, context, state, noises), *work)
        if not jnp.isfinite(found[name]()).all():
            raise FpoError("The model's actions are not finite: these weights can't be used.")
    return found


def limit_programs(dtype: str) -> dict[str, Program]:
    """What this machine can do at best; run once."""
    edge, size = LIMIT_SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    matrix = jax.random.normal(jax.random.key(5), (edge, edge), dtype)
    array = jnp.ones((size // 1024, 256), jnp.float32)
    found = {
        "matmul": Program(jnp.matmul, (matrix, matrix), Work(2 * edge**3, 3 * matrix.nbytes)),
        "read": Program(partial(jnp.sum, axis=1), (array,), Work(array.size, array.nbytes)),
    }
    take_turns(found, 1)
    return found


# --- measurements ---------------------------------------------------------------------------------------------------

Times = dict[str, list[tuple[float, float]]]  # (CPU seconds, wall seconds) of each program in each round


def clock() -> tuple[int, str]:
    """Which of the two times rates and ratios use, and its name."""
    return (0, "CPU second") if jax.default_backend() == "cpu" else (1, "second")


def take_turns(entrants: dict[str, Program], repeats: int) -> Times:
    rounds = [{name: timed(program)[1:] for name, program in entrants.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in entrants}


def limits(times: Times, entrants: dict[str, Program]) -> Record:
    """The best round of each."""
    column, per = clock()
    matmul, read = (min(both[column] for both in times[name]) for name in ("matmul", "read"))
    return {
        "measurement": "pi0_limits",
        "per": per,
        "matmul_edge": len(entrants["matmul"].inputs[0]),
        "flops_per_second": entrants["matmul"].work.flops / matmul,
        "bytes_per_second": entrants["read"].work.bytes / read,
    }


def latency(name: str, program: Program, times: list[tuple[float, float]], limit: Record) -> Record:
    """Times of one program, its rates, and how near they come to the limits."""
    cpu, wall = np.median(times, axis=0).tolist()
    seconds = (cpu, wall)[clock()[0]]
    rates = {"flops_per_second": program.work.flops / seconds, "bytes_per_second": program.work.bytes / seconds}
    compute, memory = (rates[name] / limit[name] for name in rates)
    used, xla = program.compiled.memory_analysis(), program.compiled.cost_analysis() or {}
    sizes = (used.argument_size_in_bytes, used.output_size_in_bytes, used.temp_size_in_bytes) if used else None
    return {
        "measurement": "pi0_latency",
        "program": name,
        "seconds": wall,
        "lowest_seconds": min(both[1] for both in times),
        "cpu_seconds": cpu,
        "compile_seconds": program.compile_seconds,
        "count": "by hand",  # of the next two, from which the rates and ratios come
        **program.work._asdict(),
        "per": limit["per"],
        **rates,
        "ratio_to_matmul": compute,
        "ratio_to_bandwidth": memory,
        "binding_limit": "compute" if compute > memory else "memory",
        "xla_flops": xla.get("flops"),
        "xla_bytes": xla.get("bytes accessed"),
        "xla_counts_loops": xla_counts_loops(),
        "xla_flops_ratio": xla["flops"] / program.by_xla.flops if "flops" in xla else None,  # near 1: the counts agree
        "program_bytes": sum(sizes) if sizes else None,  # weights, inputs, results and scratch
    }


def ratios(times: Times) -> list[Record]:
    """One camera against three, and several latents on one context against as many encodes and decodes."""
    column, per = clock()
    encode, one, decode, several = (np.array(times[n])[:, column] for n in (ENCODE, ONE_CAMERA, DECODE, SEVERAL))
    compared = [
        (ONE_CAMERA, ENCODE, one / encode, CAMERAS_TARGET),
        (SEVERAL, f"{LATENTS} x (encode + decode)", several / (LATENTS * (encode + decode)), None),
    ]
    found = []
    for program, to, values, target in compared:
        spread = dict(zip(("lowest", "ratio", "highest"), np.quantile(values, (0, 0.5, 1)).tolist(), strict=True))
        found.append({"measurement": "pi0_ratio", "program": program, "to": to, "per": per, **spread, "target": target})
    return found


def chunk(args: Args, batch: int, times: Times) -> Record:
    """From images to actions, beside openpi's own figure where there is one."""
    cpu, wall = np.median(np.array(times[ENCODE]) + np.array(times[DECODE]), axis=0).tolist()
    same = (jax.default_backend(), batch, args.prompt_tokens, args.dtype) == ("cpu", 1, 48, "float32")
    reference = REFERENCE.get(args.model or "") if same else None
    source = {"reference_cpu_seconds": reference, "reference": REFERENCE_SOURCE if reference else None}
    return {"measurement": "pi0_chunk", "cpu_seconds": cpu, "seconds": wall, **source}


def one_batch(args: Args, config: Pi0Config, params: Params, batch: int) -> list[Record]:
    """All measurements at one batch size."""
    ours = programs(args, config, params, batch)
    memory = peak_memory()  # by now all four have run, and the limits' arrays don't exist yet
    entrants = ours | limit_programs(config.dtype)
    times = take_turns(entrants, args.repeats or 1)
    limit = limits(times, entrants)
    records = [limit, *(latency(name, ours[name], times[name], limit) for name in ours)]
    records += [*ratios(times), chunk(args, batch, times), {"measurement": "pi0_memory", **memory}]
    return [record | {"batch_size": batch} for record in records]


def load(config: Pi0Config, directory: Path) -> tuple[Params, Record]:
    """(weights, time and memory of loading them)."""
    from fpo_jax.policies.openpi_checkpoint import restore_params

    before, shapes = peak_memory(), param_shapes(config)
    path, dtype = directory.absolute(), jnp.dtype(config.dtype)
    params, cpu, wall = timed(lambda: jax.block_until_ready(restore_params(path, shapes, dtype=dtype)))
    about = {"measurement": "pi0_load", "checkpoint": directory.name, "cpu_seconds": cpu, "seconds": wall}
    return params, about | {"peak_host_bytes_before": before["peak_host_bytes"], **peak_memory()}


def bench(args: Args, console: Console) -> list[Record]:
    """All records, in the order in which they were measured; `args` as `resolve` gives them. Raises FpoError."""
    about = circumstances(args.machine or default_machine())  # first: its load is that of others
    config, records = replace(MODELS[args.model or ""], dtype=args.dtype or ""), []
    if args.checkpoint is None:
        console.print(f"Making the weights of {args.model} in {config.dtype}")
        params = random_params(config)
    else:
        console.print(f"Loading {args.checkpoint}", markup=False)
        params, record = load(config, args.checkpoint)
        records.append(record)
    for batch in sorted(args.batch_sizes or ()):
        console.print(f"Batch size {batch}: compiling, then {args.repeats} rounds")
        try:
            records += one_batch(args, config, params, batch)
        except jax.errors.JaxRuntimeError as error:  # too large for the memory: so are all larger ones
            console.print(f"Left out, with all larger ones: {str(error).splitlines()[0]}", markup=False)
            break
    about |= {"cameras": len(CAMERAS), "steps": STEPS}
    names = ("model", "dtype", "prompt_tokens", "repeats")
    return [about | {name: getattr(args, name) for name in names} | record for record in records]


# --- report ---------------------------------------------------------------------------------------------------------


COLUMNS = {
    "limits": ("batch_size", "per", "flops_per_second", "bytes_per_second"),
    "latency": (
        *("batch_size", "program", "seconds", "lowest_seconds", "cpu_seconds", "flops_per_second", "ratio_to_matmul"),
        *("bytes_per_second", "ratio_to_bandwidth", "binding_limit", "xla_flops_ratio", "program_bytes"),
    ),
    "ratio": ("batch_size", "program", "to", "per", "ratio", "lowest", "highest", "target"),
    "chunk": ("batch_size", "seconds", "cpu_seconds", "reference_cpu_seconds", "reference"),
    "memory": ("batch_size", "peak_host_bytes", "peak_device_bytes"),
    "load": ("seconds", "cpu_seconds", "peak_host_bytes_before", "peak_host_bytes", "peak_device_bytes"),
}


def show(console: Console, records: list[Record]) -> None:
    """The same figures as tables."""

    def cell(value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        unit, name = next(((unit, name) for unit, name in ((1e9, " G"), (1e6, " M")) if value >= unit), (1, ""))
        return f"{value / unit:.3g}{name}"

    for kind, columns in COLUMNS.items():
        table = Table(*(name.replace("_", " ") for name in columns), title=kind)
        for record in records:
            if record["measurement"] == f"pi0_{kind}":
                table.add_row(*(cell(record[name]) for name in columns))
        if table.row_count:
            console.print(table)


def main(arguments: list[str]) -> int:
    args, console = tyro.cli(Args, args=arguments, description=__doc__), Console(width=128)
    path = args.out / f"{args.machine or default_machine()}.jsonl"
    return measure_and_append(path, console, lambda: bench(resolve(args), console), show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
