"""Sweeps: the space file, the command lines, what a report says, and a small real search on Ray Tune."""

import csv
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sweep as sweep_script
import train as train_script

from fpo_jax import sweep_report, sweeps
from fpo_jax.signals import TRY_AGAIN
from fpo_jax.types import FpoError

PNG = b"\x89PNG\r\n\x1a\n"
ROOT = Path(sweep_script.__file__).parents[1]
SPACE = """
base:
  env: point_mass
  iterations: 20
  actor.hidden: [8, 8]
  evaluation.video: false
parameters:
  fpo.ratio: {choice: [mean, paper]}
  fpo.beta: {loguniform: [0.02, 0.5], when: {fpo.ratio: paper}}
  fpo.epsilon: {uniform: [0.1, 0.4]}
  actor.learning-rate: {loguniform: [1e-4, 3e-3]}   # YAML takes 1e-4 for a word
  latent.rank: {int: [1, 4]}
"""


@pytest.fixture
def space_file(tmp_path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(SPACE)
    return path


def run(arguments, capsys) -> tuple[int, str, str]:
    code = sweep_script.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the space ------------------------------------------------------------------------------------------------------


def test_draws_lie_in_their_ranges_and_repeat_with_the_seed(space_file):
    space = sweeps.read_space(space_file)
    drawn = sweeps.random_settings(space, 200, seed=0)
    assert drawn == sweeps.random_settings(space, 200, seed=0) != sweeps.random_settings(space, 200, seed=1)
    assert drawn[0] == {"fpo.ratio": "mean", "fpo.epsilon": 0.2, "actor.learning_rate": 1e-3, "latent.rank": 2}
    assert len({sweeps.trial_name(settings) for settings in drawn}) == 200
    rates = np.array([settings["actor.learning_rate"] for settings in drawn])
    assert rates.min() >= 1e-4 and rates.max() <= 3e-3
    # uniform in the logarithm: half of the draws lie below the geometric mean, to four standard errors
    assert abs(np.mean(rates < np.sqrt(3e-7)) - 0.5) < 4 * np.sqrt(0.25 / 200)
    assert {settings["latent.rank"] for settings in drawn} == {1, 2, 3, 4}
    assert {settings["fpo.ratio"] for settings in drawn} == {"mean", "paper"}


def test_a_parameter_is_left_out_where_it_means_nothing(space_file):
    space = sweeps.read_space(space_file)
    for settings in [*sweeps.random_settings(space, 50, seed=0), *sweeps.grid_settings(space, 2)]:
        assert ("fpo.beta" in settings) == (settings["fpo.ratio"] == "paper")


def test_a_grid_is_every_combination_once(space_file):
    space = sweeps.read_space(space_file)
    grid = sweeps.grid_settings(space, 3)
    # mean: 3 x 3 x 3; paper: 3 times as many, by β. Whole numbers from 1 to 4 in three points: 1, 2, 4.
    assert len(grid) == 27 + 81
    assert sorted({settings["actor.learning_rate"] for settings in grid}) == [1e-4, 5.477e-4, 3e-3]
    assert sorted({settings["latent.rank"] for settings in grid}) == [1, 2, 4]


def test_no_more_settings_than_there_are(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("base: {env: point_mass}\nparameters: {latent.space: {choice: [full, repeat]}}\n")
    space = sweeps.read_space(path)
    assert sweeps.default_settings(space) is None  # dct is not among them
    found = {settings["latent.space"] for settings in sweeps.random_settings(space, 10, seed=0)}
    assert found == {"full", "repeat"}


def test_train_understands_every_command_line(space_file):
    space = sweeps.read_space(space_file)
    for settings in sweeps.random_settings(space, 20, seed=0):
        config = train_script.parse(sweeps.command_line(space, settings, Path("r")))
        assert config.run_dir == "r" and not config.evaluation.video and config.actor.hidden == (8, 8)
        config_of_space = space.config(settings | {"run_dir": "r"})
        assert config == config_of_space


def test_a_preset_is_the_ground_the_options_stand_on(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text("base: {preset: paper}\nparameters: {fpo.beta: {uniform: [0.05, 0.2]}}\n")
    space = sweeps.read_space(path)
    assert space.config({"fpo.beta": 0.07}).fpo.ratio == "paper"
    command = sweeps.command_line(space, {"fpo.beta": 0.07}, Path("r"))
    assert train_script.parse(command) == space.config({"fpo.beta": 0.07, "run_dir": "r"})


def test_the_shipped_space_is_valid():
    space = sweeps.read_space(ROOT / "sweeps" / "aloha.yaml")
    names = {parameter.name for parameter in space.parameters}
    assert {"fpo.beta", "fpo.epsilon", "latent.space", "actor.learning_rate"} <= names
    assert sweeps.default_settings(space) is not None


@pytest.mark.parametrize(
    ("base", "parameters", "sentence"),
    [
        ("{}", "{fpo.epsilom: {uniform: [0.1, 0.2]}}", "no option 'fpo.epsilom'; did you mean 'fpo.epsilon'?"),
        ("{iteration: 3}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "did you mean 'iterations'?"),
        ("{}", "{fpo.epsilon: {lognormal: [0.1, 0.2]}}", "no kind 'lognormal'; did you mean 'loguniform'?"),
        ("{}", "{fpo.epsilon: {uniform: [0.2, 0.1]}}", "needs [lowest, highest], not [0.2, 0.1]"),
        ("{}", "{fpo.epsilon: {uniform: [-0.2, 0.1]}}", "fpo.epsilon must be greater than 0, not -0.2"),
        ("{}", "{fpo.anchor: {loguniform: [0, 0.1]}}", "loguniform needs a lowest value greater than 0"),
        ("{}", "{fpo.epsilon: {uniform: [0.1]}}", "uniform takes [lowest, highest]"),
        ("{}", "{fpo.epsilon: 0.1}", "fpo.epsilon needs one kind with its values"),
        ("{}", "{fpo.ratio: {choice: [mean, median]}}", "fpo.ratio cannot be 'median'; it takes mean, sample, paper"),
        ("{}", "{fpo.ratio: {uniform: [0, 1]}}", "fpo.ratio cannot be 0"),
        ("{}", "{fpo.epsilon: {int: [1, 2]}}", "fpo.epsilon is no whole number"),
        ("{}", "{num_envs: {uniform: [1, 64]}}", "num_envs is no real number"),
        (
            "{num_envs: many}",
            "{fpo.epsilon: {uniform: [0.1, 0.2]}}",
            "num_envs cannot be 'many'; it takes a whole number",
        ),
        ("{num_envs: 0}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "num_envs must be at least 1"),
        ("{evaluation.video: 1}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "it takes true or false"),
        ("{preset: papper}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "did you mean 'paper'?"),
        ("{run_dir: x}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "run_dir is the sweep's to decide"),
        ("{population.size: 2}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "single run; vary the seed instead"),
        ("{}", "{parallel.hosts: {choice: [one, many]}}", "a trial is a single process"),
        ("{fpo.epsilon: 0.1}", "{fpo.epsilon: {uniform: [0.1, 0.2]}}", "each option may stand once"),
        ("{}", "{fpo.beta: {uniform: [0.1, 0.2], when: {fpo.ratio: paper}}}", "when names fpo.ratio"),
        ("{}", "{}", "names no parameters to search"),
        ("{}", "[", "is no YAML"),
    ],
)
def test_a_wrong_space_gets_one_helpful_sentence(base, parameters, sentence, tmp_path, capsys):
    path = tmp_path / "toy.yaml"
    path.write_text(f"base: {base}\nparameters: {parameters}\n")
    code, _, err = run(["--space", path, "--out", tmp_path / "out", "--write-jobs", "random"], capsys)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_other_mistakes_get_one_sentence_too(space_file, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "out"]
    assert "Cannot read the space file" in run(["--space", tmp_path / "no.yaml", *out], capsys)[2]
    assert "--trials must be at least 1" in run(["--space", space_file, *out, "--trials", 0], capsys)[2]
    assert "--concurrent must be at least 1" in run(["--space", space_file, *out, "--concurrent", 0], capsys)[2]
    assert "one of them more than 0" in run(["--space", space_file, *out, "--resources.cpu", 0], capsys)[2]
    assert "holds no trials" in run(["--space", space_file, *out, "--report"], capsys)[2]
    monkeypatch.setitem(sys.modules, "sweep_ray", None)  # as where Ray is not installed
    assert 'pip install "fpo_jax[sweep]"' in run(["--space", space_file, *out], capsys)[2]
    code, _, err = run(["--space", space_file, *out, "--trials", 9], capsys)
    assert code == 2 and "was begun with --trials 16" in err
    other = tmp_path / "other.yaml"
    other.write_text(SPACE.replace("20", "30"))
    code, _, err = run(["--space", other, *out], capsys)
    assert code == 2 and "holds a sweep of another space" in err
    other.write_text(SPACE.replace("point_mass", "point_mas"))
    code, _, err = run(["--space", other, "--out", tmp_path / "o", "--write-jobs", "grid"], capsys)
    assert code == 2 and "did you mean 'point_mass'" in err


# --- jobs without Ray -----------------------------------------------------------------------------------------------


def test_jobs_are_command_lines_that_train_understands(space_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--space", space_file, "--out", out, "--write-jobs", "random", "--trials", 5]
    code, text, _ = run(arguments, capsys)
    assert code == 0 and "--array=1-5" in text
    jobs = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    space = sweeps.read_space(space_file)
    assert len(jobs) == 5
    for job in jobs:
        program, script, *options = shlex.split(job["command"])
        assert (program, script) == ("python", "experiments/train.py")
        assert train_script.parse(options) == space.config(job["settings"] | {"run_dir": job["run_dir"]})
        assert shlex.split(job["resume"])[2:] == ["--resume", "--run-dir", job["run_dir"]]
    assert [trial.outcome for trial in sweep_report.read_trials(out)] == ["not started"] * 5
    before = (out / "sweep.jsonl").read_text()
    assert run(arguments, capsys)[0] == 0 and (out / "sweep.jsonl").read_text() == before


def test_an_array_task_starts_its_line_then_resumes_it_then_leaves_it(space_file, tmp_path, capsys):
    run(["--space", space_file, "--out", tmp_path / "out", "--write-jobs", "random", "--trials", 3], capsys)
    jobs = tmp_path / "out" / "sweep.jsonl"
    job = json.loads(jobs.read_text().splitlines()[1])
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "train.py").write_text("import sys; print(sys.argv[1:])")
    run_dir = Path(job["run_dir"])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def task(number: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / "sweeps" / "slurm_array.sh"), str(jobs)],
            env={**environment, "SLURM_ARRAY_TASK_ID": str(number)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    assert task(2).returncode == 0
    assert (run_dir / "trial.log").read_text().strip() == str(shlex.split(job["command"])[2:])
    (run_dir / "config.json").write_text("{}")
    assert task(2).returncode == 0
    assert (run_dir / "trial.log").read_text().strip() == str(["--resume", "--run-dir", str(run_dir)])
    (run_dir / "evaluation.json").write_text("{}")
    assert "has ended" in task(2).stdout
    assert task(4).returncode == 2 and "has no line 4" in task(4).stderr


# --- reports --------------------------------------------------------------------------------------------------------


def fake_trial(out: Path, rates: list[float | None], settings: dict, *, evaluated: float | None = None) -> Path:
    """A run directory as train.py leaves it: 10 episodes and 30 seconds per iteration."""
    run_dir = sweep_report.register(out, settings)
    (run_dir / "config.json").write_text(json.dumps({"iterations": 20, "evaluation": {"episodes": 100}}))
    records = [
        {"iteration": i, "episodes": 10 * i, "success_rate": rate, "iteration_seconds": 30.0}
        for i, rate in enumerate(rates, 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if evaluated is not None:
        tuned = {"success_rate": evaluated, "low": evaluated - 0.05, "high": evaluated + 0.05, "episodes": 100}
        difference = {"success_rate": 0.3, "low": 0.2, "high": 0.4}
        (run_dir / "evaluation.json").write_text(json.dumps({"tuned": tuned, "difference": difference}))
    return run_dir


def paper(rank: int) -> dict:
    return {"fpo.ratio": "paper", "fpo.beta": 0.1, "fpo.epsilon": 0.2, "actor.learning_rate": 1e-3, "latent.rank": rank}


@pytest.fixture
def fake_sweep(tmp_path) -> Path:
    """One trial of every outcome."""
    out = tmp_path / "out"
    mean = {"fpo.ratio": "mean", "fpo.epsilon": 0.3, "actor.learning_rate": 5e-4, "latent.rank": 2}
    fake_trial(out, [None, 0.5, 0.5, 0.8, 0.9, 0.9, 0.9, 1.0], mean, evaluated=0.9)
    early = fake_trial(out, [0.4] * 6, paper(1))
    sweep_report.note(early, outcome="stopped early")
    stopped = fake_trial(out, [0.4, 0.1], paper(2))
    (stopped / "stopped.json").write_text(json.dumps({"iteration": 2, "reason": "the latents collapsed"}))
    failed = sweep_report.register(out, paper(3))
    (failed / "trial.log").write_text("compiling ...\nError: latent.rank is 9; choose 1 to 4.\n")
    fake_trial(out, [0.6] * 3, paper(4))
    return out


def test_a_report_says_what_became_of_every_trial(fake_sweep, space_file):
    trials = sweep_report.write_report(fake_sweep, sweeps.read_space(space_file))
    assert [trial.outcome for trial in trials] == [
        "finished",
        "unfinished",
        "stopped early",
        "stopped itself",
        "failed",
    ]
    best = trials[0]
    assert best.success == (0.9, pytest.approx(0.85), pytest.approx(0.95))
    assert best.curve is not None
    # Five iterations in which an episode ended: .5 .5 .8 .9 .9 are .72, .5 .8 .9 .9 .9 are .80, after iteration 7.
    assert best.episodes_to_80 == 70
    np.testing.assert_allclose(best.curve.minutes, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
    assert trials[2].success.estimate == pytest.approx(0.4) and trials[2].episodes_to_80 is None
    assert trials[4].reason == "latent.rank is 9; choose 1 to 4." and trials[4].curve is None


def test_tables_and_figures(fake_sweep, space_file, capsys):
    code, text, _ = run(["--space", space_file, "--out", fake_sweep, "--report"], capsys)
    assert code == 0
    assert "finished, success 0.900 [0.850, 0.950]; fpo.ratio mean, fpo.epsilon 0.3" in text
    assert "failed (latent.rank is 9; choose 1 to 4.), no episode" in text
    rows = json.loads((fake_sweep / "results.json").read_text())
    assert rows[0]["episodes_to_80"] == 70 and rows[0]["tuned_minus_base"] == [0.3, 0.2, 0.4]
    assert rows[0]["settings"]["fpo.epsilon"] == 0.3
    with (fake_sweep / "results.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [line["outcome"] for line in table] == [row["outcome"] for row in rows]
    assert table[0]["fpo.beta"] == "" and float(table[1]["fpo.beta"]) == 0.1
    text = (fake_sweep / "results.md").read_text()
    assert "| 0.900 [0.850, 0.950] |" in text and "stopped itself: the latents collapsed" in text
    for name in ("curves.png", "parallel.png"):
        assert (fake_sweep / name).read_bytes().startswith(PNG)


def test_a_run_without_evaluation_is_finished_by_its_last_iteration(tmp_path):
    run_dir = fake_trial(tmp_path, [0.5] * 19, paper(1))
    config = {"iterations": 20, "evaluation": {"episodes": 0}}
    (run_dir / "config.json").write_text(json.dumps(config))
    assert sweep_report.read_trial(run_dir).outcome == "unfinished"
    (run_dir / "config.json").write_text(json.dumps(config | {"iterations": 19}))
    assert sweep_report.read_trial(run_dir).outcome == "finished"
    (run_dir / "metrics.jsonl").unlink()
    assert sweep_report.read_trial(run_dir).outcome == "unfinished"


def test_settings_that_are_lists_survive_the_trip_through_json(tmp_path):
    path = tmp_path / "widths.yaml"
    path.write_text("base: {env: point_mass}\nparameters: {actor.hidden: {choice: [[8], [8, 8]]}}\n")
    space = sweeps.read_space(path)
    for settings in sweeps.random_settings(space, 2, seed=0):
        fake_trial(tmp_path / "out", [0.5] * 5, settings)
    trials = sweep_report.write_report(tmp_path / "out", space)
    assert {sweeps.trial_name(trial.settings) for trial in trials} == {trial.name for trial in trials}


# --- Ray ------------------------------------------------------------------------------------------------------------


def test_a_resumed_search_compares_with_the_trials_before(fake_sweep):
    pytest.importorskip("ray")
    pytest.importorskip("optuna")
    import sweep_ray

    scheduler = sweep_ray.Asha(fake_sweep, grace_period=20, reduction_factor=2, max_t=1000)
    scheduler.set_search_properties("success_rate", "max")
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    # On disk are .25, .4 and .5 after 20 episodes (the unfinished trial does not count): the better half goes on.
    assert scheduler.on_trial_result(None, trial, {"episodes": 10, "success_rate": 0.1}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {"episodes": 20, "success_rate": 0.3}) == "STOP"
    other = SimpleNamespace(trial_id="other")
    scheduler.on_trial_add(None, other)
    assert scheduler.on_trial_result(None, other, {"episodes": 20, "success_rate": 0.6}) == "CONTINUE"


def test_a_trial_does_not_take_gpus_nobody_gave_it():
    pytest.importorskip("ray")
    pytest.importorskip("optuna")
    import sweep_ray

    sweep_ray.check_resources({"CPU": 2.0}, {"CPU": 2.0}, {})
    sweep_ray.check_resources({"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 8.0}, {})
    sweep_ray.check_resources({"CPU": 2.0}, {"CPU": 8.0, "GPU": 8.0}, {"JAX_PLATFORMS": "cpu"})
    with pytest.raises(FpoError, match="A trial asks for 4 CPU, there are 2"):
        sweep_ray.check_resources({"CPU": 4.0}, {"CPU": 2.0}, {})
    with pytest.raises(FpoError, match="each would take all of its machine"):
        sweep_ray.check_resources({"CPU": 2.0}, {"CPU": 8.0, "GPU": 8.0}, {})


TINY_SPACE = """
base:
  env: point_mass
  iterations: 12
  num_envs: 8
  rollout.decisions: 3
  update.epochs: 1
  update.minibatch_size: 16
  actor.hidden: [8]
  critic.hidden: [8]
  actor.sampler_steps: 2
  evaluation.episodes: 8
  evaluation.video: false
  saving.tensorboard: false
  saving.every: 1
parameters:
  fpo.epsilon: {loguniform: [0.05, 0.5]}
  latent.rank: {choice: [2, 9]}                     # 9 is more than there are: that trial fails
"""


def _begin_search(arguments: list[str], log: Path) -> subprocess.Popen:
    """The command as a process of its own, as this one's threads do not survive the forks of Ray."""
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "experiments" / "sweep.py"), *arguments],
            stdout=stream,
            stderr=stream,
            cwd=log.parent,
        )


def _outcomes(out: Path) -> dict[str, str]:
    paths = (out / "trials").glob("*/trial.json")
    return {path.parent.name: sweep_report.read_trial(path.parent).outcome for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not (importlib.util.find_spec("ray") and importlib.util.find_spec("optuna")), reason="needs the extra sweep"
)
def test_a_search_goes_on_after_sigterm_and_survives_a_failing_trial(tmp_path):
    """Importing Ray here would only bring its warnings: everything runs in the command's own process."""
    space, out, log = tmp_path / "tiny.yaml", tmp_path / "out", tmp_path / "log"
    space.write_text(TINY_SPACE)
    arguments = ["--space", "tiny.yaml", "--out", "out", "--trials", "5", "--seed", "1", "--no-asha"]
    process = _begin_search(arguments, log)
    while process.poll() is None and "finished" not in _outcomes(out).values():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == TRY_AGAIN, log.read_text()
    assert "the same command goes on" in log.read_text()
    ended = [out / "trials" / name / "metrics.jsonl" for name, of in _outcomes(out).items() if of == "finished"]
    assert ended  # and where there are many cores, maybe several
    written = [path.stat().st_mtime_ns for path in ended]

    process = _begin_search(arguments, log)
    assert process.wait(timeout=1000) == 0, log.read_text()
    rows = json.loads((out / "results.json").read_text())
    assert len(rows) == 5
    outcomes = {row["outcome"] for row in rows}
    assert outcomes == {"finished", "failed"}
    assert all((row["outcome"] == "failed") == (row["settings"]["latent.rank"] == 9) for row in rows)
    assert all("choose 1 to 4" in row["reason"] for row in rows if row["outcome"] == "failed")
    assert [path.stat().st_mtime_ns for path in ended] == written  # not run again

    process = _begin_search(arguments, log)  # nothing is left to do
    assert process.wait(timeout=1000) == 0, log.read_text()
    assert json.loads((out / "results.json").read_text()) == rows
