import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import page
from experiments.tables import Table, render_table, show_p_value

PAGE = f"Before\n\n<!-- tables: thrift -->\n{page.END}\n\nBetween\n\n<!-- tables: clean -->\nold\n\n{page.END}\n"


def test_parts_are_made_anew_in_their_order_and_the_others_stay_behind_them():
    first = page.replace_parts(PAGE, "thrift", {"logistic": "one | \\1", "mlp": "two"})
    second = page.replace_parts(first, "thrift", {"mlp": "anew", "lenet5": "three"})
    assert second == PAGE.replace(
        "<!-- tables: thrift -->\n",
        "<!-- tables: thrift -->\n<!-- part: mlp -->\nanew\n\n<!-- part: lenet5 -->\nthree\n\n"
        "<!-- part: logistic -->\none | \\1\n\n",
    )
    assert page.replace_parts(second, "thrift", {}) == second


def test_a_cell_is_one_line_and_ends_no_cell():
    table = Table("Errors", {"run": lambda row: row["run"], "state": lambda row: row["state"]}, [])
    (*_, last) = render_table(table._replace(rows=[{"run": "a|b", "state": "failed:\n no  room"}])).splitlines()
    assert last == r"| a\|b | failed: no room |"


@pytest.mark.parametrize(
    ("p_value", "shown"),
    [
        (0.0449, "0.04"),
        (0.0482, "0.0482"),
        (0.0499, "0.0499"),
        (0.04996, "0.04996"),
        (0.05, "0.05"),
        (0.05004, "0.05"),
        (0.0503, "0.0503"),
        (0.0571, "0.06"),
    ],
)
def test_a_p_value_near_the_threshold_has_the_digits_that_tell_its_side(p_value, shown):
    assert show_p_value({"adjusted_p_value": p_value}) == shown
    assert show_p_value(None) == show_p_value({}) == ""


def test_what_is_no_part_is_not_lost():
    with pytest.raises(ValueError, match=r"section 'clean' begins with something that is no part .* 'old'"):
        page.replace_parts(PAGE, "clean", {"mlp": "new"})


def test_a_page_that_cannot_be_written_is_left_whole(tmp_path, monkeypatch):
    target = tmp_path / "results.md"
    target.write_text(PAGE, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no room"):
            page.renew(target, page.replace_section, "clean", "φ")
    assert target.read_text(encoding="utf-8") == PAGE
    page.renew(target, page.replace_section, "clean", "φ")
    assert target.read_text(encoding="utf-8") == page.replace_section(PAGE, "clean", "φ")


def fail(file):
    raise OSError("no room")


def test_of_several_that_publish_at_once_none_loses_what_another_wrote(tmp_path):
    path = tmp_path / "results" / "clean.json"
    names = [str(number) for number in range(60)]

    def add(name):
        with page.publishing(path):  # locks keep threads off as they do processes
            known = json.loads(path.read_text()) if path.exists() else {}
            page.write_numbers(path, known | {name: 1.0})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, names))
    assert sorted(json.loads(path.read_text())) == sorted(names)


def test_a_page_that_may_not_be_written_to_is_told_before_anything_is_done(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    path.write_text("<!-- tables: mine -->\n<!-- end of tables -->\n")
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver((page.WRITE, str(path))):
        page.require_section("mine")
        for closed in (path, tmp_path):  # the page is replaced in one move, so its folder counts too
            monkeypatch.setattr(os, "access", lambda asked, mode, closed=closed: asked != closed)
            with pytest.raises(PermissionError, match=r"page\.md and its folder may not be written to; change their"):
                page.require_section("mine")


def test_numbers_are_written_to_six_digits(tmp_path):
    path = tmp_path / "results" / "clean.json"
    numbers = {"mean": 1 / 3, "curves": [[1e-5 / 7], (2,)], "arm": "AdaLFL", "p": None, "seeds": True}
    shown = page.write_numbers(path, numbers)
    assert shown == json.loads(path.read_text())
    assert shown == {"mean": 0.333333, "curves": [[1.42857e-06], [2]], "arm": "AdaLFL", "p": None, "seeds": True}
