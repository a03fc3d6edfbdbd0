r"""Times of day in answers: "4:30 \text{ p.m.}" is 16:30 and not 4:30 a.m.; without this, 4:30 would be a quotient."""

import re
from typing import NamedTuple

from jaxrl_reason.rewards.answers import plain, TEXT_GROUP

_HALVES = {"a": "am", "p": "pm", "noon": "pm", "midnight": "am"}
_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?::(?P<minute>[0-5][0-9]))?(?:\s*(?P<half>[ap]\.?\s?m\b\.?|noon|midnight))?", re.IGNORECASE
)


class Time(NamedTuple):
    """A time of day."""

    minute: int  # after 0:00 or 12:00
    half: str  # "am" or "pm"; "" if the text does not say it
    is_certain: bool  # False: the text may be a number or a ratio, such as 7 and 10:30


def same_time(a: str, b: str) -> bool | None:
    """Returns whether two answers are the same time of day; None if neither is certainly a time, or one is something else.

    Of one time with a.m. or p.m. and one without, only the clock is compared: the question may say the half of the day.
    """
    one, other = read_time(a), read_time(b)
    if one is None or other is None or not (one.is_certain or other.is_certain):
        return None
    return one.minute == other.minute and (one.half == other.half or "" in (one.half, other.half))


def is_time(answer: str) -> bool:
    """Returns whether an answer is certainly a time of day: it has a.m. or p.m., or minutes that begin with 0."""
    time = read_time(answer)
    return time is not None and time.is_certain


def read_time(answer: str) -> Time | None:
    r"""Returns the time of day that an answer may be: "16:30", "4:30 \text{ PM}", "7 pm", "12 noon", or "7"."""
    text = re.sub(r"(?:\\[,;: ]|~|\s)+", " ", TEXT_GROUP.sub(r" \1 ", plain(answer))).strip()
    found = _TIME.fullmatch(text)
    if found is None or not int(found["hour"]) < 24:
        return None
    hour, minute = int(found["hour"]), found["minute"]
    half = (found["half"] or "").lower()
    half = _HALVES.get(half) or _HALVES.get(half[:1], "")
    if half and not 1 <= hour <= 12:
        return None
    half = half or ("pm" if hour > 12 else "")
    return Time(hour % 12 * 60 + int(minute or 0), half, bool(found["half"]) or (minute or "").startswith("0"))
