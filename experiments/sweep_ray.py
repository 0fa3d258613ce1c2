"""The part of a sweep that is Ray's: Optuna proposes settings, each trial is a `train.py` process, ASHA ends weak ones.

Run directories are the truth, Ray's own state in `<sweep>/ray` only says what was proposed: a trial that Ray starts
again goes on from its last checkpoint, and one that had finished reports what it has.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before Ray is imported: no telemetry, no result files that nobody reads, and its old output, which can be silent.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray  # pyright: ignore[reportMissingImports]
from optuna.samplers import TPESampler  # pyright: ignore[reportMissingImports]
from ray import tune  # pyright: ignore[reportMissingImports]
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler  # pyright: ignore[reportMissingImports]
from ray.tune.search.optuna import OptunaSearch  # pyright: ignore[reportMissingImports]
from rich.console import Console

from fpo_jax.sweep_report import in_words, last_words, note, read_curve, read_trial, register, write_report
from fpo_jax.sweeps import Parameter, Settings, Space, command_line, default_settings, read_space, rounded
from fpo_jax.types import FpoError

TRAIN = Path(__file__).with_name("train.py")
_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; nothing is exchanged through it
ENDED = ("finished", "stopped early", "stopped itself")  # trials that are not run again
_PATIENCE = 30.0  # [s] that a run has for the end of its iteration before it is killed


def _domain(parameter: Parameter) -> Any:
    """The parameter in Ray's words; choices as JSON, as Optuna's categories are plain values."""
    if parameter.kind == "choice":
        return tune.choice([json.dumps(value) for value in parameter.values])
    low, high = parameter.values
    if parameter.kind == "int":
        return tune.randint(low, high + 1)
    return (tune.loguniform if parameter.kind == "loguniform" else tune.uniform)(low, high)


def settings_of(space: Space, drawn: dict[str, Any]) -> Settings:
    """What Ray drew, as options."""
    settings = {}
    for parameter in space.parameters:
        value = drawn[parameter.name]
        if parameter.kind == "choice":
            value = next(x for x in parameter.values if json.dumps(x) == value)
        settings[parameter.name] = value if parameter.kind in ("choice", "int") else rounded(value)
    return space.active(settings)


class TrialRun(tune.Trainable):
    """One trial: a `train.py` process whose metrics are reported as they are written."""

    def setup(self, config: dict[str, Any]) -> None:
        sweep_dir = Path(config["sweep_dir"])
        space = read_space(sweep_dir / "space.yaml")
        settings = settings_of(space, config)
        self.run_dir = register(sweep_dir, settings)
        self.reported = 0
        # A process of the same run that outlived an earlier Ray holds the lock, and so does a trial with the same
        # settings: wait for it, then take its result.
        self.lock = (self.run_dir / ".lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.process = None
        if read_trial(self.run_dir).outcome in ENDED:
            return
        resume = ["--resume", "--run-dir", str(self.run_dir)]
        begun = (self.run_dir / "config.json").exists()
        options = resume if begun else command_line(space, settings, self.run_dir)
        # Alone: the variables of SLURM around Ray are those of Ray's own processes.
        command = [sys.executable, str(TRAIN), *options, "--parallel.hosts", "one"]
        with (self.run_dir / "trial.log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=config["cwd"],
                pass_fds=[self.lock.fileno()],
                process_group=0,
            )

    def step(self) -> dict[str, Any]:
        """The next iteration of the run, or its end. Raises FpoError where it failed."""
        while True:
            ended = self.process is None or self.process.poll() is not None  # before reading: nothing comes after it
            curve = read_curve(self.run_dir)
            if curve and len(curve.episodes) > self.reported:
                at = self.reported
                self.reported += 1
                return {"episodes": int(curve.episodes[at]), "success_rate": float(curve.success[at, 0])}
            if ended:
                return self._end()
            time.sleep(0.5)

    def _end(self) -> dict[str, Any]:
        trial = read_trial(self.run_dir)
        episodes = int(trial.curve.episodes[-1]) if trial.curve else 0
        if trial.outcome == "stopped itself":  # a policy that collapsed is worth nothing, whatever it was before
            return {"episodes": episodes, "success_rate": 0.0, "done": True}
        if trial.outcome in ENDED:
            return {"episodes": episodes, "success_rate": trial.success.estimate, "done": True}
        code = self.process.returncode if self.process else None
        reason = last_words(self.run_dir / "trial.log") or f"train.py ended with exit status {code}; see trial.log"
        note(self.run_dir, outcome="failed", reason=reason)
        raise FpoError(reason)

    def cleanup(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.lock.close()


class Asha(ASHAScheduler):
    """ASHA that compares with every trial on disk: Ray saves what a search knows, but not what its scheduler does."""

    def __init__(self, sweep_dir: Path, **options: Any) -> None:
        super().__init__(time_attr="episodes", stop_last_trials=False, **options)
        self.sweep_dir = sweep_dir

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Ray's first call, in a resumed search too."""
        accepted = super().set_search_properties(metric, mode, **spec)
        for path in sorted((self.sweep_dir / "trials").glob("*/trial.json")):
            trial = read_trial(path.parent)
            if trial.curve and trial.outcome in ENDED:
                known: Any = SimpleNamespace(trial_id=trial.name)
                self.on_trial_add(None, known)  # pyright: ignore[reportArgumentType]
                for episodes, success in zip(trial.curve.episodes, trial.curve.success[:, 0], strict=True):
                    self.on_trial_result(None, known, {"episodes": episodes, metric: success})  # pyright: ignore[reportArgumentType]
        return accepted


class Progress(tune.Callback):
    """Says how each trial ended and keeps the table up to date."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        space = read_space(self.sweep_dir / "space.yaml")
        run_dir = register(self.sweep_dir, settings_of(space, trial.config))
        if read_trial(run_dir).outcome in ("unfinished", "not started"):
            if trial.status == "ERROR":  # Ray lost the trial itself: its worker or its machine
                note(run_dir, outcome="failed", reason="the worker of this trial died")
            else:
                note(run_dir, outcome="stopped early", reason=None)
        Console().print(in_words(read_trial(run_dir)), markup=False, highlight=False, soft_wrap=True)
        write_report(self.sweep_dir, space)


def connect(address: str | None, resources: dict[str, float]) -> None:
    """Join the cluster at `address`, or start Ray here. Raises FpoError where no machine could hold one trial."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of failed trials; Progress says why
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # JAX has no threads here yet
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, log_to_driver=False)
    except ConnectionError as error:
        raise FpoError(f"There is no Ray cluster at {address}; start one, or leave --address out.") from error
    except Exception as error:  # Ray has no class of its own for the first of these
        if "timed out during startup" not in str(error) and "Failed to connect to GCS" not in str(error):
            raise
        raise FpoError("Ray did not start in time, as this machine is busy; the same command goes on.") from error
    # Ray's own handler leaves at once, and the trials' processes would outlive it; after Ctrl-C Tune ends them.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    check_resources(resources, ray.cluster_resources(), os.environ)


def check_resources(wanted: Mapping[str, float], have: Mapping[str, float], environment: Mapping[str, str]) -> None:
    """Raises FpoError where no machine could hold one trial, and where each trial would take every GPU."""
    for name, count in wanted.items():
        if count > have.get(name, 0):
            raise FpoError(f"A trial asks for {count:g} {name}, there are {have.get(name, 0):g}; see --resources.")
    if have.get("GPU") and not wanted.get("GPU") and environment.get("JAX_PLATFORMS") != "cpu":
        raise FpoError(
            f"There are {have['GPU']:g} GPUs and a trial asks for none, so each would take all of its machine: give "
            "--resources.gpu 1, or set JAX_PLATFORMS=cpu."
        )


def search(
    space: Space,
    sweep_dir: Path,
    *,
    trials: int,
    seed: int,
    resources: dict[str, float],
    concurrent: int | None,
    grace_episodes: int | None,
    reduction: int,
) -> int:
    """Run the sweep, or go on with it, until every trial has ended or Ctrl-C; returns how many have.

    `grace_episodes` None: no early stopping. What only matters at the beginning is Ray's to remember.
    """
    sweep_dir = sweep_dir.resolve()  # workers have directories of their own
    trainable = tune.with_resources(TrialRun, tune.PlacementGroupFactory([resources]))
    constants = {"sweep_dir": str(sweep_dir), "cwd": os.getcwd()}
    param_space = {p.name: _domain(p) for p in space.parameters} | constants
    if any((sweep_dir / "ray").glob("experiment_state-*.json")):  # Ray's first snapshot takes it some seconds
        tuner = tune.Tuner.restore(str(sweep_dir / "ray"), trainable, param_space=param_space)
        return _ended(tuner.fit())
    scheduler = FIFOScheduler()
    if grace_episodes is not None:
        scheduler = Asha(
            sweep_dir,
            grace_period=grace_episodes,
            reduction_factor=reduction,
            max_t=10**9,  # a trial's own iterations end it
        )
    tuner = tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric="success_rate",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=concurrent,
            scheduler=scheduler,
            search_alg=OptunaSearch(
                sampler=TPESampler(seed=seed, n_startup_trials=max(4, trials // 3)),
                points_to_evaluate=_first(space),
            ),
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(sweep_dir),
            callbacks=[Progress(sweep_dir)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs keep their own
            verbose=0,
        ),
    )
    return _ended(tuner.fit())


def _ended(results: tune.ResultGrid) -> int:
    return results.num_terminated + results.num_errors


def _first(space: Space) -> list[dict[str, Any]] | None:
    """The defaults, in Ray's words, where the space holds them."""
    first = default_settings(space)
    if first is None:
        return None
    return [{p.name: json.dumps(first[p.name]) if p.kind == "choice" else first[p.name] for p in space.parameters}]
