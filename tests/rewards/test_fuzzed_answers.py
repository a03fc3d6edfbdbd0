"""Tests random answers. The number grammar agrees with a second parser, and only the final answer is judged.

`python -m rewards.test_fuzzed_answers -max_total_time=60`, started in tests/, fuzzes with atheris if it is installed.
"""

from decimal import Decimal
from fractions import Fraction
import itertools
import pathlib
import subprocess
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from helpers.hostile_answers import call_all, call_reward
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number
from jaxrl_reason.rewards.task_rewards import judge_reward

FRAGMENTS = [
    *"0123456789", *"0123456789", *".,-+/%$ \\{}()^!eEx_−–'½²５８\n", "12", "000", "234", ",567", ".50", "1,234", "{,}", r",\!", r"\$", r"\%", "e3", "E-2", "e999",
    r"\frac{", r"\dfrac{3}{4}", "}{", r"\text{ cm}", r"\mathrm{kg}", r"\text{00}", r"\text{ million}", "####", "#### ", r"\boxed{", "}", " and ", "= ", "0x", "1_0",
    r"\,", r"\ ", "~", r"\displaystyle ", r"\(", r"\)", "**", "^2", r"^{\circ}", "/", r"\mathrm{~km}", r"\text{\%}", r"\fbox{", r"\boxed ", "#### Check\n", "#####",
    "\u200d", "\u202e", "\u0336", "\0", "\ud800", "\u2028", "\ufeff", "nan", "inf", "１", "٣", "Ⅷ",
]  # fmt: skip
JUMBLES = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def _maybe(*options):
    return st.sampled_from(["", "", *options])


# Texts that are almost numbers; about half of them are numbers.
INTEGERS = st.one_of(
    st.integers(0, 10**7).map(str),
    st.integers(0, 10**9).map("{:,}".format),
    st.sampled_from(["007", "0", "1,23", "0,123", "12,3456", "9" * 199, "９"]),
)
BODIES = st.one_of(
    INTEGERS,
    st.tuples(
        INTEGERS, _maybe("."), st.integers(0, 999).map(str), _maybe("e3", "E-20", "e+100", "e101", "e1000", "e")
    ).map("".join),
    st.tuples(INTEGERS, st.sampled_from(["/", " / ", "  /", "/-"]), INTEGERS).map("".join),
    st.tuples(
        st.sampled_from([r"\frac{", r"\dfrac{", r"\sfrac{"]),
        _maybe("-", "--"),
        INTEGERS,
        st.just("}{"),
        _maybe("+"),
        INTEGERS,
        st.just("}"),
    ).map("".join),
    st.integers(0, 999).map(".{}".format),
)
NEARLY = st.tuples(
    _maybe(" ", "\u2028"), _maybe("-", "+", "−", "--", "–"), _maybe("$", r"\$"), BODIES, _maybe(r"\text{ cm}", r" \mathrm{kg}", r"\text{ million}", r"\text{0}"),
    _maybe("%", r"\%", " %", "%%"), _maybe("$", ".", ". ", "\u0336"),
).map("".join)  # fmt: skip
DIGITS = "0123456789"


def reference_number(text):
    """Parses numbers like `parse_number`, but by hand, from the outside in and then from left to right."""
    text = text.strip()
    if len(text) > 200:
        return None
    text = _bare(text)
    for written, meant in (("−", "-"), (r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r",\!", ",")):
        text = meant.join(text.split(written))
    if text and text[0] == "$":
        text = text[1:-1] if text[1:].endswith("$") else text[1:]
    elif len(text) > 1 and text[0] in "+-" and text[1] == "$":
        text = text[0] + text[2:]
    text, is_percentage = _without_unit(text)
    text = text + "%" * is_percentage
    text, scale = text.strip(), 1
    if text.endswith("%"):
        text, scale = _trimmed(text[:-1]), 100
    text = _trimmed(text)
    sign = -1 if text.startswith("-") else 1
    if text[:1] in ("-", "+"):
        text = text[1:]
    for command in (r"\frac{", r"\dfrac{", r"\tfrac{"):
        if text.startswith(command) and text.endswith("}"):
            above, between, below = text[len(command) : -1].partition("}{")
            return _over(above, below, sign, scale, signs=True) if between else None
    if "/" in text:
        above, _, below = text.partition("/")
        return _over(above.removesuffix(" "), below.removeprefix(" "), sign, scale, signs=False)
    mantissa, e, exponent = text.replace("E", "e").partition("e")
    shift = exponent[1:] if exponent[:1] in ("-", "+") else exponent
    if e and not (0 < len(shift) <= 3 and set(shift) <= set(DIGITS) and int(shift) <= 100):
        return None
    whole, point, decimals = mantissa.partition(".")
    if point and not (decimals and set(decimals) <= set(DIGITS)):
        return None
    units = 0 if point and not whole else _whole(whole)
    if units is None:
        return None
    digits = units * 10 ** len(decimals) + int(decimals or 0)
    return sign * Fraction(digits, 10 ** len(decimals)) * Fraction(10) ** (int(exponent) if e else 0) / scale


BLANKS = (r"\,", r"\;", r"\:", r"\!", r"\ ", "~", r"\quad", r"\qquad")
LEFT_OUT = (r"\displaystyle", r"\textstyle", r"\text{}", r"\text{ }")


def _trimmed(text):
    """Returns a text without blanks (also of TeX) at its ends, and without commands before it that show nothing."""
    before = None
    while before != text:
        before = text
        for blank in (*BLANKS, *LEFT_OUT):
            is_whole = not (
                blank[-1].isalpha() and text[len(blank) :][:1].isascii() and text[len(blank) :][:1].isalpha()
            )
            if text.startswith(blank) and is_whole and blank != "~":  # "~5" means about 5
                text = text[len(blank) :]
        text = text.lstrip()
    before = None
    while before != text:
        before = text
        for blank in BLANKS:
            if text.endswith(blank):
                text = text[: -len(blank)]
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]
        text = text.rstrip()
    return text


def _bare(text):
    """Returns a text without surrounding marks."""
    before = None
    while before != text:
        before, text = text, _trimmed(text)
        if text[-1:] in (".", "。") and text[-2:-1] not in (".", "。"):
            text = text[:-1].rstrip()
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`")):
            inside = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
                if not any(mark in inside for mark in {opening[-1] if opening[0] == "$" else opening, closing}):
                    text = inside
                    break
        else:
            for command in (r"\text{", r"\mathrm{"):
                inside = text[len(command) : -1]
                if text.startswith(command) and text.endswith("}") and "{" not in inside and "}" not in inside:
                    text = inside
    return text


def _without_unit(text):
    """Returns a text without the unit after its number, and whether the unit is per cent."""
    at = min((text.find(command) for command in (r"\text{", r"\mathrm{") if command in text), default=0)
    value, rest = _trimmed(text[:at]), text[at:].rstrip(" .$")
    number, per_cent = text, False
    if value and (value[-1].isalnum() or value[-1] in ")}!"):
        parts = rest.replace(r"\cdot", "/").replace(r"\times", "/").replace("\\,\\", "/\\").split("/")
        names = [_trimmed(part) for part in parts]
        for power in ("^2", "^{2}", "{2}", *(f"^{digit}" for digit in DIGITS)):
            names = [name.removesuffix(power) if name.endswith("}" + power) else name for name in names]
        per_cent = names == [r"\text{\%}"] or names == [r"\text{%}"]
        units = {rf"\{c}{{{unit}}}" for c in ("text", "mathrm") for unit in (" cm", "kg", "~km", "cm", "")}
        if per_cent or set(names) <= units:
            number = value
    for degrees in (r"^{\circ}", r"^\circ", "°"):
        if not per_cent and number.rstrip().endswith(degrees):
            number = number.rstrip()[: -len(degrees)].rstrip()
            break
    return number, per_cent


def _whole(text):
    """Returns the value of a whole number with optional thousands separators, or None."""
    first, *groups = text.split(",")
    if not first or set("".join([first, *groups])) - set(DIGITS):
        return None
    if groups and (first[0] == "0" or len(first) > 3 or any(len(group) != 3 for group in groups)):
        return None
    return int("".join([first, *groups]))


def _over(above, below, sign, scale, signs):
    """Returns the value of a fraction, or None. `signs`: whether its parts may have signs."""
    for part in (above, below):
        if signs and part[:1] in ("-", "+"):
            sign = -sign if part[0] == "-" else sign
    above, below = (_whole(part[1:] if signs and part[:1] in ("-", "+") else part) for part in (above, below))
    return None if above is None or not below else sign * Fraction(above, below) / scale


def check_number(text):
    """Checks `parse_number`, `numeric_verdict` and `judge_reward` on a text, and returns its value."""
    value = parse_number(text)
    assert value == reference_number(text), text
    if value is not None and "\n" not in text and "#" not in text:
        assert numeric_verdict(f"#### {text}", value) and call_reward(judge_reward, [f"#### {text}"], str(value)) == [
            1.0
        ]
        assert not numeric_verdict(f"#### {text}", value + 1) or "%" in text
    return value


def check_completion(text):
    """Checks that every verdict on a completion follows from its final answer."""
    for fallback in (None, "last_number"):
        answer = extract_answer(text, fallback=fallback)
        assert answer is None or answer and answer in text
        value = None if answer is None else reference_number(answer)
        for reference in (18, Fraction(1, 2), -3):
            forms = {value, value * 100} if value is not None and "%" in answer else {value}
            assert numeric_verdict(text, reference, fallback=fallback) == (reference in forms)
    if (
        not any(mark in text for mark in ("#", r"\boxed", r"\fbox")) and value is not None
    ):  # the number is no part of a longer one
        before, _, after = text.rpartition(answer)
        assert not (before[-1:].isdecimal() and answer[0].isdecimal()) and not after[:1].isnumeric()
        if answer[-1].isdecimal():
            assert after[:1] != "\u0336" and not (after[:1] in ("_", "\u200d", "\u202e") and after[1:2].isdecimal())
    results = call_all(text)
    assert results == call_all(text) and all(
        r in ([0.0], [1.0]) for r in results if isinstance(r, list) and len(r) == 1
    )


BUDGET = settings(max_examples=300, derandomize=True, deadline=None)


@BUDGET
@given(st.one_of(NEARLY, JUMBLES))
def test_numbers_agree_with_a_second_parser(text):
    check_number(text)


@BUDGET
@given(
    st.one_of(
        JUMBLES,
        st.tuples(JUMBLES, st.sampled_from(["#### ", r"\boxed{", "= ", ""]), NEARLY, _maybe("}", "\n", ".")).map(
            "".join
        ),
    )
)
def test_a_completion_is_judged_by_its_final_answer(text):
    check_completion(text)


@BUDGET
@given(NEARLY, NEARLY)
def test_equality_of_answers_is_symmetric(a, b):
    for x, y in itertools.product((a, b), repeat=2):
        if parse_number(x) is not None and parse_number(y) is not None:
            assert numeric_verdict(f"#### {x}", y) == numeric_verdict(f"#### {y}", x)
            assert numeric_verdict(f"#### {x}", y) or x != y


@BUDGET
@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 6),
    st.sampled_from(["{:f}", "{:,f}", "${:f}", "{:f}.", r"{:f}\text{{ cm}}", "{:e}", "+{:f}"]),
)
def test_formatted_numbers_are_read_back(digits, places, form):
    number = Decimal(digits).scaleb(-places)
    text = form.format(abs(number) if form[0] in "+$" else number)
    assert parse_number(text) == (abs if form[0] in "+$" else Fraction)(Fraction(number))


@pytest.mark.slow
def test_a_minute_of_fuzzing():
    end = time.monotonic() + 60

    @settings(max_examples=2_000, deadline=None, database=None)
    @given(NEARLY, JUMBLES, st.text(st.characters(categories=None)))
    def once(near, jumble, text):
        for found in (near, jumble, text):
            check_number(found)
            check_completion(found)
            check_completion(f"{jumble}#### {found}")

    while time.monotonic() < end:
        once()


@pytest.mark.slow
def test_a_minute_of_fuzzing_with_atheris():
    pytest.importorskip("atheris", reason="atheris, which fuzzes by coverage, is not installed: pip install atheris")
    command = [sys.executable, "-m", "rewards.test_fuzzed_answers", "-max_total_time=60"]
    tests = pathlib.Path(__file__).parents[1]
    run = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


if __name__ == "__main__":
    import atheris

    def _once(data):
        provider = atheris.FuzzedDataProvider(data)
        pick = [
            FRAGMENTS[provider.ConsumeIntInRange(0, len(FRAGMENTS) - 1)]
            for _ in range(provider.ConsumeIntInRange(0, 20))
        ]
        for text in ("".join(pick), provider.ConsumeUnicode(200)):
            check_number(text)
            check_completion(text)

    atheris.instrument_all()
    atheris.Setup(sys.argv, _once)
    atheris.Fuzz()
