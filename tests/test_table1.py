"""experiments/table1.py: the published table, and results of suites beside it."""

import json

import numpy as np
import pytest
import table1 as script

# Table I of the paper: method, (rate, rank) on Spatial, Object, Goal, Long, average rate, average rank as printed.
PAPER = """
Diffusion Policy | 78.3 6 92.5 2 68.3 6 50.5 6 72.4 5.0
GRAPE (DPO)      | 87.6 3 91.2 4 82.2 3 55.8 3 79.2 3.3
Octo (SFT)       | 78.9 5 85.7 6 84.6 2 51.1 5 75.1 4.5
OpenVLA (SFT)    | 84.7 4 88.4 5 79.2 5 53.7 4 76.5 4.5
VLA-RL           | 90.2 2 91.8 3 82.2 3 59.8 2 81.0 2.5
π0-FAST          | 96.4 - 96.8 - 88.6 - 60.2 - 85.5 -
π0-FPO           | 97.2 1 97.3 1 89.4 1 65.3 1 87.2 1.0
"""


def paper() -> list[tuple[str, list[str]]]:
    return [(name.strip(), cells.split()) for name, cells in (line.split("|") for line in PAPER.strip().splitlines())]


def test_all_24_published_ranks_follow_from_the_published_rates():
    ranked = [cells for _, cells in paper() if cells[1] != "-"]
    np.testing.assert_array_equal(script.published_ranks(), [[int(rank) for rank in row[1:8:2]] for row in ranked])
    assert script.published_ranks().size == 24
    means = script.published_ranks().mean(axis=1)
    np.testing.assert_array_equal(np.floor(10 * means + 0.5) / 10, [float(row[9]) for row in ranked])


def test_published_numbers_are_the_papers():
    for row, (method, cells) in zip(script.PUBLISHED, paper(), strict=True):
        assert (row.method, row.average) == (method, float(cells[8]))
        assert list(row.rates) == [float(rate) for rate in cells[:8:2]]
        assert abs(np.mean(row.rates) - row.average) < 0.11  # the paper's own row is printed .1 below its mean


def result(suite: str, rate: float, tuned: float | None = None, **changes) -> dict:
    """What evaluate.py writes, as far as it matters here."""

    def policy(value):
        task = {"success_rate": value, "low": value - 0.05, "high": value + 0.05, "episodes": 50, "invalid_episodes": 0}
        return task | {"episodes": 498, "invalid_episodes": 2, "tasks": {"one": task, "two": task}}

    protocol = {"env": suite, "deviations": {"seeds": "episode instead of openpi", "stand_ins": "15 instead of 0"}}
    made = {"base": policy(rate), "protocol": protocol, "evaluation": {"base": "pi05_libero"}}
    if tuned is not None:
        made |= {"tuned": policy(tuned), "run": {"preset": "default", "iteration": 3}}
    return made | changes


def write(folder, name: str, content) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_measured_rows_stand_beside_the_published_ones(tmp_path, capsys):
    rates = dict(zip(script.SUITES, (0.9, 0.8, 0.7, 0.6), strict=True))
    files = [write(tmp_path, f"{suite}.json", result(suite, rate, rate + 0.05)) for suite, rate in rates.items()]
    assert script.main([*files, "--out", str(tmp_path / "new" / "table1")]) == 0
    text = (tmp_path / "new" / "table1.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    lines = text.splitlines()
    assert all(line.count("|") == lines[0].count("|") == 12 for line in lines[:11])
    assert lines[2] == "| Diffusion Policy | 78.3 | 6 | 92.5 | 2 | 68.3 | 6 | 50.5 | 6 | 72.4 | 5.0 |"
    assert lines[7] == "| π0-FAST | 96.4 | – | 96.8 | – | 88.6 | – | 60.2 | – | 85.5 | – |"
    assert lines[9].startswith("| pi05_libero, untrained (*measured here*) | 90.0 [85.0, 95.0] | – | 80.0 [")
    assert lines[10].startswith("| pi05_libero, tuned (default) (*measured here*) | 95.0 [90.0, 100.0] | – |")
    assert lines[9].endswith("| 75.0 | – |") and lines[10].endswith("| 80.0 | – |")
    assert (
        "- pi05_libero, untrained, libero_goal: 498 episodes, 2 invalid, not counted; deviations from the official "
        "protocol: seeds episode instead of openpi; its pictures show stand-ins" in text
    )
    rows = json.loads((tmp_path / "new" / "table1.json").read_text())["rows"]
    assert [row["source"] for row in rows] == ["published"] * 7 + ["measured here"] * 2
    assert rows[6]["suites"]["libero_10"] == {"success_percent": 65.3, "rank": 1}
    assert rows[8]["suites"]["libero_10"]["episodes"] == 498
    assert rows[8]["suites"]["libero_10"]["success_percent"] == pytest.approx(65.0)


def test_a_suite_that_was_not_measured_is_left_open(tmp_path):
    (row,) = script.measured_rows([tmp_path / write(tmp_path, "a.json", result("libero_10", 0.5))])
    assert row["average_percent"] is None and list(row["suites"]) == ["libero_10"]
    line = script.markdown([row]).splitlines()[2]
    assert (
        line == "| pi05_libero, untrained (*measured here*) | – | – | – | – | – | – | 50.0 [45.0, 55.0] | – | – | – |"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (result("libero_90", 0.5), "is a result of libero_90, which is no suite of Table I"),
        ({"base": {"success_rate": 0.5}, "tuned": {}}, "is no result of a suite"),  # ALOHA
        (result("libero_goal", 0.5, base={"success_rate": 0.5}), "is no result of a suite"),  # one task
        ([1], "is no result of a suite"),
        (None, "no readable"),
    ],
)
def test_what_is_no_suite_is_refused(content, sentence, tmp_path, capsys):
    file = str(tmp_path / "nothing.json") if content is None else write(tmp_path, "r.json", content)
    assert script.main([file]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("changed", ["base_crc32", "execute_steps", "openpi.denoise_steps"])
def test_a_row_is_of_one_method(changed, tmp_path, capsys):
    """Other weights or settings under the same name are another method; another file of the tokenizer is not."""
    about = {"base": "pi05_libero", "base_crc32": 1, "render": None, "execute_steps": 5}
    files = []
    for number, suite in enumerate(("libero_goal", "libero_10", "libero_object")):
        other = about | {"openpi": {"denoise_steps": 10, "tokenizer": f"/{number}"}}
        if number == 2:
            place, _, name = changed.rpartition(".")
            (other[place] if place else other)[name] = 3
        files.append(write(tmp_path, f"{suite}.json", result(suite, 0.5, evaluation=other)))
    assert script.main(files[:2]) == 0
    capsys.readouterr()
    assert script.main(files) == 2
    err = capsys.readouterr().err
    assert f"libero_object.json and {files[0]} are of two methods, as {changed} differ: " in err


def test_one_row_has_one_result_of_a_suite(tmp_path, capsys):
    twice = [write(tmp_path, name, result("libero_goal", 0.5)) for name in ("a.json", "b.json")]
    assert script.main(twice) == 2
    assert "b.json is a second result of pi05_libero, untrained on libero_goal" in capsys.readouterr().err
