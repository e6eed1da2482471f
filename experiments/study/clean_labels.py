"""The paper's comparison on clean data, with the baseline it leaves out: a task loss tuned and decayed with care."""

from __future__ import annotations

from experiments.study.arms import Arm, Comparison, Overrides, grid

PROBLEMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "mnist_logistic": ("MNIST, logistic regression", (0.01, 0.03, 0.1, 0.3)),
    "mnist_mlp": ("MNIST, MLP 784-1000-1000-10", (0.03, 0.1, 0.3, 1.0)),
    "mnist_lenet5": ("MNIST, LeNet-5", (0.03, 0.1, 0.3)),
    "fashion_mnist_mlp": ("Fashion-MNIST, MLP 784-256-10", (0.03, 0.1, 0.3, 1.0)),
    "fashion_mnist_lenet5": ("Fashion-MNIST, LeNet-5", (0.03, 0.1, 0.3)),
    "digits_mlp": ("digits, MLP", (0.03, 0.1, 0.3)),
    "diabetes_mlp": ("Diabetes, MLP", (0.003, 0.01, 0.03, 0.1)),
}  # configuration -> title, and the learning rates the task loss is tuned over
SHORT: Overrides = {"num_steps": 2000, "eval_every": 100}  # of LeNet-5, whose steps are the longest
SETTINGS: dict[str, Overrides] = {
    "mnist_lenet5": SHORT,
    "fashion_mnist_mlp": {"model.hidden_sizes": (256,), "batch_size": 100, "num_steps": 5000, "eval_every": 250},
    "fashion_mnist_lenet5": SHORT,
    "diabetes_mlp": {"dataset.valid_fraction": 0.2},  # arms are tuned with half, and half of 36 rows is no batch of 32
}
OUTER_RATES = (1e-5, 1e-4, 3e-4)  # eta of AdaLFL: the paper's, and larger ones

# Those of AdaLFL with nothing tuned, and from the task loss, beside what has to be beaten; and a scale alone.
PAIRS = (
    ("adalfl_default", "constant"),
    ("adalfl_default", "linear"),
    ("adalfl_default", "cosine"),
    ("adalfl_default", "ml3"),
    ("adalfl_fitted", "constant"),
    ("adalfl_fitted", "ml3"),
    ("adalfl_fitted", "learned_rate"),
)


def _arms(rates: tuple[float, ...]) -> tuple[Arm, ...]:
    tuned = grid(inner__learning_rate=rates)
    task_loss: Overrides = {"method": "task_loss"}
    fitted: Overrides = {"method": "adalfl", "learned_loss.start": "task_loss"}
    return (
        Arm("task_loss", "task loss", task_loss),
        Arm("constant", "task loss, tuned", task_loss, tuned),
        Arm("linear", "task loss, tuned, linear decay", {**task_loss, "inner.schedule": "linear"}, tuned),
        Arm("cosine", "task loss, tuned, cosine decay", {**task_loss, "inner.schedule": "cosine"}, tuned),
        Arm(
            "learned_rate",
            "learned learning rate",
            {"method": "adalfl", "learned_loss.family": "scaled_task_loss"},
            grid(outer__learning_rate=(1e-5, 3e-4, 3e-3)),
        ),
        Arm("ml3", "ML3", {"method": "ml3"}),
        Arm("adalfl_paper", "AdaLFL, the paper's η", {"method": "adalfl", "outer.learning_rate": 1e-5}),
        Arm("adalfl_default", "AdaLFL, the default η", {"method": "adalfl", "outer.learning_rate": 3e-4}),
        Arm("adalfl", "AdaLFL, tuned", {"method": "adalfl"}, grid(outer__learning_rate=OUTER_RATES)),
        Arm("adalfl_fitted", "AdaLFL from the task loss", fitted, grid(outer__learning_rate=OUTER_RATES)),
    )


def comparisons() -> list[Comparison]:
    """One for each problem."""
    return [
        Comparison(name, title, name, SETTINGS.get(name, {}), _arms(rates), "adalfl", PAIRS)
        for name, (title, rates) in PROBLEMS.items()
    ]
