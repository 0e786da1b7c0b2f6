"""The pages that a user reads, the README and the guide, and what is in their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "tutorials" / "guide").glob("*.md"))
PAGES = [README, *GUIDE]
MARKS = ("needs a GPU", "needs the hub", "needs the network")  # a command with such a comment is not executed here


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> dict[str, bool]:
    """The command lines of a page, without their comments, and whether each is marked as one that is not executed."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    split = [re.fullmatch(r"(.*?)(?:\s+# (.*))?", line) for line in lines if line]
    return {" ".join(line[1].split()): (line[2] or "").startswith(MARKS) for line in split}


def targets(page: Path) -> list[tuple[str, str]]:
    """Where the links of a page lead: a path inside the project, and an anchor; either may be empty."""
    return re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", read(page))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
