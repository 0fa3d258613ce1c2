"""The host side of training: run directory, checkpoints, resume, signals, progress, final evaluation.

Everything that learns is in `train.py`; this file only calls it, once per iteration.
"""

import json
import math
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fpo_jax import analysis, checkpoint, hosts, parallel, train
from fpo_jax.config import ParallelOptions, TrainConfig, check, to_dict
from fpo_jax.evaluate import EpisodeLog, Evaluator, Outcomes, compare
from fpo_jax.health import COLLAPSE_WINDOW, failure
from fpo_jax.metrics import Interval, RunLogger, now_and_then, read_jsonl
from fpo_jax.provenance import write_json, write_provenance
from fpo_jax.rollout import FrozenBase, System
from fpo_jax.runs import build, default_run_dir, holds_run, load_run, lock, resume_advice, settled, whole_crc32
from fpo_jax.saver import Saver
from fpo_jax.signals import StopSignal, exit_code, stop_signals
from fpo_jax.train import TrainState
from fpo_jax.types import FpoError, HostedEnv, Params
from fpo_jax.video import record_comparison


class RunStopped(FpoError):
    """Training ended before its last iteration, with its state saved; the sentence says why and how to go on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


_FAILED = 2  # exit code


class Run:
    """One training run: its directory, its logger, what it saves and when."""

    def __init__(self, config: TrainConfig, run_dir: Path, logger: RunLogger, saver: Saver):
        self.config, self.run_dir, self.logger, self.saver = config, run_dir, logger, saver
        self.saved: int | None = None  # the newest rolling checkpoint of this process
        # After `--resume yes` of this start only: a run that goes on after a collapse is not judged by what was before.
        self.recent: deque[Mapping[str, float]] = deque(maxlen=COLLAPSE_WINDOW)
        self.newest_rates: deque[float] = deque(maxlen=3)
        self.first_rates: list[float] = []  # success of the first three iterations in which an episode ended
        self.best_rate = -1.0

    def note(self, record: Mapping[str, float]) -> str | None:
        """Take a record into the books; returns why the run should stop, or None."""
        self.recent.append(record)
        self._note_rate(record["success_rate"])
        return failure(self.recent, float(np.mean(self.first_rates or [0.0])))

    def _note_rate(self, rate: float) -> None:
        self.newest_rates.append(rate)
        if len(self.first_rates) < 3 and math.isfinite(rate):
            self.first_rates.append(rate)

    def replay(self, records: list[dict[str, Any]]) -> None:
        """Take up the books of the iterations before a resume."""
        for record in records:
            record = {name: math.nan if value is None else value for name, value in record.items()}
            if self.config.resume == "auto":
                self.recent.append(record)
            self._note_rate(record["success_rate"])
            self.best_rate = max(self.best_rate, self._recent_rate())

    def _recent_rate(self) -> float:
        rates = [rate for rate in self.newest_rates if math.isfinite(rate)]
        return float(np.mean(rates)) if len(rates) == 3 else -1.0

    def save(self, state: TrainState, shelf: checkpoint.Shelf = "checkpoints") -> None:
        step, keep = int(state.iteration), None
        if shelf == "checkpoints":
            if step == self.saved:
                return
            self.saved, keep = step, self.config.saving.keep
        self.saver.save(self.run_dir, step, state, shelf=shelf, keep=keep, config=to_dict(self.config))

    def due(self, step: int) -> set[str]:
        """The shelves on which something belongs after iteration `step`."""
        saving, last = self.config.saving, step == self.config.iterations
        found = {
            "milestones": saving.milestone_every and ((step - 1) % saving.milestone_every == 0 or last),
            "best": self._recent_rate() > self.best_rate,
            "checkpoints": step % saving.every == 0 or last,
        }
        return {shelf for shelf, is_due in found.items() if is_due}

    def save_what_is_due(self, before: TrainState, state: TrainState) -> None:
        """Rolling, best and milestone checkpoints. The newest rollout of `state` was gathered by `before.agent`."""
        due = self.due(int(state.iteration))
        if "milestones" in due:
            self._save_milestone(before, state)
        if "best" in due:
            self.best_rate = self._recent_rate()
            self.save(before, "best")
        if "checkpoints" in due:
            self.save(state)

    def _save_milestone(self, before: TrainState, state: TrainState) -> None:
        names = ("state", "latent", "reward", "done", "valid")
        extra = parallel.here({name: getattr(state.window, name)[-1] for name in names})
        extra = {name: np.asarray(leaf) for name, leaf in extra.items()}
        self.saver.save(
            self.run_dir,
            int(before.iteration),
            before.agent,
            shelf="milestones",
            config=to_dict(self.config),
            extra=extra,
        )

    def stop(self, state: TrainState, reason: str, advice: str, exit_code: int) -> RunStopped:
        """Save `state`, write down why where it was no user's wish, and make the exception that ends the run."""
        self.save(state)
        self.saver.wait()
        step = int(state.iteration)
        if exit_code == _FAILED and hosts.is_first():
            write_json(self.run_dir / "stopped.json", {"iteration": step, "reason": reason})
        return RunStopped(f"{reason}; the state after iteration {step} is saved in {self.run_dir}. {advice}", exit_code)


def fit(config: TrainConfig, console: Any = None) -> dict[str, Any]:
    """Train, then evaluate base against tuned; returns the evaluation. Writes everything under `config.run_dir`.

    Raises FpoError for what the user can mend, RunStopped when the run ended early with its state saved.
    """
    check(config)
    with stop_signals() as stop:
        hosts.connect(config.parallel)
        with (
            hosts.one_for_all(RunStopped),
            parallel.using(parallel.make_mesh(config.parallel, config.num_envs)),
            ExitStack() as stack,
        ):
            return _fit(settled(config), console if hosts.is_first() else None, stop, stack)


def _fit(config: TrainConfig, console: Any, stop: StopSignal, stack: ExitStack) -> dict[str, Any]:
    run_dir = Path(config.run_dir or default_run_dir(config))
    say = console.print if console else lambda *_, **__: None
    begun = holds_run(config, run_dir)
    hosts.require_same(begun, f"whether {run_dir} holds a run: give a --run-dir that all of them share")
    result = _finished(config, run_dir) if begun and config.resume == "auto" else None
    hosts.require_same(result is not None, f"whether {run_dir} is finished: all must see the same files")
    if result is not None:
        say(f"{run_dir} is finished; nothing is left to do.", markup=False)
        return result
    if begun:
        stack.enter_context(lock(run_dir, begun))
        step, system, base_params, state = _resume(config, run_dir)
    else:
        if config.base:
            say(f"Loading the base {config.base} ...", markup=False)
        system, base_params = build(config)
        _prepare(system)
        if system.base.standardize:
            say("Playing the base once for the statistics of its features ...")
        step, state = None, _begin(system, base_params)
        stack.enter_context(lock(run_dir, begun))  # not before: a mistake leaves no directory
    with (
        Saver() as saver,
        RunLogger(
            run_dir,
            iterations=config.iterations,
            resumed_iteration=step,
            tensorboard=config.saving.tensorboard,
            wandb_project=config.saving.wandb,
            config=to_dict(config),
            console=console,
            silent=not hosts.is_first(),
        ) as logger,
    ):
        hosts.wait_for_all("the metrics file is open")
        run = Run(config, run_dir, logger, saver)
        if step is None:
            run.save(state)
            saver.wait()
        else:  # only so far: another host may still see the file as it was before its later lines were dropped
            records = [record for record in read_jsonl(logger.metrics_path) if record["iteration"] <= step]
            hosts.require_same(len(records), f"what is in {logger.metrics_path}: all must see the same files")
            run.replay(records)
        # Last of all, as it is what makes the directory a run: a start that failed before can simply be repeated.
        checksum = whole_crc32(base_params)
        if hosts.is_first():
            write_provenance(run_dir, checksum, system.env.spec.protocol)
            write_json(run_dir / "config.json", to_dict(replace(config, resume="no", parallel=ParallelOptions())))
        logger.print(_opening(system, run_dir, step))
        with stop.deferred():
            state = _loop(system, base_params, state, run, stop)
            saver.wait()
            if number := hosts.largest(stop.received or 0):
                received = signal.Signals(number)
                raise run.stop(state, f"Stopped by {received.name}", resume_advice(run_dir), exit_code(received))
        stop.at_once = True  # nothing that is still to come has to be saved
        return _finish(system, base_params, state, run)


def _prepare(system: System) -> None:
    """Raises FpoError where this machine cannot simulate the run's environments."""
    if isinstance(system.env, HostedEnv):
        system.env.prepare(system.config.num_envs)


def _begin(system: System, base_params: Params) -> TrainState:
    state = parallel.jit(partial(train.init, system), train.PLACES)(base_params)
    if state.features is not None and not np.isfinite(state.features.mean).all():
        raise FpoError(
            "The base's features have no statistics: every simulation broke in its first rollout, or they are not "
            "finite. Look at one episode of this base first, and at --render."
        )
    return state


def _finished(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """The evaluation of a run that has come to its end, for a job that is started again; else None.

    Raises FpoError where the run stopped itself: doing the same again would not help.
    """
    if (stopped := run_dir / "stopped.json").exists():
        reason = json.loads(stopped.read_text())["reason"]
        raise FpoError(f"{run_dir} stopped itself: {reason}; use --resume yes to go on all the same.")
    evaluation = run_dir / "evaluation.json"
    over = evaluation.exists() and checkpoint.latest_step(run_dir) == config.iterations
    return json.loads(evaluation.read_text()) if over else None


def _resume(config: TrainConfig, run_dir: Path) -> tuple[int, System, Params, TrainState]:
    _, system, base, state = load_run(run_dir, base_checkpoint=config.checkpoint, libero=config.libero)
    _prepare(system)
    step = int(state.iteration)
    finished = step == config.iterations and (run_dir / "evaluation.json").exists()
    if step > config.iterations or finished:
        raise FpoError(f"{run_dir} already has {step} iterations; give a larger --iterations to go on.")
    hosts.wait_for_all("the run's files are read")
    if hosts.is_first():
        for stale in ("stopped.json", "evaluation.json"):
            (run_dir / stale).unlink(missing_ok=True)
    return step, replace(system, config=config), base.params, state


def _opening(system: System, run_dir: Path, step: int | None) -> str:
    config, spec = system.config, system.env.spec
    begin = f"resuming after iteration {step}" if step else "compiling the first iteration"
    return (
        f"{config.algorithm} on {spec.name} ({type(system.env).__name__}, {jax.default_backend()}{_devices()}), preset "
        f"{config.preset}, {config.num_envs} environments, {_base_in_words(system)}latent {config.latent.space} "
        f"D={system.dims.latent}; "
        f"run directory {run_dir}; {begin} ..."
    )


def _devices() -> str:
    if jax.device_count() == 1:
        return ""
    used, count = parallel.num_devices(), hosts.num_processes()
    processes = f", {jax.local_device_count()} in the first of {count} processes" if count > 1 else ""
    return f", {used} of {jax.device_count()} devices{processes}"


def _base_in_words(system: System) -> str:
    base, config = system.base, system.config
    if not base.cameras:
        return ""
    return f"base {config.base} ({config.openpi.dtype}, sees {', '.join(base.cameras)}), "


def _loop(system: System, base_params: Params, state: TrainState, run: Run, stop: StopSignal) -> TrainState:
    """Iterations until the last one or a signal."""
    config = system.config
    iterate = parallel.jit(partial(train.train_iteration, system), (train.PLACES, parallel.EVERYWHERE))
    for _ in range(int(state.iteration), config.iterations):
        began = time.perf_counter()
        before = state
        state, metrics = iterate(base_params, before)
        record = {name: value.item() for name, value in jax.device_get(metrics).items()}
        record["iteration_seconds"] = time.perf_counter() - began
        if isinstance(system.env, HostedEnv):
            record |= hosts.total(system.env.report())
        reason = run.note(record)
        run.logger.log(record)
        if problem := _problem(system):  # this iteration lacks episodes
            raise run.stop(
                before, f"Training stopped: {problem}", f"Mend what ends them. {resume_advice(run.run_dir)}", _FAILED
            )
        if reason and "non-finite" in reason:  # the state before is the last good one: nothing newer may be saved
            raise run.stop(before, f"Training stopped: {reason}", _ADVICE, _FAILED)
        run.save_what_is_due(before, state)
        if reason and config.saving.stop_on_collapse:
            raise run.stop(state, f"Training stopped: {reason}", _ADVICE, _FAILED)
        if hosts.largest(stop.received or 0):
            break
    return state


def _problem(system: System) -> str | None:
    """Why the simulators of this process, or of another one, cannot go on; the same on all of them, or None."""
    if not isinstance(system.env, HostedEnv):
        return None
    problem = system.env.problem()
    if not hosts.largest(problem is not None):
        return None
    return problem or "The simulators of another process cannot go on"


_ADVICE = "Try a smaller --actor.learning-rate or --fpo.epsilon in a new run."


def _finish(system: System, base_params: Params, state: TrainState, run: Run) -> dict[str, Any]:
    """Paired evaluation, learning curve and video."""
    settings, first = system.config.evaluation, hosts.is_first()
    if settings.episodes == 0:
        if first:
            learning_curve(run, None)
        return {}
    run.logger.print(f"Evaluating base and tuned on the same {settings.episodes} initial states ...")
    evaluator = Evaluator(system, FrozenBase(base_params, state.features), settings.episodes, settings.seed)
    policies = {"base": (evaluator.base_agent, evaluator.base_system), "tuned": (state.agent, system)}
    with ExitStack() as stack:
        logs = [_episode_log(name, evaluator, agent, run) for name, (agent, _) in policies.items()]
        for log in logs:
            stack.enter_context(closing(log))
        base, tuned = (evaluator.play(*policy, log=log) for policy, log in zip(policies.values(), logs, strict=True))
    result = compare(base, tuned, system.env.spec)
    if first:
        write_json(run.run_dir / "evaluation.json", result)
        learning_curve(run, Interval(*(result["base"][name] for name in ("success_rate", "low", "high"))))
    if settings.video:
        _video(evaluator, base, tuned, state.agent, run)
    return result


def _episode_log(name: str, evaluator: Evaluator, agent: PyTree, run: Run) -> EpisodeLog:
    """The episodes of the evaluation, so that it goes on where it was stopped. The first process writes them."""
    about = {"seed": run.config.evaluation.seed, "episodes": evaluator.episodes, "num_envs": evaluator.batch}
    path, first = run.run_dir / f"evaluation.{name}.jsonl", hosts.is_first()
    # `anew`: episodes of an evaluation before the run went on
    open_log = partial(EpisodeLog, path, about | {"agent_crc32": whole_crc32(agent)}, anew=True)
    log = None if first else open_log(writes=False)
    hosts.wait_for_all("the episodes are read")
    log = log or open_log(now_and_then(run.logger.print))
    hosts.require_same(log.finished, f"what is in {path}: all must see the same files")
    return log


def _video(evaluator: Evaluator, base: Outcomes, tuned: Outcomes, agent: PyTree, run: Run) -> None:
    """By the first process, on one device of its own; the others wait at the end of the run."""
    seen, agent = parallel.here((evaluator.base, agent))
    if not hosts.is_first():
        return
    with parallel.using(None):
        settings = run.config.evaluation
        alone = Evaluator(evaluator.system, seen, settings.episodes, settings.seed, batch=evaluator.batch)
        try:
            record_comparison(alone, base, tuned, agent, run.run_dir / "base_and_tuned.mp4")
        except FpoError as error:
            run.logger.print(f"No video: {error}")


def learning_curve(run: Run, base: Interval | None) -> None:
    try:
        analysis.learning_curve_png(run.logger.metrics_path, run.run_dir / "learning_curve.png", base=base)
    except FpoError as error:  # a run too short for a single episode
        run.logger.print(f"No learning curve: {error}")
