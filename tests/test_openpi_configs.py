"""The named openpi configurations against openpi's own, and configurations in JSON files."""

import dataclasses
import json
from pathlib import Path

import pytest

import openpi_golden as golden
from fpo_jax.policies.gemma import GemmaConfig, Lora
from fpo_jax.policies.openpi_configs import (
    OPENPI_CONFIGS,
    OpenpiConfig,
    from_dict,
    read_openpi_config,
    to_dict,
    write_openpi_config,
)
from fpo_jax.policies.pi0 import Pi0Config
from fpo_jax.policies.siglip import SiglipConfig
from fpo_jax.types import FpoError

RECORDED = json.loads((golden.FOLDER / "configs.json").read_text())  # openpi's, for ALOHA and LIBERO
SHARED = Path(__file__).parents[2] / "shared" / "openpi_reference" / "configs.json"

EXPLICIT = OpenpiConfig(
    model=Pi0Config(
        paligemma=GemmaConfig(16, 2, 32, 4, 1, 8, attention_lora=Lora(2, 4.0)),
        expert=GemmaConfig(8, 2, 16, 4, 1, 8),
        image_tower=SiglipConfig(8, 1, 16, 2, 14),
        action_dim=14,
        horizon=20,
        image_size=28,
        vocab_size=64,
        dtype="bfloat16",
    ),
    robot="aloha",
    asset_id="me/bimanual",
    prompt="pick up the cube – slowly",
    normalisation="z-score",
    delta_actions=False,
    adapt_to_pi=False,
    discrete_state_input=False,
    max_token_len=32,
    checkpoint="/data/mine",
)


@pytest.mark.skipif(not SHARED.is_file(), reason=f"openpi's full list of configurations is not at {SHARED}")
def test_excerpt_is_openpis():
    full = json.loads(SHARED.read_text())
    for name, fields in RECORDED.items():
        assert fields == {key: full[name][key] for key in fields}
    robots = ("LeRobotAlohaDataConfig", "LeRobotLiberoDataConfig")
    ours = {name for name, c in full.items() if c["data_factory"] in robots and c["model_type"] != "pi0_fast"}
    assert ours == set(RECORDED)


@pytest.mark.parametrize("name", OPENPI_CONFIGS)
def test_named_configurations_are_openpis(name):
    config, model = OPENPI_CONFIGS[name], OPENPI_CONFIGS[name].model
    recorded = RECORDED[{"pi0_base": "pi0_aloha", "pi05_base": "pi05_aloha"}.get(name, name)]
    aloha = recorded["data_factory"] == "LeRobotAlohaDataConfig"
    ours = {
        "model_type": "pi05" if model.pi05 else "pi0",
        "action_dim": model.action_dim,
        "action_horizon": model.horizon,
        "max_token_len": config.max_token_len,
        "paligemma_variant": model.paligemma,
        "action_expert_variant": model.expert,
        "discrete_state_input": config.discrete_state_input,
        "data_factory": f"LeRobot{config.robot.capitalize()}DataConfig",
        "asset_id": config.asset_id,
        "norm": config.normalisation,
    }
    if aloha:
        ours |= {
            "use_delta_joint_actions": config.delta_actions,
            "adapt_to_pi": config.adapt_to_pi,
            "default_prompt": config.prompt,
        }
    else:
        ours |= {"extra_delta_transform": config.delta_actions}
        assert config.prompt is None
        assert not config.adapt_to_pi
    assert ours == recorded
    assert (model.image_tower, model.image_size, model.vocab_size) == ("So400m/14", 224, 257152)


def test_every_recorded_configuration_has_a_name_here():
    assert set(RECORDED) | {"pi0_base", "pi05_base"} == set(OPENPI_CONFIGS)


def test_public_weights():
    public = {
        *("pi0_base", "pi05_base", "pi0_aloha_towel", "pi0_aloha_tupperware", "pi0_aloha_pen_uncap", "pi0_aloha_sim"),
        *("pi0_libero", "pi05_libero"),
    }
    prefix = "gs://openpi-assets/checkpoints/"
    places = {name: config.checkpoint.removeprefix(prefix) for name, config in OPENPI_CONFIGS.items()}
    assert {place for place in places.values() if place} == public
    assert {name: place for name, place in places.items() if place != name} == {
        "pi0_aloha": "pi0_base",
        "pi05_aloha": "pi05_base",
        "pi05_aloha_pen_uncap": "",
        "pi0_libero_low_mem_finetune": "",
    }


@pytest.mark.parametrize("config", [*OPENPI_CONFIGS.values(), EXPLICIT])
def test_files_give_the_same_configuration_back(tmp_path, config):
    write_openpi_config(tmp_path / "openpi.json", config)
    again = read_openpi_config(tmp_path / "openpi.json")
    assert again == config
    assert hash(again) == hash(config)


def test_what_may_be_left_out():
    content = to_dict(EXPLICIT)
    content["model"] = {"pi05": True}
    del content["checkpoint"]
    assert from_dict(content) == dataclasses.replace(EXPLICIT, model=Pi0Config(pi05=True), checkpoint="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapt_to_pie": True}, r"adapt_to_pie is no field of an openpi configuration; did you mean 'adapt_to_pi'\?"),
        ({"robot": "droid"}, "robot must be 'aloha' or 'libero', not \"droid\""),
        ({"prompt": 3}, "prompt must be a string or null, not 3"),
        ({"delta_actions": 1}, "delta_actions must be true or false, not 1"),
        ({"max_token_len": True}, "max_token_len must be a whole number, not true"),
        ({"model": "pi0"}, 'model must be an object with sizes, not "pi0"'),
        ({"model": {"horizon": 5.5}}, "model.horizon must be a whole number, not 5.5"),
        ({"model": {"paligemma": {"width": 64}}}, "model.paligemma.depth is missing"),
        ({"model": {"paligemma": {"depht": 4}}}, "model.paligemma.depht is no field .*; did you mean 'depth'"),
        ({"model": {"image_tower": 14}}, "model.image_tower must be a string or an object with sizes, not 14"),
        ({"model": {"expert": "gemma_3b"}}, "There is no Gemma variant 'gemma_3b'"),
        ({"model": {"image_tower": "So400m"}}, "There is no image tower 'So400m'; did you mean"),
        ({"model": {"dtype": "half"}}, 'model.dtype must be "float32" or "bfloat16", not "half"'),
    ],
)
def test_wrong_fields(change, message):
    with pytest.raises(FpoError, match=message):
        from_dict(to_dict(EXPLICIT) | change)


def test_missing_field():
    content = to_dict(EXPLICIT)
    del content["asset_id"]
    with pytest.raises(FpoError, match=r"^asset_id is missing"):
        from_dict(content)


def test_wrong_files(tmp_path):
    with pytest.raises(FpoError, match=r"There is no readable openpi configuration at .*none.json: give a JSON file"):
        read_openpi_config(tmp_path / "none.json")
    file = tmp_path / "openpi.json"
    for text, message in {
        "{": r"openpi.json is no JSON \(.*\): mend it",
        "[]": r"In .*openpi.json: an openpi configuration must be a JSON object",
        "{}": r"In .*openpi.json: model is missing",
    }.items():
        file.write_text(text)
        with pytest.raises(FpoError, match=message):
            read_openpi_config(file)
