"""What runs of one file share."""

import pytest

from adalfl_jax.training import run


@pytest.fixture(scope="module")
def programs():
    """What was compiled for a configuration in this file."""
    return {}


def share_programs(programs, patch):
    """Has runs of one configuration compile once. Not for tests that give one configuration other data."""

    def shared(make):
        def made(setup, *method):
            key = (make, setup.config, *method)
            if key not in programs:
                programs[key] = make(setup, *method)
            return programs[key]

        return made

    for name in ("Evaluation", "make_offline_program", "make_training_program"):
        patch.setattr(run, name, shared(getattr(run, name)))


@pytest.fixture
def shared_programs(programs, monkeypatch):
    """Runs of one configuration compile once in a file."""
    share_programs(programs, monkeypatch)
