"""The form of the loss network: sharpness, slope, activations, width and depth, what goes in and how it is reduced."""

from __future__ import annotations

from typing import Any

from experiments.study.arms import Arm, Comparison
from experiments.study.recipe import DEFAULTS, PROBLEMS

ACTIVATIONS = ("relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus", "gelu", "silu")
ABLATED = ("digits_mlp", "mnist_logistic")  # of PROBLEMS


def _arm(title: str, **learned_loss: Any) -> Arm:
    name = "_".join(str(value) for item in learned_loss.items() for value in item)
    return Arm(name, title, {f"learned_loss.{field}": value for field, value in learned_loss.items()})


ARMS = (
    Arm("default", "as it is: beta 10, gamma .01, two layers of 40"),
    *(_arm(f"beta {beta:g}", beta=beta) for beta in (1.0, 5.0, 30.0)),
    *(_arm(f"gamma {gamma:g}", gamma=gamma) for gamma in (0.0, 0.1, 0.25)),
    *(_arm(f"activation {name}", activation=name) for name in ACTIVATIONS),
    _arm("output softplus", output_activation="softplus"),
    *(_arm(f"layers {sizes}", hidden_sizes=sizes) for sizes in ((10, 10), (160, 160), (40,), (40, 40, 40))),
    _arm("with biases", use_bias=True),
    _arm("mean over classes", reduction="mean"),
    _arm("log-probabilities in", predictions="log_probabilities"),
    _arm("logits in", predictions="raw"),
)


def comparisons() -> list[Comparison]:
    """One for each problem, at the default settings."""
    return [_comparison(name) for name in ABLATED]


def _comparison(name: str) -> Comparison:
    title, config, overrides = PROBLEMS[name]
    text = f"{title}: forms of the loss network"
    return Comparison(f"ablation_{name}", text, config, {**DEFAULTS, **overrides}, ARMS, "default")
