"""The base of our TFDS builders: a subclass declares its columns and generates its rows."""

import abc
from collections.abc import Iterable, Iterator, Mapping
import itertools
import random
from typing import Any, ClassVar, TypeVar

import tensorflow_datasets as tfds

T = TypeVar("T")


def endless(rng: random.Random, choices: Mapping[str, Iterable[T]]) -> dict[str, Iterator[T]]:
    """Returns for every name its choices in random order, repeated without end."""
    orders = {name: list(items) for name, items in choices.items()}
    for order in orders.values():
        rng.shuffle(order)
    return {name: itertools.cycle(order) for name, order in orders.items()}


class OfflineBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder that generates its rows and downloads nothing."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    DESCRIPTION: ClassVar[str]  # one sentence about the data
    SIZES: Mapping[str, int]  # split -> size; the unit is the subclass's
    COLUMNS: Mapping[str, type]  # column -> str or a NumPy number type

    @abc.abstractmethod
    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of a split."""

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> str | int:
        """Returns the key of row `i`, by which TFDS shuffles the rows of a split."""
        return f"{split}-{i}"

    def _info(self) -> tfds.core.DatasetInfo:
        feature = lambda kind: tfds.features.Text() if kind is str else tfds.features.Scalar(kind)
        features = tfds.features.FeaturesDict({name: feature(kind) for name, kind in self.COLUMNS.items()})
        return tfds.core.DatasetInfo(builder=self, description=self.DESCRIPTION, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[str | int, dict[str, Any]]]:
        for i, row in enumerate(self.rows(split)):
            yield self.key(split, i, row), row
