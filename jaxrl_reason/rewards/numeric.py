r"""Exact numeric verdicts on text that a model wrote, without evaluating it.

`extract_answer` finds the final answer of a completion, a small grammar reads it into an exact `Fraction`, and
fractions are compared for equality. Nothing is computed from the text: "2+3" is not a number, and "9**9**9**9" costs as
much as "hello". Every function takes time linear in the text and keeps no state, so any thread can call it.

Numbers:
    18  -3  +3  1,234  0.50  .5  3/4  1e3  $18  -$18  \$18  18.  \frac{1}{2}  -\dfrac{1}{2}  5\text{ cm}  50%
Not numbers, and neither are digits that are not ASCII:
    1,2,3  1,23  --5  3/0  1e101  1 1/2  2+3  nan  inf  5 apples  x = 5  5\text{00}  5\text{ million}  5\mathrm{i}

`parse_number` divides by 100 if a percent sign follows. `numeric_verdict` accepts "50%" for the references "50%", "0.5"
and "50", because the reference to "what percentage ...?" is usually written without the sign. It accepts "50" and "0.5"
for the reference "50%", too.
"""

import collections
from fractions import Fraction
import itertools
import math
import numbers
import re
import unicodedata

MAX_NUMBER_LENGTH = 200  # characters; a longer text is not a number, so a megabyte of digits never becomes an integer
MAX_EXPONENT = 100  # 1e100 is a number, 1e101 is not: exact arithmetic on 10**999999999 would not return

_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"  # [0-9], not \d: \d is every script's digits
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:"
    rf"(?P<decimal>(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?)"
    rf"|(?P<above>{_INTEGER}) ?/ ?(?P<below>{_INTEGER})"
    rf"|\\[dt]?frac\{{(?P<above_tex>[-+]?{_INTEGER})\}}\{{(?P<below_tex>[-+]?{_INTEGER})\}})"
)
_TRAILING_UNIT = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}$")
# Words that change the value or continue the text: "5\text{ million}", "5\text{ or six}" and 5i are not 5. A plural s
# changes nothing.
_NOT_UNITS = frozenset(
    "and or nor not but if to plus minus times over mod modulo choose point negative below base double half halve quarter third fourth "
    "fifth sixth seventh eighth ninth tenth hundredth thousandth millionth percent percentage permille pct factorial squared cubed score "
    "dozen zero one two three four five six seven eight nine ten eleven twelve hundred thousand million billion trillion lakh crore bn "
    "pi oder und ou et k K M B T e i j n x y z".split()
)
_NOT_UNIT_CHARACTERS = frozenset("π或和与及半成倍")
# A lump is a run of text that starts like a number. It includes every character that touches the number, so that a
# look-alike is rejected whole instead of being cut short. Such characters are digits of other scripts (\d on purpose),
# a second sign, characters that look like signs or fractions, powers ("5²"), 0x10, and marks that strike digits out. If
# a digit follows, they are also separators that the grammar does not know and invisible characters. A sign after a word
# or a digit ("10-4") is a subtraction, not a sign. Quantifiers are possessive (*+): nothing is tried twice.
_SIGNS = (
    "-+\u00af\u02c9\u02d7\u058a\u05be\u1806\u2010-\u2015\u2043\u207a\u207b\u208a\u208b\u2212\u2296\u23af\u2500\u2795\u2796\u2e3a\u30fc"
    "\ufe58\ufe62\ufe63\uff0b\uff0d"
)
_PARTS = (
    r"[\d.,/\u00b2\u00b3\u00b9\u00bc-\u00be\u066a\u066b\u2030\u2031\u2044\u2070-\u2089\u20d0-\u20ff\u2150-\u2189\u2215"
    r"\u0300-\u036f\u0483-\u0489\u05b0-\u05bd\u1ab0-\u1aff\u1dc0-\u1dff\u3099\u309a\ufe00-\ufe0f\ufe20-\ufe2f\uff05]*+"
)
_BETWEEN_DIGITS = (
    r"[_'`\u00a0\u00ad\u00b4\u00b7\u02bc\u0600-\u0605\u061c\u066c\u06dd\u070f\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180e\u2003-\u200f\u2018-\u201a"
    r"\u2024\u2027\u202a-\u202f\u2032\u205f-\u206f\u2396\u2800\u2e32\u3164\ua4f8\ufe50\ufe52\ufeff\uff0c\uff0e\uff61\uffa0\ufff9-\ufffc"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]++(?=\d)"
)
_RUN = rf"{_PARTS}(?:{_BETWEEN_DIGITS}{_PARTS})*+"
_FRACTION = r"\\[dt]?frac\{[^{}]{1,50}\}\{[^{}]{1,50}\}"
_LUMP = re.compile(
    rf"(?:(?<![{_SIGNS}\w)}}])[{_SIGNS}]+)?\$?(?:0[xXoObB]\w++|{_FRACTION}{_RUN}"
    rf"|(?:(?<![\w.])\.)?[\d\u00bc-\u00be\u2150-\u215f]{_RUN}(?:[eE][-+\u2212]?\d{_RUN})*+(?:{_FRACTION}{_RUN})?)(?:\\?%)?"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_answer(text: str, *, fallback: str | None = None) -> str | None:
    r"""Returns the final answer of a completion as text.

    The answer is in the last marker of either kind: "#### x" to the end of the line, or "\boxed{x}". It is stripped. It
    is None if there is no marker, if the last marker is empty, or if its brace is never closed. With the fallback
    "last_number", a text without a marker has as its answer the last part that looks like a number. Raises ValueError
    for any other fallback but None.
    """
    if fallback not in (None, "last_number"):
        raise ValueError(f'fallback is {fallback!r}; it must be None or "last_number".')
    hashes, box = text.rfind("####"), text.rfind(r"\boxed{")
    if hashes > box:
        return text[hashes + 4 :].partition("\n")[0].strip() or None
    if box >= 0:
        return _to_matching_brace(text, box + len(r"\boxed{"))
    if fallback is None:
        return None
    last = collections.deque(_LUMP.finditer(text), maxlen=1)
    return last[0].group().rstrip(".,/") if last else None


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of a text that is one number and nothing else, or None. "50%" is 1/2.

    The module's docstring shows the grammar. A text of more than `MAX_NUMBER_LENGTH` characters is not a number.
    """
    value, percent = _read(text) or (None, False)
    return value / 100 if value is not None and percent else value


def numeric_verdict(completion: str, answer: str | int | float, *, fallback: str | None = None) -> bool:
    r"""Returns whether the completion's final answer is exactly the reference number.

    The reference `answer` is a number, a text that is a number, or a worked solution that ends in "#### x" or
    "\boxed{x}", as GSM8K's `answer` column does. A float means the decimal that it prints as: 0.1 is 1/10.
    `extract_answer` finds the final answer, with the given fallback. Returns False also if there is no answer or the
    answer is not a number. "0.50" and "1/2" are equal. Raises ValueError if the reference is not a number: the fault is
    in the data, not in the completion.
    """
    reference, reference_percent = _read_reference(answer)
    extracted = extract_answer(completion, fallback=fallback)
    reading = None if extracted is None else _read(extracted)
    if reading is None:
        return False
    value, percent = reading
    if percent == reference_percent:
        return value == reference
    with_sign, without_sign = (value, reference) if percent else (reference, value)
    return without_sign in (with_sign, with_sign / 100)


def is_unit(words: str) -> bool:
    r"""Returns whether \text{words} after a number is a unit: true for " cm", false for "00", "!" and " million"."""
    words = words.replace("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}")
    if unicodedata.normalize("NFKC", words) != words or not _NOT_UNIT_CHARACTERS.isdisjoint(words):
        return False
    if not all(unicodedata.category(c) in ("Ll", "Lu", "Lo") and not c.isnumeric() or c in " ./-'°" for c in words):
        return False
    names = [word if len(word) == 1 else word.lower() for word in re.split(r"[ ./-]+", words)]
    per_cent = any(pair in (("per", "cent"), ("per", "mille")) for pair in itertools.pairwise(names))
    return not per_cent and _NOT_UNITS.isdisjoint(names) and _NOT_UNITS.isdisjoint(x.removesuffix("s") for x in names)


def _to_matching_brace(text: str, start: int) -> str | None:
    depth = 1
    for token in _BRACE.finditer(text, start):  # \{ and \} are part of the answer, and match as escapes
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start : token.start()].strip() or None
    return None


def _read(text: str) -> tuple[Fraction, bool] | None:
    """Returns (the number as written, whether a percent sign follows), or None."""
    text = text.strip()
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    text = text.removesuffix(".").replace("\N{MINUS SIGN}", "-").replace(r"\$", "$").replace(r"\%", "%")
    text = text.replace("{,}", ",").replace(r",\!", ",")  # thousands separators as TeX spaces them
    if text.startswith("$"):  # "$18" is money, "$18$" is TeX
        text = text[1:].removesuffix("$")
    elif text[:2] in ("-$", "+$"):
        text = text[0] + text[2:]
    unit = _TRAILING_UNIT.search(text)
    if unit is not None and is_unit(unit[1]):
        text = text[: unit.start()].strip()
    percent = text.endswith("%")
    match = _NUMBER.fullmatch(text.removesuffix("%").strip())
    if match is None:
        return None
    part = {name: group and group.replace(",", "") for name, group in match.groupdict().items()}
    if part["decimal"] is not None:
        if abs(int(part["exponent"] or 0)) > MAX_EXPONENT:
            return None
        value = Fraction(part["decimal"])
    else:
        above, below = int(part["above"] or part["above_tex"]), int(part["below"] or part["below_tex"])
        if below == 0:
            return None
        value = Fraction(above, below)
    return (-value if part["sign"] == "-" else value), percent


def _read_reference(answer: str | int | float) -> tuple[Fraction, bool]:
    if isinstance(answer, numbers.Rational):  # exact: 10**400 would overflow a float
        return Fraction(int(answer.numerator), int(answer.denominator)), False
    if isinstance(answer, numbers.Real) and math.isfinite(answer):
        return Fraction(str(answer)), False  # by the decimal that it prints as: Fraction(0.1) is not 1/10
    reading = None
    if isinstance(answer, str):
        extracted = extract_answer(answer)
        reading = _read(answer if extracted is None else extracted)
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
