"""Checkpoints written in the background, while training goes on."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from fpo_jax import checkpoint, hosts


class Saver:
    """Saves in the background, in the order of the calls; leaving the `with` block waits for what is unfinished.

    with Saver() as saver:
        saver.save(run_dir, step, tree)

    `most_unfinished` bounds what a slow disk may keep in host memory; by default two iterations' rolling, best and
    milestone.
    """

    def __init__(self, most_unfinished: int = 6) -> None:
        self._most_unfinished = most_unfinished
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._unfinished: deque[tuple[Path, Future[Path]]] = deque()

    def save(
        self,
        run_dir: str | Path,
        step: int,
        tree: PyTree,
        *,
        shelf: checkpoint.Shelf = "checkpoints",
        keep: int | None = None,
        config: Mapping[str, Any] | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """`checkpoint.save`, but it returns when the arrays have left the device.

        Waits where this very checkpoint or `most_unfinished` others are still being written; with several processes,
        where any other one is. Raises FpoError when the disk is full, or became full under an earlier checkpoint.
        """
        target = Path(run_dir).resolve() / shelf / str(step)
        if hosts.num_processes() > 1:  # they must meet in one order, also within Orbax
            self.wait()
        while self._unfinished and (
            self._unfinished[0][1].done()
            or len(self._unfinished) >= self._most_unfinished
            or any(target == other for other, _ in self._unfinished)
        ):
            self._finish_oldest()
        writing = checkpoint.begin(run_dir, step, tree, shelf, keep, config, extra)
        self._unfinished.append((target, self._thread.submit(writing.finish)))

    def wait(self) -> None:
        """Return when everything is on disk, on all hosts; raises what went wrong meanwhile."""
        while self._unfinished:
            self._finish_oldest()
        hosts.wait_for_all("checkpoints are on disk")

    def _finish_oldest(self) -> None:
        _, writing = self._unfinished.popleft()
        writing.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()
