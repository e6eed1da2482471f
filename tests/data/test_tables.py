"""Tables that are downloaded: once, whole, verified, and without a look at what is held out."""

import shlex
import types
import urllib.error

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets

from adalfl_jax import data
from adalfl_jax.data import DatasetError
from adalfl_jax.data.tables import CRIME_NOT_PREDICTIVE, CRIME_TARGET
from tests.training.tiny import snapshot

NUM_CALIFORNIA, NUM_CRIME = 20640, 1994
TABLES = ("california", "crime")


class Downloads:
    """Stands for scikit-learn's two fetchers, and counts their calls."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.calls = []
        self.california = rng.normal(size=(NUM_CALIFORNIA, 8)), rng.normal(size=NUM_CALIFORNIA)
        # As OpenML has it: 5 columns that are not predictive (one of them text, and two with most values missing), 100
        # with at most a few missing, and the 22 of a survey that 84 % of the communities did not answer.
        values = rng.uniform(size=(NUM_CRIME, 100))
        values[rng.choice(NUM_CRIME, 3, replace=False), 7] = np.nan
        survey = rng.uniform(size=(NUM_CRIME, 22))
        survey[rng.uniform(size=survey.shape) < 0.84] = np.nan
        frame = pd.DataFrame(
            np.concatenate([values[:, :50], survey, values[:, 50:]], axis=1), columns=[f"x{i}" for i in range(122)]
        )
        for place, name in enumerate(CRIME_NOT_PREDICTIVE):
            frame.insert(place, name, "Lakewoodcity" if name == "communityname" else rng.uniform(size=NUM_CRIME))
        self.crime, self.crime_targets = frame, pd.Series(rng.uniform(size=NUM_CRIME), name=CRIME_TARGET)

    def fetch_california_housing(self, *, data_home):
        self._leave_behind(data_home)
        inputs, targets = self.california
        return types.SimpleNamespace(data=inputs.copy(), target=targets.copy())

    def fetch_openml(self, *, data_id, target_column, as_frame, parser, data_home):
        assert (data_id, target_column, as_frame, parser) == (315, "ViolentCrimesPerPop", True, "pandas")
        self._leave_behind(data_home)
        return types.SimpleNamespace(data=self.crime.copy(), target=self.crime_targets.copy())

    def _leave_behind(self, data_home):
        self.calls.append(data_home)
        with open(f"{data_home}/pickled.pkz", "wb") as file:  # as scikit-learn does
            file.write(b"a pickle")


@pytest.fixture
def downloads(monkeypatch):
    fakes = Downloads()
    for name in ("fetch_california_housing", "fetch_openml"):
        monkeypatch.setattr(sklearn.datasets, name, getattr(fakes, name))
    return fakes


def go_offline(monkeypatch):
    def fail(**settings):
        raise urllib.error.URLError("Name or service not known")

    for name in ("fetch_california_housing", "fetch_openml"):
        monkeypatch.setattr(sklearn.datasets, name, fail)


def arrays_of(dataset):
    return [np.asarray(array) for split in (dataset.train, dataset.valid, dataset.test) for array in split]


def assert_all_equal(left, right):
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def table_file(tmp_path, name):
    return tmp_path / name / "adalfl_jax.safetensors"


@pytest.mark.parametrize(
    ("name", "columns", "sizes"), [("california", 8, (14860, 1652, 4128)), ("crime", 100, (1435, 160, 399))]
)
def test_tables_have_their_shapes_and_are_regressions(name, columns, sizes, tmp_path, downloads):
    dataset = data.load(name, data_dir=tmp_path)
    arrays = arrays_of(dataset)
    assert tuple(len(array) for array in arrays) == tuple(size for size in sizes for _ in range(2))
    assert {array.shape[1:] for array in arrays[::2]} == {(columns,)}
    assert {array.shape[1:] for array in arrays[1::2]} == {(1,)}
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)
    assert (dataset.is_classification, dataset.num_outputs) == (False, 1)
    spec = data.load_spec(name)
    assert (spec.input_shape, spec.num_outputs, spec.num_train) == ((columns,), 1, sum(sizes))


@pytest.mark.parametrize("name", TABLES)
def test_every_column_of_the_training_split_is_standardised(name, tmp_path, downloads):
    for array in arrays_of(data.load(name, data_dir=tmp_path))[:2]:
        np.testing.assert_allclose(array.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(array.std(axis=0), 1, atol=5e-3)  # 0 stands for the missing ones, few as they are


def rows_of(dataset, downloads):
    """Which row of the raw table every row of each split is: column x0 has the same order in both."""
    arrays = arrays_of(dataset)[::2]
    order = np.argsort(np.concatenate(arrays)[:, 0])
    rows = np.empty(NUM_CRIME, int)
    rows[order] = np.argsort(downloads.crime["x0"].to_numpy())
    return np.split(rows, np.cumsum([len(array) for array in arrays])[:2])


def test_missing_values_become_the_mean_of_the_training_split(tmp_path, downloads):
    downloads.crime.loc[::3, "x20"] = np.nan  # a third; a column is kept unless more than half are missing
    dataset = data.load("crime", data_dir=tmp_path)
    rows = rows_of(dataset, downloads)
    kept = [f"x{i}" for i in range(122) if not 50 <= i < 72]  # not those of the survey, nor those not predictive
    raw = downloads.crime[kept].to_numpy(np.float64)
    mean, deviation = np.nanmean(raw[rows[0]], axis=0), np.nanstd(raw[rows[0]], axis=0)
    for inputs, numbers in zip(arrays_of(dataset)[::2], rows, strict=True):
        expected = np.nan_to_num((raw[numbers] - mean) / deviation)
        np.testing.assert_allclose(inputs, expected, atol=1e-5)
        assert (inputs[:, 20] == 0).tolist() == (numbers % 3 == 0).tolist()


def test_no_value_of_the_test_split_has_a_part_in_the_training_split(tmp_path, downloads):
    before = data.load("crime", data_dir=tmp_path / "before")
    row = rows_of(before, downloads)[2][5]
    downloads.crime.loc[row, ["x3", "x7", "x20"]] = [1e3, -1e3, np.nan]
    downloads.crime_targets[row] = 1e4
    after = data.load("crime", data_dir=tmp_path / "after")
    assert_all_equal(arrays_of(before)[:4], arrays_of(after)[:4])  # of the training and the validation split
    changed = np.asarray(after.test.inputs) != np.asarray(before.test.inputs)
    assert np.argwhere(changed).tolist() == [[5, 3], [5, 7], [5, 20]]
    assert np.asarray(after.test.inputs)[5, 3] > 100
    assert np.asarray(after.test.inputs)[5, 20] == 0
    assert np.asarray(after.test.targets)[5, 0] > 1000


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_downloaded_once_and_leaves_one_file(name, tmp_path, downloads):
    first = arrays_of(data.load(name, data_dir=tmp_path))
    file = table_file(tmp_path, name)
    before = snapshot(tmp_path)
    assert list(before) == [str(file.relative_to(tmp_path))]
    assert_all_equal(arrays_of(data.load(name, data_dir=tmp_path)), first)
    assert snapshot(tmp_path) == before
    assert len(downloads.calls) == 1
    assert not any(str(tmp_path) in str(folder) for folder in downloads.calls)  # what scikit-learn pickles is gone


def test_a_table_kept_in_cache_dir_is_found_there(tmp_path, downloads):
    settings = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    for _ in range(2):
        data.load("california", **settings)
    assert list(snapshot(tmp_path)) == ["cache/california.safetensors"]
    assert len(downloads.calls) == 1


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_fetched_anew(name, tmp_path, downloads):
    first = arrays_of(data.load(name, data_dir=tmp_path))
    file = table_file(tmp_path, name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{file} is damaged and is built anew"):
        assert_all_equal(arrays_of(data.load(name, data_dir=tmp_path)), first)
    assert len(downloads.calls) == 2


@pytest.mark.parametrize("name", TABLES)
def test_without_a_network_the_file_the_reason_and_the_remedy_are_named(name, tmp_path, monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(DatasetError) as caught:
        data.load(name, data_dir=tmp_path / "my data")
    text, folder = str(caught.value), tmp_path / "my data"
    assert f"dataset {name!r} is not in {table_file(folder, name)} and its download failed" in text
    assert "URLError" in text
    assert "Name or service not known" in text
    assert f" -m adalfl_jax.data.prepare {name} --data_dir={shlex.quote(str(folder))}" in text
    assert snapshot(tmp_path) == {}


def test_a_table_is_read_without_a_network_once_it_is_there(tmp_path, downloads, monkeypatch):
    first = arrays_of(data.load("california", data_dir=tmp_path))
    go_offline(monkeypatch)
    assert_all_equal(arrays_of(data.load("california", data_dir=tmp_path)), first)


def test_a_table_of_another_shape_is_refused_and_not_kept(tmp_path, downloads):
    downloads.california = tuple(array[:-1] for array in downloads.california)
    downloads.crime = downloads.crime.iloc[:-1]
    with pytest.raises(DatasetError, match=r"'california' was downloaded as \(20639, 8\), not as \(20640, 8\)"):
        data.load("california", data_dir=tmp_path)
    with pytest.raises(DatasetError, match=r"'crime' was downloaded as \(1993, 100\), not as \(1994, 100\)"):
        data.load("crime", data_dir=tmp_path)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("change", ["a column is renamed", "a column is text"])
def test_a_table_unlike_the_one_described_is_refused(change, tmp_path, downloads):
    if change == "a column is renamed":
        downloads.crime = downloads.crime.rename(columns={"fold": "part"})
    else:
        downloads.crime["x5"] = "?"
    with pytest.raises(DatasetError, match=r"dataset 'crime' is not in .* and its download failed \((Key|Value)Error"):
        data.load("crime", data_dir=tmp_path)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_values_are_no_missing_ones(value):
    inputs = np.random.default_rng(0).normal(size=(50, 3))
    inputs[4, 1], inputs[9, 1] = np.nan, value
    with pytest.raises(
        DatasetError, match=r"'mine': inputs are not finite, or not in float32, in 1 of 50 examples, .* at index 9"
    ):
        data.make_dataset("mine", data.Examples(inputs, inputs[:, 0], fill_missing=True))
