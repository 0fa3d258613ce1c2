"""A population on the command line: its files, resume, and members as runs of their own."""

import json

import evaluate as evaluate_script
import numpy as np
import pytest
import train as train_script

from fpo_jax import checkpoint
from test_cli import POINT_MASS, assert_same_run, metrics, run

POPULATION = [*POINT_MASS, "--population.size", "2", "--saving.milestone-every", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seeds, two iterations, evaluated."""
    run_dir = tmp_path_factory.mktemp("population") / "whole"
    assert train_script.main([*POPULATION, "--iterations", "2", "--run-dir", str(run_dir)]) == 0
    return run_dir


def test_each_member_leaves_what_a_run_leaves(whole, tmp_path):
    summary = json.loads((whole / "summary.json").read_text())
    assert [row["member"] for row in summary["members"]] == ["member_00", "member_01"]
    assert [row["seed"] for row in summary["members"]] == [0, 1]
    for row in summary["members"]:
        folder = whole / row["member"]
        for name in ("config.json", "provenance.json", "metrics.jsonl", "evaluation.json"):
            assert (folder / name).stat().st_size > 0
        assert checkpoint.latest_step(folder) == 2 and len(metrics(folder)) == 2
        assert row["evaluation"]["tuned"]["episodes"] == 8
    target = tmp_path / "result.json"
    arguments = ["--run-dir", str(whole / "member_01"), "--episodes", "8", "--json", str(target)]
    assert evaluate_script.main(arguments) == 0
    assert json.loads(target.read_text())["run"]["training_seed"] == 1


def test_one_and_one_more_iteration_are_two(whole, tmp_path, capsys):
    parts = tmp_path / "parts"
    assert run([*POPULATION, "--iterations", 1, "--run-dir", parts], capsys)[0] == 0
    checkpoint.save(parts / "member_00", 2, {"x": np.zeros(3)})  # the process was killed before member_01 had its own
    checkpoint.save(parts / "member_00", 7, {"x": np.zeros(3)}, keep=9)
    code, out, err = run(["--resume", "--run-dir", parts, "--iterations", 2], capsys)
    assert code == 0, err
    assert "resuming after iteration 1" in out and "member_01 (seed 1)" in out
    for member in ("member_00", "member_01"):
        assert_same_run(whole / member, parts / member)
        assert checkpoint.steps(parts / member) == [1, 2]
    before = metrics(parts / "member_00")
    code, out, _ = run(["--resume", "auto", "--run-dir", parts], capsys)
    assert code == 0 and "nothing is left to do" in out
    assert run(["--resume", "yes", "--run-dir", parts], capsys)[0] == 2
    provenance = parts / "member_00" / "provenance.json"
    recorded = json.loads(provenance.read_text())
    provenance.write_text(json.dumps(recorded | {"base_crc32": 1}))
    code, _, err = run(["--resume", "yes", "--run-dir", parts, "--iterations", 3], capsys)
    assert code == 2 and "The base policy is not the one that" in err
    provenance.write_text(json.dumps(recorded))
    (parts / "summary.json").unlink()  # as where it was killed in a continuation
    code, _, err = run(["--resume", "yes", "--run-dir", parts, "--iterations", 1], capsys)
    assert code == 2 and "already has 2 iterations; give a larger --iterations" in err
    assert metrics(parts / "member_00") == before


def test_a_member_equals_the_run_of_its_seed_and_goes_on_alone(whole, tmp_path, capsys):
    alone = tmp_path / "alone"
    assert run([*POINT_MASS, "--seed", 1, "--iterations", 2, "--run-dir", alone], capsys)[0] == 0
    for one, other in zip(metrics(whole / "member_01"), metrics(alone), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    arguments = ["--resume", "--run-dir", whole / "member_01", "--iterations", 3]
    code, out, _ = run(arguments, capsys)
    assert code == 0 and "resuming after iteration 2" in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--population.size", "0"], "population.size must be at least 1"),
        (["--population.size", "2", "--parallel.fsdp", "0"], "parallel.fsdp must be at least 1"),
        (["--population.vary", "actor.hidden=8"], "only in numbers"),
        (["--population.size", "2", "--saving.wandb", "x"], "one run per process"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, sentence, tmp_path, capsys):
    code, _, err = run([*POINT_MASS, *options, "--run-dir", tmp_path / "r"], capsys)
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "r").exists()
