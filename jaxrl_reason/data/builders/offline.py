"""The base of our TFDS builders: a subclass declares its columns and generates its rows."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds


class OfflineBuilder(tfds.core.GeneratorBasedBuilder):
    """A builder that generates its rows and downloads nothing.

    Attributes:
      DESCRIPTION: one sentence about the data.
      SIZES: split -> size; the unit is the subclass's.
      COLUMNS: column -> str or a NumPy number type.
    """

    DESCRIPTION: ClassVar[str]
    SIZES: Mapping[str, int]
    COLUMNS: Mapping[str, type]

    @abc.abstractmethod
    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of a split."""

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> str | int:
        """Returns the key of row `i`, by which TFDS shuffles the rows of a split."""
        return f"{split}-{i}"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Text() if kind is str else tfds.features.Scalar(kind)
            for name, kind in self.COLUMNS.items()
        }
        return tfds.core.DatasetInfo(
            builder=self, description=self.DESCRIPTION, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self.SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[str | int, dict[str, Any]]]:
        for i, row in enumerate(self.rows(split)):
            yield self.key(split, i, row), row
