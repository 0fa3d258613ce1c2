"""Sweeps over training options: the space file, settings drawn from it, and the command line of each trial.

A space file is YAML: under `base` options of `train.py` for every trial, under `parameters` those that vary, both named
as on the command line:
    base: {env: point_mass, iterations: 20}
    parameters:
      fpo.epsilon: {loguniform: [0.05, 0.5]}        # also uniform; int, both ends included; choice
      fpo.ratio: {choice: [mean, paper]}
      fpo.beta: {uniform: [0.05, 0.3], when: {fpo.ratio: paper}}      # left out of trials in which it means nothing
"""

import dataclasses
import hashlib
import itertools
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpo_jax.config import TrainConfig, check, from_dict, preset, to_dict
from fpo_jax.types import FpoError, suggestion

Kind = Literal["uniform", "loguniform", "int", "choice"]
Settings = dict[str, Any]  # option -> value

_OURS = ("run_dir", "resume")  # what a sweep decides itself
_OF_PROCESSES = ("parallel.hosts", "parallel.coordinator", "parallel.num_processes", "parallel.process_id")


@dataclass(frozen=True)
class Parameter:
    """One option and the values it may take."""

    name: str
    kind: Kind
    values: tuple[Any, ...]  # (low, high), for `choice` all of them
    when: Settings = field(default_factory=dict)  # the parameter is left out unless the others have these values


@dataclass(frozen=True)
class Space:
    """What a sweep searches."""

    base: Settings
    parameters: tuple[Parameter, ...]

    def active(self, settings: Settings) -> Settings:
        """Only those parameters whose `when` is fulfilled."""
        every = self.base | settings
        conditions = {p.name: p.when.items() for p in self.parameters}
        return {name: x for name, x in settings.items() if all(every.get(k) == v for k, v in conditions[name])}

    def config(self, settings: Settings) -> TrainConfig:
        """The training configuration of a trial."""
        return _config(self.base | settings)


# --- reading a space file -------------------------------------------------------------------------------------------


def read_space(path: Path) -> Space:
    """The space of a YAML file. Raises FpoError for unknown options, values that do not fit and empty ranges."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise FpoError(f"Cannot read the space file {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise FpoError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise FpoError(f"{path} needs two entries, base and parameters; see sweeps/aloha.yaml.")
    for name in content:
        if name not in ("base", "parameters"):
            raise FpoError(f"{path} has an unknown entry {name!r}{suggestion(str(name), ('base', 'parameters'))}")
    given, searched = content.get("base") or {}, content.get("parameters")
    if not isinstance(given, dict) or not isinstance(searched, dict) or not searched:
        raise FpoError(f"{path} names no parameters to search; give option: {{kind: values}} under parameters.")
    try:
        return _space(given, searched)
    except FpoError as error:
        raise FpoError(f"{path}: {error}") from error


def _space(given: Mapping[str, Any], searched: Mapping[str, Any]) -> Space:
    base = {_option(name): _value(_option(name), value) for name, value in given.items()}
    check(_config(base))
    parameters = tuple(_parameter(_option(name), text) for name, text in searched.items())
    names = {parameter.name for parameter in parameters}
    if len(names) < len(parameters) or names & set(base):
        raise FpoError("each option may stand once, under base or under parameters.")
    for parameter in parameters:
        if unknown := sorted(set(parameter.when) - names - set(base)):
            raise FpoError(f"{parameter.name}: when names {unknown[0]}, which is no parameter of this space.")
        for value in parameter.values:
            check(_config(base | {parameter.name: value}))
    return Space(base, parameters)


def _parameter(name: str, text: Any) -> Parameter:
    """One entry under `parameters`."""
    known = typing.get_args(Kind)
    text = dict(text) if isinstance(text, Mapping) else {}
    when = text.pop("when", {})
    if len(text) != 1 or not isinstance(when, Mapping):
        raise FpoError(f"{name} needs one kind with its values, as {{loguniform: [0.05, 0.5]}}; {', '.join(known)}.")
    [(kind, values)] = text.items()
    if kind not in known:
        raise FpoError(f"{name}: there is no kind {kind!r}{suggestion(str(kind), known)}")
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
        raise FpoError(f"{name}: {kind} takes {'a list of values' if kind == 'choice' else '[lowest, highest]'}.")
    values = tuple(_value(name, value) for value in values)
    conditions = {_option(other): _value(_option(other), value) for other, value in when.items()}
    if kind != "choice":
        number = int if kind == "int" else float
        if number not in _types_of(name):
            raise FpoError(f"{name} is no {'whole number' if kind == 'int' else 'real number'}: {kind} does not fit.")
        low, high = values
        if not low < high:
            raise FpoError(f"{name}: {kind} needs [lowest, highest], not [{low}, {high}].")
        if kind == "loguniform" and low <= 0:
            raise FpoError(f"{name}: loguniform needs a lowest value greater than 0, not {low}.")
    return Parameter(name, kind, values, conditions)


def _fields(like: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every option, by its dotted name."""
    hints = typing.get_type_hints(like)
    found = {}
    for entry in dataclasses.fields(like):
        kind = hints[entry.name]
        found |= (
            _fields(kind, f"{prefix}{entry.name}.") if dataclasses.is_dataclass(kind) else {prefix + entry.name: kind}
        )
    return found


def _option(name: Any) -> str:
    """The option as the configuration spells it (`actor.learning-rate` is `actor.learning_rate`)."""
    known, spelt = _fields(), str(name).removeprefix("--").replace("-", "_")
    if spelt in _OURS:
        raise FpoError(f"{spelt} is the sweep's to decide; leave it out.")
    if spelt.startswith("population."):
        raise FpoError(f"{spelt}: a trial is a single run; vary the seed instead.")
    if spelt in _OF_PROCESSES:
        raise FpoError(f"{spelt}: a trial is a single process; leave it out.")
    if spelt not in known:
        raise FpoError(f"there is no option {name!r}{suggestion(spelt, known)}")
    return spelt


def _types_of(name: str) -> tuple[Any, ...]:
    kind = _fields()[name]
    return (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )


def _value(name: str, value: Any) -> Any:
    """`value` as the option's type wants it. Raises FpoError where it does not fit."""
    words = []
    for kind in _types_of(name):
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        number = _number(value)
        if value in choices or (kind is types.NoneType and value is None):
            return value
        if kind is float and number is not None:
            return number
        if kind in (bool, str, int) and type(value) is kind:
            return value
        if typing.get_origin(kind) is tuple and isinstance(value, list) and all(type(x) is int for x in value):
            return tuple(value)
        words += choices or [{bool: "true or false", str: "a word", int: "a whole number", float: "a number"}.get(kind)]
    wanted = ", ".join(str(word) for word in words if word) or "a list of whole numbers"
    raise FpoError(f"{name} cannot be {value!r}; it takes {wanted}.")


def _number(value: Any) -> float | None:
    """YAML takes 1e-4, which has no point, for a word."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _config(settings: Settings) -> TrainConfig:
    default = preset(settings.get("preset", "default"))
    nested = to_dict(default)
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return from_dict(nested, default)


# --- drawing settings -----------------------------------------------------------------------------------------------


def default_settings(space: Space) -> Settings | None:
    """What the parameters are without a sweep; None where one of them lies outside its range."""
    settings = {}
    for parameter in space.parameters:
        value: Any = space.config({})
        for part in parameter.name.split("."):
            value = getattr(value, part)
        inside = value in parameter.values if parameter.kind == "choice" else _within(value, parameter.values)
        if not inside:
            return None
        settings[parameter.name] = value
    return settings


def _within(value: Any, limits: tuple[Any, ...]) -> bool:
    return value is not None and limits[0] <= value <= limits[1]


def random_settings(space: Space, count: int, seed: int) -> list[Settings]:
    """The defaults, where the space holds them, then independent draws; no two alike, fewer than `count` if need be."""
    rng = np.random.default_rng(seed)
    first = default_settings(space)
    found = {} if first is None else {trial_name(s): s for s in [space.active(first)]}
    for _ in range(100 * count):
        if len(found) >= count:
            break
        settings = space.active({p.name: _draw(p, rng) for p in space.parameters})
        found.setdefault(trial_name(settings), settings)
    return list(found.values())[:count]


def _draw(parameter: Parameter, rng: np.random.Generator) -> Any:
    if parameter.kind == "choice":
        return parameter.values[rng.integers(len(parameter.values))]
    low, high = parameter.values
    if parameter.kind == "int":
        return int(rng.integers(low, high, endpoint=True))
    if parameter.kind == "loguniform":
        return rounded(np.exp(rng.uniform(np.log(low), np.log(high))))
    return rounded(rng.uniform(low, high))


def rounded(value: float) -> float:
    """Four significant digits: more say nothing, and command lines stay readable."""
    return float(f"{value:.4g}")


def grid_settings(space: Space, points: int) -> list[Settings]:
    """Every combination, with `points` values of each range."""
    axes = [[(p.name, value) for value in _points(p, points)] for p in space.parameters]
    every = [space.active(dict(combination)) for combination in itertools.product(*axes)]
    return list({trial_name(settings): settings for settings in every}.values())


def _points(parameter: Parameter, points: int) -> Sequence[Any]:
    if parameter.kind == "choice":
        return parameter.values
    low, high = parameter.values
    if parameter.kind == "int":
        return sorted({round(x) for x in np.linspace(low, high, points)})
    return [rounded(x) for x in (np.geomspace if parameter.kind == "loguniform" else np.linspace)(low, high, points)]


# --- trials ---------------------------------------------------------------------------------------------------------


def trial_name(settings: Settings) -> str:
    """The same for the same settings, so that a repeated or resumed sweep finds its runs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def command_line(space: Space, settings: Settings, run_dir: Path) -> list[str]:
    """The arguments of `train.py` for a trial."""
    arguments = []
    for name, value in (space.base | settings).items():
        *groups, last = name.replace("_", "-").split(".")
        if isinstance(value, bool):
            arguments.append("--" + ".".join([*groups, last if value else f"no-{last}"]))
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += ["--" + ".".join([*groups, last]), *map(str, values)]
    return [*arguments, "--run-dir", str(run_dir)]
