"""The documents, and the cells of their tables."""

import re

from tests.training.tiny import ROOT

README = (ROOT / "README.md").read_text()
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


OWN, OURS, STEPS, MEMORY = "in own task-loss steps", "in steps of “JAX, forward”", "in task-loss steps", "temporary MB"
WRONG_LABELS = ("noisy_labels", r"MNIST, MLP 784-256-10, 40 % wrong labels(?=\*\*)")
MOVED_LABELS = ("noisy_labels", r"MNIST, MLP 784-256-10, 40 % of labels moved to the next class(?=\*\*)")
WITHOUT = ("noisy_labels", r"MNIST, MLP 784-256-10, clean labels(?=\*\*)")
ERROR = "test error rate, %"
