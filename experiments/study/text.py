"""The next character of English text, by an MLP: a learned loss where the paper did not try one."""

from __future__ import annotations

from experiments.study.arms import Arm, Comparison, grid

RATES = grid(inner__learning_rate=(0.1, 0.3, 1.0, 3.0))
LINEAR = {"inner.schedule": "linear"}
ARMS = (
    Arm("constant", "task loss, tuned", {"method": "task_loss"}, RATES),
    Arm("linear", "task loss, tuned, linear decay", {"method": "task_loss", **LINEAR}, RATES),
    Arm("ml3", "ML3", {"method": "ml3"}),
    Arm("adalfl", "AdaLFL", {"method": "adalfl"}),
    Arm("adalfl_fitted", "AdaLFL from the task loss", {"method": "adalfl", "learned_loss.start": "task_loss"}),
    Arm(
        "adalfl_fitted_alone",
        "AdaLFL from the task loss, no offline phase, tuned",
        {"method": "adalfl", "learned_loss.start": "task_loss", "offline.num_steps": 0},
        RATES,
    ),
    Arm("log", "AdaLFL, log-probabilities in", {"method": "adalfl", "learned_loss.predictions": "log_probabilities"}),
    Arm(
        "shape",
        "shape alone, tuned, linear decay",
        {"method": "adalfl", "learned_loss.floor": 1.0, "learned_loss.ceiling": 1.0, **LINEAR},
        RATES,
    ),
)


def comparisons() -> list[Comparison]:
    """One, on the documentation that comes with Python."""
    return [Comparison("text", "The next character of English text, MLP", "text_mlp", {}, ARMS, "linear")]
