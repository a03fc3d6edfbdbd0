"""Sums of two digits as plain questions, as a TFDS builder that needs no network: for small pretrained models."""

import hashlib
import itertools

import tensorflow_datasets as tfds


def split_of(a: int, b: int) -> str:
    """The one split of a pair and of its mirror image: 29 of the sums are test, 71 train."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return "test" if digest[0] % 3 == 0 else "train"


class Sums(tfds.core.GeneratorBasedBuilder):
    """The hundred sums of two numbers from 0 to 9.

    Features, all text: `question` ("What is 7 + 5?"); `solution` ("7 + 5 = 12"); `answer` ("12").
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="All sums of two digits; a + b and b + a are in the same split.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in ("question", "solution", "answer")}
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str):
        for a, b in itertools.product(range(10), repeat=2):
            if split_of(a, b) == split:
                row = {"question": f"What is {a} + {b}?", "solution": f"{a} + {b} = {a + b}", "answer": str(a + b)}
                yield f"{a}+{b}", row
