"""The tutorial's code runs as it stands, and learns."""

import re
from pathlib import Path


def test_the_code_of_the_tutorial_runs_and_learns(capsys):
    text = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(code, "docs/tutorial.md", "exec"), {})
    out = capsys.readouterr().out
    low = float(re.search(r"tuned -    base: \S+ \[([-+.\d]+),", out)[1])  # of the 95 % interval
    assert low > 0.1
