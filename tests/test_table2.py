"""Table II: which runs it makes, and how it puts them together."""

import json

import pytest
import table2_ablations as table2

from fpo_jax.config import LIBERO_BUTTER, PRESETS, to_dict


def run(preset: str, seed: int, successes: int, episodes: int = 200, stopped: str | None = None) -> dict:
    return {
        "preset": preset,
        "seed": seed,
        "episodes": 1600,
        "base": 0.5,
        "tuned": [successes / episodes, 0.0, 1.0],
        "valid": episodes,
        "stopped": stopped,
    }


def test_its_rows_are_presets():
    assert set(table2.PUBLISHED) <= set(PRESETS)


def test_seeds_of_a_row_are_taken_together():
    rows = [run("libero_butter", seed, count) for seed, count in enumerate((180, 190, 200))]
    rows.append(run("no_clip", 0, 100, stopped="success collapsed"))
    full, no_clip = table2.summary(rows)
    assert full["seeds"] == [0, 1, 2] and full["success"]["estimate"] == pytest.approx(570 / 600)
    assert full["success"]["low"] == pytest.approx(0.9294, abs=5e-4)  # Wilson's by hand: (p + z²/2n - z√...)/(1 + z²/n)
    lines = table2.markdown([full, no_clip]).splitlines()
    assert lines[2].startswith("| FPO (complete) (`libero_butter`) | 3 | 1600 | 50.0 | 95.0 [")
    assert lines[3].startswith("| without PPO clipping (`no_clip`) (stopped itself) | 1 |") and lines[3].endswith(
        "| 45.1 |"
    )


def test_the_ablations_get_the_task_and_the_full_method_its_preset():
    args = table2.Args(episodes=40)
    told = table2.options(args, "no_clip")
    assert told[:2] == table2.options(args, LIBERO_BUTTER.preset)[:2] == ["--evaluation.episodes", "40"]
    assert told[told.index("--env") + 1] == LIBERO_BUTTER.env and told[told.index("--execute-steps") + 1] == "20"
    assert "--env" not in table2.options(args, LIBERO_BUTTER.preset)


def test_the_evaluation_of_a_run_is_taken_as_it_is(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"tuned": {"success_rate": 0.5}}))
    assert table2.result_of(tmp_path, 200) == {"tuned": {"success_rate": 0.5}}


def store(out, name: str, evaluation: dict | None, stopped: str | None = None) -> None:
    """A run that is over, as far as the table looks at it."""
    (out / name).mkdir()
    record = {"iteration": 1, "iteration_seconds": 60.0, "episodes": 80, "success_rate": 0.5}
    (out / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (out / name / "config.json").write_text(json.dumps(to_dict(LIBERO_BUTTER)))
    if evaluation:
        (out / name / "evaluation.json").write_text(json.dumps(evaluation))
    if stopped:
        (out / name / "stopped.json").write_text(json.dumps({"iteration": 1, "reason": stopped}))


def test_the_table_holds_all_that_is_finished_whatever_was_asked_for(tmp_path, monkeypatch, capsys):
    rate = {"success_rate": 0.5, "low": 0.4, "high": 0.6, "episodes": 20, "invalid_episodes": 0}
    result = {"base": rate, "tuned": rate, "difference": rate}
    store(tmp_path, "libero_butter-s10", result)
    store(tmp_path, "libero_butter-s9", result)
    store(tmp_path, "no_clip-s0", None, stopped="Training stopped: success collapsed to 1.0%, from 50.0% at the start")
    store(tmp_path, "no_ratio-s0", None)  # still at work
    store(tmp_path, "single_step-s0", None, stopped="Training stopped: 101 simulator processes were lost (101 died)")
    asked = []

    def evaluate(run_dir, episodes, seed):
        asked.append((run_dir.name, episodes, seed))
        return result

    monkeypatch.setattr(table2, "evaluate", evaluate)
    assert table2.main(table2.Args(out=tmp_path, train=False, presets=("no_clip",), episodes=20)) == 0
    assert asked == [("no_clip-s0", 20, LIBERO_BUTTER.evaluation.seed)]  # the others' own evaluation has this seed too
    table = json.loads((tmp_path / "table2.json").read_text())
    assert [(row["preset"], row["seeds"]) for row in table["rows"]] == [("libero_butter", [9, 10]), ("no_clip", [0])]
    assert "(`no_clip`) (stopped itself)" in capsys.readouterr().out
