"""What tests of several programs share."""

import pytest
from absl.testing import flagsaver

from experiments import launch
from experiments.study import __main__ as study  # noqa: F401, its flags


@pytest.fixture
def program_flags(tmp_path):
    with flagsaver.flagsaver():
        yield lambda *given: launch.parse_flags(["study", f"--workdir={tmp_path}", "--compilation_cache=", *given])
