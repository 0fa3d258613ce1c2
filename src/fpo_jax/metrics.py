"""What a run reports: metric files, the live line on the terminal, and the intervals behind every success rate.

A *record* is one flat mapping per iteration with at least the key `iteration`. Names that mean something here:
    iteration, episodes, env_steps      counts since the start of the run
    success_rate, return, clip_fraction shown on the progress line
    *_seconds                           wall-clock times: what two runs of the same seed may differ in
Values are Python numbers, strings or arrays of size 1.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import NormalDist
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from fpo_jax.types import FpoError

Record = Mapping[str, Any]


# --- intervals ------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """An estimate with its confidence limits."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate [Wilson 1927].

    p̃ ± z √(p̂(1-p̂)/n + z²/4n²) / (1 + z²/n)  with  p̃ = (p̂ + z²/2n) / (1 + z²/n). With n = 0 it is (nan, 0, 1).

    Raises ValueError unless 0 <= successes <= n.
    """
    successes, n = int(successes), int(n)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At the borders the limit is exactly 0 or 1, but for rounding.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Interval(rate, low, high)


def paired_difference_interval(base: np.ndarray, tuned: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Newcombe's interval (method 10) of `mean(tuned) - mean(base)`, two success rates on the same initial states.

    With Wilson limits (l₁, u₁) of p₁ = mean(tuned), (l₂, u₂) of p₂ = mean(base) and the correlation φ of the two,
    corrected for continuity (n/2 is taken off a positive numerator, down to 0):
        low  = p₁ - p₂ - √((p₁-l₁)² - 2φ(p₁-l₁)(u₂-p₂) + (u₂-p₂)²)
        high = p₁ - p₂ + √((u₁-p₁)² - 2φ(u₁-p₁)(p₂-l₂) + (p₂-l₂)²)
    [Newcombe 1998, Statistics in Medicine 17, 2635-2650].

    `base`, `tuned`: bool [n], the same episode at the same index. With n = 0 it is (nan, -1, 1).

    Raises ValueError unless both are one-dimensional and equally long.
    """
    base, tuned = np.asarray(base, bool), np.asarray(tuned, bool)
    if base.shape != tuned.shape or base.ndim != 1:
        raise ValueError(f"paired episodes need two vectors of one length, got shapes {base.shape} and {tuned.shape}")
    n = len(base)
    if n == 0:
        return Interval(math.nan, -1.0, 1.0)
    both, only_tuned = int(np.sum(tuned & base)), int(np.sum(tuned & ~base))
    only_base, neither = int(np.sum(~tuned & base)), int(np.sum(~tuned & ~base))
    covariance = both * neither - only_tuned * only_base
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    margins = (both + only_tuned) * (only_base + neither) * (both + only_base) * (only_tuned + neither)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    p1, low1, high1 = wilson_interval(both + only_tuned, n, confidence=confidence)
    p2, low2, high2 = wilson_interval(both + only_base, n, confidence=confidence)

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    difference = p1 - p2
    return Interval(
        difference, difference - distance(p1 - low1, high2 - p2), difference + distance(high1 - p1, p2 - low2)
    )


# --- writers --------------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per line and iteration, on disk when `write` returns; non-finite numbers become null.

    `resumed_iteration` is the last iteration that the run continues from: later lines, which the run is about to
    write again, are dropped, and so is a line that was cut short.

    Raises FpoError where a new run (`resumed_iteration=None`) would write into the file of another.
    """

    def __init__(self, path: str | Path, *, resumed_iteration: int | float | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_iteration is None:
            if self.path.exists() and self.path.stat().st_size:
                raise FpoError(f"{self.path} holds another run: go on with --resume or choose another --run-dir.")
        elif self.path.exists():
            kept = [r for r in read_jsonl(self.path) if r.get("iteration", math.inf) <= resumed_iteration]
            rewritten = self.path.with_suffix(".partial")
            with rewritten.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in kept)
                stream.flush()
                os.fsync(stream.fileno())
            rewritten.replace(self.path)
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line that a killed run left unfinished is skipped.

    Raises FpoError where the file is missing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise FpoError(f"Cannot read the metrics file {path}: {error.strerror}.") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class TensorBoardWriter:
    """Scalars as TensorBoard events against the iteration; a resumed run hides the events it writes again."""

    def __init__(self, directory: str | Path, *, resumed_iteration: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        start = 0 if resumed_iteration is None else resumed_iteration + 1
        # Files are named by the second; the suffix keeps a quick resume from writing over the file it continues.
        self._writer = SummaryWriter(str(directory), purge_step=start or None, filename_suffix=f".from{start}")

    def write(self, record: Record) -> None:
        for name, value in _plain(record).items():
            if name != "iteration" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, int(record["iteration"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Records to Weights & Biases. Raises FpoError where the package is missing."""

    def __init__(
        self, project: str, run_dir: str | Path, *, config: Mapping[str, Any] | None = None, resumed: bool = False
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise FpoError(
                'Weights & Biases is not installed: pip install "fpo_jax[wandb]", or leave its project name out.'
            ) from error
        # The run's identity must outlive the process; the directory's name is too easily the same in two places.
        id_file = Path(run_dir) / "wandb_id"
        run_id = id_file.read_text().strip() if resumed and id_file.exists() else wandb.util.generate_id()
        self._run = wandb.init(
            project=project,
            dir=str(run_dir),
            name=Path(run_dir).name,
            id=run_id,
            resume="allow",
            config=dict(config or {}),
        )
        id_file.write_text(run_id + "\n")

    def write(self, record: Record) -> None:
        self._run.log(_plain(record), step=int(record["iteration"]))

    def close(self) -> None:
        self._run.finish()


def _plain(record: Record) -> dict[str, Any]:
    """Python numbers out of arrays of size 1; null for what JSON cannot say."""

    def plain(value: Any) -> Any:
        if isinstance(value, (str, type(None))):
            return value
        value = np.asarray(value).item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in record.items()}


# --- terminal -------------------------------------------------------------------------------------------------------


class ProgressLine:
    """The live line of a run; where the output is no terminal, plain lines, one every `plain_interval_seconds`.

    The first iteration of a process compiles, so speed and time left are of the later ones.
    """

    def __init__(
        self,
        iterations: int,
        *,
        start: int = 0,
        console: Console | None = None,
        plain_interval_seconds: float = 15.0,
    ) -> None:
        self.iterations = iterations
        self.console = console or Console()
        self._plain_interval_seconds = plain_interval_seconds
        self._printed_at = -math.inf
        self._done = start
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=11)  # (time [s], iteration, env_steps)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        if self._live:
            self._live.start()

    def update(self, record: Record) -> None:
        """Show the record of a finished iteration (keys as in the module's docstring, all but `iteration` optional)."""
        record = _plain(record)
        self._done = int(record["iteration"])
        now = time.monotonic()
        self._marks.append((now, self._done, record.get("env_steps") or 0))
        text = "  ".join(self._parts(record))
        if self._live:
            row = Table.grid(padding=(0, 1))
            row.add_row(ProgressBar(total=self.iterations, completed=self._done, width=20), text)
            self._live.update(row, refresh=True)
        elif now - self._printed_at >= self._plain_interval_seconds or self._done >= self.iterations:
            self._printed_at = now
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _parts(self, record: Record) -> Iterable[str]:
        yield f"iteration {self._done}/{self.iterations}"
        formats = {
            "episodes": "episodes {:.0f}",
            "success_rate": "success {:.1%}",
            "return": "return {:.3f}",
            "clip_fraction": "clipped {:.1%}",
        }
        for name, template in formats.items():
            if (value := record.get(name)) is not None:
                yield template.format(value)
        if broken := record.get("invalid_episodes"):
            yield f"invalid {broken:.0f}"
        (t0, i0, s0), (t1, i1, s1) = self._marks[0], self._marks[-1]
        if i1 > i0 and t1 > t0:
            if s1 > s0:
                yield f"{(s1 - s0) / (t1 - t0):,.0f} steps/s"
            yield f"{_duration((self.iterations - i1) * (t1 - t0) / (i1 - i0))} left"

    def print(self, message: str) -> None:
        """A line above the live one."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def now_and_then(say: Callable[[str], None], seconds: float = 15.0) -> Callable[[str], None]:
    """`say`, which leaves out what comes less than `seconds` after what it said last, or after the start."""
    said_at = time.monotonic()

    def seldom(message: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= seconds:
            said_at = time.monotonic()
            say(message)

    return seldom


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RunLogger:
    """All that a run reports, in one place: `<run_dir>/metrics.jsonl`, `<run_dir>/tensorboard/`, W&B, the terminal.

    with RunLogger(run_dir, iterations=120) as logger:
        logger.log({"iteration": 1, "episodes": 32, ...})

    `resumed_iteration` is the last finished iteration of the checkpoint the run goes on from, None for a new run.
    `silent`: nothing is written nor shown, in all processes of a run but the first.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        iterations: int,
        resumed_iteration: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        run_dir = Path(run_dir)
        self.metrics_path = run_dir / "metrics.jsonl"
        self._writers: list[Writer] = []
        if not silent:
            self._writers.append(JsonlWriter(self.metrics_path, resumed_iteration=resumed_iteration))
        if tensorboard and not silent:
            self._writers.append(TensorBoardWriter(run_dir / "tensorboard", resumed_iteration=resumed_iteration))
        if wandb_project and not silent:
            resumed = resumed_iteration is not None
            self._writers.append(WandbWriter(wandb_project, run_dir, config=config, resumed=resumed))
        console = Console(quiet=True) if silent else console
        self._progress = ProgressLine(iterations, start=resumed_iteration or 0, console=console)

    def log(self, record: Record) -> None:
        """Write the record of one iteration everywhere. Raises ValueError where it has no `iteration`."""
        if "iteration" not in record:
            raise ValueError("a record needs the key 'iteration'")
        for writer in self._writers:
            writer.write(record)
        self._progress.update(record)

    def print(self, message: str) -> None:
        """A line on the terminal that leaves the progress line whole."""
        self._progress.print(message)

    def close(self) -> None:
        self._progress.close()
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
