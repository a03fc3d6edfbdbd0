"""Hostile answers: every built-in reward gives each its verdict, at once, twice the same, and runs nothing.

The corpus is `hostile.py`. Run as a script (`python tests/rewards/test_hostile_answers.py -max_total_time=60`) this file fuzzes with
atheris, where it is installed, by the properties that hypothesis checks below.
"""

import collections
import contextlib
from decimal import Decimal
from fractions import Fraction
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import threading
import time
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from rewards.hostile import ANSWERS, REFERENCES, UNITS

from jaxrl_reason import metrics
from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.math import math_verify_reward
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number
from jaxrl_reason.rewards.task_rewards import canonical_answer, judge_reward, many_answers_reward, strict_reward
from jaxrl_reason.runs.writers import read_metrics, SampleTable
from jaxrl_reason.tasks import evaluation

TEXTS = [answer.text for answer in ANSWERS.values()]
VALUES = sorted(
    {v for a in ANSWERS.values() for v in (a.value, a.last) if v is not None} | {Fraction(1000), Fraction(16)}
)
MULTIPLES = dict(kind="multiple", target=6, low=0, high=99)
SUMS = dict(kind="sum", target=18, low=0, high=99)


def judged(reward, texts, reference):
    return reward(
        prompts=[""] * len(texts), completions=texts, completion_ids=[[]] * len(texts), answer=[reference] * len(texts)
    )


def fits(reward, texts, constraint):
    return reward(completions=texts, **{name: [value] * len(texts) for name, value in constraint.items()})


def everything(text):
    """What all that reads completions in this process says about one."""
    return (
        [extract_answer(text, fallback=fallback) for fallback in (None, "last_number")],
        parse_number(text),
        numeric_verdict(text, 18, fallback="last_number"),
        accuracy_reward(completions=[text], answer=["18"]),
        last_number_reward(completions=[text], answer=["18"]),
        last_number_reward.answer_of(text, {}),
        format_reward(completions=[text]),
        strict_reward(completions=[text], answer=["18"]),
        judge_reward(completions=[text], answer=["18"]),
        fits(many_answers_reward, [text], SUMS),
        many_answers_reward.answer_of(text, {}),
        evaluation.final_answer(text, {}),
    )


def boxable(text):
    """Whether the braces of a text close themselves."""
    return text.count("{") == text.count("}") and not text.endswith("\\")


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hashes", "box"])
def test_verdicts_on_marked_answers(name):
    form = "So it is:\n#### {}" if name == "hashes" else r"So it is $\boxed{{{}}}$."
    answers = [a for a in ANSWERS.values() if "\n" not in a.text and (name == "hashes" or boxable(a.text))]
    assert len(answers) > 200
    texts = [form.format(answer.text) for answer in answers]
    for value in VALUES:
        right = [float(answer.value == value) for answer in answers]
        assert judged(accuracy_reward, texts, value) == right
        assert judged(last_number_reward, texts, value) == right
        if len(str(value)) > 200:  # as a text it is none
            continue
        assert judged(accuracy_reward, texts, str(value)) == right
        mixed = [float(value == Fraction(3, 2) and answer.text == "1 1/2") for answer in answers]
        assert judged(judge_reward, texts, str(value)) == [float(a or b) for a, b in zip(right, mixed)]
        same = [float(answer.text.strip() == str(value)) for answer in answers]
        assert judged(strict_reward, texts, str(value)) == same
    assert format_reward(completions=texts) == [float(answer.value is not None) for answer in answers]
    assert fits(many_answers_reward, texts, SUMS) == [0.0] * len(texts)
    shown = [answer.text.strip().removeprefix("-") for answer in answers]
    plain = [text.isascii() and text.isdigit() and len(text) < 10 for text in shown]
    assert fits(many_answers_reward, texts, MULTIPLES) == [
        float(p and a.value % 6 == 0) for p, a in zip(plain, answers)
    ]


def test_verdicts_on_unmarked_answers():
    for value in VALUES:
        right = [float(answer.last == value) for answer in ANSWERS.values()]
        assert judged(last_number_reward, TEXTS, value) == right
        assert judged(last_number_reward, [f"It is {text}" for text in TEXTS], value) == right
        for reward in (accuracy_reward, strict_reward):
            assert judged(reward, TEXTS, value) == [0.0] * len(TEXTS)
    assert [last_number_reward.answer_of(text, {}) for text in TEXTS] == [answer.last for answer in ANSWERS.values()]
    assert format_reward(completions=TEXTS) == [0.0] * len(TEXTS)


def test_what_is_glued_to_a_digit_is_never_left_out():
    """Signs, separators, marks and what is not seen, of every script that has them: refused whole rather than cut short."""
    ranges = {
        "{}5": "2796 208b fe58 05be 058a 1806 2043 2296 2500 2e3a 30fc 00af 02c9 23af",
        "5{}": "0483-0489 05b0-05bd 1ab0-1abe 1dc0-1dff 3099 309a fe20-fe2f",
        "1{}8": "070f 115f 1160 17b4 180b-180e 206a-206f 2800 3164 ffa0 fff9-fffc 1bca0 1d173 e0001 e0020-e007f e0100-e01ef 0600-0605 06dd 08e2 "
        "0483-0489 05b0-05bd 1ab0-1abe 1dc0-1dff 3099 fe20-fe2f",
        "1{}234": "0060 00b4 02bc 2003-200a 201a 2024 2027 2032 205f 2396 fe50 fe52 ff61 2e32 a4f8",
    }
    for form, listed in ranges.items():
        for text in listed.split():
            first, _, last = text.partition("-")
            for code in range(int(first, 16), int(last or first, 16) + 1):
                read = last_number_reward.answer_of(form.format(chr(code)), {})
                assert read is None, (form, hex(code), read)


@pytest.mark.parametrize(
    "opening, closing", [("{", "}"), ("(", ")"), (r"\frac{1}{", "}"), ("$", "$"), (r"\text{", "}")]
)
def test_ten_thousand_levels_hide_nothing(opening, closing):
    texts = [opening * 10_000 + answer.text + closing * 10_000 for answer in ANSWERS.values()]
    for text in (*texts[:8], opening * 10_000 + "18" + closing * 10_000, opening * 10_000 + "18"):
        for completion in (text, "#### " + text, rf"\boxed{{{text}}}"):
            assert not numeric_verdict(completion, 18)
            assert judged(judge_reward, [completion], "18") == judged(strict_reward, [completion], "18") == [0.0]
    boxes = r"\boxed{" * 10_000
    assert numeric_verdict(boxes + "18" + "}" * 10_000, 18) and not numeric_verdict(boxes + "18", 18)


def test_said_again_and_again_nothing_becomes_a_number():
    for answer in ANSWERS.values():
        text = f"#### {answer.text} {answer.text} {answer.text}"
        assert not any(numeric_verdict(text, value) for value in VALUES if value != 0), answer


@pytest.mark.parametrize("index", range(len(REFERENCES)))
def test_a_hostile_reference_is_refused_or_nothing_hostile_equals_it(index):
    reference = REFERENCES[index]
    completions = [form.format(text) for text in TEXTS for form in ("#### {}", "{}")]
    for reward in (accuracy_reward, last_number_reward, judge_reward):
        with contextlib.suppress(ValueError):
            assert not any(judged(reward, completions, reference))
    with contextlib.suppress(ValueError):  # by text "nan" is "nan", if the data say so; a missing answer is not "None"
        right = {c for c, verdict in zip(completions, judged(strict_reward, completions, reference)) if verdict}
        assert right <= {f"#### {reference}"} and reference is not None
    for name in SUMS:
        with contextlib.suppress(ValueError):
            assert not any(fits(many_answers_reward, completions, SUMS | {name: reference})), name


def test_a_constraint_that_nothing_can_meet_is_refused():
    for column, value in [("target", 0), ("target", None), ("low", "1"), ("high", float("nan")), ("kind", ["sum"])]:
        with pytest.raises(ValueError, match=f"^The column '{column}' holds .*correct that row.$"):
            canonical_answer("#### 5", **MULTIPLES | {column: value})


def test_a_missing_reference_is_not_the_answer_none():
    with pytest.raises(ValueError, match="A row has no reference in its column 'answer'.*correct that row"):
        strict_reward(completions=["#### 5", "#### None"], answer=["5", None])


def test_references_beyond_a_float_are_exact():
    assert numeric_verdict(f"#### 1e{100}", 10**100) and not numeric_verdict("#### 1e100", 10**400)
    assert not numeric_verdict("#### 0", Fraction(1, 10**400))
    assert math_verify_reward(completions=["#### 18", "18"], answer=[10**400, Fraction(10**400, 3)]) == [0.0, 0.0]
    with pytest.raises(
        ValueError, match="^Row 1: the reference answer is too long a number.*correct that row's answer"
    ):
        math_verify_reward(completions=["#### 18"] * 2, answer=[18, 10**5000])


# -- no state, nothing run ---------------------------------------------------------------------------------------------


def test_the_same_again_in_any_order_and_from_any_thread():
    texts = [form.format(text) for text in TEXTS for form in ("{}", "#### {}", r"\boxed{{{}}}")]
    first = {text: everything(text) for text in texts}
    found = [None] * 8

    def judge(index):
        order = random.Random(index).sample(texts, len(texts))
        found[index] = {text: everything(text) for text in order} == first

    threads = [threading.Thread(target=judge, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


_watched: list[str] | None = None  # what this thread does, while it is watched; audit hooks cannot be removed
_watcher = threading.get_ident()


def _watch(event, _):
    if _watched is not None and threading.get_ident() == _watcher:
        _watched.append(event)


def test_nothing_is_evaluated_imported_opened_or_started():
    global _watched
    everything("#### 18")  # what is imported at the first call
    sys.addaudithook(_watch)
    try:
        _watched = []
        compile("1", "", "eval")
        assert _watched == ["compile"]  # it sees what it should
        _watched = []
        for text in TEXTS:
            for completion in (text, "#### " + text, rf"\boxed{{{text}}}"):
                everything(completion)
        assert not {
            e
            for e in _watched
            if e.startswith(("compile", "exec", "import", "open", "os.", "subprocess", "pickle", "socket"))
        }
    finally:
        _watched = None


# -- votes and tables --------------------------------------------------------------------------------------------------


def test_hostile_answers_vote_for_themselves():
    votes = [evaluation.final_answer(f"#### {text}", {}) for text in TEXTS]
    lines = [text.partition("\n")[0].strip() for text in TEXTS]
    assert votes == [
        answer.value if answer.value is not None else line or None for answer, line in zip(ANSWERS.values(), lines)
    ]
    assert all(isinstance(vote, (Fraction, str, type(None))) for vote in votes)
    by_vote = collections.Counter(v for v in votes if v is not None)
    twins = [vote for vote, count in by_vote.items() if count > 1]
    assert all(isinstance(vote, Fraction) or lines.count(vote) == by_vote[vote] for vote in twins)

    crowd = [vote for vote in votes if vote != 18]
    honest = [evaluation.final_answer(text, {}) for text in ("#### 18", r"\boxed{18.0}", "#### $36/2$")]
    assert honest == [Fraction(18)] * 3 and metrics.majority_vote([*set(crowd), *honest]) == len(set(crowd))
    assert metrics.majority_vote([None, votes[0], "nan", "nan", float("inf")]) == 2
    big = "#### " + "9" * 1_000_000
    assert metrics.majority_vote([evaluation.final_answer(t, {}) for t in (big, big + "8", big)]) == 0


def test_samples_are_written_and_read_back(tmp_path):
    texts = [
        *TEXTS,
        "{" * 100_000,
        "x\ny\r\nz\v\f\x85\u2028\u2029\0",
        '"}\n{"step": 99}\n',
        "\ud83d",
        "\\ud83d",
        "\ude00",
    ]
    ones = np.ones((len(texts), 1))
    columns = dict(total=ones, advantages=ones, lengths=ones.astype(int), truncated=ones > 1)
    for _ in range(2):  # the second time into what is there, which is read and cut
        with SampleTable(tmp_path, resume_step=0) as table:
            table.write(1, texts, [[text] for text in texts], rewards={"accuracy": ones * np.nan}, **columns)
    lines = (tmp_path / "samples.jsonl").read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    found = read_metrics(tmp_path / "samples.jsonl")
    assert [line["completion"] for line in found] == [line["prompt"] for line in found] == texts
    assert [json.loads(line) for line in lines] == found and {line["rewards"]["accuracy"] for line in found} == {None}


# -- time and memory ---------------------------------------------------------------------------------------------------


def grown(name, size):
    body = (UNITS[name] * (size // len(UNITS[name]) + 1))[:size]
    return [body, "#### " + body, rf"\boxed{{{body}}}", r"\boxed{" + body, body + "x####"]


def seconds(texts):
    begin = time.process_time()
    for text in texts:
        everything(text)
    return time.process_time() - begin


@pytest.mark.parametrize("name", UNITS)
def test_time_grows_with_the_length(name):
    small, large = (seconds(grown(name, size)) for size in (8_000, 32_000))
    # Five texts, read twelve ways, at most a second a megabyte. A quadratic step would take 16 times as long.
    assert large < 8 * small + 0.05 and large < 5 * 12 * 0.032


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_a_megabyte(name):
    small, large = (seconds(grown(name, size)) for size in (250_000, 1_000_000))
    assert large < 7 * small + 0.5 and large < 5 * 12


@pytest.mark.parametrize("name", ["digits", "open", "python_groups", "joined", "minuses", "fractions", "signs"])
def test_memory_is_a_few_copies_of_the_text(name):
    texts = grown(name, 20_000)
    tracemalloc.start()
    try:
        for text in texts:
            everything(text)
        assert tracemalloc.get_traced_memory()[1] < 12 * sys.getsizeof(texts[0]) + 50_000
    finally:
        tracemalloc.stop()


# -- fuzzing -----------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *"0123456789", *"0123456789", *".,-+/%$ \\{}()^!eEx_−–'½²５８\n", "12", "000", "234", ",567", ".50", "1,234", "{,}", r",\!", r"\$", r"\%", "e3", "E-2", "e999",
    r"\frac{", r"\dfrac{3}{4}", "}{", r"\text{ cm}", r"\mathrm{kg}", r"\text{00}", r"\text{ million}", "####", "#### ", r"\boxed{", "}", " and ", "= ", "0x", "1_0",
    "\u200d", "\u202e", "\u0336", "\0", "\ud800", "\u2028", "\ufeff", "nan", "inf", "１", "٣", "Ⅷ",
]  # fmt: skip
JUMBLES = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


def _maybe(*options):
    return st.sampled_from(["", "", *options])


# Texts of which about half are numbers, by a hair.
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
    """`parse_number` once more, by hand: from the outside in, and then from left to right."""
    text = text.strip()
    if len(text) > 200:
        return None
    if text.endswith("."):
        text = text[:-1]
    for written, meant in (("−", "-"), (r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r",\!", ",")):
        text = meant.join(text.split(written))
    if text and text[0] == "$":
        text = text[1:-1] if text[1:].endswith("$") else text[1:]
    elif len(text) > 1 and text[0] in "+-" and text[1] == "$":
        text = text[0] + text[2:]
    if text.endswith("}"):
        head, opening, unit = text[:-1].rpartition("{")
        for command in (r"\text", r"\mathrm"):
            if opening and head.endswith(command) and unit.strip() in ("cm", "kg", ""):
                text = head[: -len(command)]
                break
    text, scale = text.strip(), 1
    if text.endswith("%"):
        text, scale = text[:-1].strip(), 100
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


def _whole(text):
    first, *groups = text.split(",")
    if not first or set("".join([first, *groups])) - set(DIGITS):
        return None
    if groups and (first[0] == "0" or len(first) > 3 or any(len(group) != 3 for group in groups)):
        return None
    return int("".join([first, *groups]))


def _over(above, below, sign, scale, signs):
    for part in (above, below):
        if signs and part[:1] in ("-", "+"):
            sign = -sign if part[0] == "-" else sign
    above, below = (_whole(part[1:] if signs and part[:1] in ("-", "+") else part) for part in (above, below))
    return None if above is None or not below else sign * Fraction(above, below) / scale


def check_number(text):
    value = parse_number(text)
    assert value == reference_number(text), text
    if value is not None and "\n" not in text and "#" not in text:
        assert numeric_verdict(f"#### {text}", value) and judged(judge_reward, [f"#### {text}"], str(value)) == [1.0]
        assert not numeric_verdict(f"#### {text}", value + 1) or "%" in text
    return value


def check_completion(text):
    for fallback in (None, "last_number"):
        answer = extract_answer(text, fallback=fallback)
        assert answer is None or answer and answer in text
        value = None if answer is None else reference_number(answer)
        for reference in (18, Fraction(1, 2), -3):
            forms = {value, value * 100} if value is not None and "%" in answer else {value}
            assert numeric_verdict(text, reference, fallback=fallback) == (reference in forms)
    if "#" not in text and r"\boxed{" not in text and value is not None:  # not cut out of something longer
        before, _, after = text.rpartition(answer)
        assert not (before[-1:].isdecimal() and answer[0].isdecimal()) and not after[:1].isnumeric()
        if answer[-1].isdecimal():
            assert after[:1] != "\u0336" and not (after[:1] in ("_", "\u200d", "\u202e") and after[1:2].isdecimal())
    results = everything(text)
    assert results == everything(text) and all(
        r in ([0.0], [1.0]) for r in results if isinstance(r, list) and len(r) == 1
    )


BUDGET = settings(max_examples=300, derandomize=True, deadline=None)


@BUDGET
@given(st.one_of(NEARLY, JUMBLES))
def test_numbers_are_read_as_by_hand(text):
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
def test_any_completion_is_judged_by_its_answer(text):
    check_completion(text)


@BUDGET
@given(NEARLY, NEARLY)
def test_two_answers_are_equal_whichever_is_the_reference(a, b):
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
def test_what_is_formatted_is_read_back(digits, places, form):
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
    run = subprocess.run([sys.executable, __file__, "-max_total_time=60"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


# -- math-verify -------------------------------------------------------------------------------------------------------

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)

# Wrong for the reference 5, though math-verify by itself takes each for 5, or would if it read on.
TAKEN_FOR_5 = [
    "2=5", "x=2=5", "2=x=5", "y=6=x=5", r"5\text{00}", r"5\text{.5}", r"5\text{!}", r"5\mathrm{i}", r"5\textbf{00}", r"5\mbox{00}", r"5\text{ million}",
    r"5\text{ and a half}", r"5\text{cm}+\frac{1}{2}", r"5\text{ or six}", "5_000", r"6 \fbox{5}", r"6 ( final answer is $5$. I hope", r"6 ( answer: $5$",
    "5} or else 6", "5} 6", "1e999", "0x5", "NaN", r"\infty", "5j", "5!", "5²", "５", "½", "5\u200d5", "5\u0338", "5; 6", "5 6", r"5\pm 1", "5,6", r"\frac{0}{0}", "5<6",
    # guards that what math-verify takes out would open again
    r"6 \f\boxedbox{5}", r"6\phantom{\f\boxedbox{5}}", r"5\te$xt{00}", r"5\te'xt{ or 6}", r"5\tex\!t{ or 6}", r"5\math\displaystylerm{00}", r"5\te\te$xt{00}",
    r"6 \equiv 5", r"1\equiv 6\equiv 5", r"\{6\}=x=5", r"x=\{6\}=5", r"\{6\}=\{5\}", r"5\text{ tenths}", r"5\text{ thousands}", r"5\mathrm{pi}", r"5\text{π}",
    r"5\text{ per cent}", r"5\text{ⁿ}", r"5\text{ 或 6}", r"5\mathrm{c/e}", r"5\mathrm{x}",
]  # fmt: skip
RIGHT_FOR_5 = [
    "5",
    "x=5",
    "2+3=5",
    "f(2)=5",
    r"5\text{ cm}",
    r"5\text{ cm}^2",
    r"5 \mathrm{kg}.",
    r"\sqrt{25}",
    r"\fbox{5}",
    r"\text{5}",
    "x = 10/2 = 5",
    r"\frac{10}{2}",
]
OTHERS = [  # reference, answer, verdict
    *(("0", a, 0.0) for a in (r"1\,000", r"x=1\,000", r"7\;000\text{ m}", "1 000", "12 000 000", r"5\quad 0", "5 .0", r"5\ldots 0", "0x5", "0x10")),
    *(("1000", a, 1.0) for a in (r"1\,000", "1~000", r"1\ 000", r"x=1\,000", r"1,\!000", r"1\,000\text{ m}")), (r"1\,000", "1000", 1.0),
    *(("1000", a, 0.0) for a in (r"1\,00", r"10\,00", r"1\,0000", r"1\,000\,00", "1 000")), ("100", r"1\,00", 0.0),
    *(("57", a, 0.0) for a in ("5'7", "5'7\"", "5$7$", r"5\mathrm{th}7", r"5\displaystyle7", r"5\text{}7")), ("1000", "1'000", 0.0),
    (r"\frac{1}{2}", r"\frac 1 2", 1.0), (r"\frac{3}{2}", "1 1/2", 1.0), ("(1, 2)", r"(1,\,2)", 1.0), ("204_5", "204_5", 1.0), ("5", r"5\mathrm{th}", 1.0),
    (r"3\text{ hours and }20\text{ minutes}", r"3\text{ hours and }50\text{ minutes}", 0.0),
    (r"3\text{ hours and }20\text{ minutes}", r"3\text{ hours and }20\text{ minutes}", 1.0),
    (r"10\text{ million}", "10", 0.0), (r"10\text{ million}", r"10\text{ million}", 1.0), (r"\text{Evelyn}", r"\text{Evelyn}", 1.0),
    (r"x=5\text{ or }x=6", r"x=6\text{ or }x=5", 1.0), (1e300, "10^{300}", 1.0), (1e300, "e+300", 0.0), ("x=2", "3=x=2", 0.0),
    (r"\frac{1}{2004!}", r"x=\frac{1}{2006!}", 0.0), ("5", r"6 \boxed {5}", 0.0), (r"\sqrt{2}", r"3=\sqrt{2}", 0.0), (r"\sqrt{2}", r"x=\sqrt{2}", 1.0), ("e^{-20}", "0", 0.0), (r"\infty", "inf", 1.0), (r"\infty", r"\frac{0}{0}", 0.0),
]  # fmt: skip
ENDLESS = {
    "tower": "9^{9^{9^{9}}}", "tower_of_2": "2^{2^{2^{2^{2^{2}}}}}", "factorial": "100000000!", "factorials": "((9!)!)!", "binomial": r"\binom{10^{9}}{5\cdot10^{8}}",
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n}", "product": r"\prod_{n=1}^{99999999} n", "braces": "{" * 900 + "1" + "}" * 900, "roots": r"\sqrt{" * 200 + "2" + "}" * 200,
    "fractions": r"\frac{1}{" * 150 + "2" + "}" * 150, "bars": "|" * 501 + "1" + "|" * 501, "cosines": r"\cos(" * 100 + "1" + ")" * 100, "power": "(a+b+c+d+e+f)^{200}",
    "matrix": r"\begin{pmatrix}" + r"\\".join(["1 & 2 & 3 & 4 & 5 & 6 & 7 & 8 & 9"] * 30) + r"\end{pmatrix}", "modulo": r"7^{7^{7^{7}}} \mod 10",
    "determinant": r"\det\begin{pmatrix}" + r"\\".join([" & ".join(f"x_{{{i}{j}}}" for j in range(7)) for i in range(7)]) + r"\end{pmatrix}",
    "integral": r"\int_0^{\infty} e^{-x^2} \sin(x^{x^x}) dx", "integrals": r"\int " * 50 + "x" + " dx" * 50, "derivatives": r"\frac{d}{dx}" * 30 + "x^{x^{x}}",
    "limit": r"\lim_{x\to\infty} (1+\frac{1}{x})^{x^{x^{x}}}", "floor": r"\lfloor 10^{10^{10}}\rfloor", "equations": "=" * 1000, "signs": "-" * 1500 + "5", "set": r"\{" + "1," * 400 + r"1\}",
    "megabyte": r"\frac{1}{" * 100_000, "equal_towers": "9^{9^{9^{9}}} = 5",
}  # fmt: skip


@needs_math_verify
def test_math_verify_takes_no_wrong_answer_for_right():
    table = [("5", a, 0.0) for a in TAKEN_FOR_5] + [("5", a, 1.0) for a in RIGHT_FOR_5] + OTHERS
    marked = [
        (reference, form.format(a), right) for reference, a, right in table for form in ("#### {}", r"so \boxed{{{}}}.")
    ]
    marked = [row for row in marked if row[1].startswith("#") or boxable(row[1])]
    references, completions, right = zip(*marked)
    results = math_verify_reward(completions=list(completions), answer=list(references))
    assert results.outcomes == ["ok"] * len(marked), results.error
    assert not [(row, found) for row, found in zip(marked, results) if found != row[2]]


def check_endless(names):
    """Each is wrong, an error or a timeout, and what follows it is judged as ever."""
    good = r"#### \frac{2}{\sqrt{2}}"
    completions = [c for name in names for c in (f"#### {ENDLESS[name]}", good)]
    results = math_verify_reward(completions=completions, answer=[r"\sqrt{2}"] * len(completions))
    for name, value, outcome in zip(names, results[::2], results.outcomes[::2]):
        assert (value, outcome) in ((0.0, "ok"), (None, "timeout"), (None, "error")), name
    assert results[1::2] == [1.0] * len(names)
    return results.outcomes[::2]


@needs_math_verify
def test_math_verify_leaves_endless_answers():
    assert check_endless(["tower", "factorial", "megabyte"]) == ["timeout", "timeout", "error"]


@needs_math_verify
@pytest.mark.slow
def test_math_verify_leaves_every_endless_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_endless(list(ENDLESS))
    results = math_verify_reward(completions=[f"#### {text}" for text in TEXTS], answer=[r"\sqrt{2}"] * len(TEXTS))
    assert set(results) <= {0.0, None} and not list(tmp_path.iterdir())
    math_rewards._pool().map([])  # the pool is as good as before
    check_endless(["tower"])


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
