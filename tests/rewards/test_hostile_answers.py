"""On hostile answers, each built-in reward gives the correct verdict in linear time, keeps no state and runs no code.

The answers are in `helpers/hostile_answers.py`.
"""

import collections
import contextlib
from fractions import Fraction
import json
import random
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

from helpers.hostile_answers import (
    ANSWERS,
    braces_close,
    call_all,
    call_many_answers,
    call_reward,
    REFERENCES,
    SUMS,
    UNITS,
)
from jaxrl_reason import metrics
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.math import math_verify_reward
from jaxrl_reason.rewards.numeric import numeric_verdict
from jaxrl_reason.rewards.task_rewards import canonical_answer, judge_reward, strict_reward
from jaxrl_reason.runs.metrics_file import read_metrics, SampleTable
from jaxrl_reason.tasks import evaluation

TEXTS = [answer.text for answer in ANSWERS.values()]
VALUES = sorted(
    {v for a in ANSWERS.values() for v in (a.value, a.last) if v is not None} | {Fraction(1000), Fraction(16)}
)
MULTIPLES = dict(kind="multiple", target=6, low=0, high=99)


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hashes", "box"])
def test_verdicts_on_marked_answers(name):
    form = "So it is:\n#### {}" if name == "hashes" else r"So it is $\boxed{{{}}}$."
    answers = [a for a in ANSWERS.values() if "\n" not in a.text and (name == "hashes" or braces_close(a.text))]
    assert len(answers) > 200
    texts = [form.format(answer.text) for answer in answers]
    for value in VALUES:
        correct = [float(answer.value == value) for answer in answers]
        assert call_reward(accuracy_reward, texts, value) == correct
        assert call_reward(last_number_reward, texts, value) == correct
        if len(str(value)) > 200:  # the text is too long to be a number
            continue
        assert call_reward(accuracy_reward, texts, str(value)) == correct
        mixed = [float(value == Fraction(3, 2) and answer.text == "1 1/2") for answer in answers]
        assert call_reward(judge_reward, texts, str(value)) == [float(a or b) for a, b in zip(correct, mixed)]
        same = [float(answer.text.strip() == str(value)) for answer in answers]
        assert call_reward(strict_reward, texts, str(value)) == same
    assert format_reward(completions=texts) == [float(answer.value is not None) for answer in answers]
    assert call_many_answers(texts, SUMS) == [0.0] * len(texts)
    shown = [answer.text.strip().removeprefix("-") for answer in answers]
    plain = [text.isascii() and text.isdigit() and len(text) < 10 for text in shown]
    assert call_many_answers(texts, MULTIPLES) == [float(p and a.value % 6 == 0) for p, a in zip(plain, answers)]


def test_verdicts_on_unmarked_answers():
    for value in VALUES:
        correct = [float(answer.last == value) for answer in ANSWERS.values()]
        assert call_reward(last_number_reward, TEXTS, value) == correct
        assert call_reward(last_number_reward, [f"It is {text}" for text in TEXTS], value) == correct
        for reward in (accuracy_reward, strict_reward):
            assert call_reward(reward, TEXTS, value) == [0.0] * len(TEXTS)
    assert [last_number_reward.answer_of(text, {}) for text in TEXTS] == [answer.last for answer in ANSWERS.values()]
    assert format_reward(completions=TEXTS) == [0.0] * len(TEXTS)


def test_characters_that_touch_a_digit_are_never_ignored():
    """Rejects texts with signs, separators, marks and invisible characters of all scripts as a whole, without a cut."""
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
def test_ten_thousand_levels_hide_no_answer(opening, closing):
    texts = [opening * 10_000 + answer.text + closing * 10_000 for answer in ANSWERS.values()]
    for text in (*texts[:8], opening * 10_000 + "18" + closing * 10_000, opening * 10_000 + "18"):
        for completion in (text, "#### " + text, rf"\boxed{{{text}}}"):
            assert not numeric_verdict(completion, 18)
            assert (
                call_reward(judge_reward, [completion], "18") == call_reward(strict_reward, [completion], "18") == [0.0]
            )
    boxes = r"\boxed{" * 10_000
    assert numeric_verdict(boxes + "18" + "}" * 10_000, 18) and not numeric_verdict(boxes + "18", 18)


def test_repeated_answers_are_no_number():
    for answer in ANSWERS.values():
        text = f"#### {answer.text} {answer.text} {answer.text}"
        assert not any(numeric_verdict(text, value) for value in VALUES if value != 0), answer


@pytest.mark.parametrize("index", range(len(REFERENCES)))
def test_a_hostile_reference_raises_or_equals_no_hostile_answer(index):
    reference = REFERENCES[index]
    completions = [form.format(text) for text in TEXTS for form in ("#### {}", "{}")]
    for reward in (accuracy_reward, last_number_reward, judge_reward):
        with contextlib.suppress(ValueError):
            assert not any(call_reward(reward, completions, reference))
    with contextlib.suppress(ValueError):  # as texts, "nan" equals "nan"; a missing answer is not "None"
        correct = {c for c, verdict in zip(completions, call_reward(strict_reward, completions, reference)) if verdict}
        assert correct <= {f"#### {reference}"} and reference is not None
    for name in SUMS:
        with contextlib.suppress(ValueError):
            assert not any(call_many_answers(completions, SUMS | {name: reference})), name


def test_a_constraint_that_no_answer_can_satisfy_raises():
    for column, value in [("target", 0), ("target", None), ("low", "1"), ("high", float("nan")), ("kind", ["sum"])]:
        with pytest.raises(ValueError, match=f"^The column '{column}' holds .*correct that row.$"):
            canonical_answer("#### 5", **MULTIPLES | {column: value})


def test_a_missing_reference_raises():
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


# -- no state, no side effects -----------------------------------------------------------------------------------------


def test_results_are_the_same_in_any_order_and_from_any_thread():
    texts = [form.format(text) for text in TEXTS for form in ("{}", "#### {}", r"\boxed{{{}}}")]
    first = {text: call_all(text) for text in texts}
    found = [None] * 8

    def judge(index):
        order = random.Random(index).sample(texts, len(texts))
        found[index] = {text: call_all(text) for text in order} == first

    threads = [threading.Thread(target=judge, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


_watched: list[str] | None = None  # the audit events of this thread while it is watched; hooks cannot be removed
_watcher = threading.get_ident()


def _watch(event, _):
    if _watched is not None and threading.get_ident() == _watcher:
        _watched.append(event)


def test_no_reader_evaluates_imports_opens_or_starts_anything():
    global _watched
    call_all("#### 18")  # the first call may import
    sys.addaudithook(_watch)
    try:
        _watched = []
        compile("1", "", "eval")
        assert _watched == ["compile"]  # the hook records events
        _watched = []
        for text in TEXTS:
            for completion in (text, "#### " + text, rf"\boxed{{{text}}}"):
                call_all(completion)
        assert not {
            e
            for e in _watched
            if e.startswith(("compile", "exec", "import", "open", "os.", "subprocess", "pickle", "socket"))
        }
    finally:
        _watched = None


# -- votes and files ---------------------------------------------------------------------------------------------------


def test_hostile_answers_vote_only_for_themselves():
    votes = [evaluation.final_answer(f"#### {text}", {}) for text in TEXTS]
    lines = [text.partition("\n")[0].strip() for text in TEXTS]
    for vote, line, answer in zip(votes, lines, ANSWERS.values(), strict=True):
        assert isinstance(vote, str) if answer.value is None and line else vote == answer.value, line
    texts_of = collections.defaultdict(set)
    for vote, line in zip(votes, lines):
        if isinstance(vote, str):
            texts_of[vote].add(line)
    twins = [texts for texts in texts_of.values() if len(texts) > 1]
    assert twins == [{"-", r"\$-\$"}, {"--5", "-−5"}, {"1 1/2", "1½"}]

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
    for _ in range(2):  # the second time, the table reads and cuts the existing file
        with SampleTable(tmp_path, resume_step=0) as table:
            table.write(1, texts, [[text] for text in texts], rewards={"accuracy": ones * np.nan}, **columns)
    lines = (tmp_path / "samples.jsonl").read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    found = read_metrics(tmp_path / "samples.jsonl")
    assert [line["completion"] for line in found] == [line["prompt"] for line in found] == texts
    assert [json.loads(line) for line in lines] == found and {line["rewards"]["accuracy"] for line in found} == {None}


# -- time and memory ---------------------------------------------------------------------------------------------------


def grown(name, size):
    """Returns texts of about `size` characters that repeat one unit."""
    body = (UNITS[name] * (size // len(UNITS[name]) + 1))[:size]
    return [body, "#### " + body, rf"\boxed{{{body}}}", r"\boxed{" + body, body + "x####"]


def seconds(texts):
    """Returns the CPU time of all readers."""
    begin = time.process_time()
    for text in texts:
        call_all(text)
    return time.process_time() - begin


@pytest.mark.parametrize("name", UNITS)
def test_time_is_linear_in_the_length(name):
    small, large = (seconds(grown(name, size)) for size in (8_000, 32_000))
    # Five texts and twelve readers take at most one second per megabyte. A quadratic step would take 16 times as long.
    assert large < 8 * small + 0.05 and large < 5 * 12 * 0.032


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_time_is_linear_up_to_a_megabyte(name):
    small, large = (seconds(grown(name, size)) for size in (250_000, 1_000_000))
    assert large < 7 * small + 0.5 and large < 5 * 12


@pytest.mark.parametrize("name", ["digits", "open", "python_groups", "joined", "minuses", "fractions", "signs"])
def test_memory_is_a_few_copies_of_the_text(name):
    texts = grown(name, 20_000)
    tracemalloc.start()
    try:
        for text in texts:
            call_all(text)
        assert tracemalloc.get_traced_memory()[1] < 12 * sys.getsizeof(texts[0]) + 50_000
    finally:
        tracemalloc.stop()
