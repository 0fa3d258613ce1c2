"""A π0 of a few thousand weights with its checkpoint, for tests."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from fpo_jax.policies import OPENPI_FILE
from fpo_jax.policies.gemma import GemmaConfig
from fpo_jax.policies.openpi_checkpoint import save_params
from fpo_jax.policies.openpi_configs import OPENPI_CONFIGS, OpenpiConfig, write_openpi_config
from fpo_jax.policies.pi0 import Pi0Config, init
from fpo_jax.policies.siglip import SiglipConfig
from fpo_jax.policies.tokenizer import TOKENIZER_FILE, train_tiny_tokenizer
from fpo_jax.policies.transforms import NormStats

GEMMA = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = Pi0Config(
    paligemma=GEMMA,
    expert=replace(GEMMA, width=8, mlp_dim=16),
    image_tower=SiglipConfig(width=8, depth=1, mlp_dim=16, num_heads=2, patch=14),
    action_dim=16,
    horizon=10,
    image_size=28,
    vocab_size=512,
)
ALOHA = replace(OPENPI_CONFIGS["pi0_aloha_sim"], model=MODEL, asset_id="arms", adapt_to_pi=False, checkpoint="")
STATS = {
    # Actions near the arms' starting pose, so that physics stays quiet.
    "state": NormStats(np.zeros(14, np.float32), np.ones(14, np.float32), *np.float32([[-1.0] * 14, [1.0] * 14])),
    "actions": NormStats(
        np.float32(2 * [0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.0]),
        np.full(14, 0.05, np.float32),
        np.full(14, -0.5, np.float32),
        np.full(14, 0.5, np.float32),
    ),
}


LIBERO = replace(OPENPI_CONFIGS["pi0_libero"], model=MODEL, asset_id="panda", delta_actions=False, checkpoint="")
LIBERO_STATS = {
    "state": NormStats(np.zeros(8, np.float32), np.ones(8, np.float32), *np.float32([[-1.0] * 8, [1.0] * 8])),
    "actions": NormStats(np.zeros(7, np.float32), np.full(7, 0.5, np.float32), *np.float32([[-1.0] * 7, [1.0] * 7])),
}


def write_checkpoint(folder: Path, config: OpenpiConfig = ALOHA, seed: int = 0) -> Path:
    """A checkpoint folder as `load_base` takes it: openpi's layout, the configuration, a tokenizer."""
    params = jax.jit(init, static_argnums=0)(config.model, jax.random.key(seed))
    save_params(folder, params, LIBERO_STATS if config.robot == "libero" else STATS, config.asset_id)
    write_openpi_config(folder / OPENPI_FILE, config)
    train_tiny_tokenizer(folder / TOKENIZER_FILE, ["Transfer cube", "Task: State: 0 1 2 3; Action:"])
    return folder
