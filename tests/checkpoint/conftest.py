"""A short supervised run with a checkpoint a step, and copies of it to be damaged."""

import shutil
from pathlib import Path

import pytest
from whole_runs import run


@pytest.fixture(scope="session")
def sft(questions):
    """Settings of a supervised run without held-out questions: the quickest kind."""
    return questions | {"recipe": "tiny-spatial-sft", "eval_data": "none"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, sft):
    """Four supervised steps, a checkpoint each, that nobody ended."""
    return run(tmp_path_factory.mktemp("run") / "whole", **sft)


@pytest.fixture
def copy(whole, tmp_path):
    """Of that run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))
