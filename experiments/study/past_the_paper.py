"""Past the paper on clean data: a scale from outside, a budget for it, progress, longer horizons; against the decayed
task loss.
"""

from __future__ import annotations

from typing import Any

from experiments.study.arms import Arm, Comparison, Overrides, fields, grid

PROBLEMS: dict[str, tuple[str, str, Overrides]] = {
    "mnist_logistic": ("MNIST, logistic regression", "mnist_logistic", {"num_steps": 5000}),
    "mnist_mlp": ("MNIST, MLP 784-256-10", "mnist_mlp", {"model.hidden_sizes": (256,)}),
    "digits_mlp": ("digits, MLP", "digits_mlp", {"model.hidden_sizes": (128,)}),
}
RATES = grid(inner__learning_rate=(0.03, 0.1, 0.3))
SHAPE_ALONE: Overrides = {"learned_loss.floor": 1.0, "learned_loss.ceiling": 1.0}
TASK_LOSS: Overrides = {"method": "task_loss"}


# AdaLFL and the shape alone beside the constant rate; what looks further than a step beside AdaLFL.
PAIRS = (
    ("adalfl", "constant"),
    ("shape_constant", "constant"),
    *((arm, "adalfl") for arm in ("offline_5", "offline_20", "truncated_5", "truncated_20", "persistent")),
)


def _adalfl(name: str, title: str, points: tuple[Overrides, ...] = ({},), **settings: Any) -> Arm:
    return Arm(name, title, {"method": "adalfl", "outer.learning_rate": 3e-4, **fields(**settings)}, points)


def _shape_alone(schedule: str) -> Arm:
    arm = _adalfl(f"shape_{schedule}", f"shape alone, tuned, {schedule}", RATES, inner__schedule=schedule)
    return arm._replace(overrides={**arm.overrides, **SHAPE_ALONE})


ARMS = (
    Arm("constant", "task loss, tuned", TASK_LOSS, RATES),
    Arm("cosine", "task loss, tuned, cosine decay", {**TASK_LOSS, "inner.schedule": "cosine"}, RATES),
    Arm("linear", "task loss, tuned, linear decay", {**TASK_LOSS, "inner.schedule": "linear"}, RATES),
    _adalfl("adalfl", "AdaLFL"),
    _adalfl("adalfl_linear", "AdaLFL, linear decay", inner__schedule="linear"),
    *(_shape_alone(schedule) for schedule in ("constant", "linear", "cosine")),
    _adalfl("floor", "AdaLFL with a floor", grid(learned_loss__floor=(1.0, 3.0, 10.0))),
    _adalfl("ceiling", "AdaLFL with a ceiling", grid(learned_loss__ceiling=(3.0, 10.0, 30.0))),
    _adalfl("progress", "AdaLFL that reads progress", learned_loss__use_progress=True),
    _adalfl("biases", "AdaLFL with biases, for comparison", learned_loss__use_bias=True),
    _adalfl("offline_5", "offline through 5 steps", offline__num_inner_steps=5),
    _adalfl("offline_20", "offline through 20, mixed mode", offline__num_inner_steps=20, hypergradient="mixed_mode"),
    _adalfl("truncated_5", "window of 5", hypergradient="truncated", estimator__window=5),
    _adalfl("truncated_20", "window of 20", hypergradient="truncated", estimator__window=20),
    _adalfl(
        "persistent",
        "persistent evolution strategies",
        grid(estimator__sigma=(0.01, 0.1)),
        hypergradient="persistent_evolution_strategies",
    ),
)


def comparisons() -> list[Comparison]:
    """One for each problem; the reference is the bar."""
    return [
        Comparison(
            f"past_{name}", f"{title}: past the paper", config, overrides, ARMS, "linear", PAIRS, num_tuning_seeds=6
        )
        for name, (title, config, overrides) in PROBLEMS.items()
    ]
