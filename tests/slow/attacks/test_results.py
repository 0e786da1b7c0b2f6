"""The table of README.md says what the files in `results` say."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_table_is_what_was_found():
    lines = re.findall(r"^\| `(\w+)` .*$", page := (HERE / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (HERE / "results").glob("*.json")}
    assert found
    assert sorted(lines) == sorted(found)
    for name, outcome in found.items():
        tried, lost = sum(outcome["tried"].values()), len(outcome["lost"])
        cells = re.search(rf"^\| `{name}` *\|(.*)\|$", page, flags=re.MULTILINE)[1].split("|")
        assert [cell.strip() for cell in cells[1:]] == [f"{tried:,}", str(lost), f"{outcome['seconds'] / 60:.0f}"]
        assert lost == 0
