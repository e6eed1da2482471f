"""Training on wrong labels with a small clean set, which every arm may use: the validation split is clean.

The clean set is what arms are tuned by and, where they train on it, their outer batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study.arms import Arm, Comparison, Overrides, grid, suffix_of
from experiments.study.overview import Contest, average_tables, contests_figure, contests_table, find_contests
from experiments.study.runs import RUNS
from experiments.study.shapes import learned_curves, shapes_figure
from experiments.study.tables import Part, comparison_parts
from experiments.tables import Row, Table, show_mean

NOISE: dict[str, Overrides] = {
    "clean": {},
    "20": {"dataset.label_noise": 0.2},
    "40": {"dataset.label_noise": 0.4},
    "60": {"dataset.label_noise": 0.6},
    "80": {"dataset.label_noise": 0.8},
    "pair_40": {"dataset.label_noise": 0.4, "dataset.noise_kind": "pair"},
}
RARE_CLASSES: dict[str, Overrides] = {"imbalance_100": {"dataset.imbalance": 100.0}}
SHOWN = {
    "clean": "clean labels",
    "pair_40": "40 % of labels moved to the next class",
    "imbalance_100": "classes imbalanced 1:100",
}
MLP: Overrides = {"model.name": "mlp", "model.hidden_sizes": (256,), "model.initialization": "pytorch"}
LENET5: Overrides = {"model.name": "lenet5", "num_steps": 2000}  # a step takes seven times as long as the MLP's
PROBLEMS: dict[str, tuple[str, Overrides]] = {
    "mnist_mlp": ("MNIST, MLP 784-256-10", {"dataset.name": "mnist", **MLP}),
    "fashion_mnist_mlp": ("Fashion-MNIST, MLP 784-256-10", {"dataset.name": "fashion_mnist", **MLP}),
    "mnist_lenet5": ("MNIST, LeNet-5", {"dataset.name": "mnist", **LENET5}),
    "fashion_mnist_lenet5": ("Fashion-MNIST, LeNet-5", {"dataset.name": "fashion_mnist", **LENET5}),
}
SETTING: Overrides = {
    "num_steps": 6000,
    "eval_every": 250,
    "batch_size": 100,
    "dataset.valid_examples": 1000,
    "outer.split": "valid",
}
LINEAR = {"inner.schedule": "linear"}
JOINT: Overrides = {"outer.joint_share": 1.0}  # every step takes the clean set too
LEARNED_FURTHER: Overrides = {
    "method": "adalfl",
    "learned_loss.predictions": "log_probabilities",
    "offline.num_steps": 0,
    **LINEAR,
}  # with learned_loss.start, where it goes on from


def _rates(*values: float) -> tuple[Overrides, ...]:
    return grid(inner__learning_rate=values)


def _fixed(loss: str = "", method: str = "task_loss") -> dict[str, Any]:
    return {"method": method, "baseline.loss": loss}


GENERALIZED, SYMMETRIC = "generalized_cross_entropy", "symmetric_cross_entropy"
UNTUNED = Arm("adalfl", "AdaLFL, untuned", {"method": "adalfl"})
BOUND = "right_alone"  # an arm: what knowing the wrong labels, which nobody does, would be worth
ARMS = (
    Arm("cross_entropy", "cross-entropy", _fixed(), _rates(0.003, 0.01, 0.03, 0.1, 0.3)),
    Arm("decayed", "cross-entropy, decayed", _fixed() | LINEAR, _rates(0.01, 0.03, 0.1, 0.3)),
    Arm("early_stopped", "cross-entropy, early-stopped", _fixed(), _rates(0.003, 0.01, 0.03, 0.1, 0.3), True),
    Arm("fine_tuned", "cross-entropy, fine-tuned", _fixed(method="fine_tuned"), _rates(0.03, 0.1, 0.3, 1.0)),
    Arm(
        "fine_tuned_decayed",
        "cross-entropy, fine-tuned, decayed",
        _fixed(method="fine_tuned") | LINEAR,
        _rates(0.03, 0.1, 0.3, 1.0),
    ),
    Arm("joint", "cross-entropy, joint", _fixed() | JOINT, _rates(0.003, 0.01, 0.03, 0.1)),
    Arm(
        BOUND,
        "cross-entropy on the right labels alone, decayed",
        {**_fixed(), **LINEAR, "dataset.noise_kind": "removed"},
        _rates(0.01, 0.03, 0.1, 0.3),
    ),
    Arm("smoothed", "label smoothing", _fixed("smoothed_cross_entropy"), _rates(0.01, 0.03, 0.1)),
    Arm("generalized", "generalised cross-entropy", _fixed(GENERALIZED), _rates(0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    Arm("symmetric", "symmetric cross-entropy", _fixed(SYMMETRIC), _rates(0.01, 0.03, 0.1, 0.3)),
    Arm(
        "symmetric_early_stopped",
        "symmetric cross-entropy, early-stopped",
        _fixed(SYMMETRIC),
        _rates(0.01, 0.03, 0.1, 0.3),
        early_stopping=True,
    ),
    Arm(
        "symmetric_decayed",
        "symmetric cross-entropy, decayed",
        _fixed(SYMMETRIC) | LINEAR,
        _rates(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    Arm(
        "symmetric_joint",
        "symmetric cross-entropy, joint",
        _fixed(SYMMETRIC) | JOINT,
        _rates(0.01, 0.03, 0.1, 0.3),
    ),
    Arm(
        "symmetric_fine_tuned",
        "symmetric cross-entropy, fine-tuned",
        _fixed(SYMMETRIC, "fine_tuned"),
        _rates(0.03, 0.1, 0.3, 1.0),
    ),
    Arm(
        "generalized_joint",
        "generalised cross-entropy, joint",
        _fixed(GENERALIZED) | JOINT,
        _rates(0.03, 0.1, 0.3, 1.0),
    ),
    Arm(
        "generalized_joint_decayed",
        "generalised cross-entropy, joint, decayed",
        _fixed(GENERALIZED) | JOINT | LINEAR,
        _rates(0.1, 0.3, 1.0),
    ),
    Arm(
        "generalized_fine_tuned",
        "generalised cross-entropy, fine-tuned",
        _fixed(GENERALIZED, "fine_tuned"),
        _rates(0.1, 0.3, 1.0),
    ),
    Arm(
        "meta_weight_net",
        "Meta-Weight-Net",
        {"method": "adalfl", "learned_loss.family": "weight_network", "offline.num_steps": 0},
        grid(inner__learning_rate=(0.01, 0.03, 0.1), outer__learning_rate=(1e-3, 1e-2, 3e-2)),
    ),
    Arm("reweighting", "Learning to Reweight", _fixed(method="reweighting"), _rates(0.003, 0.01, 0.03, 0.1)),
    Arm(
        "reweighting_decayed",
        "Learning to Reweight, decayed",
        _fixed(method="reweighting") | LINEAR,
        _rates(0.01, 0.03, 0.1, 0.3),
    ),
    Arm("ml3", "ML3, untuned", {"method": "ml3"}),
    Arm(
        "adalfl_cross_entropy",
        "AdaLFL from the cross-entropy, decayed",
        {**LEARNED_FURTHER, "learned_loss.start": "task_loss"},
        grid(inner__learning_rate=(0.01, 0.03, 0.1), outer__learning_rate=(1e-4, 1e-3, 3e-3)),
    ),
    Arm(
        "adalfl_symmetric",
        "AdaLFL from the symmetric one, decayed",
        {**LEARNED_FURTHER, "learned_loss.start": SYMMETRIC},
        grid(inner__learning_rate=(0.1, 0.3, 1.0), outer__learning_rate=(1e-4, 1e-3, 3e-3)),
    ),
    Arm(
        "adalfl_tuned",
        "AdaLFL, decayed",
        {"method": "adalfl", **LINEAR},
        grid(inner__learning_rate=(0.01, 0.03, 0.1), outer__learning_rate=(3e-4, 1e-3, 3e-3)),
    ),
    Arm(
        "shape",
        "AdaLFL, shape alone, decayed",
        {"method": "adalfl", "learned_loss.floor": 1.0, "learned_loss.ceiling": 1.0, **LINEAR},
        _rates(0.1, 0.3, 1.0),
    ),
    Arm("floor", "AdaLFL with a floor", {"method": "adalfl"}, grid(learned_loss__floor=(3.0, 10.0, 30.0))),
    Arm("ceiling", "AdaLFL with a ceiling", {"method": "adalfl"}, grid(learned_loss__ceiling=(3.0, 10.0, 30.0))),
    Arm(
        "adalfl_pytorch",
        "AdaLFL, untuned, PyTorch's initialisation",
        {"method": "adalfl", "model.initialization": "pytorch"},
    ),
    UNTUNED,
)

FIRST_STEPS = tuple(
    Arm(f"first_step_{rate}", f"AdaLFL, first step {rate}", {"method": "adalfl", "inner.first_step_rate": rate})
    for rate in (0.1, 0.3, 1.0)
)
FURTHER = Arm(
    "further",
    "the symmetric one learned further, decayed",
    {**LEARNED_FURTHER, "learned_loss.start": SYMMETRIC},
    grid(inner__learning_rate=(0.1, 0.3, 1.0), outer__learning_rate=(1e-4, 3e-4, 1e-3)),
)
MANY_FOR_TUNING = 6  # seeds: an outer rate that loses one of ten must not pass for the best
OTHER_START = {"mlp": "he_glorot", "lenet5": "pytorch"}  # the initialisation from which alpha is not the right one
REGULATED = ("shape", "floor", "ceiling")
SMALL_START = "adalfl_pytorch"  # an arm: small weights, which leave the tanh of LeNet-5 near zero
DECAYED = ("fine_tuned_decayed", "reweighting_decayed")
SYMMETRIC_AHEAD = ("20", "40", "60")  # noise, where the symmetric cross-entropy is the best rival
ELSEWHERE = (BOUND, *REGULATED, SMALL_START)  # arms of other comparisons than these
VARIANTS = (BOUND, "symmetric_decayed", "adalfl_cross_entropy", "adalfl_symmetric", "adalfl_tuned", *REGULATED)
FIXED = ("decayed", "fine_tuned", "generalized", "symmetric_decayed", "symmetric_fine_tuned")
KEY_ARMS = (*FIXED, *DECAYED, "meta_weight_net", "reweighting")  # rivals everywhere else: one or two of every kind
LEARNED = ("ml3", "adalfl_cross_entropy", "adalfl_symmetric", "adalfl_tuned", *REGULATED, SMALL_START, "adalfl")
RIVALS = tuple(arm.name for arm in ARMS if arm.name not in (BOUND, *LEARNED))  # all that were made by hand
LENET5_ARMS = (*FIXED, "fine_tuned_decayed")
ALL_ARMS = tuple(arm.name for arm in ARMS if arm.name not in ELSEWHERE)
MORE_ARMS = {  # problem and noise -> arms, where they are others than KEY_ARMS and LENET5_ARMS
    ("mnist_mlp", "40"): ALL_ARMS,
    ("mnist_mlp", "pair_40"): ALL_ARMS,
    ("mnist_lenet5", "40"): (*LENET5_ARMS, SMALL_START),
}
TOO_SHORT = ("mnist_lenet5", "80")  # where AdaLFL still learns when 2,000 steps are over
AHEAD = ("fine_tuned", "symmetric_decayed", "symmetric_fine_tuned")  # there; mostly the best where labels are wrong
# Learned losses, each beside a rival that trains on the loss it starts from; the best rival beside the bound.
PAIRS = (
    ("adalfl_cross_entropy", "fine_tuned"),
    ("adalfl_symmetric", "symmetric_decayed"),
    ("symmetric_decayed", BOUND),
)


def comparisons() -> list[Comparison]:
    """Every noise; at 40 % also first steps and, with the MLP, forms of AdaLFL and fewer clean labels.

    LeNet-5 has no rivals that weigh examples here, which `weighting` has; with 80 % wrong it is trained for longer too.
    """
    made = []
    for problem, (title, overrides) in PROBLEMS.items():
        compare = functools.partial(_compare, problem, title, overrides)
        is_lenet5 = overrides["model.name"] == "lenet5"
        for noise, corruption in (NOISE if is_lenet5 else NOISE | RARE_CLASSES).items():
            arms = MORE_ARMS.get((problem, noise), LENET5_ARMS if is_lenet5 else KEY_ARMS)
            made.append(compare(noise, show_noise(noise), corruption, arms))
        wrong, start = NOISE["40"], OTHER_START[overrides["model.name"]]
        from_there = {**wrong, "model.initialization": start}
        shown = f"40 % wrong labels, starting from {start}"
        made.append(compare("40_first_step", shown, from_there, [arm.name for arm in FIRST_STEPS]))
        if is_lenet5:
            continue
        made.append(compare("40_variants", "40 % wrong labels: forms of AdaLFL", wrong, VARIANTS))
        for noise in SYMMETRIC_AHEAD:
            shown = f"{noise} % wrong labels: a robust loss learned further"
            further = compare(f"{noise}_further", shown, NOISE[noise], (BOUND, "symmetric_decayed", FURTHER.name))
            made.append(further._replace(reference=FURTHER.name, pairs=(), num_tuning_seeds=MANY_FOR_TUNING))
        for size in (100, 300):
            batch_size = min(SETTING["batch_size"], size // 2)  # half of the clean set is held out for tuning
            shown = f"40 % wrong labels, {size} clean ones, batches of {batch_size}"
            fewer = {**wrong, "dataset.valid_examples": size, "batch_size": batch_size}
            made.append(compare(f"40_of_{size}", shown, fewer, KEY_ARMS))
    problem, noise = TOO_SHORT
    num_steps = SETTING["num_steps"]
    longer = {**NOISE[noise], "num_steps": num_steps}
    shown = f"{show_noise(noise)}, {num_steps:,} steps"
    return [*made, _compare(problem, *PROBLEMS[problem], f"{noise}_longer", shown, longer, AHEAD)]


def parts_by_noise(
    name: str,
    title: str,
    averaged: str,
    rivals: Sequence[str],
    comparisons: Sequence[Comparison],
    known: Mapping[str, Any],
) -> list[Part]:
    """Of a study whose comparisons are those of the same noises here with its name before them: an overview, and each.

    Args:
      name: of the study.
      title: of the overview.
      averaged: the title of the averages over the wrong labels.
      rivals: arms that the overview has.
      comparisons: of the study.
      known: name of a comparison -> its numbers.
    """
    suffix = suffix_of(comparisons)
    contests, wrong = contests_by_noise(known, rivals, suffix, f"{name}_")
    if not contests:
        return []
    tables = contests_table(contests), *average_tables(wrong, averaged)
    names = tuple(contest.name for contest in contests)
    overview = Part(f"{name}{suffix}", title, names, contests_figure(contests, rivals), tables)
    return [overview, *comparison_parts(comparisons, known)]


def _compare(
    problem: str, title: str, overrides: Overrides, name: str, shown: str, further: Overrides, arms: Iterable[str]
) -> Comparison:
    """AdaLFL, untuned, with some of all arms on a problem in some setting."""
    config = {**SETTING, **overrides, **further}
    known = (*FIRST_STEPS, *ARMS, FURTHER)
    whole = Comparison(f"{problem}_{name}", f"{title}, {shown}", "default", config, known, UNTUNED.name, PAIRS)
    return whole.select(arms)


def show_noise(noise: str) -> str:
    """What one of `NOISE` or `RARE_CLASSES` is called."""
    return SHOWN.get(noise, f"{noise} % wrong labels")


def contests_by_noise(
    known: Mapping[str, Any], rivals: Sequence[str], suffix: str, prefix: str = ""
) -> tuple[list[Contest], list[Contest]]:
    """The contests of every problem and noise that there are numbers of, and those of wrong labels among them."""
    problems = {f"{prefix}{problem}": title for problem, (title, _) in PROBLEMS.items()}
    noises = {f"{noise}{suffix}": show_noise(noise) for noise in NOISE}
    contests = find_contests(problems, noises, rivals, known)
    return contests, [contest for contest in contests if contest.noise != SHOWN["clean"]]


def measure(numbers: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What AdaLFL learned, as JSON holds it."""
    adalfl = numbers["arms"].get("adalfl", {})
    return {"learned_losses": learned_curves(workdir / RUNS / adalfl["run"])} if "test" in adalfl else {}


def parts(comparisons: Sequence[Comparison], known: Mapping[str, Any]) -> list[Part]:
    """An overview; for each problem, errors and what AdaLFL learned, by the noise; and every comparison."""
    suffix = suffix_of(comparisons)
    made = _overview(known, suffix)
    for problem, (title, _) in PROBLEMS.items():
        names = [f"{problem}_{noise}{suffix}" for noise in NOISE]
        names = [name for name in names if "learned_losses" in known.get(name, {})]
        if names:
            figure = shapes_figure(
                {known[name]["title"].removeprefix(f"{title}, "): known[name]["learned_losses"] for name in names}
            )
            picture = f"{problem}_learned_losses{suffix}"
            tables = _errors_by_noise(title, {name: known[name] for name in names})
            made.append(Part(picture, f"What AdaLFL learned: {title}", tuple(names), figure, tables))
    return [*made, *comparison_parts(comparisons, known)]


def _overview(known: Mapping[str, Any], suffix: str) -> list[Part]:
    """AdaLFL, untuned, beside all rivals; of one noise its own table has that."""
    contests, wrong = contests_by_noise(known, RIVALS, suffix)
    if len(contests) < 2:
        return []
    title, names = "AdaLFL, untuned, and rivals tuned for each noise", tuple(contest.name for contest in contests)
    tables = (
        contests_table(contests),
        *average_tables(wrong, "One method for all wrong labels"),
        *average_tables(contests, "One method for wrong labels and right ones"),
    )
    return [Part(f"noisy_labels{suffix}", title, names, contests_figure(contests, KEY_ARMS), tables)]


def _errors_by_noise(title: str, numbers: Mapping[str, Any]) -> tuple[Table, ...]:
    """A row for each arm that was trained with every one of several noises; no table of one."""
    if len(numbers) < 2:
        return ()
    noises = {name: found["title"].removeprefix(f"{title}, ") for name, found in numbers.items()}
    rows = [
        {"arm": arm.title} | {name: found["arms"][arm.name]["test"] for name, found in numbers.items()}
        for arm in ARMS
        if all("test" in found["arms"].get(arm.name, {}) for found in numbers.values())
    ]
    cells = {shown: functools.partial(_error, name) for name, shown in noises.items()}
    return (Table(f"{title}: test error rate, %, by the labels", {"arm": lambda row: row["arm"]} | cells, rows),)


def _error(noise: str, row: Row) -> str:
    return show_mean(row[noise], 100)
