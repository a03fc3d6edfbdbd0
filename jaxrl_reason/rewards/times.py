r"""Times of day in answers: "4:30 \text{ p.m.}" is 16:30 and not 4:30 a.m.; without this, 4:30 would be a quotient."""

import re
from typing import NamedTuple

from jaxrl_reason.rewards.answers import plain, TEXT_GROUP

_HALVES = {"a": "am", "p": "pm", "n": "pm", "m": "am"}  # by the first letter: noon and midnight too
_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-5][0-9]))?(?: ?(?P<half>[ap]\.? ?m\b\.?|noon|midnight))?(?: ?o'?clock)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"[a-zA-Z] ?= ?")


class Time(NamedTuple):
    """A time of day as an answer writes it."""

    hour: int
    minute: str  # "" if there are none
    half: str  # "am" or "pm"; "" if the text does not say it

    @property
    def is_certain(self) -> bool:
        """Whether the text can be no number and no ratio, as 7 and 10:30 can."""
        return self.half != "" or self.minute.startswith("0")

    def clock(self) -> tuple[int, int, str]:
        """Returns hour and minute of a clock with twelve hours, and the half of the day if it is known."""
        return self.hour % 12, int(self.minute or 0), self.half or ("pm" if self.hour > 12 else "")


def is_time(answer: str) -> bool:
    """Returns whether an answer is certainly a time of day: it has a.m. or p.m., or minutes that begin with 0."""
    time = read_time(answer)
    return time is not None and time.is_certain


def same_time(reference: str, answer: str) -> bool | None:
    """Returns whether an answer is the time of day of its reference; None if they are not both times, or neither certainly.

    An answer may leave out a.m. or p.m., and then the minutes 00: the question may say the half of the day. A reference that
    is a number is no time.
    """
    right, found = read_time(reference), read_time(answer)
    if right is None or found is None or not (right.minute or right.half):
        return None
    if not (found.minute or found.half):
        return found.hour == right.hour and right.minute in ("", "00") if right.half else None
    if not (right.is_certain or found.is_certain):
        return None
    (*at, half), (*other_at, other) = right.clock(), found.clock()
    return at == other_at and (half == other or "" in (half, other))


def read_time(answer: str) -> Time | None:
    r"""Returns the time of day that an answer may be: "16:30", "t = 4:30 \text{ PM}", "7 pm", "noon", or "7"."""
    text = TEXT_GROUP.sub(r" \1 ", plain(answer).replace("{:}", ":").replace(r"\!", ""))
    text = re.sub(r" ?: ?", ":", re.sub(r"(?:\\[,;: ]|~|\s)+", " ", text).strip())
    text = _NAME.sub("", text, count=1) if _NAME.match(text) else text
    found = _TIME.fullmatch(f"12 {text}" if text.casefold() in ("noon", "midnight") else text)
    if found is None or int(found["hour"]) > 23:
        return None
    hour, half = int(found["hour"]), _HALVES.get((found["half"] or "-")[0].lower(), "")
    return None if half and not 1 <= hour <= 12 else Time(hour, found["minute"] or "", half)
