"""Improve a frozen flow policy by Flow Policy Optimization.

python experiments/train.py --env aloha_transfer_cube

python experiments/train.py --preset paper --seed 1

python experiments/train.py --resume --run-dir runs/aloha_transfer_cube-default-s0

Exit codes: 0 done; 2 a mistake, or a run that stopped itself; 75 stopped by SIGTERM, or because another process of the
run was lost: the same command goes on, given --resume auto; 130 stopped by Ctrl-C.
"""

import sys
from dataclasses import replace
from pathlib import Path

import tyro
from rich.console import Console

from fpo_jax import hosts
from fpo_jax.config import TrainConfig, preset
from fpo_jax.evaluate import report
from fpo_jax.fit import RunStopped, fit
from fpo_jax.fit_population import fit as fit_population
from fpo_jax.fit_population import is_population
from fpo_jax.fit_population import report as report_population
from fpo_jax.runs import default_run_dir, read_config
from fpo_jax.signals import stop_signals
from fpo_jax.types import FpoError


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value of `--option value` or `--option=value`; tyro has yet to parse the rest."""
    names = (f"--{option}", f"--{option.replace('-', '_')}")
    for index, argument in enumerate(arguments):
        if argument in names and index + 1 < len(arguments):
            return arguments[index + 1]
        for name in names:
            if argument.startswith(name + "="):
                return argument.removeprefix(name + "=")
    return None


def spelled_out(arguments: list[str]) -> list[str]:
    """`--resume` alone is `--resume yes`."""
    followers = [*arguments[1:], ""]
    pairs = zip(arguments, followers, strict=True)
    bare = [word == "--resume" and follower not in ("no", "yes", "auto") for word, follower in pairs]
    return [part for word, is_bare in zip(arguments, bare, strict=True) for part in [word, *["yes"] * is_bare]]


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration: a preset, or on --resume the run's own, with the given options over it."""
    arguments = spelled_out(arguments)
    name, run_dir = _value_of("preset", arguments), _value_of("run-dir", arguments)
    defaults = preset(name or "default")
    if _value_of("resume", arguments) in ("yes", "auto"):
        guess = tyro.cli(TrainConfig, args=arguments, default=defaults) if run_dir is None else None
        saved = Path(run_dir) if run_dir else default_run_dir(guess or defaults)
        if (saved / "config.json").exists():
            defaults = read_config(saved)
    config = tyro.cli(TrainConfig, args=arguments, default=defaults, description=__doc__)
    return replace(config, run_dir=config.run_dir or str(default_run_dir(config)))


def main(arguments: list[str]) -> int:
    console = Console()
    errors = Console(stderr=True)
    try:
        with stop_signals():
            config = parse(arguments)
            result = (fit_population if is_population(config) else fit)(config, console)
    except RunStopped as stopped:
        errors.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        errors.print("Interrupted; what was saved before is whole: go on with --resume auto.")
        return 130
    except (FpoError, OSError) as error:
        errors.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if not hosts.is_first():
        return 0
    if result:
        text = report_population(result) if is_population(config) else report(result)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Everything is in {config.run_dir}: learning_curve.png, metrics.jsonl, evaluation.json ...",
        markup=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
