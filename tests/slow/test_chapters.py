"""Every chapter of the course runs from top to bottom, in its short form."""

import pytest

from tutorials import run


@pytest.mark.parametrize("chapter", run.chapters([]), ids=lambda file: file.stem)
def test_a_chapter_runs_from_top_to_bottom(chapter):
    run.execute(chapter, short=True)
