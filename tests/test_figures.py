"""The figures that the documents tell: each is that of a table, or of the numbers behind it."""

import json
import re

import numpy as np
import pytest

from tests.training.tiny import ROOT

PERFORMANCE, ON_A_GPU, RESULTS, MORE_RESULTS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("performance", "performance_gpu", "results", "results_more")
)


def figure(section, title, row, column, page=PERFORMANCE):
    """A cell of a table of a page; of a ratio, its median, and of a mean with its deviation the mean."""
    (content,) = re.findall(rf"<!-- tables: {section} -->\n(.*?)<!-- end of tables -->", page, re.DOTALL)
    (table,) = re.findall(rf"^\*\*(?-s:{title})[^\n]*\*\*\n\n(.*?)\n\n", content, re.DOTALL | re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    (cells,) = (cells for cells in rows if row in (cells[0], " ".join(cells[:2])))
    return cells[head.index(column)].partition(" ")[0]


README = (ROOT / "README.md").read_text()
OWN, OURS, STEPS, MEMORY = "in own task-loss steps", "in steps of “JAX, forward”", "in task-loss steps", "temporary MB"
GOALS = [
    ("peers", "MLP", "JAX, forward", OWN),
    ("peers", "ResNet-18", "JAX, forward", OWN),
    ("peers", "Logistic", "JAX, forward", OWN),
    ("parts", "Logistic", "the same, and the gradient of phi", STEPS),
    *(("thrift", "ResNet-18", row, STEPS) for row in ("finite difference", "a quarter", "an eighth")),
    *(("thrift", "MLP", row, STEPS) for row in ("a quarter", "an eighth", "pipelined", "pipelined, finite difference")),
    *(("peers", model, "PyTorch, higher", OURS) for model in ("Logistic", "MLP", "LeNet-5")),
    *(("peers", model, "PyTorch, autograd.grad", column) for model in ("MLP", "LeNet-5") for column in (OURS, OWN)),
    *(("thrift", "ResNet-18", row, MEMORY) for row in ("task loss", "recompute")),
    ("seeds mnist_logistic", "mnist", "AdaLFL, 10 seeds", "ratio"),
    ("seeds mnist_lenet5", "mnist", "AdaLFL, 10 seeds", "ratio"),
    *(
        ("estimators", f"{model}.*K inner", f"{k} checkpointed", MEMORY)
        for model in ("MLP", "LeNet-5")
        for k in (4, 32)
    ),
]


SIZES = [
    (".*by width", "100"),
    (".*by width", "300"),
    (".*by inputs and width", "64, 64"),
    (".*by outputs C", "1000"),
]


@pytest.mark.parametrize("where", GOALS, ids=" ".join)
def test_what_was_reached_is_what_the_tables_have(where):
    (goals,) = re.findall(r"^## What was aimed at\n(.*?)^## ", PERFORMANCE, re.DOTALL | re.MULTILINE)
    assert re.search(rf"(?<![\d.]){re.escape(figure(*where))}(?![\d])", goals)


@pytest.mark.parametrize(("title", "row"), [("LeNet-5.*one inner", "unrolled"), ("LeNet-5.*K inner", "1 unrolled")])
def test_the_page_says_how_far_two_measurements_of_one_step_differ(title, row):
    (introduction,) = re.findall(
        r"^## Estimators of the meta-gradient\n(.*?)<!--", PERFORMANCE, re.DOTALL | re.MULTILINE
    )
    assert figure("estimators", title, row, STEPS) in introduction


WRONG_LABELS = ("noisy_labels", r"MNIST, MLP 784-256-10, 40 % wrong labels(?=\*\*)")
FORMS = ("noisy_labels", "MNIST, MLP 784-256-10, 40 % wrong labels: forms of AdaLFL")
MOVED_LABELS = ("noisy_labels", r"MNIST, MLP 784-256-10, 40 % of labels moved to the next class(?=\*\*)")
WITHOUT = ("noisy_labels", r"MNIST, MLP 784-256-10, clean labels(?=\*\*)")
CLEAN_LABELS = ("clean_labels", "MNIST, logistic regression")
CLEAN_MLP = ("clean_labels", "MNIST, MLP 784-1000-1000-10")
MOST_WRONG = ("noisy_labels", r"MNIST, MLP 784-256-10, 80 % wrong labels(?=\*\*)")
MANY_SEEDS = [
    ("recipe", f"{problem}: settings, 100 seeds") for problem in ("digits, MLP", "MNIST, logistic regression")
]
COLUMNS = [WITHOUT, WRONG_LABELS, MOST_WRONG, MOVED_LABELS]  # of the README
ERROR = "test error rate, %"
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


@pytest.mark.parametrize(
    "arm",
    [
        "cross-entropy, decayed",
        "cross-entropy, fine-tuned",
        "generalised cross-entropy",
        "symmetric cross-entropy, decayed",
        "symmetric cross-entropy, fine-tuned",
        "Meta-Weight-Net",
        "Learning to Reweight",
        "Learning to Reweight, decayed",
        "AdaLFL, untuned",
    ],
)
def test_the_readme_has_the_errors_with_wrong_labels(arm):
    without_links = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", README)
    (row,) = re.findall(rf"^\| {arm} \|(.*)\|$", without_links, re.MULTILINE)
    shown = [cell.strip(" *") for cell in row.split("|")]
    measured = {labels: cell for labels, cell in zip(COLUMNS, shown, strict=True) if cell}
    assert measured == {labels: figure(*labels, arm, ERROR, page=RESULTS) for labels in measured}
    assert list(measured) == COLUMNS


def test_the_readme_marks_the_lowest_error_of_every_column():
    (table,) = re.findall(r"^\| training labels .*?(?=\n\n)", README, re.DOTALL | re.MULTILINE)
    for column in zip(*(line.strip("|").split("|")[1:] for line in table.splitlines()[2:]), strict=True):
        errors = {float(cell.strip(" *")): "**" in cell for cell in column if cell.strip()}
        assert [error for error, is_bold in errors.items() if is_bold] == [min(errors)]


@pytest.mark.parametrize(
    ("problem", "page", "ahead"),
    [
        ("MNIST, MLP 784-256-10", RESULTS, 3),
        ("Fashion-MNIST, MLP 784-256-10", RESULTS, 3),
        ("MNIST, LeNet-5", MORE_RESULTS, 4),  # the third by the mean is level
        ("Fashion-MNIST, LeNet-5", MORE_RESULTS, 3),
    ],
    ids=["MNIST, MLP", "Fashion-MNIST, MLP", "MNIST, LeNet-5", "Fashion-MNIST, LeNet-5"],
)
def test_the_pages_have_the_errors_over_all_noises(problem, page, ahead):
    """Of so many arms, the best, AdaLFL among them."""
    (table,) = re.findall(r"^\*\*One method for all wrong labels: [^\n]*\n\n(.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    best = [(row[2], row[3].partition(" ")[0]) for row in rows if row[0] == problem][:ahead]
    assert "AdaLFL, untuned" in dict(best)
    (told,) = re.findall(r"^\*\*One method for every noise\.\*\*(.*?)^\*\*At each", RESULTS, re.DOTALL | re.MULTILINE)
    assert [mean for _, mean in best if mean not in told] == []
    worst = next(row[-1] for row in rows if row[0] == problem and row[2] == "AdaLFL, untuned")
    assert f" {worst} times" in told
    (line,) = re.findall(r"^- \*\*One method for every noise\.\*\*(.*?)^- ", README, re.DOTALL | re.MULTILINE)
    assert dict(best)["AdaLFL, untuned"] in line
    assert best[0][1] in line


def test_the_pages_say_what_came_of_data_drawn_again():
    (content,) = re.findall(r"<!-- tables: redrawn -->\n(.*?)<!-- end of tables -->", MORE_RESULTS, re.DOTALL)
    (table,) = re.findall(
        r"^\*\*Drawn again, over all wrong labels: [^\n]*\n\n(.*?)\n\n", content, re.DOTALL | re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    (told,) = re.findall(r"^## Drawn again\n(.*?)^## ", RESULTS, re.DOTALL | re.MULTILINE)
    told, results, readme = (" ".join(text.split()) for text in (told, RESULTS, README))
    means = {(row[0].partition(",")[0], row[2]): row[3].partition(" ")[0] for row in rows}
    assert [mean for mean in means.values() if mean not in told] == []
    (own, *rivals), p = [mean for (where, _), mean in means.items() if where == "MNIST"], rows[1][5]
    assert rows[0][2] == "AdaLFL, untuned"  # the lowest on MNIST
    assert f"({own} and {rivals[0]} %, p = {p})" in results
    assert f"({own} %; the closest rival {rivals[0]} %, p = {p})" in readme
    (ahead, own, *_) = [mean for (where, _), mean in means.items() if where == "Fashion-MNIST"]
    assert own == means["Fashion-MNIST", "AdaLFL, untuned"]  # the second there
    assert f"({own} %; the third has {ahead})" in results
    assert f"one of three is ahead of it on Fashion-MNIST ({ahead} %, AdaLFL {own})" in readme
    (table,) = re.findall(
        r"^\*\*AdaLFL, untuned, and the best rival[^\n]*\n\n(.*?)\n\n", content, re.DOTALL | re.MULTILINE
    )
    for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]):
        own, best = (row[place].partition(" ")[0] for place in (2, 4))
        assert re.search(rf"{own} and {best} %|{best} and {own} %", told), row


def test_the_pages_say_where_no_rival_of_lenet5_is_ahead():
    (content,) = re.findall(r"<!-- tables: noisy_labels -->\n(.*?)<!-- end of tables -->", MORE_RESULTS, re.DOTALL)
    (table,) = re.findall(
        r"^\*\*AdaLFL, untuned, and the best rival[^\n]*\n\n(.*?)\n\n", content, re.DOTALL | re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    level = [row[1] for row in rows if row[0] == "MNIST, LeNet-5" and row[-1] == "0"]
    assert level == ["clean labels", *(f"{share} % wrong labels" for share in (20, 40, 60))]
    assert "With LeNet-5 on MNIST no rival is significantly ahead at 0 to 60 % wrong" in " ".join(RESULTS.split())


@pytest.mark.parametrize(
    ("model", "page"), [("MLP 784-256-10", RESULTS), ("LeNet-5", MORE_RESULTS)], ids=["MLP", "LeNet-5"]
)
def test_the_readme_says_where_a_learned_loss_fails(model, page):
    (line,) = re.findall(r"^- \*\*It can fail\.\*\*(.*?)^- ", README, re.DOTALL | re.MULTILINE)
    worst = ("noisy_labels", f"Fashion-MNIST, {model}, 80 % wrong labels")
    for arm in ("AdaLFL, untuned", "symmetric cross-entropy, fine-tuned"):
        assert figure(*worst, arm, ERROR, page=page) in line


CLEAN_SET = ("MNIST, MLP 784-256-10", "Fashion-MNIST, MLP 784-256-10")
RIVALS_WITH_A_CLEAN_SET = (
    "cross-entropy, fine-tuned",
    "symmetric cross-entropy, decayed",
    "symmetric cross-entropy, fine-tuned",
    "symmetric cross-entropy, decayed, joint at the end",
)


@pytest.mark.parametrize("problem", CLEAN_SET)
@pytest.mark.parametrize(
    ("arm", "noise"),
    [
        ("AdaLFL, untuned", "80 % wrong labels"),
        ("AdaLFL, untuned, joint at the end", "80 % wrong labels"),
        *(
            ("symmetric cross-entropy, decayed, joint at the end", noise)
            for noise in ("40 % wrong labels", "80 % wrong labels")
        ),
    ],
)
def test_the_pages_say_what_the_clean_set_is_worth_at_the_end(problem, arm, noise):
    error = figure("clean_set", f"{problem}, the clean set at the end", arm, noise, page=RESULTS)
    is_told = problem == CLEAN_SET[0] or "80" in noise  # the guide tells the others of MNIST alone
    for text in (RESULTS, (ROOT / "docs" / "noisy_labels.md").read_text())[: 1 + is_told]:
        (section,) = re.findall(r"^## The clean set at the end\n(.*?)^(?:<!--|## )", text, re.DOTALL | re.MULTILINE)
        assert is_told is bool(re.search(rf"(?<![\d.]){error}(?!\d)", section))
    if "joint" in arm and "80" in noise:
        (line,) = re.findall(
            r"^- \*\*Let the model train on the clean set too(.*?)^- ", README, re.DOTALL | re.MULTILINE
        )
        assert re.search(rf"(?<![\d.]){error}(?!\d)", line)


WEIGHING = ["Meta-Weight-Net", "Meta-Weight-Net, decayed", "Learning to Reweight", "Learning to Reweight, decayed"]


def rivals_that_weigh_examples():
    (section,) = re.findall(r"\*\*Rivals that weigh examples\*\* .*?\n\n", RESULTS, re.DOTALL)
    return " ".join(section.split())


def weighting_figure(problem, arm, column):
    return figure("weighting", f"{problem}, learned weights of examples", arm, column, page=MORE_RESULTS)


@pytest.mark.parametrize(
    ("arm", "column"),
    [
        ("AdaLFL, untuned", ERROR),
        ("Learning to Reweight, decayed", ERROR),
        ("Learning to Reweight, decayed", "p"),
        ("Meta-Weight-Net, decayed", ERROR),
    ],
)
def test_the_page_has_rivals_that_weigh_examples_where_labels_are_right(arm, column):
    (told,) = re.findall(r"With right labels both are behind too: .*? Where labels", rivals_that_weigh_examples())
    found = [
        weighting_figure(f"{data}, MLP 784-256-10, clean labels", arm, column) for data in ("MNIST", "Fashion-MNIST")
    ]
    assert " and ".join(found) in told


@pytest.mark.parametrize("arm", [*WEIGHING, "AdaLFL, untuned"])
def test_the_page_says_what_rivals_that_weigh_examples_reach_with_lenet5(arm):
    found = [weighting_figure(f"{data}, LeNet-5, 40 % wrong labels", arm, ERROR) for data in ("MNIST", "Fashion-MNIST")]
    assert f"{' and '.join(found)} %" in rivals_that_weigh_examples()


@pytest.mark.parametrize(
    "problem",
    [
        "MNIST, MLP 784-256-10, 40 % of labels moved to the next class",
        "Fashion-MNIST, MLP 784-256-10, 80 % wrong labels",
    ],
)
def test_the_page_says_where_a_rival_that_weighs_examples_is_ahead(problem):
    rival, own = (weighting_figure(problem, arm, ERROR) for arm in (WEIGHING[-1], "AdaLFL, untuned"))
    p_value = weighting_figure(problem, WEIGHING[-1], "p")
    assert float(rival) < float(own)
    assert f"({rival} and {own} %, p = {p_value})" in rivals_that_weigh_examples()
    another = weighting_figure(problem, WEIGHING[1], ERROR)
    is_ahead = float(another) < float(own)
    assert is_ahead is (f"where Meta-Weight-Net is too ({another} %)" in rivals_that_weigh_examples())


def test_the_page_has_the_errors_of_rivals_that_weigh_examples_over_noises():
    (table,) = re.findall(
        r"^\*\*Learned weights of examples, over all [^\n]*\n\n(.*?)\n\n", MORE_RESULTS, re.DOTALL | re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    own, reweighting, meta_weight_net = (row[3].partition(" ")[0] for row in rows[:3])
    assert [row[:2] for row in rows[:3]] == [["MNIST, MLP 784-256-10", "5"]] * 3
    said = f"ends at {own} %, Learning to Reweight at {reweighting} % and Meta-Weight-Net, which is worse at a constant"
    assert [row[:2] for row in rows[3:]] == [["Fashion-MNIST, MLP 784-256-10", "5"]] * 3
    others = [row[3].partition(" ")[0] for row in rows[3:]]
    on_fashion = f"on Fashion-MNIST at {others[0]}, {others[1]} and {others[2]} % (p = {rows[5][5]} and less)"
    assert f"{said} rate, at {meta_weight_net} %; {on_fashion}" in rivals_that_weigh_examples()
    (constant,) = re.findall(r"MNIST, MLP 784-256-10 +\| 5 +\| Meta-Weight-Net +\| ([\d.]+)", RESULTS)
    assert float(constant) > float(meta_weight_net)


@pytest.mark.parametrize("problem", ["MNIST, LeNet-5", "Fashion-MNIST, LeNet-5"])
def test_the_page_says_what_the_clean_set_is_worth_to_lenet5(problem):
    ours, alone = "AdaLFL, untuned, joint at the end", "AdaLFL, untuned"
    (section,) = re.findall(r"^LeNet-5 was run with 40 and 80 %.*?\n\n", RESULTS, re.DOTALL | re.MULTILINE)
    of_80, of_40 = " ".join(section.split()).split("With 40 %")

    def errors(noise):
        table = f"{problem}, the clean set at the end"
        arms = (ours, alone, *RIVALS_WITH_A_CLEAN_SET)
        found = {arm: figure("clean_set", table, arm, noise, page=MORE_RESULTS) for arm in arms}
        return found, min((found[rival] for rival in RIVALS_WITH_A_CLEAN_SET), key=float)

    found, best = errors("80 % wrong labels")
    assert all(float(found[rival]) < float(found[ours]) for rival in RIVALS_WITH_A_CLEAN_SET)  # all four are ahead
    assert f"{found[ours]} instead of {found[alone]} %" in of_80
    assert f" {best} " in of_80
    found, best = errors("40 % wrong labels")
    both = (
        f"{found[ours]} and {found[alone]} %" if found[ours] != found[alone] else f"{found[ours]} % on MNIST both ways"
    )
    assert both in of_40
    assert f"{best} %" in of_40


@pytest.mark.parametrize("problem", CLEAN_SET)
@pytest.mark.parametrize("title", ["over all wrong labels", "over wrong labels and right ones"])
def test_the_pages_have_the_errors_over_noises_with_the_clean_set_at_the_end(title, problem):
    (table,) = re.findall(
        rf"^\*\*The clean set at the end, {title}: [^\n]*\n\n(.*?)\n\n", RESULTS, re.DOTALL | re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    rows = [row for row in rows if row[0] == problem]
    means = {row[2]: row[3].partition(" ")[0] for row in rows}
    assert rows[0][2] == "symmetric cross-entropy, decayed, joint at the end"
    errors = f"({means[rows[0][2]]} and {means['AdaLFL, untuned, joint at the end']} %, p = {rows[0][5]})"
    (section,) = re.findall(r"^## The clean set at the end\n(.*?)^<!--", RESULTS, re.DOTALL | re.MULTILINE)
    assert errors in " ".join(section.split())
    if "all" in title and problem == CLEAN_SET[0]:  # and those without it, as in Wrong labels
        rival, own = means["symmetric cross-entropy, fine-tuned"], means["AdaLFL, untuned"]
        assert f"with {rival} % where AdaLFL had {own} %" in " ".join(RESULTS.split())
    if "all" not in title and problem == CLEAN_SET[0]:
        rival, own = means["symmetric cross-entropy, fine-tuned"], means["AdaLFL, untuned"]
        assert f"they had {rival} and {own} %" in " ".join(RESULTS.split())


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            "mnist",
            "three arms of 18 on MNIST .* moved by more than {} points, .*; at another one by {} to {}, on Fashion",
        ),
        ("fashion_mnist", "seven of 18 on Fashion-MNIST.*, on Fashion-MNIST {}; at .*, on Fashion-MNIST {} to {}\\."),
    ],
)
def test_the_pages_say_how_far_tuning_anew_may_lead(problem, said):
    """Of the rivals that two studies trained at the same noises."""
    first, anew = (
        json.loads((ROOT / "docs" / "results" / f"{study}.json").read_text()) for study in ("noisy_labels", "clean_set")
    )
    moved = {True: [], False: []}  # points of the error rate, where tuning took the same rate and where another
    for comparison in (name for name in anew if name.startswith(f"{problem}_mlp")):
        for arm in ("fine_tuned", "symmetric_decayed", "symmetric_fine_tuned"):
            one, other = (numbers[comparison]["arms"][arm] for numbers in (anew, first))
            points = 100 * abs(round(one["test"]["mean"], 4) - round(other["test"]["mean"], 4))
            moved[one["chosen"] == other["chosen"]].append(points)
    assert (len(moved[False]), sum(map(len, moved.values()))) == ({"mnist": 3, "fashion_mnist": 7}[problem], 18)
    furthest = (f"{points:.2f}" for points in (max(moved[True]), min(moved[False]), max(moved[False])))
    (section,) = re.findall(r"^## The clean set at the end\n(.*?)^<!--", RESULTS, re.DOTALL | re.MULTILINE)
    assert re.search(said.format(*furthest), " ".join(section.split()))
    if problem == "mnist":
        assert "other learning rates for three arms of 18" in " ".join(RESULTS.split())


@pytest.mark.parametrize("arm", ["AdaLFL, untuned", "cross-entropy, fine-tuned"])
def test_the_guide_says_what_a_hundred_clean_labels_are_worth(arm):
    text = (ROOT / "docs" / "noisy_labels.md").read_text()
    of_a_hundred = ("noisy_labels", r"MNIST, MLP 784-256-10, 40 % wrong labels, 100 clean ones")
    for table, page in ((WRONG_LABELS, RESULTS), (of_a_hundred, MORE_RESULTS)):
        assert figure(*table, arm, ERROR, page=page) in text


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5", "ResNet-18"])
def test_the_readme_has_the_times_of_a_step_beside_pytorch(model):
    (table,) = re.findall(r"^\| model \| plain steps \|.*?(?=\n\n)", README, re.DOTALL | re.MULTILINE)
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {model}"))
    peers = [figure("peers", model, f"PyTorch, {name}", OURS) for name in ("higher", "TorchOpt", "autograd.grad")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        figure("peers", model, "JAX, forward", OWN),
        *peers,
    ]


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5"])
def test_the_readme_has_the_times_of_a_step_on_a_gpu(model):
    (sentence,) = re.findall(r"On\s+an\s+\[H100\].*?\.\n\n", README, re.DOTALL)
    for program, column in (("JAX, forward", OWN), ("PyTorch, higher", OURS)):
        assert figure("peers", model, program, column, page=ON_A_GPU) in sentence


@pytest.mark.parametrize("model", ["Logistic", "MLP", "LeNet-5"])
def test_the_page_of_a_gpu_sums_its_tables_up(model):
    text = ON_A_GPU.partition("<!--")[0]
    assert f" {figure('peers', model, 'JAX, forward', OWN, page=ON_A_GPU)} for " in text
    for program in ("task loss", "higher"):
        ratios = [figure("peers", each, f"PyTorch, {program}", OURS, page=ON_A_GPU) for each in ("Logistic", "LeNet-5")]
        assert f"{ratios[1]} to {ratios[0]} times" in text


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


def test_the_documents_say_what_sizes_cost():
    costs = [float(figure("scaling", by, row, STEPS)) for by, row in SIZES]
    narrow, wider, small, many_outputs = costs
    assert 3 < wider < narrow < 4
    assert f"one of 64 units on 64 inputs {small:.0f}, and an MLP with 1,000 outputs" in " ".join(README.split())
    assert f"instead of ten {many_outputs:.1f}:" in " ".join(README.split())
    assert f"{many_outputs:.1f} for an MLP of a thousand outputs" in (ROOT / "docs" / "meta_gradients.md").read_text()
    few, whole = (float(figure("scaling", ".*by batch size", size, "bilevel step, ms")) for size in ("16", "128"))
    assert 1 / 8 < few / whole == pytest.approx(1 / 5, abs=0.01)


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
