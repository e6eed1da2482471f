"""What the documents tell of wrong labels is what the tables have."""

import json
import re

import pytest

from tests.documents import ERROR, MORE_RESULTS, MOVED_LABELS, README, RESULTS, WITHOUT, WRONG_LABELS, figure
from tests.training.tiny import ROOT

MOST_WRONG = ("noisy_labels", r"MNIST, MLP 784-256-10, 80 % wrong labels(?=\*\*)")
COLUMNS = [WITHOUT, WRONG_LABELS, MOST_WRONG, MOVED_LABELS]  # of the README


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
