"""The table of README.md says what the files in `results` say."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_says_what_was_found():
    page = (HERE / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)` .*$", page, flags=re.MULTILINE)
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (HERE / "results").glob("*.json")}
    assert found
    assert sorted(lines) == sorted(found)
    for name, outcome in found.items():
        tried, failed = sum(outcome["tried"].values()), len(outcome["failures"])
        cells = re.search(rf"^\| `{name}` *\|(.*)\|$", page, flags=re.MULTILINE)[1].split("|")
        assert [cell.strip() for cell in cells[1:]] == [f"{tried:,}", str(failed), f"{outcome['seconds'] / 60:.0f}"]
        assert failed == 0
