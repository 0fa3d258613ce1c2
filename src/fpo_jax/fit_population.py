"""The host side of a population: a run directory that holds one of each member, `member_00`, `member_01`, ...

Members' directories are those of runs of their own: `evaluate.py`, `steerability.py` and `train.py --resume` read them.
"""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fpo_jax import checkpoint, hosts, population, train
from fpo_jax.config import ParallelOptions, PopulationOptions, TrainConfig, check, to_dict
from fpo_jax.evaluate import Evaluator, compare
from fpo_jax.fit import Run, RunStopped, learning_curve
from fpo_jax.metrics import Interval, ProgressLine, RunLogger, read_jsonl
from fpo_jax.provenance import tree_crc32, write_json, write_provenance
from fpo_jax.rollout import FrozenBase, System
from fpo_jax.runs import build, check_base, default_run_dir, holds_run, lock, resume_advice, settled
from fpo_jax.saver import Saver
from fpo_jax.signals import StopSignal, exit_code, stop_signals
from fpo_jax.train import TrainState
from fpo_jax.types import FpoError, Params

_take = jax.jit(population.member)


def is_population(config: TrainConfig) -> bool:
    return config.population != PopulationOptions()


def fit(config: TrainConfig, console: Any = None) -> dict[str, Any]:
    """Train all members, then evaluate each against the base; returns `summary.json`.

    Raises FpoError for what the user can mend, RunStopped after a signal, with all members saved.
    """
    check(config)
    with stop_signals() as stop, ExitStack() as stack:
        return _fit(config, console, stop, stack)


def _fit(config: TrainConfig, console: Any, stop: StopSignal, stack: ExitStack) -> dict[str, Any]:
    if config.parallel != ParallelOptions() or hosts.tasks_announced(os.environ) > 1:
        raise FpoError("A population is trained by one process on one device: leave --parallel.* out, and srun too.")
    config = settled(config)
    # The process may be killed between two members' checkpoints: the ones before are needed then.
    config = replace(config, saving=replace(config.saving, keep=max(config.saving.keep, 2)))
    if config.saving.wandb:
        raise FpoError("Weights & Biases logs one run per process: leave --saving.wandb out for a population.")
    run_dir = Path(config.run_dir or default_run_dir(config))
    configs = population.members(config)
    folders = [run_dir / f"member_{index:02}" for index in range(len(configs))]
    configs = [replace(one, run_dir=str(folder)) for one, folder in zip(configs, folders, strict=True)]
    begun = holds_run(config, run_dir)
    if begun and (result := _finished(config, run_dir)):
        if console:
            console.print(f"{run_dir} is finished; nothing is left to do.", markup=False, soft_wrap=True)
        return result
    system, base_params = build(config)
    state = None if begun else population.init(system, base_params, configs)
    stack.enter_context(lock(run_dir, begun))  # not before: a mistake leaves no directory
    for folder in folders:
        stack.enter_context(lock(folder, (folder / "config.json").exists()))
    step, state = (None, state) if state is not None else _restore(system, base_params, folders, config.iterations)
    for stale in (run_dir / "summary.json", *(folder / "evaluation.json" for folder in folders)):
        stale.unlink(missing_ok=True)
    saver = stack.enter_context(Saver(6 * len(configs)))
    runs = [_open(one, step, saver, stack) for one in configs]
    if step is None:
        _save(runs, state)
        saver.wait()
    base_crc32 = tree_crc32(base_params)
    for run in runs:
        write_provenance(run.run_dir, base_crc32, system.env.spec.protocol)
        write_json(run.run_dir / "config.json", to_dict(run.config))
    write_json(run_dir / "config.json", to_dict(replace(config, resume="no")))
    progress = ProgressLine(config.iterations, start=step or 0, console=console or Console(quiet=True))
    stack.callback(progress.close)
    begin = f"resuming after iteration {step}" if step else "compiling the first iteration"
    progress.print(f"{len(runs)} members with {config.num_envs} environments each in {run_dir}; {begin} ...")
    with stop.deferred():
        state = _loop(system, base_params, state, runs, progress, stop)
        saver.wait()
        if stop.received:
            _save(runs, state)
            saver.wait()
            sentence = f"Stopped by {stop.received.name}; all members are saved in {run_dir}. {resume_advice(run_dir)}"
            raise RunStopped(sentence, exit_code(stop.received))
    stop.at_once = True  # nothing that is still to come has to be saved
    return _finish(system, base_params, state, runs, run_dir)


def _finished(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """The summary of a population that is at its end; with `resume="yes"` that is an error."""
    path = run_dir / "summary.json"
    if not path.exists() or (summary := json.loads(path.read_text()))["iterations"] < config.iterations:
        return None
    if config.resume == "yes" or summary["iterations"] > config.iterations:
        raise FpoError(f"{run_dir} already has {summary['iterations']} iterations; give a larger --iterations.")
    return summary


def _restore(system: System, base_params: Params, folders: list[Path], iterations: int) -> tuple[int, TrainState]:
    """All members at the newest step of which every one has a whole checkpoint.

    Raises FpoError where there is none, where it lies behind the last of `iterations`, and where the base is another.
    """
    check_base(folders[0], base_params)
    like = jax.eval_shape(partial(train.init, system), base_params)
    common = set.intersection(*(set(checkpoint.steps(folder)) for folder in folders))
    for step in sorted(common, reverse=True):
        if all(checkpoint.is_whole(folder, step) for folder in folders):
            if step > iterations:
                raise FpoError(f"{folders[0].parent} already has {step} iterations; give a larger --iterations.")
            state = population.stack([checkpoint.restore(folder, step, like) for folder in folders])
            for folder in folders:  # what only some have would outlive what all have
                checkpoint.forget_later(folder, step)
            return step, state
    raise FpoError(f"The members in {folders[0].parent} have no whole checkpoint in common; start again elsewhere.")


def _open(config: TrainConfig, step: int | None, saver: Saver, stack: ExitStack) -> Run:
    assert config.run_dir is not None
    logger = RunLogger(
        config.run_dir,
        iterations=config.iterations,
        resumed_iteration=step,
        tensorboard=config.saving.tensorboard,
        console=Console(quiet=True, force_terminal=False),
    )
    stack.enter_context(logger)
    run = Run(config, Path(config.run_dir), logger, saver)
    run.replay(read_jsonl(logger.metrics_path))
    return run


def _save(runs: list[Run], state: TrainState) -> None:
    for index, run in enumerate(runs):
        run.save(_take(state, index))


def _loop(
    system: System, base_params: Params, state: TrainState, runs: list[Run], progress: ProgressLine, stop: StopSignal
) -> TrainState:
    """Iterations until the last one or a signal. A member that breaks down is marked and goes on beside the others."""
    iterate = jax.jit(partial(population.iteration, system))
    values = population.differing([run.config for run in runs])
    for _ in range(int(state.iteration[0]), system.config.iterations):
        began, before = time.perf_counter(), state
        state, metrics = iterate(base_params, values, before)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        for index, run in enumerate(runs):
            record = {name: column[index].item() for name, column in metrics.items()}
            reason = run.note(record)
            run.logger.log(record | {"iteration_seconds": seconds})
            if reason and not (path := run.run_dir / "stopped.json").exists():
                write_json(path, {"iteration": record["iteration"], "reason": reason})
                progress.print(f"{run.run_dir.name}: {reason}")
            if run.due(record["iteration"]):
                run.save_what_is_due(_take(before, index), _take(state, index))
        progress.update(_together(metrics))
        if stop.received:
            break
    return state


def _together(metrics: dict[str, np.ndarray]) -> dict[str, int | float]:
    """One line for all members: their mean success, their episodes and steps."""
    rates = metrics["success_rate"]
    return {
        "iteration": int(metrics["iteration"][0]),
        "episodes": int(metrics["episodes"].sum()),
        "env_steps": int(metrics["env_steps"].sum()),
        "success_rate": float(np.nanmean(rates)) if np.isfinite(rates).any() else float("nan"),
    }


def _finish(system: System, base_params: Params, state: TrainState, runs: list[Run], run_dir: Path) -> dict[str, Any]:
    """Paired evaluation and learning curve of each member, and the summary of all."""
    settings = system.config.evaluation
    values = population.differing([run.config for run in runs])
    results: list[dict[str, Any] | None] = [None] * len(runs)
    interval = None
    if settings.episodes:
        evaluator = Evaluator(system, FrozenBase(base_params), settings.episodes, settings.seed)
        base = evaluator.play_base()
        for index, run in enumerate(runs):
            own = replace(system, config=run.config) if values else system  # seeds alone share a compiled evaluation
            result = compare(base, evaluator.play(_take(state.agent, index), own), system.env.spec)
            write_json(run.run_dir / "evaluation.json", result)
            interval = Interval(*(result["base"][name] for name in ("success_rate", "low", "high")))
            results[index] = result
    for run in runs:
        learning_curve(run, interval)
    settings_of = [{name: float(column[index]) for name, column in values.items()} for index in range(len(runs))]
    rows = [_row(*of_member) for of_member in zip(runs, settings_of, results, strict=True)]
    summary = {"iterations": system.config.iterations, "members": rows}
    write_json(run_dir / "summary.json", summary)
    return summary


def _row(run: Run, settings: dict[str, float], result: dict[str, Any] | None) -> dict[str, Any]:
    """What the summary says of one member: its training success is that of its last iterations."""
    records = read_jsonl(run.logger.metrics_path)
    rates = [rate for record in records[-5:] if (rate := record["success_rate"]) is not None]
    stopped = run.run_dir / "stopped.json"
    return {
        "member": run.run_dir.name,
        "seed": run.config.seed,
        "settings": settings,
        "training_success": float(np.mean(rates)) if rates else None,
        "episodes": records[-1]["episodes"],
        "stopped": json.loads(stopped.read_text())["reason"] if stopped.exists() else None,
        "evaluation": result,
    }


def report(summary: dict[str, Any]) -> str:
    """The summary in words, a line for each member."""
    lines = []
    for row in summary["members"]:
        settings = ", ".join(f"{name} {value:.3g}" for name, value in row["settings"].items())
        parts = [f"{row['member']} (seed {row['seed']}{', ' if settings else ''}{settings})"]
        if (rate := row["training_success"]) is not None:
            parts.append(f"last iterations {rate:.3f}")
        if row["evaluation"]:
            tuned, d = row["evaluation"]["tuned"], row["evaluation"]["difference"]
            parts.append(f"tuned {tuned['success_rate']:.3f} [{tuned['low']:.3f}, {tuned['high']:.3f}]")
            parts.append(f"tuned - base {d['success_rate']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
        if row["stopped"]:
            parts.append(row["stopped"])
        lines.append(": ".join([parts[0], "; ".join(parts[1:])]))
    return "\n".join(lines)
