"""What `import tinyspeed` offers, and that it stays light."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tinyspeed

PACKAGE = Path(tinyspeed.__file__).parent


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", tinyspeed.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(tinyspeed, name) is not None
    assert name in dir(tinyspeed)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'dualsped'"):
        _ = tinyspeed.dualsped


def test_importing_and_listing_imports_neither_torch_nor_transformers():
    done = python("import sys, tinyspeed; dir(tinyspeed); assert not {'torch', 'transformers'} & {*sys.modules}")
    assert done.returncode == 0, done.stderr


def test_a_star_import_brings_every_public_name():
    done = python("from tinyspeed import *; import tinyspeed; assert {*tinyspeed.__all__} <= {*globals()}")
    assert done.returncode == 0, done.stderr


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
