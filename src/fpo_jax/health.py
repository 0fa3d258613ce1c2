"""Why a training run should stop, read off its records."""

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

COLLAPSE_WINDOW = 8  # iterations
_MAY_BE_NAN = {"success_rate", "return", "episode_length"}  # where no episode ended in an iteration


def failure(records: deque[Mapping[str, float]], base_rate: float) -> str | None:
    """Why a run should stop, or None. `records`: newest last; `base_rate`: success of the first iterations.

    Non-finite numbers; simulations that all break; latents that left the range a base can read; success that fell to a
    fifth of where it began.
    """
    newest = records[-1]
    may_be_nan = {name for name in newest if name.split("/")[0] in _MAY_BE_NAN}  # a suite's success_rate/<task> too
    if bad := [name for name, value in newest.items() if not math.isfinite(value) and name not in may_be_nan]:
        return f"{', '.join(sorted(bad))} became non-finite"
    full = len(records) == records.maxlen
    if full and all(r["invalid_episodes"] > 0 and math.isnan(r["success_rate"]) for r in records):
        return f"every simulation broke in the last {len(records)} iterations"
    if not 0.02 < newest["latent_std"] < 10.0:
        return f"the latents collapsed (their root mean square is {newest['latent_std']:.3g}; it starts at 1)"
    rates = [record["success_rate"] for record in records if math.isfinite(record["success_rate"])]
    if len(rates) == records.maxlen and base_rate > 0.05 and float(np.mean(rates)) < 0.2 * base_rate:
        return f"success collapsed to {np.mean(rates):.1%}, from {base_rate:.1%} at the start"
    return None
