"""The short form of `surroundings`: a user who may not read or write everything. The rest are tests of their own."""

import shutil
import subprocess

import pytest
from slow.attacks import surroundings

CAN = shutil.which("setpriv") and subprocess.run([*surroundings.NO_POWERS, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN, reason="needs setpriv, and root whose powers it can take away")
def test_a_user_who_may_not_read_or_write_gets_the_result_or_one_line(tmp_path):
    cases = list(surroundings.another_user(tmp_path))
    assert len(cases) == 8
    assert not [case for case in cases if case[1]]


def test_the_tests_that_the_long_form_runs_are_there():
    for nodes in surroundings.TESTS.values():
        for node in nodes:
            file, _, name = node.partition("::")
            assert f"def {name}" in (surroundings.ROOT / "tests" / file).read_text(encoding="utf-8")
