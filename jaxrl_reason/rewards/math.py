r"""Verdicts on LaTeX answers by math-verify: "\frac{\sqrt{3}}{3}" is "\frac{1}{\sqrt{3}}", and "x=5" is "5".

Plain numbers are compared exactly in this process (`numeric`). Worker processes (`pool`) judge everything else, because
math-verify computes a model's expressions: "9^{9^{9^9}}" would not return, and nothing in its process could stop it.
"""

from collections.abc import Sequence
import functools
import importlib.util
import logging
import math
import numbers
import os
import re

from jaxrl_reason.rewards.answers import extract_answer, TEXT_GROUP, without_announcement
from jaxrl_reason.rewards.latex import (
    differ_in_brackets,
    is_broken,
    is_phrase,
    is_sentence,
    normalised,
    same_words,
    states_base_ten,
    with_capital_digits,
    with_distinct_case,
    without_bases,
    without_name,
)
from jaxrl_reason.rewards.numeric import choice, numeric_verdict, parse_number, shortened
from jaxrl_reason.rewards.pool import Pool, Results
from jaxrl_reason.rewards.times import is_time, same_time

TIMEOUT_S = 2.0  # for one answer: a number takes 1 ms, LaTeX 5 ms
MAX_ANSWER_LENGTH = 2_000  # characters; a longer answer would use up its time, so it is an error and is not read
MAX_WORKERS = 8

_EQUALS = re.compile(r"(?<![\\<>!])=|\\equiv")


def math_verify_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> Results:
    r"""Returns 1.0 if a completion's final answer equals the reference of the column `answer`, else 0.0.

    `extract_answer` finds the final answer. A completion is incorrect if it has none, or if math-verify cannot read it.
    Two plain numbers must be exactly equal. Number bases and kinds of brackets are part of an answer. An answer is an error if it has
    more than `MAX_ANSWER_LENGTH` characters or if the verifier dies on it. It is a timeout if the verifier takes longer
    than `TIMEOUT_S`. Neither has a reward. References are numbers, LaTeX, or worked solutions that end in "#### x" or
    "\boxed{x}".

    Raises ValueError if a reference cannot be read, a fault in the data, and ImportError without math-verify.
    """
    results = Results([None] * len(completions), ["error"] * len(completions))
    questions: dict[tuple[str, str | None], list[int]] = {}  # a group often repeats an answer: each is judged once
    for row, (completion, gold) in enumerate(zip(completions, answer, strict=True)):
        reference, is_number = _read_reference(gold, row)
        prediction = extract_answer(completion)
        if is_number and (prediction is None or parse_number(prediction) is not None):
            results[row], results.outcomes[row] = float(numeric_verdict(completion, gold)), "ok"
        elif prediction is not None and len(prediction) > MAX_ANSWER_LENGTH:
            too_long = f"an answer has {len(prediction)} characters"
            results.error = f"{too_long}, more than the {MAX_ANSWER_LENGTH} that are read"
        else:
            questions.setdefault((reference, prediction), []).append(row)
    if not questions:
        return results
    verdicts = _pool().map(questions)
    results.error = verdicts.error or results.error
    for rows, verdict, outcome in zip(questions.values(), verdicts, verdicts.outcomes):
        if outcome == "none":
            raise ValueError(f"Row {rows[0]}: {_unreadable(answer[rows[0]])}")
        for row in rows:
            results[row], results.outcomes[row] = verdict, outcome
    return results


def require_math_verify() -> None:
    """Raises ImportError if math-verify is not installed. Imports nothing."""
    if importlib.util.find_spec("math_verify") is None:
        needed = "The reward 'math_verify' needs the package math-verify, which is not installed"
        raise ImportError(f"{needed}: pip install 'jaxrl_reason[math]'.")


@functools.cache
def _pool() -> Pool:
    require_math_verify()
    return Pool(_judge, workers=min(os.cpu_count() or 1, MAX_WORKERS), timeout_s=TIMEOUT_S, initializer=_warm_up)


def _read_reference(answer: str | int | float, row: int) -> tuple[str, bool]:
    """Returns (the reference as text, whether it is a plain number)."""
    if isinstance(answer, numbers.Rational) or isinstance(answer, numbers.Real) and math.isfinite(answer):
        try:
            return str(answer), True
        except ValueError as e:  # Python converts integers of at most 4300 digits
            too_long = f"Row {row}: the reference answer is too long a number: {e}"
            raise ValueError(f"{too_long}; correct that row's answer.") from None
    text = answer.strip() if isinstance(answer, str) else ""
    text = extract_answer(text) or without_announcement(text)  # a worked solution, or "The answer is 18."
    if not 0 < len(text) <= MAX_ANSWER_LENGTH:
        raise ValueError(f"Row {row}: {_unreadable(answer)}")
    return text, parse_number(text) is not None


def _unreadable(answer: object) -> str:
    return (
        f"math-verify cannot read the reference answer {shortened(answer)}, so no completion can be judged "
        "against it; correct that row's answer."
    )


def reference_faults(answer: Sequence[str | int | float]) -> list[str | None]:
    """Returns, for each reference, why no completion can be judged against it, or None if it can be read."""
    faults: list[str | None] = [None] * len(answer)
    questions: dict[tuple[str, None], list[int]] = {}
    for row, gold in enumerate(answer):
        try:
            reference, is_number = _read_reference(gold, row)
        except ValueError as error:
            faults[row] = str(error).removeprefix(f"Row {row}: ")
        else:
            if not is_number:
                questions.setdefault((reference, None), []).append(row)
    outcomes = _pool().map(questions).outcomes if questions else []
    for rows, outcome in zip(questions.values(), outcomes):
        for row in rows:
            faults[row] = None if outcome == "ok" else _unreadable(answer[row])
    return faults


def _judge(question: tuple[str, str | None]) -> float | None:
    """In a worker, like everything below: returns 1.0 or 0.0; None if the reference cannot be read."""
    from math_verify import verify  # imported here, so that only workers load sympy

    reference, prediction = question
    same = None if prediction is None else same_time(reference, prediction)
    if same is not None or is_time(reference):
        return float(same is True)
    gold_latex = normalised(reference)
    if is_sentence(reference) or not _can_be_matched(gold_latex):
        return None
    if prediction is None:
        return 0.0
    letter, chosen = choice(reference, certain=True), choice(prediction, with_text=True)
    if letter and chosen:
        return float(letter == chosen)
    words = same_words(reference, prediction)
    if words is not None:
        return float(words)
    gold_text, predicted_text = with_capital_digits(reference, prediction)
    gold_latex = normalised(gold_text)
    latex = normalised(predicted_text)
    # The question may name the base, so an answer may leave it out.
    if latex == without_bases(latex) and not states_base_ten(prediction):
        gold_latex = without_bases(gold_latex)
    gold_latex, latex = with_distinct_case(gold_latex, latex)
    gold, predicted = _parse_gold(gold_latex), _parse(latex)
    if any(read and isinstance(read[0], str) for read in (gold, predicted)):
        gold_latex, latex, gold, predicted = _without_names(gold_latex, latex, gold, predicted)
    if not gold or not predicted:
        return 0.0
    # The order of the arguments matters: gold first. The pool limits the time; math-verify's own time limit can fail.
    correct = verify(gold, predicted, timeout_seconds=None) and not _differ_exactly(gold[0], predicted[0])
    if not correct or differ_in_brackets(gold_latex, latex):
        return 0.0
    return float(latex == gold_latex or not _contradicts_itself(latex))


def _without_names(gold_latex: str, latex: str, gold: list, predicted: list) -> tuple[str, str, list, list]:
    """Returns a reference, an answer and both as read, without the names of values that make them text, see `without_name`."""
    is_text = lambda read: bool(read) and isinstance(read[0], str)
    gold_value = without_name(gold_latex, latex) if is_text(gold) else gold_latex
    value = without_name(latex, gold_latex) if is_text(predicted) else latex
    return gold_value, value, _parse_gold(gold_value), _parse(value)


def _can_be_matched(latex: str) -> bool:
    """Returns whether an answer can equal a normalised reference: math-verify reads it, or it is text that is not cut off."""
    from sympy import nan, zoo

    gold = _parse_gold(latex)
    if not gold or isinstance(gold[0], str):
        return bool(gold) and (is_phrase(latex) or not is_broken(latex))
    return not gold[0].has(nan, zoo)


def _differ_exactly(a, b) -> bool:
    """Returns whether two expressions are unequal rational numbers, or two equations certainly not the same.

    Of equations, the right sides count if the left sides are equal; polynomials must be multiples of each other.
    """
    # math-verify compares the first 15 decimals of a difference, by which 1/2004! equals 1/2006!. Percentages are left
    # to math-verify, which compares them with and without the sign.
    from sympy import cancel, Equality, Expr, nsimplify, UnevaluatedExpr

    if isinstance(a, Equality) and isinstance(b, Equality) and a.lhs != b.lhs:  # x + y = 3 and x + y - 3 = 0
        if not all(isinstance(side, Expr) for x in (a, b) for side in (x.lhs, x.rhs)):
            return False
        left, right = (nsimplify((x.lhs - x.rhs).doit(), rational=True) for x in (a, b))
        if not (left.is_polynomial() and right.is_polynomial() and right.free_symbols):
            return False
        return not cancel(left / right).is_number
    a, b = (x.rhs if isinstance(x, Equality) else x for x in (a, b))  # "x = 1/2006!"
    if a == b or not all(isinstance(x, Expr) and not x.has(UnevaluatedExpr) for x in (a, b)):
        return False
    a, b = a.doit(), b.doit()
    return bool(a.is_Rational and b.is_Rational and a != b)


def _contradicts_itself(answer: str) -> bool:
    """Returns whether an answer equates different numbers or sets, like "2 = x = 5". math-verify takes the last."""
    from math_verify import verify
    from sympy import Set

    is_stated = lambda x: getattr(x, "is_number", False) or isinstance(x, Set) and not x.free_symbols
    members = [_parse(normalised(member)) for member in _EQUALS.split(answer)]
    stated = [read[0] for read in members if read and is_stated(read[0])]
    return any(not verify(stated[0], other, timeout_seconds=None) for other in stated[1:])


def _parse(latex: str) -> list:
    """Returns a normalised answer as sympy expressions, or as text if it is no expression; empty if it has no meaning."""
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import convert_to_pct
    from math_verify import LatexExtractionConfig, parse
    from sympy import Equality, Expr

    # Reads the whole box or nothing: a brace in the answer must not close the box. By default, math-verify would take
    # any number or formula in it for the answer, and remove letters as units.
    if not latex or extract_answer(rf"\boxed{{{latex}}}") != latex:
        return []
    if is_phrase(latex):
        return ["".join(TEXT_GROUP.sub(r"\1", latex).casefold().split())]
    if latex.endswith(r"\%"):  # some versions of the grammar do not know the sign
        value, *_ = _parse(latex.removesuffix(r"\%")) or [None]
        if isinstance(value, Equality) and isinstance(value.rhs, Expr):  # x = 50\%
            return [value.func(value.lhs, convert_to_pct(value.rhs), evaluate=False), latex]
        return [convert_to_pct(value) if isinstance(value, Expr) else latex, latex]
    norm = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    whole = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=norm)
    found = parse(rf"\boxed{{{latex}}}", [whole], parsing_timeout=None, extraction_mode="first_match")
    return ["".join(found[0].split())] if found and isinstance(found[0], str) else found


@functools.lru_cache(maxsize=1024)
def _parse_gold(latex: str) -> list:
    return _parse(latex)


def _warm_up() -> None:
    """Imports sympy and compiles the grammar, which takes longer than the time limit of an answer."""
    logging.disable()  # math-verify logs every answer that it cannot read
    _judge((r"\frac{1}{2}", r"\sqrt{x} + 1"))
