import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from statsmodels.stats.proportion import proportion_confint

from fpo_jax import metrics
from fpo_jax.types import FpoError

# --- intervals


def pairs(both, only_tuned, only_base, neither):
    tuned = np.repeat([True, True, False, False], [both, only_tuned, only_base, neither])
    base = np.repeat([True, False, True, False], [both, only_tuned, only_base, neither])
    return base, tuned


@pytest.mark.parametrize("successes, n", [(0, 1), (0, 10), (3, 10), (10, 10), (81, 263), (140, 512)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_agrees_with_statsmodels(successes, n, confidence):
    expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    rate, low, high = metrics.wilson_interval(successes, n, confidence=confidence)
    assert rate == successes / n
    np.testing.assert_allclose((low, high), expected, atol=1e-12)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_reproduces_newcombe_1998(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857-872, Table I, method 3."""
    np.testing.assert_allclose(metrics.wilson_interval(successes, n)[1:], (low, high), atol=5e-5)


def test_wilson_borders():
    assert metrics.wilson_interval(0, 5).low == 0.0
    assert metrics.wilson_interval(5, 5).high == 1.0
    assert metrics.wilson_interval(0, 0)[1:] == (0.0, 1.0)
    with pytest.raises(ValueError, match="6 successes of 5"):
        metrics.wilson_interval(6, 5)


def test_paired_difference_reproduces_a_published_number():
    """Cavo et al. 2012 in Fagerland, Lydersen & Laake 2017, chapter 8, as in R package contingencytables."""
    interval = metrics.paired_difference_interval(*pairs(59, 6, 16, 80))
    np.testing.assert_allclose(interval, (-0.0621, -0.1186, -0.0046), atol=5e-5)


def test_a_small_positive_correlation_counts_as_none():
    """1·12 - 1·7 = 5 < 21/2: φ = 0, and the squares of the Wilson distances add."""
    interval = metrics.paired_difference_interval(*pairs(1, 1, 7, 12))
    p1, low1, high1 = metrics.wilson_interval(2, 21)
    p2, low2, high2 = metrics.wilson_interval(8, 21)
    low, high = p1 - p2 - math.hypot(p1 - low1, high2 - p2), p1 - p2 + math.hypot(high1 - p1, p2 - low2)
    np.testing.assert_allclose(interval, (-6 / 21, low, high), atol=1e-12)


def test_a_negative_correlation_is_not_corrected():
    """All discordant, 4 and 4 of 8: φ = -16/16 = -1, and the Wilson distances themselves add."""
    interval = metrics.paired_difference_interval(*pairs(0, 4, 4, 0))
    rate, low, high = metrics.wilson_interval(4, 8)
    np.testing.assert_allclose(interval, (0.0, -(rate - low) - (high - rate), (high - rate) + (rate - low)), atol=1e-12)


def test_paired_difference_is_antisymmetric_and_bounded():
    for table in [(59, 6, 16, 80), (0, 5, 0, 0), (0, 0, 0, 7), (7, 0, 0, 0), (3, 0, 0, 4), (0, 4, 3, 0)]:
        base, tuned = pairs(*table)
        forth = metrics.paired_difference_interval(base, tuned)
        back = metrics.paired_difference_interval(tuned, base)
        np.testing.assert_allclose(forth, (-back.estimate, -back.high, -back.low), atol=1e-12)
        assert -1 <= forth.low <= forth.estimate <= forth.high <= 1


def test_pairing_narrows_the_interval():
    """Two rates that rise and fall together are told apart by fewer episodes."""
    together = metrics.paired_difference_interval(*pairs(40, 10, 0, 50))
    apart = metrics.paired_difference_interval(*pairs(20, 30, 20, 30))
    assert together.estimate == pytest.approx(apart.estimate)
    assert together.low > 0 > apart.low


def test_paired_difference_refuses_unpaired_episodes():
    assert metrics.paired_difference_interval(np.zeros(0, bool), np.zeros(0, bool))[1:] == (-1.0, 1.0)
    with pytest.raises(ValueError, match="one length"):
        metrics.paired_difference_interval(np.zeros(3, bool), np.zeros(4, bool))


# --- writers


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_takes_arrays_and_writes_strict_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = metrics.JsonlWriter(path)
    writer.write({"iteration": 1, "loss": jnp.float32(0.5), "flag": np.bool_(True), "bad": jnp.nan, "note": "a"})
    assert read(path) == [{"iteration": 1, "loss": 0.5, "flag": True, "bad": None, "note": "a"}]  # before close
    writer.close()


def test_resumed_jsonl_has_every_iteration_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.JsonlWriter(path)
    for iteration in range(1, 5):
        writer.write({"iteration": iteration, "loss": 0.1 * iteration})
    writer.close()
    first = path.read_text().splitlines()
    with path.open("a") as stream:
        stream.write('{"iteration": 5, "lo')  # killed here
    writer = metrics.JsonlWriter(path, resumed_iteration=2)
    for iteration in range(3, 7):
        writer.write({"iteration": iteration, "loss": 0.1 * iteration})
    writer.close()
    assert [r["iteration"] for r in read(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines()[:4] == first
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_never_writes_into_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n')
    with pytest.raises(FpoError, match="--resume"):
        metrics.JsonlWriter(path)
    with pytest.raises(FpoError, match="Cannot read"):
        metrics.read_jsonl(tmp_path / "missing.jsonl")


def test_missing_wandb_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FpoError, match=r"fpo_jax\[wandb\]"):
        metrics.WandbWriter("project", tmp_path)


# --- terminal


def record(iteration):
    return {
        "iteration": iteration,
        "episodes": 32 * iteration,
        "env_steps": 1000 * iteration,
        "success_rate": 0.25,
        "return": 0.125,
        "clip_fraction": 0.1,
    }


def test_progress_without_a_terminal_prints_first_and_last(monkeypatch):
    clock = iter(float(t) for t in range(0, 1000, 2))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = metrics.ProgressLine(5, console=Console(file=out, width=80))
    for iteration in range(1, 6):
        progress.update(record(iteration))
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "iteration 1/5  episodes 32  success 25.0%  return 0.125  clipped 10.0%"
    assert lines[1:] == [
        "iteration 5/5  episodes 160  success 25.0%  return 0.125  clipped 10.0%  500 steps/s  0:00 left"
    ]


def test_progress_names_broken_simulations():
    out = io.StringIO()
    progress = metrics.ProgressLine(5, console=Console(file=out, width=80))
    progress.update(record(1) | {"invalid_episodes": 2})
    progress.close()
    assert out.getvalue().splitlines()[0].endswith("clipped 10.0%  invalid 2")


def test_progress_on_a_terminal(monkeypatch):
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, get_time=lambda: 0.0)
    progress = metrics.ProgressLine(40, console=console)
    for iteration in (1, 2):
        progress.update(record(iteration))
    progress.print("[bracketed] note")
    progress.close()
    assert "10 steps/s  1:03:20 left" in out.getvalue()
    assert "[bracketed] note" in out.getvalue()


def test_run_logger_feeds_everything_and_resumes(tmp_path):
    def console():
        return Console(file=io.StringIO())

    with metrics.RunLogger(tmp_path, iterations=4, console=console()) as logger:
        for iteration in (1, 2, 3):
            logger.log(record(iteration))
        with pytest.raises(ValueError, match="iteration"):
            logger.log({"loss": math.pi})
    with metrics.RunLogger(tmp_path, iterations=4, resumed_iteration=2, console=console()) as logger:
        for iteration in (3, 4):
            logger.log(record(iteration))
    assert [r["iteration"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2


def test_what_comes_too_soon_is_left_out(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    say = metrics.now_and_then(said.append, seconds=15.0)
    for at in (101.0, 115.0, 129.0, 130.0, 131.0):
        now[0] = at
        say(str(at))
    assert said == ["115.0", "130.0"]
