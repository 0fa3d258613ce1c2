import json

import bench_population

from test_cli import POINT_MASS


def test_each_size_is_measured_against_single_runs(tmp_path, capsys):
    options = [f"--train.{word[2:]}" if word.startswith("--") else word for word in POINT_MASS]
    code = bench_population.main([*options, "--sizes", "1", "2", "--repeats", "1", "--out", str(tmp_path)])
    assert code == 0
    (path,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["members"] for record in records] == [1, 2]
    assert all(record["ratio_seconds"] > 0 and record["ratio_cpu_seconds"] > 0 for record in records)
    assert "P single runs / one population" in " ".join(capsys.readouterr().out.split())
