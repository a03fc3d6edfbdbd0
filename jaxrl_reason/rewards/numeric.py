r"""Exact numeric verdicts on text that a model wrote, without evaluating it.

`extract_answer` finds the final answer of a completion, a small grammar reads it into an exact `Fraction`, and
fractions are compared for equality. Nothing is computed from the text: "2+3" is not a number, and "9**9**9**9" costs as
much as "hello". Every function takes time linear in the text and keeps no state, so any thread can call it.

Numbers:
    18  -3  +3  1,234  1\,234  0.50  .5  3/4  1e3  $18  -$18  \$18  18.  \frac{1}{2}  -\dfrac{1}{2}  \frac12  50%  50\text{ percent}
    5\text{ cm}  5\,\mathrm{km/h}  90^\circ  $\displaystyle 18$.  \(18\)  \text{18}
    5 cm  5 km/h  5 dollars  18€  €18  50 percent  {18}  "18"  $\$18$
Not numbers, and neither are digits that are not ASCII:
    1,2,3  1,23  --5  3/0  1e101  1 1/2  2+3  nan  inf  5 apples  5 m  x = 5  5\text{00}  5\text{ million}  5\mathrm{i}

A unit is not compared: the question states it. In plain letters, units are the measures and currencies that
`answers.without_bare_unit` knows. Single letters can be variables, and other words can change the value.

`parse_number` divides by 100 if a percent sign follows. `numeric_verdict` accepts "50%" for the references "50%", "0.5"
and "50", because the reference to "what percentage ...?" is usually written without the sign. It accepts "50" and "0.5"
for the reference "50%", too.
"""

from fractions import Fraction
import math
import numbers
import re

from jaxrl_reason.rewards.answers import (
    BARE_PER_CENT,
    CURRENCIES,
    extract_answer,
    plain,
    split_unit,
    TEXT_GROUP,
    without_announcement,
    without_bare_unit,
    without_blanks,
)

MAX_NUMBER_LENGTH = 200  # characters; a longer text is not a number, so a megabyte of digits never becomes an integer
MAX_EXPONENT = 100  # 1e100 is a number, 1e101 is not: exact arithmetic on 10**999999999 would not return

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"  # [0-9], not \d: \d is every script's digits
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:"
    rf"(?P<decimal>(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?)"
    rf"|(?P<above>{_INTEGER}) ?/ ?(?P<below>{_INTEGER})"
    rf"|\\[dtc]?frac ?(?:\{{ ?(?P<above_tex>[-+]?{_INTEGER}) ?\}}|(?P<above_digit>[0-9]))"
    rf" ?(?:\{{ ?(?P<below_tex>[-+]?{_INTEGER}) ?\}}|(?P<below_digit>[0-9])))"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))")  # separators as TeX spaces them
_FORMULA_WITH_UNIT = re.compile(r"^\$([^$]*[0-9][^$]*)\$(?=[\s~\\])")  # $18$ cm
_MONEY = re.compile(rf"^([-+]?)(?:\$|[{CURRENCIES}] ?)(?=[-+.0-9\\])")
# A letter that names a choice: C, (C), C., C), \textbf{(C)}, Option C. The text of the choice may follow: (C) 18, C. 18.
_CHOICE = re.compile(r"(?:(?i:option|choice|answer)[\s~:]+)?\(?([A-Ja-j])[.:]?\)?[.:]?")
_CHOICE_WITH_TEXT = re.compile(
    r"(\(?[A-Ja-j]\)|[A-Ja-j][.:](?=[\s~\\]))(?:\\ |\\[,;:]|\\q?quad(?![a-zA-Z])|[\s~])*(?=[^\s(])(.+)"
)
_SECOND_CHOICE = re.compile(r"\b(?i:or|and)\b|[,;&]|(?<![a-zA-Z\\])[A-Ja-j](?![a-zA-Z])")


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a text that is one number and nothing else, or None. "50%" is 1/2.

    The module's docstring shows the grammar. A text of more than `MAX_NUMBER_LENGTH` characters is not a number.
    """
    value, percent = _read(text) or (None, False)
    return value / 100 if value is not None and percent else value


def numeric_verdict(completion: str, answer: str | int | float, *, fallback: str | None = None) -> bool:
    r"""Returns whether the completion's final answer is exactly the reference: a number, or the letter of a choice.

    The reference `answer` is a number, a text that is a number or a letter from A to J, or a worked solution that ends
    in "#### x" or "\boxed{x}", as GSM8K's `answer` column does. A float means the decimal that it prints as: 0.1 is
    1/10. `extract_answer` finds the final answer, with the given fallback. Returns False also if there is no answer or
    the answer is not a number. "0.50" and "1/2" are equal, and so are "C", "(C)" and "C.". Raises ValueError if the
    reference is neither a number nor a letter: the fault is in the data, not in the completion.
    """
    expected = _read_reference(answer)
    extracted = extract_answer(completion, fallback=fallback)
    if isinstance(expected, str):
        return extracted is not None and choice(extracted, with_text=True) == expected
    reference, reference_percent = expected
    reading = None if extracted is None else _read(extracted)
    if reading is None:
        return False
    value, percent = reading
    if percent == reference_percent:
        return value == reference
    with_sign, without_sign = (value, reference) if percent else (reference, value)
    return without_sign in (with_sign, with_sign / 100)


def _read(text: str) -> tuple[Fraction, bool] | None:
    """Returns (the number as written, whether a percent sign follows), or None."""
    text = text.strip()
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    text = plain(text).replace("\N{MINUS SIGN}", "-").replace(r"\$", "$").replace(r"\%", "%")
    text = _FORMULA_WITH_UNIT.sub(r"\1", _THOUSANDS.sub(",", text))
    if text.startswith("$"):  # "$18" is money
        text = text[1:].removesuffix("$")
    else:
        text = _MONEY.sub(r"\1", text)
    text, percent = split_unit(text)
    if not percent:
        shorter = BARE_PER_CENT.sub("", text)
        shorter = shorter.removesuffix("%") if shorter == text else shorter
        text, percent = (without_bare_unit(text), False) if shorter == text else (shorter, True)
    match = _NUMBER.fullmatch(without_blanks(text))
    if match is None:
        return None
    part = {name: group and group.replace(",", "") for name, group in match.groupdict().items()}
    if part["decimal"] is not None:
        if abs(int(part["exponent"] or 0)) > MAX_EXPONENT:
            return None
        value = Fraction(part["decimal"])
    else:
        above, below = (int(part[n] or part[f"{n}_tex"] or part[f"{n}_digit"]) for n in ("above", "below"))
        if below == 0:
            return None
        value = Fraction(above, below)
    return (-value if part["sign"] == "-" else value), percent


def choice(text: str, *, with_text: bool = False, certain: bool = False) -> str | None:
    """Returns the capital letter of a text that names a choice, or None.

    With `with_text`, the text of the choice may follow: "(C) 18" is C, and "(C) or (D)" is None. If `certain`, small
    letters from e on need parentheses or a label, because e and i are numbers: "(e)" and "Option e" are E.
    """
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    text = TEXT_GROUP.sub(r"\1", plain(text))
    labelled = _CHOICE_WITH_TEXT.fullmatch(text) if with_text else None
    if labelled and not _SECOND_CHOICE.search(labelled[2]):
        text = labelled[1]
    match = _CHOICE.fullmatch(text)
    if match is None or certain and text in "efghij":
        return None
    return match[1].upper()


def _read_reference(answer: str | int | float) -> tuple[Fraction, bool] | str:
    """Returns a number and whether a percent sign follows, or the capital letter of a choice."""
    if isinstance(answer, numbers.Rational):  # exact: 10**400 would overflow a float
        return Fraction(int(answer.numerator), int(answer.denominator)), False
    if isinstance(answer, numbers.Real) and math.isfinite(answer):
        return Fraction(str(answer)), False  # by the decimal that it prints as: Fraction(0.1) is not 1/10
    reading: tuple[Fraction, bool] | str | None = None
    if isinstance(answer, str):
        extracted = extract_answer(answer)
        text = without_announcement(answer) if extracted is None else extracted
        reading = choice(text, certain=True) or _read(text)
    if reading is None:
        raise ValueError(
            f"The reference answer {shortened(answer)} is not a number, so no completion can be judged against it; "
            "correct that row's answer, or use another reward for answers that are not numbers."
        )
    return reading


def shortened(answer: object) -> str:
    """Returns the repr of an answer for a message, cut to 80 characters."""
    shown = repr(answer)
    return shown if len(shown) <= 80 else shown[:77] + "..."
