"""Regression tables that are downloaded once: California Housing, Communities and Crime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn.datasets

from adalfl_jax.data.cache import Arrays, cached
from adalfl_jax.data.errors import DatasetError
from adalfl_jax.data.examples import Examples, Location

CRIME_ID = 315  # of "us_crime" in OpenML
CRIME_TARGET = "ViolentCrimesPerPop"
CRIME_NOT_PREDICTIVE = ("state", "county", "community", "communityname", "fold")  # says the dataset's own description


def load_california(location: Location) -> Examples:
    """20,640 districts of California, 8 columns, and the median value of their houses (Pace & Barry, 1997).

    No value is missing. scikit-learn downloads it and checks the archive's SHA-256.
    """

    def download(data_home: str) -> Arrays:
        bunch: Any = sklearn.datasets.fetch_california_housing(data_home=data_home)
        return {"inputs": bunch.data, "targets": bunch.target}

    return Examples(*_fetch("california", location, download, shape=(20640, 8)))


def load_crime(location: Location) -> Examples:
    """1,994 communities of the USA, 100 columns, and violent crimes per head (UCI Communities and Crime, 2009).

    Of its 127 columns the 5 that are not predictive are dropped, and so are the 22 that lack more than half of their
    values, those of a survey few police departments answered. The few other missing values become their column's mean
    over the training split. scikit-learn downloads it from OpenML and checks its MD5.
    """

    def download(data_home: str) -> Arrays:
        bunch: Any = sklearn.datasets.fetch_openml(
            data_id=CRIME_ID, target_column=CRIME_TARGET, as_frame=True, parser="pandas", data_home=data_home
        )
        frame = bunch.data.drop(columns=list(CRIME_NOT_PREDICTIVE)).astype(np.float64)
        frame = frame.loc[:, frame.isna().mean() <= 0.5]
        return {"inputs": frame.to_numpy(), "targets": bunch.target.to_numpy(np.float64)}

    return Examples(*_fetch("crime", location, download, shape=(1994, 100)), fill_missing=True)


def _fetch(
    name: str, location: Location, download: Callable[[str], Arrays], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The table from its verified file, downloaded first where that is missing."""
    path = location.cache_file(location.data_dir / name)

    def build() -> Arrays:
        with tempfile.TemporaryDirectory() as data_home:  # what the fetchers would keep is pickled
            try:
                arrays = download(data_home)
            except Exception as error:  # of the network, of a checksum, of a table unlike the one described
                raise DatasetError(
                    f"dataset {name!r} is not in {path} and its download failed ({type(error).__name__}: {error}); "
                    f"with a network, {location.prepare_command(name)} fetches it, and the file can be copied from "
                    "there"
                ) from error
        if arrays["inputs"].shape != shape:
            raise DatasetError(f"dataset {name!r} was downloaded as {arrays['inputs'].shape}, not as {shape}")
        return arrays

    arrays = cached(path, f"{name} {shape}", build)
    return arrays["inputs"], arrays["targets"]
