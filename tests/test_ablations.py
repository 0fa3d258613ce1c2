"""The runs behind the tables of ablations: which are over, and which evaluations are taken as they are."""

import json
import math
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import ablations
import pytest

from fpo_jax import checkpoint
from fpo_jax.health import failure
from fpo_jax.types import FpoError
from tiny_libero import fake_libero, pool_of


def record(**values: float) -> dict[str, float]:
    return {"success_rate": 0.5, "latent_std": 1.0, "invalid_episodes": 0.0, **values}


def stop(run_dir: Path, reason: str | None) -> None:
    (run_dir / "stopped.json").write_text(json.dumps({"iteration": 3, "reason": f"Training stopped: {reason}"}))


@pytest.mark.parametrize(
    "newest",
    [
        {"loss": math.nan},
        {"latent_std": 20.0},
        {"success_rate": 0.01},
        {"success_rate": math.nan, "invalid_episodes": 9.0},
    ],
)
def test_what_health_says_is_a_result(tmp_path, newest):
    stop(tmp_path, failure(deque([record(**newest)] * 8, maxlen=8), base_rate=0.5))
    assert ablations.stop_reason(tmp_path)
    ablations.train("paper", 0, tmp_path, 20, ())  # begins no process


def test_a_run_that_lost_its_simulators_goes_on(tmp_path, monkeypatch):
    with fake_libero() as env:
        pool = pool_of(env)
        pool._gave_up = True
        stop(tmp_path, pool.problem())
    (tmp_path / "config.json").touch()
    commands = []

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(ablations.subprocess, "run", run)
    with pytest.raises(FpoError, match="exit status 2"):  # it was lost once more
        ablations.train("paper", 0, tmp_path, 20, ())
    assert "--resume" in commands[0] and ablations.stop_reason(tmp_path) is None


LATENT = [0.25, -1.0]


def evaluated(invalid: int = 0, constant: list[float] | None = None) -> dict:
    result = {
        "run": {"iteration": 20, "evaluation_seed": 2_000_003},
        "tuned": {"episodes": 100 - invalid, "invalid_episodes": invalid},
    }
    return result | ({"constant_latent": constant} if constant else {})


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """`ablations.evaluate` of 100 episodes, and the commands that it began; every one is interrupted."""
    monkeypatch.setattr(checkpoint, "latest_step", lambda run_dir: 20)
    commands = []

    def run(command, check):
        commands.append(command)
        (tmp_path / "paired_evaluation.base.jsonl").touch()
        return SimpleNamespace(returncode=130)

    monkeypatch.setattr(ablations.subprocess, "run", run)

    def call(earlier: dict, **options) -> list | None:
        (tmp_path / "paired_evaluation.json").write_text(json.dumps(earlier))
        (tmp_path / "paired_evaluation.base.jsonl").write_text("earlier")
        try:
            ablations.evaluate(tmp_path, 100, **options)
        except FpoError:
            return commands.pop()

    return call


def test_an_evaluation_with_invalid_episodes_is_taken_as_it_is(evaluate):
    assert evaluate(evaluated(invalid=3)) is None
    assert evaluate(evaluated() | {"tuned": {"episodes": 50, "invalid_episodes": 0}})
    assert "1000003" in evaluate(evaluated(), seed=1_000_003)


def test_another_constant_latent_is_another_evaluation(evaluate, tmp_path):
    constant = tmp_path / "steerability.json"
    constant.write_text(json.dumps({"constant_latent": LATENT}))
    assert evaluate(evaluated(constant=LATENT), constant=constant) is None
    assert evaluate(evaluated(constant=[0.0, 0.0]), constant=constant)
    assert evaluate(evaluated(), constant=constant) and evaluate(evaluated(constant=LATENT))


def test_an_interrupted_evaluation_goes_on_after_its_episodes(evaluate, tmp_path):
    evaluate(evaluated(), seed=1)
    log = tmp_path / "paired_evaluation.base.jsonl"
    assert log.read_text() == ""  # of the new settings; the old ones are gone
    log.write_text("episodes")
    with pytest.raises(FpoError):
        ablations.evaluate(tmp_path, 100, seed=1)
    assert log.read_text() == "episodes"
