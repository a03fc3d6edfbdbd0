"""The built-in host rewards, by TRL's signature: f(prompts, completions, completion_ids, **columns) -> rewards.

A reward is called by keyword, so it names the arguments that it uses and takes the rest as `**_`.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
import functools
from typing import Any, TypeVar

from jaxrl_reason.rewards.answers import count_markers, extract_answer, find_marker
from jaxrl_reason.rewards.numeric import numeric_verdict, parse_number

F = TypeVar("F", bound=Callable)


def with_answer_of(answer_of: Callable[[str, Mapping[str, Any]], Any]) -> Callable[[F], F]:
    """Returns a decorator that sets `reward.answer_of`, by which evaluation tells answers apart.

    `answer_of` returns the answer, correct or not, or None. Completions with equal answers vote together.
    """

    def decorate(reward: F) -> F:
        vars(reward)["answer_of"] = answer_of
        return reward

    return decorate


def accuracy_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """Returns 1.0 if a completion's final answer is exactly the reference of the column `answer`, else 0.0.

    For the references see `numeric_verdict`. Raises ValueError if a reference is neither a number nor a choice.
    """
    return [float(numeric_verdict(text, reference)) for text, reference in zip(completions, answer, strict=True)]


def _last_number(completion: str, row: Mapping[str, Any]) -> Fraction | None:
    del row
    text = extract_answer(completion, fallback="last_number")
    return None if text is None else parse_number(text)


@with_answer_of(_last_number)
def last_number_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """Like `accuracy_reward`, but if a completion has no marker, its last number is the answer."""
    verdict = functools.partial(numeric_verdict, fallback="last_number")
    return [float(verdict(text, reference)) for text, reference in zip(completions, answer, strict=True)]


def format_reward(completions: Sequence[str], **_) -> list[float]:
    r"""Returns 1.0 if a completion states one final answer in the agreed form, correct or not, else 0.0.

    The agreed form is one marker in the whole text, with a number: either "#### x" as the last line, or "\boxed{x}".
    Headings are not markers.
    """
    return [float(_states_one_answer(completion)) for completion in completions]


def _states_one_answer(text: str) -> bool:
    marker = find_marker(text)
    if marker is None or marker.answer is None or parse_number(marker.answer) is None or count_markers(text) != 1:
        return False
    begin_of_last_line = text.rstrip().rfind("\n") + 1
    return marker.is_box or marker.begin == begin_of_last_line and text.startswith("#### ", begin_of_last_line)
