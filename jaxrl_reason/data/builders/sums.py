"""Sums of two digits as plain questions: a TFDS builder without network, for small pretrained models."""

from collections.abc import Iterator, Mapping
import hashlib
import itertools
from typing import Any

from jaxrl_reason.data.builders.offline import OfflineBuilder


def split_of(a: int, b: int) -> str:
    """Returns the split of a + b and of b + a: 29 of the sums are test, 71 train."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return "test" if digest[0] % 3 == 0 else "train"


class Sums(OfflineBuilder):
    """All sums of two numbers from 0 to 9: `question` "What is 7 + 5?", `solution` "7 + 5 = 12", `answer` "12"."""

    DESCRIPTION = "All sums of two digits; a + b and b + a are in the same split."
    SIZES = {"train": 71, "test": 29}
    COLUMNS = dict.fromkeys(("question", "solution", "answer"), str)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        for a, b in itertools.product(range(10), repeat=2):
            if split_of(a, b) == split:
                yield {"question": f"What is {a} + {b}?", "solution": f"{a} + {b} = {a + b}", "answer": str(a + b)}

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> str:
        return row["question"].removeprefix("What is ").removesuffix("?").replace(" ", "")  # "7+5"
