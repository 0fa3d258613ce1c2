"""The paper's Table I (success on LIBERO), with what was measured here set beside what was published.

    python experiments/table1.py

    python experiments/table1.py spatial.json object.json goal.json long.json --out runs/table1

Every file is what `evaluate.py --env libero_... --json` wrote. Writes <out>.md and <out>.json.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from jaxtyping import Int
from rich.console import Console

from fpo_jax.evaluate import competition_rank
from fpo_jax.types import FpoError

SUITES = {"libero_spatial": "Spatial", "libero_object": "Object", "libero_goal": "Goal", "libero_10": "Long"}
SOURCE = "Lyu et al., Flow Policy Optimization, arXiv 2510.09976, Table I"


class Published(NamedTuple):
    """A row as printed; `average` and `average_rank` are not always what the other columns give."""

    method: str
    rates: tuple[float, float, float, float]  # [%], in the order of SUITES
    average: float
    average_rank: float | None  # None: the paper ranks it nowhere


PUBLISHED = (
    Published("Diffusion Policy", (78.3, 92.5, 68.3, 50.5), 72.4, 5.0),
    Published("GRAPE (DPO)", (87.6, 91.2, 82.2, 55.8), 79.2, 3.3),
    Published("Octo (SFT)", (78.9, 85.7, 84.6, 51.1), 75.1, 4.5),
    Published("OpenVLA (SFT)", (84.7, 88.4, 79.2, 53.7), 76.5, 4.5),
    Published("VLA-RL", (90.2, 91.8, 82.2, 59.8), 81.0, 2.5),
    Published("π0-FAST", (96.4, 96.8, 88.6, 60.2), 85.5, None),
    Published("π0-FPO", (97.2, 97.3, 89.4, 65.3), 87.2, 1.0),
)
NOTE = (
    f"Published rates: {SOURCE}. Its ranks are among the methods that it ranks, and are computed here from its rates. "
    "Rows marked *measured here* come from this code's own evaluations, with Wilson 95 % intervals; they have no rank."
)


@dataclass(frozen=True)
class Args:
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Results of suites, as evaluate.py --json wrote them."""
    out: Path | None = None
    """Where to write the table, without an ending: <out>.md and <out>.json."""


def published_ranks() -> Int[np.ndarray, "m 4"]:
    """The rank of each ranked method on each suite, from the published rates."""
    rates = np.array([row.rates for row in PUBLISHED if row.average_rank is not None])
    return np.stack([competition_rank(column) for column in rates.T], axis=1)


def published_rows() -> list[dict[str, Any]]:
    ranks = iter(published_ranks())
    rows = []
    for method, rates, average, average_rank in PUBLISHED:
        own = [None] * len(SUITES) if average_rank is None else next(ranks).tolist()
        cells = {
            suite: {"success_percent": rate, "rank": rank} for suite, rate, rank in zip(SUITES, rates, own, strict=True)
        }
        row = {"method": method, "suites": cells, "average_percent": average, "average_rank": average_rank}
        rows.append({"source": "published"} | row)
    return rows


def read_result(path: Path) -> dict[str, Any]:
    """The result of a whole suite. Raises FpoError for anything else."""
    wanted = "give what `evaluate.py --env libero_spatial --json` wrote, or that of another suite of the table."
    try:
        result = json.loads(path.read_text())
        suite = result["protocol"]["env"]
        complete = result["base"]["tasks"] and result["evaluation"]["base"]
    except OSError as error:
        raise FpoError(f"There is no readable {path}: {wanted}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FpoError(f"{path} is no result of a suite: {wanted}") from error
    if suite not in SUITES or not complete:
        raise FpoError(f"{path} is a result of {suite}, which is no suite of Table I: {wanted}")
    return result


def measured_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each base and each way of tuning it, with the suites that were measured. Raises FpoError."""
    rows: dict[str, dict[str, Any]] = {}
    first: dict[str, tuple[Path, dict[str, Any]]] = {}  # of each base: the file and the method of its first result
    for path in paths:
        result = read_result(path)
        method = method_of(result)
        before, known = first.setdefault(result["evaluation"]["base"], (path, method))
        if changed := [name for name in known | method if known.get(name) != method.get(name)]:
            named = ", ".join(changed)
            raise FpoError(f"{path} and {before} are of two methods, as {named} differ: put them in two tables.")
        suite, base = result["protocol"]["env"], result["evaluation"]["base"]
        names = {"base": f"{base}, untrained"}
        if "tuned" in result:
            names["tuned"] = f"{base}, tuned ({result['run']['preset']})"
        for policy, method in names.items():
            cells = rows.setdefault(method, {})
            if suite in cells:
                raise FpoError(f"{path} is a second result of {method} on {suite}: give one of each.")
            cells[suite] = cell(result, policy)
    return [
        {"source": "measured here", "method": method, "suites": cells} | mean(cells) for method, cells in rows.items()
    ]


def method_of(result: dict[str, Any]) -> dict[str, Any]:
    """What one row has in common besides the base's name; where files lie is no part of it."""
    about = result["evaluation"]
    openpi = {f"openpi.{name}": value for name, value in about.get("openpi", {}).items() if name != "tokenizer"}
    return {name: about.get(name) for name in ("base_crc32", "render", "execute_steps")} | openpi


def cell(result: dict[str, Any], policy: str) -> dict[str, Any]:
    """Success [%] of one policy on one suite, and how it was measured."""
    summary = result[policy]
    rate = {"success_percent": "success_rate", "low_percent": "low", "high_percent": "high"}
    percent = {name: 100 * summary[key] for name, key in rate.items()}
    counts = {name: summary[name] for name in ("episodes", "invalid_episodes")}
    return percent | counts | {"rank": None, "deviations": result["protocol"]["deviations"]}


def mean(cells: dict[str, Any]) -> dict[str, Any]:
    """The average over the suites, where all were measured."""
    whole = set(cells) == set(SUITES)
    rates = [one["success_percent"] for one in cells.values()]
    return {"average_percent": float(np.mean(rates)) if whole else None, "average_rank": None}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and below it how each measured row was measured."""
    titles = [part for name in SUITES.values() for part in (f"{name} SR (%)", "rank")]
    lines = [_line(["method", *titles, "average SR (%)", "average rank"]), "|---" * (2 * len(SUITES) + 3) + "|"]
    remarks = []
    for row in rows:
        here = row["source"] != "published"
        columns = [f"{row['method']} (*{row['source']}*)" if here else row["method"]]
        for suite in SUITES:
            one = row["suites"].get(suite)
            columns += ["–", "–"] if one is None else [_rate(one), str(one["rank"] or "–")]
            if here and one is not None:
                remarks.append(f"- {row['method']}, {suite}: {_remark(one)}")
        average, rank = row["average_percent"], row["average_rank"]
        columns += ["–" if average is None else f"{average:.1f}", "–" if rank is None else f"{rank:.1f}"]
        lines.append(_line(columns))
    return "\n".join([*lines, "", NOTE, *([""] if remarks else []), *remarks]) + "\n"


def _line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _rate(one: dict[str, Any]) -> str:
    interval = f" [{one['low_percent']:.1f}, {one['high_percent']:.1f}]" if "low_percent" in one else ""
    return f"{one['success_percent']:.1f}{interval}"


def _remark(one: dict[str, Any]) -> str:
    """How a measured rate came about, in words."""
    invalid = f", {one['invalid_episodes']} invalid, not counted" if one["invalid_episodes"] else ""
    deviations = [f"{name} {what}" for name, what in one["deviations"].items() if name != "stand_ins"]
    said = [f"{one['episodes']} episodes{invalid}"]
    if deviations:
        said.append(f"deviations from the official protocol: {', '.join(deviations)}")
    if "stand_ins" in one["deviations"]:
        said.append("its pictures show stand-ins for some of LIBERO's assets, so it is no official number")
    return "; ".join(said)


def main(arguments: list[str]) -> int:
    try:
        args = tyro.cli(Args, args=arguments, description=__doc__)
        rows = [*published_rows(), *measured_rows(args.results)]
        text = markdown(rows)
        print(text)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".md").write_text(text)
            args.out.with_suffix(".json").write_text(json.dumps({"source": SOURCE, "rows": rows}, indent=2) + "\n")
    except (FpoError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
