"""The methods theta can be trained by, and what sets them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Method:
    """A method; what makes its step is in `steps.STEPS`."""

    title: str  # what a reader is shown
    has_learned_loss: bool = False  # theta trains on M_phi, which an offline phase has learned before
    updates_phi: bool = False  # phi is learned further while theta trains
    is_tuned: bool = False  # trains at every one of `tuning.learning_rates`
    needs_clean_set: bool = False  # takes outer batches for right


METHODS: dict[str, Method] = {
    "task_loss": Method("task loss"),
    "tuned_task_loss": Method("task loss, tuned rate", is_tuned=True),
    "fine_tuned": Method("task loss, fine-tuned", needs_clean_set=True),
    "reweighting": Method("Learning to Reweight", needs_clean_set=True),
    "ml3": Method("ML3", has_learned_loss=True),
    "adalfl": Method("AdaLFL", has_learned_loss=True, updates_phi=True),
}
OFFLINE = "offline"  # in the place of a method: the phase that those with a learned loss share
_OFFLINE_PHASE = Method("offline phase (ML3)")


def has_offline_phase(methods: Iterable[str]) -> bool:
    """Whether one of some methods trains on a learned loss."""
    return any(METHODS[method].has_learned_loss for method in methods)


def find_method(name: str) -> Method:
    """The method of this name, or what stands for the offline phase."""
    return _OFFLINE_PHASE if name == OFFLINE else METHODS[name]


def phase_of(name: str) -> str:
    """The phase that a method, or what stands for one, is recorded under."""
    return OFFLINE if name == OFFLINE else "training"
