"""What the documents tell of goals, claims and right labels is what the tables have."""

import json
import re

import numpy as np
import pytest

from tests.documents import ERROR, MORE_RESULTS, MOVED_LABELS, README, RESULTS, WITHOUT, WRONG_LABELS, figure
from tests.training.tiny import ROOT

FORMS = ("noisy_labels", "MNIST, MLP 784-256-10, 40 % wrong labels: forms of AdaLFL")
CLEAN_LABELS = ("clean_labels", "MNIST, logistic regression")
CLEAN_MLP = ("clean_labels", "MNIST, MLP 784-1000-1000-10")
MANY_SEEDS = [
    ("recipe", f"{problem}: settings, 100 seeds") for problem in ("digits, MLP", "MNIST, logistic regression")
]
RESULT_GOALS = [
    (*WRONG_LABELS, "AdaLFL, untuned", ERROR),
    (*FORMS, "AdaLFL from the symmetric one, decayed", ERROR),
    *((*WRONG_LABELS, "symmetric cross-entropy, decayed", column) for column in (ERROR, "p")),
    (*FORMS, "cross-entropy on the right labels alone, decayed", ERROR),
    *((*MOVED_LABELS, row, ERROR) for row in ("AdaLFL, untuned", "AdaLFL from the cross-entropy, decayed")),
    (*MOVED_LABELS, "Learning to Reweight, decayed", ERROR),
    (*MOVED_LABELS, "Learning to Reweight, decayed", "p"),
    *((*WITHOUT, row, ERROR) for row in ("AdaLFL, untuned", "cross-entropy, decayed")),
    (*WITHOUT, "cross-entropy, decayed", "p"),
    *((*labels, "sum over classes, eta 3e-4", "worst") for labels in MANY_SEEDS),
    (*CLEAN_LABELS, "AdaLFL, tuned", ERROR),
    *((*CLEAN_LABELS, row, column) for row in ("task loss, tuned", "ML3") for column in (ERROR, "p")),
    *((*CLEAN_MLP, "AdaLFL from the task loss", column) for column in (ERROR, "worst")),
    *((*CLEAN_MLP, "AdaLFL, tuned", column) for column in (ERROR, "worst")),
    (*CLEAN_MLP, "AdaLFL, the default η", ERROR),
    (*CLEAN_MLP, "ML3", "worst"),
    (*CLEAN_MLP, "task loss, tuned", ERROR),
]
GOALS_OF = {
    "40 % wrong labels, ": (WRONG_LABELS, FORMS),
    "the same, 40 % of labels moved": (MOVED_LABELS,),
    "the setting of the first two rows": (WITHOUT,),
    "100 seeds": tuple(MANY_SEEDS),
    "MNIST, logistic": (CLEAN_LABELS,),
    "MNIST, MLP": (CLEAN_MLP,),
}  # what a row begins with -> the tables it is about


@pytest.mark.parametrize("where", RESULT_GOALS, ids=" ".join)
def test_what_was_reached_of_the_results_is_what_the_tables_have(where):
    (start,) = (start for start, tables in GOALS_OF.items() if where[:2] in tables)
    (goals,) = re.findall(r"^## What was aimed at\n(.*?)^## ", RESULTS, re.DOTALL | re.MULTILINE)
    (goal,) = re.findall(rf"^\| {start}[^\n]*$", goals, re.MULTILINE)
    assert re.search(rf"(?<![\d.]){re.escape(figure(*where, page=RESULTS))}(?![\d])", goal)


CLEAN_FASHION, CLEAN_DIGITS = (("clean_labels", title) for title in ("Fashion-MNIST, MLP 784-256-10", "digits, MLP"))
DOES_MLP, DOES_LOGISTIC, DOES_DIGITS = (
    ("behaviour", f"{title}: what the learned loss does")
    for title in ("MNIST, MLP 784-1000-1000-10", "MNIST, logistic regression", "digits, MLP")
)
FORMS_OF_NETWORK = ("ablation", "digits, MLP: forms of the loss network")
AS_IT_IS = "as it is: beta 10, gamma .01, two layers of 40"
ON_MNIST = ("transfer", "Losses learned here and elsewhere"), "on MNIST, MLP"
CLAIMS = {
    "A lower error than the task loss": [
        *((CLEAN_MLP, row, ERROR) for row in ("AdaLFL, the default η", "task loss")),
        *((CLEAN_LABELS, row, ERROR) for row in ("AdaLFL, the default η", "task loss")),
        *((CLEAN_FASHION, row, ERROR) for row in ("AdaLFL, the default η", "task loss")),
        *((CLEAN_DIGITS, row, ERROR) for row in ("AdaLFL, the default η", "task loss")),
        *(
            (("clean_labels", "Diabetes, MLP"), row, "test mean squared error")
            for row in ("AdaLFL, the default η", "task loss")
        ),
    ],
    "A lower error than a loss learned offline": [
        *((CLEAN_LABELS, row, ERROR) for row in ("AdaLFL, tuned", "ML3")),
        *((CLEAN_FASHION, row, ERROR) for row in ("AdaLFL, tuned", "ML3")),
    ],
    "Faster": [
        *(
            (CLEAN_MLP, row, column)
            for row in ("AdaLFL, the default η", "task loss, tuned")
            for column in ("steps", "seconds")
        ),
        *(
            (CLEAN_LABELS, row, "steps")
            for row in ("AdaLFL, tuned", "AdaLFL, the default η", "AdaLFL from the task loss", "task loss, tuned")
        ),
        (CLEAN_LABELS, "task loss, tuned, linear decay", "steps"),
    ],
    "More than a learned": [
        *((CLEAN_LABELS, row, ERROR) for row in ("AdaLFL, tuned", "learned learning rate")),
        *((CLEAN_MLP, row, ERROR) for row in ("AdaLFL from the task loss", "learned learning rate")),
        *((CLEAN_FASHION, row, ERROR) for row in ("AdaLFL, tuned", "learned learning rate")),
    ],
    "Implicit learning-rate": [
        *((DOES_MLP, "implicit learning rate AdaLFL, tuned", column) for column in ("start", "end")),
        (DOES_MLP, "learning rate task loss, tuned", "start"),
    ],
    "Learned label smoothing": [
        *((DOES_MLP, "label smoothing AdaLFL, tuned", column) for column in ("start", "end")),
        (DOES_LOGISTIC, "label smoothing AdaLFL, tuned", "start"),
        (DOES_DIGITS, "label smoothing AdaLFL, tuned", "end"),
    ],
    "A smooth leaky": [
        *(
            (FORMS_OF_NETWORK, row, "flat")
            for row in (AS_IT_IS, "activation tanh", "activation sigmoid", "output softplus", "activation gelu")
        ),
        *((FORMS_OF_NETWORK, row, ERROR) for row in (AS_IT_IS, "activation gelu")),
    ],
    "A learned loss serves": [
        *(
            (ON_MNIST[0], f"{row}, as it is", ON_MNIST[1])
            for row in ("MNIST, LeNet-5", "Fashion-MNIST, MLP", "its own")
        ),
        *((ON_MNIST[0], row, ON_MNIST[1]) for row in ("task loss", "task loss, tuned")),
    ],
}  # what a row begins with -> the cells it is about


@pytest.mark.parametrize("start", CLAIMS)
def test_what_came_of_the_claims_of_the_paper_is_what_the_tables_have(start):
    (claims,) = re.findall(r"^## What the paper claims\n(.*?)^## ", RESULTS, re.DOTALL | re.MULTILINE)
    (claim,) = re.findall(rf"^\| {start}[^\n]*$", claims, re.MULTILINE)
    said = claim.replace(",", "").replace(" %", "%")
    for table, row, column in CLAIMS[start]:
        assert re.search(rf"(?<![\d.]){re.escape(figure(*table, row, column, page=RESULTS))}(?![\d])", said), row


def test_the_page_counts_the_claims_that_hold():
    (claims,) = re.findall(r"^## What the paper claims\n(.*?)^## ", RESULTS, re.DOTALL | re.MULTILINE)
    verdicts = [line.split(" | ")[1] for line in claims.splitlines() if line.startswith("| ")][1:]
    holding, unseen = (sum(each.startswith(word) for each in verdicts) for word in ("yes", "not seen"))
    assert (len(verdicts), holding, unseen) == (10, 2, 1)
    assert "ten claims of the paper** two hold, seven in part, and implicit early stopping was not seen" in RESULTS


def test_how_many_outputs_lie_where_the_loss_is_flat_is_what_was_measured():
    numbers = json.loads((ROOT / "docs" / "results" / "behaviour.json").read_text())
    flat = [np.array(found["behaviour"]["adalfl"]["quantities"]["flat_output_share"]) for found in numbers.values()]
    means = [shares.mean(axis=0) for shares in flat]  # of seeds, at each evaluation
    highest, last, on_a_seed = (
        100 * max(x) for x in ([x.max() for x in means], [x[-1] for x in means], [x.max() for x in flat])
    )
    (claim,) = re.findall(r"^\| Implicit early stopping[^\n]*$", RESULTS, re.MULTILINE)
    assert (
        f"On average {highest:.0f} % of the outputs, at most, lie where the loss is flat, and {last:.0f} % at the"
        in claim
    )
    assert f"{on_a_seed:.0f} % on one seed" in claim


@pytest.mark.parametrize(
    ("against", "place", "told"), [("task loss, tuned", 3, "p = {}"), ("ML3", 4, "by ranks, p = {}")]
)
def test_the_pairs_of_the_mlp_on_clean_labels_are_those_of_its_table(against, place, told):
    (goals,) = re.findall(r"^## What was aimed at\n(.*?)^## ", RESULTS, re.DOTALL | re.MULTILINE)
    (section,) = re.findall(r"<!-- part: mnist_mlp -->(.*?)<!-- part", RESULTS, re.DOTALL)
    (pair,) = re.findall(rf"^\| AdaLFL from the task loss +\| {against} +\|.+\|$", section, re.MULTILINE)
    assert told.format([cell.strip() for cell in pair.strip("|").split("|")][place]) in goals


@pytest.mark.parametrize(
    ("problem", "page"),
    [
        ("MNIST, logistic regression", RESULTS),
        ("MNIST, MLP 784-1000-1000-10", RESULTS),
        ("MNIST, LeNet-5", MORE_RESULTS),
        ("Fashion-MNIST, MLP 784-256-10", RESULTS),
        ("Fashion-MNIST, LeNet-5", MORE_RESULTS),
        ("digits, MLP", RESULTS),
    ],
    ids=lambda value: value if len(value) < 40 else "",
)
def test_the_readme_has_the_errors_with_right_labels(problem, page):
    arms = ("task loss", "task loss, tuned", "task loss, tuned, linear decay", "ML3")
    arms += ("AdaLFL, the default η", "AdaLFL, tuned", "AdaLFL from the task loss")
    (section,) = re.findall(r"^## Right labels\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    (row,) = re.findall(rf"^\| {problem} \|(.*)\|$", section, re.MULTILINE)
    shown = [cell.strip() for cell in row.split("|")]
    errors = [figure("clean_labels", problem, arm, ERROR, page=page) for arm in arms]
    lowest = min(errors, key=float)
    assert shown == [f"**{error}**" if error == lowest else error for error in errors]


@pytest.mark.parametrize("problem", ["MNIST, LeNet-5", "Fashion-MNIST, LeNet-5"])
def test_the_pages_say_between_what_errors_lenet5_ends_on_clean_labels(problem):
    numbers = json.loads((ROOT / "docs" / "results" / "clean_labels.json").read_text())
    (found,) = (each for each in numbers.values() if each["title"] == problem)
    errors = [100 * arm["test"]["mean"] for name, arm in found["arms"].items() if name != "task_loss"]
    ends = f"{min(errors):.2f}", f"{max(errors):.2f}"
    assert all(f"{end} %" in RESULTS for end in ends)


def test_the_figures_of_the_readme_are_those_of_the_recorded_run():
    """`make pictures` records the quickstart's summary; the table in the README shows its numbers."""
    summary = json.loads((ROOT / "docs" / "images" / "summary.json").read_text())
    text = " ".join(README.split())
    for info in summary["methods"].values():
        assert f"{100 * info['test']['mean']:.2f} ± {100 * info['test']['std']:.2f}" in text
    task_loss, tuned, offline = (row["adjusted_p_value"] for row in summary["comparisons"])
    assert task_loss < 0.001
    assert "adjusted for their number: p < 0.001" in text
    for p_value in (tuned, offline):
        assert f"(p = {float(f'{p_value:.2g}'):.2f})" in text


def test_the_readme_says_what_ten_other_seeds_show():
    of_ten = ("clean_labels", "Further differences: digits, MLP", "AdaLFL, the default η task loss, tuned")
    ahead, p_value = (figure(*of_ten, column, page=RESULTS) for column in ("arm minus another", "p"))
    assert f"and of the tuned one {ahead.lstrip('-')} points (p = {p_value})" in " ".join(README.split())
    methods = json.loads((ROOT / "docs" / "images" / "summary.json").read_text())["methods"]
    recorded, tuned = (
        100 * (methods[name]["test"]["mean"] - methods["adalfl"]["test"]["mean"])
        for name in ("task_loss", "tuned_task_loss")
    )
    task_loss, own = (
        float(figure(*CLEAN_DIGITS, arm, ERROR, page=RESULTS)) for arm in ("task loss", "AdaLFL, the default η")
    )
    assert (task_loss - own) / recorded == pytest.approx(0.5, abs=0.05)
    assert -float(ahead) / tuned == pytest.approx(0.5, abs=0.05)


SETTINGS = ("digits, MLP", "MNIST, MLP 784-128-10", "MNIST, logistic regression")
ADDED = ("the task loss and what is learned to add", "the same, no offline phase")
OF_SETTINGS = {
    "A network that is added": [
        *(
            (f"{problem}: beginning as the task loss", row, column)
            for problem in SETTINGS
            for row, column in ((ADDED[0], ERROR), (ADDED[0], "p"), (ADDED[1], ERROR))
        ),
        *((f"{problem}: beginning as the task loss", "sum over classes, eta 3e-4", ERROR) for problem in SETTINGS),
        (f"{SETTINGS[1]}: beginning as the task loss", "sum, from the task loss", ERROR),
        *(
            (f"{problem}: beginning as the task loss", "sum, from the task loss, no offline phase", ERROR)
            for problem in SETTINGS
        ),
        *((f"Further differences: {SETTINGS[1]}: beginning as the task loss", row, "p") for row in ADDED),
        (f"Further differences: {SETTINGS[0]}: beginning as the task loss", ADDED[1], "p"),
    ],
    "On the paper's own models": [
        *(
            ("MNIST, MLP 784-1000-1000-10: the paper's settings", row, ERROR)
            for row in ("sum over classes, eta 3e-4", "the paper's: mean, eta 1e-5")
        ),
        *(
            (f"MNIST, {model}: the paper's settings", "the paper's: mean, eta 1e-5", "p")
            for model in ("MLP 784-1000-1000-10", "logistic regression")
        ),
        *(
            ("MNIST, logistic regression: the paper's settings", row, column)
            for row in ("sum over classes, eta 3e-4", "the paper's: mean, eta 1e-5")
            for column in (ERROR, "worst")
        ),
    ],
}  # what a paragraph begins with -> the cells it tells


@pytest.mark.parametrize("start", OF_SETTINGS)
def test_what_is_told_of_settings_is_what_the_tables_have(start):
    (told,) = re.findall(rf"^{start}.*?\n\n", RESULTS, re.DOTALL | re.MULTILINE)
    for title, row, column in OF_SETTINGS[start]:
        assert re.search(rf"(?<![\d.]){figure('recipe', title, row, column, page=RESULTS)}(?![\d.]\d)", told), (
            title,
            row,
        )


def test_the_page_says_how_the_runs_on_a_cpu_end_whose_behaviour_it_shows():
    (trained, shown), where = (
        (
            json.loads((ROOT / "docs" / "results" / f"{study}.json").read_text())[comparison]["arms"]
            for study, comparison in (("clean_labels", "mnist_mlp"), ("behaviour", "behaviour_mnist_mlp"))
        ),
        " ".join(RESULTS.split()),
    )
    errors = [f"{100 * arms[name]['test']['mean']:.2f}" for arms in (shown, trained) for name in ("adalfl", "ml3")]
    assert "AdaLFL ends at {} % and ML3 at {} %, instead of {} and {} %".format(*errors) in where
    worst = [f"{100 * max(arms['ml3']['test']['per_seed']):.2f}" for arms in (trained, shown)]
    assert "ends at {} % on the GPU and at {} % on the CPU".format(*worst) in where
