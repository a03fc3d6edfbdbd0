"""Tests a table of verdicts. No text makes a verdict raise, hang or run code."""

from decimal import Decimal
from fractions import Fraction
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_reason.rewards.numeric import extract_answer, MAX_NUMBER_LENGTH, numeric_verdict, parse_number

NUMBERS = {
    "18": 18, "-3": -3, "+3": 3, " 7 ": 7, "007": 7, "18.": 18, "0": 0, "-0": 0, "−3": -3, "-.5": "-1/2",
    "0.50": "1/2", ".5": "1/2", "-0.5": "-1/2", "3.14159": "314159/100000",
    "1,234": 1234, "12,345,678": 12345678, "1,234.50": "2469/2", "1{,}234": 1234, r"1,\!234": 1234,
    r"1\,234": 1234, r"12\;345\:678.5": "24691357/2", r"1\ 234~567\,\text{m}": 1234567,
    "3/4": "3/4", "-3/4": "-3/4", "6 / 8": "3/4", "1,000/3": "1000/3",
    r"\frac{1}{2}": "1/2", r"\dfrac{1}{2}": "1/2", r"\tfrac{-1}{2}": "-1/2", r"-\frac{1}{2}": "-1/2", r"-\frac{-1}{-2}": "-1/2",
    r"\frac12": "1/2", r"\tfrac12": "1/2", r"\frac{1}2": "1/2", r"\frac 1{12}": "1/12", r"\frac{ 1 }{ 2 }": "1/2",
    "$18": 18, r"\$18": 18, "-$18": -18, "$-18": -18, "$ 18": 18, "$18$": 18, r"$\frac{1}{2}$.": "1/2", "$1,234.00": 1234,
    "50%": "1/2", r"50\%": "1/2", "50 %": "1/2", "12.5%": "1/8",
    "$18$ dollars": 18, r"$18$\,\text{cm}": 18, r"$\frac{1}{2}$ cm.": "1/2", r"$50$ \%": "1/2",
    r"\hspace{1em}5\enspace": 5, r"\Huge 5\hspace*{2pt}\text{cm}": 5, r"5\text{ cm}": 5, r"5 \mathrm{kg}.": 5,
    "1e3": 1000, "1E3": 1000, "1.5e-3": "3/2000", "1e100": 10**100, "9" * MAX_NUMBER_LENGTH: 10**MAX_NUMBER_LENGTH - 1,
}  # fmt: skip

NOT_NUMBERS = [
    "", " ", ".", "-", "+", "$", "%", ",", "/", "--5", "+-5", "- 5", "$-$5", "18$", "1.2.3", "5..", "1,2,3", "1,23", "0,123", "1234,567", "$5$ million", "$3$ 4", "$$ 5", "$-$ 5", r"1\,23", r"1234\,567", r"1\,2345", r"5\,000\,00", ",123", "1,234,",
    "3/0", r"\frac{1}{0}", "3/-4", "1/2/3", "1 1/2", "1.5/2", r"\frac12 3", r"\frac123", r"\frac{1}{2", "1e101", "1e-101", "1e9999999999", "1e", "e3",
    "2+3", "9**9**9**9", "9^9", "nan", "NaN", "inf", "-inf", "Infinity", "1_000", "0x10", "1j", "True", "None", "five", "5 apples", "x = 5",
    "１８", "٣", "1８", "²", "½", "Ⅻ", "１,234", "3⁄4", "50％", "9" * (MAX_NUMBER_LENGTH + 1), "__import__('os').system('true')",
]  # fmt: skip

ANSWERS = {
    "#### 18": "18",
    "She has 9 * 2 = 18.\n#### 18": "18",
    "####18\n": "18",
    "#### 1\n#### 2": "2",
    "#### 18\nThat is all.": "18",
    r"so \boxed{18}.": "18",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{ {a{b}c} }": "{a{b}c}",
    r"\boxed{1} or rather \boxed{2}": "2",
    r"\boxed{\boxed{3}}": "3",
    r"\boxed{1} #### 2": "2",
    r"#### 2 \boxed{1}": "1",
    r"#### \boxed{4}": "4",
    r"\boxed{\{1\}}": r"\{1\}",
    r"\boxed{1": None,
    r"\boxed{\boxed{1}": "1",
    r"\boxed{}": None,
    "#### ": None,
    "#### 5\n####": "5",
    "The answer is 18": None,
    "": None,
}

LAST_NUMBERS = {
    "The answer is 18": "18", "is 18.": "18", "3 and 1,234, then.": "1,234", "it costs $18!": "$18", "x=-5": "-5", "10-4": "4", "x - 5": "5",
    "(−3)": "−3", "a/b is 3/4.": "3/4", r"\frac{1}{2} of it": r"\frac{1}{2}", r"\frac12 of it": r"\frac12",
    "12 000 euros": "12 000", "1 000 000.": "1 000 000", "1 234 000": "1 234 000", "3 500 gram": "500", "at 2024 000": "000", "12 0000": "0000", r"about 50\%.": r"50\%", "1e3 m": "1e3", "none": None,
    "12５": "12５", "lists 1,2,3": "1,2,3", r"3 #### 4": "4", "3 \\boxed{4": None,
}  # fmt: skip

VERDICTS = [  # completion, reference, verdict
    ("#### 18", "18", True),
    ("#### 18", 18, True),
    ("#### 18.0", 18, True),
    ("#### 19", 18, False),
    ("#### -3", "-3", True),
    ("#### −3", -3, True),
    ("#### 3", -3, False),
    ("#### 1,234", "1234", True),
    ("#### 1234", "1,234", True),
    ("#### 1,2,3", "123", False),
    ("#### -0.5", "-1/2", True),
    ("#### 3/4", 0.75, True),
    ("#### 0.1", 0.1, True),
    ("#### 0.3333", "1/3", False),
    ("#### 1/3", Fraction(1, 3), True),
    ("#### 1e20", 1e20, True),
    ("#### 7", np.int64(7), True),
    ("#### 0.1", np.float32(0.1), True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{1} \boxed{2}", 2, True),
    (r"\boxed{1} \boxed{2}", 1, False),
    ("#### $18", 18, True),
    ("#### 18.", 18, True),
    ("#### 50%", "50%", True),
    ("#### 50%", "0.5", True),
    ("#### 50%", "50", True),
    (r"\boxed{50\%}", 50, True),
    ("#### 0.5", "50%", True),
    ("#### 50", "50%", True),
    ("#### 50%", "5000", False),
    ("#### 50%", "5000%", False),
    ("#### 0.5%", "50%", False),
    ("#### 0.5", "50", False),
    ("18", 18, False),
    ("#### eighteen", 18, False),
    ("#### 9**9**9**9", 18, False),
    ("#### __import__('os').system('false')", 0, False),
    ("#### nan", 0, False),
    ("#### 18", "9 + 9 = 18\n#### 18", True),
    ("#### 18", r"thus $\boxed{18}$", True),
]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert parse_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_not_numbers(text):
    assert parse_number(text) is None
    assert not numeric_verdict(f"#### {text}", 5)


@pytest.mark.parametrize("text", ANSWERS)
def test_the_last_marker_counts(text):
    assert extract_answer(text) == ANSWERS[text]


@pytest.mark.parametrize("text", LAST_NUMBERS)
def test_fallback_to_the_last_number(text):
    assert extract_answer(text, fallback="last_number") == LAST_NUMBERS[text]


def test_fallback_reaches_the_verdict():
    assert not numeric_verdict("It is 18.", 18)
    assert numeric_verdict("It is 18.", 18, fallback="last_number")
    with pytest.raises(ValueError, match="'first'.*last_number"):
        extract_answer("18", fallback="first")


@pytest.mark.parametrize("completion, answer, verdict", VERDICTS)
def test_verdicts(completion, answer, verdict):
    assert numeric_verdict(completion, answer) is verdict


@pytest.mark.parametrize(
    "answer", ["eighteen", "", "#### ", float("nan"), float("inf"), None, b"18", "1,2,3", "x" * 1000]
)
def test_a_reference_that_is_not_a_number_raises(answer):
    with pytest.raises(ValueError, match="reference answer .* is not a number"):
        numeric_verdict("#### 18", answer)


@given(st.fractions())
def test_every_fraction_is_read_back(value):
    assert parse_number(str(value)) == value


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30, places=6))
def test_every_decimal_is_read_back(value):
    assert parse_number(f"{value:f}") == parse_number(f"{value:,f}") == Fraction(value)
    assert numeric_verdict(f"#### {value:,f}", str(Decimal(value)))


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100).filter(
        lambda x: x == 0 or abs(x) > 1e-80
    )
)
def test_every_float_equals_the_decimal_it_prints_as(value):
    assert numeric_verdict(f"#### {value}", value)


ALPHABET = st.sampled_from(list("0123456789.,-−+/$%{}\\ \n#eE() ５") + ["####", r"\boxed{", r"\frac{", r"\text{", "}{"])


@settings(max_examples=400)
@given(st.one_of(st.text(), st.lists(ALPHABET, max_size=60).map("".join)))
def test_no_text_raises(text):
    for fallback in (None, "last_number"):
        answer = extract_answer(text, fallback=fallback)
        assert answer is None or answer in text
    value = parse_number(text)
    assert value is None or isinstance(value, Fraction)
    assert isinstance(numeric_verdict(text, 1, fallback="last_number"), bool)


MEGABYTE = 1_000_000
HUGE = {
    "digits": "9", "zeros": "0", "spaces": " ", "newlines": "\n", "commas": "1,", "groups": ",123", "dots": "1.", "slashes": "1/", "signs": "-", "minus": "−1",
    "hashes": "#", "markers": "#### ", "boxes": r"\boxed{", "open": "{", "close": "}", "fractions": r"\frac{", "nearly": r"\frac{1}{",
    "texts": r"\text{", "backslashes": "\\", "dollars": "$", "percents": "1%", "exponents": "1e", "parentheses": "(", "letters": "a", "foreign": "1５",
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_a_megabyte_is_read_in_linear_time(name):
    body = (HUGE[name] * MEGABYTE)[:MEGABYTE]
    start = time.perf_counter()
    parse_number(body)
    for text in (body, "#### " + body, r"\boxed{" + body + "}", body + "x"):
        numeric_verdict(text, 18, fallback="last_number")
    # A few passes over a megabyte are fast. A quadratic step would take minutes.
    assert time.perf_counter() - start < 10


def test_ten_thousand_parentheses():
    text = "#### " + "(" * 10_000 + "1" + ")" * 10_000
    assert not numeric_verdict(text, 1)


def test_verdicts_from_threads():
    verdicts = {}

    def judge(index):
        verdicts[index] = [numeric_verdict(completion, answer) for completion, answer, _ in VERDICTS]

    threads = [threading.Thread(target=judge, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {index: [verdict for *_, verdict in VERDICTS] for index in range(8)}
