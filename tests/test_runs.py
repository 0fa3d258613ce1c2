"""A run's directory: what may change on resume, who may write it, and what a stop says later."""

from dataclasses import replace

import pytest

from fpo_jax.config import SavingConfig
from fpo_jax.fit import Run
from fpo_jax.health import COLLAPSE_WINDOW
from fpo_jax.metrics import RunLogger
from fpo_jax.runs import check_resumable, lock, settled
from fpo_jax.saver import Saver
from fpo_jax.types import FpoError
from tiny import TINY


def test_what_may_change_on_resume():
    saved = settled(TINY)
    patient = replace(saved.libero, reset_seconds=1e3, max_restarts=0, overlap=False, python="/venv/bin/python")
    evaluation = replace(saved.evaluation, video=False)
    check_resumable(saved, replace(saved, libero=patient, saving=SavingConfig(every=1), evaluation=evaluation))
    changed = replace(saved, libero=replace(patient, tasks="success"), evaluation=replace(evaluation, episodes=3))
    with pytest.raises(FpoError, match=r"changed here: libero.tasks: uniform -> success; evaluation.episodes: ") as e:
        check_resumable(saved, changed)
    assert "python" not in str(e.value)


def test_local_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "python").symlink_to("/usr/bin/env")
    libero = replace(TINY.libero, python="python", assets="assets")
    config = settled(replace(TINY, base="mine", libero=libero))
    assert config.base == str(tmp_path / "mine")
    assert config.libero.python == str(tmp_path / "python")  # where it leads is another environment
    assert config.libero.assets == str(tmp_path / "assets")
    check_resumable(replace(TINY, base="mine", libero=libero), config)  # as runs of earlier versions have it
    (tmp_path / "aloha_transfer_cube").mkdir()
    assert settled(replace(TINY, base="aloha_transfer_cube")).base == "aloha_transfer_cube"  # a name


def test_one_job_writes_a_run(tmp_path):
    with lock(tmp_path / "r", False), pytest.raises(FpoError, match="Another job writes"):
        lock(tmp_path / "r", False).__enter__()
    with lock(tmp_path / "r", False):
        (tmp_path / "r" / "config.json").write_text("{}")
    with pytest.raises(FpoError, match="has begun a run in"), lock(tmp_path / "r", False):
        pass
    with lock(tmp_path / "r", True):
        pass


def test_a_run_that_goes_on_after_a_collapse_is_judged_anew(tmp_path):
    def record(rate):
        return {"success_rate": rate, "latent_std": 1.0, "invalid_episodes": 0.0}

    before = [record(rate) for rate in (0.8, 0.8, 0.8, *[0.05] * COLLAPSE_WINDOW)]
    with RunLogger(tmp_path, iterations=20, silent=True) as logger, Saver() as saver:
        run, again = (Run(TINY, tmp_path, logger, saver) for _ in range(2))
    assert [run.note(one) for one in before][-1] is not None
    again.replay(before)
    assert again.best_rate == pytest.approx(0.8)
    *reasons, last = [again.note(record(0.05)) for _ in range(COLLAPSE_WINDOW)]
    assert last == "success collapsed to 5.0%, from 80.0% at the start" and not any(reasons)


def test_a_job_that_is_killed_again_and_again_is_judged_as_if_it_had_not_been(tmp_path):
    """With `--resume auto` the window of a collapse goes on over restarts; None is how a file says NaN."""

    def record(rate):
        return {"success_rate": rate, "latent_std": 1.0, "invalid_episodes": 0.0}

    with RunLogger(tmp_path, iterations=20, silent=True) as logger, Saver() as saver:
        run = Run(replace(TINY, resume="auto"), tmp_path, logger, saver)
    run.replay([record(rate) for rate in (None, 0.8, 0.8, 0.8, *[0.05] * (COLLAPSE_WINDOW - 1))])
    assert run.note(record(0.05)) == "success collapsed to 5.0%, from 80.0% at the start"
