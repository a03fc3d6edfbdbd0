"""Tasks of the package reasoning-gym: a TFDS builder that needs no network. Its scorers are not used: some run the answer as code."""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
from typing import Any

import tensorflow_datasets as tfds

from jaxrl_reason.data.builders.offline import OfflineBuilder

_DRAWN = 6000  # problems of a task before repeated ones are left out


@dataclasses.dataclass
class TaskConfig(tfds.core.BuilderConfig):
    """A task of reasoning-gym, and the options of its generator that are not the package's."""

    task: str = ""
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)


def split_of(question: str) -> str:
    """Returns the split of a question: a fifth of the questions is test."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 5 == 0 else "train"


class ReasoningGym(OfflineBuilder):
    """Sums and differences of two or three digits ("short_chain_sum"), or GSM8K's problems with other numbers ("gsm_symbolic").

    Each question occurs once, so none is in both splits; two problems of "gsm_symbolic" can differ in their numbers only.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.0.0": "Initial release.", "1.1.0": "Solutions of short_chain_sum show their steps."}
    DESCRIPTION = "Procedural problems of reasoning-gym with numbers as answers."
    SIZES = {"train": 80, "test": 20}  # percent, about
    COLUMNS = dict.fromkeys(("question", "solution", "answer"), str)
    BUILDER_CONFIGS = [
        TaskConfig(name="short_chain_sum", task="chain_sum", options={"max_terms": 3, "max_digits": 1}),
        TaskConfig(name="gsm_symbolic", task="gsm_symbolic"),
    ]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        c, seen = self.builder_config, set()
        for problem in _problems(c):
            question = problem["question"]
            if split_of(question) == split and question not in seen:
                seen.add(question)
                yield {"question": question, "solution": _solution(problem), "answer": problem["answer"]}


def _problems(config: TaskConfig) -> Iterator[Mapping[str, Any]]:
    """Yields problems; raises ImportError without the package that has their generator."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"The problems 'reasoning_gym/{config.name}' are prepared, once, by reasoning-gym: pip install reasoning-gym."
        ) from error
    problems = reasoning_gym.create_dataset(config.task, seed=0, size=_DRAWN, **config.options)
    yield from (problems[i] for i in range(_DRAWN))


def _solution(problem: Mapping[str, Any]) -> str:
    about, answer = problem["metadata"], problem["answer"]
    if "expression" in about:
        return "\n".join(_steps(about["expression"]))
    steps, _, _ = about["answer_cot"].rpartition("####")  # after it, some answers are spelled 8.0
    return f"{steps}#### {answer}"


def _steps(expression: str) -> Iterator[str]:
    """Yields one line per sum or difference of a chain, from the left: "4 - 8 - 2" gives "4 - 8 = -4" and "-4 - 2 = -6"."""
    first, *rest = expression.split()
    total = int(first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(sign + term)
        yield f"{total} {sign} {term} = {after}"
        total = after
