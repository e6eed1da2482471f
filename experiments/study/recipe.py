"""Settings that keep AdaLFL from failing: reduction, eta, where phi starts, how long it is learned offline."""

from __future__ import annotations

from typing import Any

from experiments.study import clean_labels
from experiments.study.arms import Arm, Comparison, Overrides, fields
from experiments.study.residual import ResidualLoss

PROBLEMS: dict[str, tuple[str, str, Overrides]] = {
    "digits_mlp": ("digits, MLP", "digits_mlp", {"model.hidden_sizes": (128,)}),
    "mnist_logistic": ("MNIST, logistic regression", "mnist_logistic", {"num_steps": 5000}),
    "mnist_mlp": ("MNIST, MLP 784-128-10", "mnist_mlp", {"model.hidden_sizes": (128,), "num_steps": 4000}),
}


DEFAULTS = fields(method="adalfl", learned_loss__reduction="sum", outer__learning_rate=3e-4)


def _arm(name: str, title: str, **settings: Any) -> Arm:
    return Arm(name, title, fields(**settings))


ARMS = (
    _arm("sum", "sum over classes, eta 3e-4"),
    _arm("sum_slow", "sum, eta 1e-5", outer__learning_rate=1e-5),
    _arm("sum_fast", "sum, eta 1e-3", outer__learning_rate=1e-3),
    _arm("mean", "mean over classes, eta 3e-4", learned_loss__reduction="mean"),
    _arm("paper", "the paper's: mean, eta 1e-5", learned_loss__reduction="mean", outer__learning_rate=1e-5),
    _arm("softplus", "the authors' softplus at the end", learned_loss__output_activation="softplus"),
    _arm("fitted", "sum, from the task loss", learned_loss__start="task_loss"),
    _arm(
        "fitted_alone",
        "sum, from the task loss, no offline phase",
        learned_loss__start="task_loss",
        offline__num_steps=0,
    ),
    _arm("unprepared", "sum, no offline phase", offline__num_steps=0),
    _arm("longer", "sum, offline phase of 10,000 steps", offline__num_steps=10000),
    _arm("unrolled", "sum, offline phase through 5 steps", offline__num_inner_steps=5),
)


RESIDUAL = (
    _arm("residual", "the task loss and what is learned to add", learned_loss__family=ResidualLoss.__name__),
    _arm(
        "residual_alone",
        "the same, no offline phase",
        learned_loss__family=ResidualLoss.__name__,
        offline__num_steps=0,
    ),
)
TOLD_APART = ("sum", "fitted", "fitted_alone")  # arms that those are compared with


FALLING = (
    _arm("falling", "sum, eta from 3e-4 to 0", outer__schedule="linear"),
    _arm("fast_falling", "sum, eta from 1e-3 to 0", outer__learning_rate=1e-3, outer__schedule="linear"),
)
CONSTANT = ("sum", "sum_fast")  # arms that those are compared with


MANY = 100  # seeds, that show a failure which ten may not
MANY_SEEDS = ("digits_mlp", "mnist_logistic")  # of PROBLEMS
THE_PAPERS = ("mnist_logistic", "mnist_mlp")  # configurations of the models it has, for as many steps


def comparisons() -> list[Comparison]:
    """For each problem all settings, a residual and a falling eta; then the defaults beside the paper's alone.

    That is with many seeds, and on the paper's own models.
    """
    settings = {
        name: Comparison(f"recipe_{name}", f"{title}: settings", config, {**DEFAULTS, **overrides}, ARMS, "sum")
        for name, (title, config, overrides) in PROBLEMS.items()
    }
    others = [_of_falling_eta(comparison) for comparison in settings.values()]
    others += [_of_residual(comparison) for comparison in settings.values()]
    others += [_of_many_seeds(settings[name]) for name in MANY_SEEDS]
    return [*settings.values(), *others, *map(_of_the_papers, THE_PAPERS)]


def _of_falling_eta(comparison: Comparison) -> Comparison:
    arms = (*(arm for arm in comparison.arms if arm.name in CONSTANT), *FALLING)
    pairs = (("fast_falling", "sum_fast"),)
    name, title = f"{comparison.name}_falling", comparison.title.replace(": settings", ": a falling eta")
    return comparison._replace(name=name, title=title, arms=arms, pairs=pairs)


def _of_residual(comparison: Comparison) -> Comparison:
    arms = (*(arm for arm in comparison.arms if arm.name in TOLD_APART), *RESIDUAL)
    pairs = (("residual", "fitted"), ("residual_alone", "fitted_alone"))
    name, title = f"{comparison.name}_residual", comparison.title.replace(": settings", ": beginning as the task loss")
    return comparison._replace(name=name, title=title, arms=arms, pairs=pairs)


def _of_many_seeds(comparison: Comparison) -> Comparison:
    name, title = f"{comparison.name}_{MANY}", f"{comparison.title}, {MANY} seeds"
    return comparison.select(("paper",))._replace(name=name, title=title, num_seeds=MANY)


def _of_the_papers(config: str) -> Comparison:
    title = f"{clean_labels.PROBLEMS[config][0]}: the paper's settings"
    return Comparison(f"recipe_{config}_paper", title, config, DEFAULTS, ARMS, "sum").select(("paper",))
