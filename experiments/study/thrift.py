"""Whether thrift costs accuracy: AdaLFL with a cheaper meta-gradient, seed for seed against the full one."""

from __future__ import annotations

from experiments.study.arms import Arm, Comparison

ARMS = (
    Arm("full", "full batch"),
    Arm("quarter", "a quarter", {"outer.inner_fraction": 0.25, "outer.outer_fraction": 0.25}),
    Arm("eighth", "an eighth", {"outer.inner_fraction": 0.125, "outer.outer_fraction": 0.125}),
    Arm("every_4th", "every 4th step", {"outer.every": 4}),
    Arm("pipelined", "pipelined", {"outer.pipelined": True}),
)
PROBLEMS = {
    "mnist_logistic": ("MNIST, logistic regression", "mnist_logistic", {}),
    "mnist_mlp": (
        "MNIST, MLP 784-256-10",
        "mnist_mlp",
        {"model.hidden_sizes": (256,), "outer.learning_rate": 1e-5},  # the paper's
    ),
}


def comparisons() -> list[Comparison]:
    """One for each problem."""
    return [
        Comparison(
            f"thrift_{name}",
            f"{title}: meta-gradients on less",
            config,
            {"method": "adalfl", **overrides},
            ARMS,
            "full",
        )
        for name, (title, config, overrides) in PROBLEMS.items()
    ]
