"""A result says which commit it was made with."""

import subprocess
from pathlib import Path

import pytest

from tinyspeed.util import provenance

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_the_one_of_the_checkout():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert provenance.commit().rstrip("+") == found.stdout.strip()
