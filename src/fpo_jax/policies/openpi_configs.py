"""What belongs to a π0 or π0.5 checkpoint besides its weights: model sizes, robot, statistics, prompt.

The named configurations are openpi's own at 15a9616 (Apache-2.0); any other one is a JSON file with the same fields.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fpo_jax.policies.gemma import gemma_config
from fpo_jax.policies.pi0 import Pi0Config
from fpo_jax.policies.siglip import siglip_config
from fpo_jax.policies.transforms import Normalisation, Robot, RobotTransform
from fpo_jax.types import FpoError, suggestion


@dataclass(frozen=True)
class OpenpiConfig:
    """How a checkpoint was trained. None of it is written in the checkpoint itself, so a wrong field goes unnoticed."""

    model: Pi0Config
    robot: Robot
    asset_id: str  # which normalisation statistics: assets/<asset_id>/norm_stats.json
    prompt: str | None  # the default task; None: the user has to say
    normalisation: Normalisation  # z-score for π0, quantile for π0.5
    delta_actions: bool  # joints (LIBERO: pose) are predicted relative to the state
    adapt_to_pi: bool  # ALOHA's joint signs and grippers in the conventions of the real robot
    discrete_state_input: bool  # π0.5: the state is written into the prompt
    max_token_len: int  # prompts are padded or cut to it
    render: Literal["official", "fast"] = "official"  # quality of simulated pictures that it was trained on
    checkpoint: str = ""  # public location of the weights; "": there are none

    @property
    def transform(self) -> RobotTransform:
        """From the robot's units to the model's and back."""
        return RobotTransform(
            self.robot, self.normalisation, self.model.action_dim, self.adapt_to_pi, self.delta_actions
        )


_PUBLIC = "gs://openpi-assets/checkpoints"
_TROSSEN = "trossen"  # statistics of pre-training on ALOHA arms
_LIBERO = "physical-intelligence/libero"
_PI05 = Pi0Config(pi05=True)


def _pi0(robot: Robot, asset_id: str, checkpoint: str, **fields: Any) -> OpenpiConfig:
    """A π0 configuration; ALOHA's adaptation and relative actions are on, as in nearly all of openpi's."""
    model = fields.pop("model", Pi0Config())
    common: dict[str, Any] = {
        "prompt": None,
        "normalisation": "quantile" if model.pi05 else "z-score",
        "delta_actions": True,
        "adapt_to_pi": robot == "aloha",
        "discrete_state_input": model.pi05,
        "max_token_len": model.max_token_len,
        "checkpoint": checkpoint and f"{_PUBLIC}/{checkpoint}",
    }
    return OpenpiConfig(model, robot, asset_id, **(common | fields))


_TOWEL = "fold the towel"
_TUPPERWARE = "open the tupperware and put the food on the plate"
_PEN = "uncap the pen"
_LORA = Pi0Config(paligemma="gemma_2b_lora", expert="gemma_300m_lora")

# `<name>_base` are the pre-trained models behind openpi's configurations `pi0_aloha` and `pi05_aloha`.
OPENPI_CONFIGS: dict[str, OpenpiConfig] = {
    "pi0_base": _pi0("aloha", _TROSSEN, "pi0_base"),
    "pi0_aloha": _pi0("aloha", _TROSSEN, "pi0_base"),
    "pi0_aloha_towel": _pi0("aloha", _TROSSEN, "pi0_aloha_towel", prompt=_TOWEL),
    "pi0_aloha_tupperware": _pi0("aloha", _TROSSEN, "pi0_aloha_tupperware", prompt=_TUPPERWARE),
    "pi0_aloha_pen_uncap": _pi0("aloha", _TROSSEN, "pi0_aloha_pen_uncap", prompt=_PEN),
    "pi0_aloha_sim": _pi0(
        *("aloha", "lerobot/aloha_sim_transfer_cube_human", "pi0_aloha_sim"),
        prompt="Transfer cube",
        delta_actions=False,
    ),
    "pi0_libero": _pi0("libero", _LIBERO, "pi0_libero"),
    "pi0_libero_low_mem_finetune": _pi0("libero", _LIBERO, "", model=_LORA),
    "pi05_base": _pi0("aloha", _TROSSEN, "pi05_base", model=_PI05),
    "pi05_aloha": _pi0("aloha", _TROSSEN, "pi05_base", model=_PI05),
    "pi05_aloha_pen_uncap": _pi0("aloha", _TROSSEN, "", model=_PI05, prompt=_PEN),
    "pi05_libero": _pi0(
        *("libero", _LIBERO, "pi05_libero"),
        model=dataclasses.replace(_PI05, horizon=10),
        delta_actions=False,
        discrete_state_input=False,  # it sees no state at all
    ),
}


def to_dict(config: OpenpiConfig) -> dict[str, Any]:
    """The configuration as JSON types."""
    return dataclasses.asdict(config)


def from_dict(content: Mapping[str, Any]) -> OpenpiConfig:
    """The inverse of `to_dict`; fields of `model` may be left out, Gemma and SigLIP sizes be names or explicit.

    Raises FpoError on an unknown or missing field and on a value of the wrong type.
    """
    return _parse(content)


def read_openpi_config(path: str | os.PathLike[str]) -> OpenpiConfig:
    """Reads a JSON file; raises FpoError where it is missing or no configuration."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise FpoError(f"There is no readable openpi configuration at {path}: give a JSON file.") from error
    except ValueError as error:
        raise FpoError(f"{path} is no JSON ({error}): mend it.") from error
    try:
        return _parse(content)
    except FpoError as error:
        raise FpoError(f"In {path}: {error}") from error


def write_openpi_config(path: str | os.PathLike[str], config: OpenpiConfig) -> None:
    """Writes what `read_openpi_config` reads."""
    Path(path).write_text(json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n")


def _parse(content: Any) -> OpenpiConfig:
    config = _build(OpenpiConfig, content, "")
    gemma_config(config.model.paligemma)  # these raise where there is no such variant
    gemma_config(config.model.expert)
    siglip_config(config.model.image_tower)
    if config.model.dtype not in ("float32", "bfloat16"):
        raise FpoError(f'model.dtype must be "float32" or "bfloat16", not {json.dumps(config.model.dtype)}.')
    return config


def _build(kind: Any, content: Any, prefix: str) -> Any:
    """A dataclass from a JSON object; `prefix` is where it stands, such as `model.expert.`."""
    if not isinstance(content, Mapping):
        raise FpoError(f"{prefix.rstrip('.') or 'an openpi configuration'} must be a JSON object with named fields.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in content:
        if name not in fields:
            raise FpoError(f"{prefix}{name} is no field of an openpi configuration{suggestion(name, fields)}")
    for name, field in fields.items():
        if name not in content and field.default is dataclasses.MISSING:
            raise FpoError(f"{prefix}{name} is missing: say what it is.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, prefix + name) for name, value in content.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` where it has the type of the annotation, with JSON objects as dataclasses."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = []
    for choice in choices:
        if dataclasses.is_dataclass(choice):
            if isinstance(value, Mapping):
                return _build(choice, value, f"{name}.")
            words.append("an object with sizes")
        elif typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return value
            words.append(" or ".join(map(repr, typing.get_args(choice))))
        elif choice is float and type(value) in (int, float):
            return float(value)
        elif type(value) is choice:  # a bool is no int
            return value
        else:
            words.append({str: "a string", int: "a whole number", float: "a number", bool: "true or false"}.get(choice))
    expected = " or ".join(word or "null" for word in words)
    raise FpoError(f"{name} must be {expected}, not {json.dumps(value)}.")
