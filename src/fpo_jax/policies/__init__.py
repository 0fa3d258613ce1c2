"""Frozen base policies (`fpo_jax.types.BasePolicy`) and how to load one."""

from pathlib import Path

from fpo_jax.policies.point_mass import PointMassPolicy
from fpo_jax.policies.small import SmallPolicy, load_policy
from fpo_jax.types import FpoError, Params, suggestion

CHECKPOINTS = Path(__file__).resolve().parents[3] / "checkpoints"  # of a source checkout (pip install -e)
ANALYTIC = {"point_mass": PointMassPolicy}  # bases that need no file


def load_base(
    name_or_dir: str | Path, checkpoints_root: str | Path | None = None
) -> tuple[SmallPolicy | PointMassPolicy, Params]:
    """Loads a frozen base as (policy, params): by name (`checkpoints_root/<name>`, or `point_mass`) or by folder."""
    root = Path(CHECKPOINTS if checkpoints_root is None else checkpoints_root)
    name = str(name_or_dir)
    if name in ANALYTIC:
        policy = ANALYTIC[name]()
        return policy, policy.init()
    if (root / name).is_dir():
        return load_policy(root / name)
    if isinstance(name_or_dir, Path) or "/" in name or Path(name).is_dir():
        return load_policy(name_or_dir)
    known = sorted({*ANALYTIC, *(config.parent.name for config in root.glob("*/config.json"))})
    raise FpoError(f"There is no base policy called '{name}' in {root}{suggestion(name, known)}")
