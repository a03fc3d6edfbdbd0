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

from jaxrl_reason.rewards.numeric import extract_answer, is_unit, numeric_verdict, parse_number, shortened
from jaxrl_reason.rewards.pool import Pool, Results

TIMEOUT_S = 2.0  # for one answer: a number takes 1 ms, LaTeX 5 ms
MAX_ANSWER_LENGTH = 2_000  # characters; a longer answer would use up its time, so it is an error and is not read
MAX_WORKERS = 8

# Forms that LaTeX would misread: "1e-7" as Euler's number minus 7, and "1 1/2" as 1.
_EXPONENT = re.compile(r"(?<=[0-9.])[eE]([-+]?[0-9]+)")
_MIXED_NUMBER = re.compile(r"([-+]?[0-9]+) +([0-9]+) ?/ ?([0-9]+)")
_FLOAT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]{1,3}")
# Forms that are not LaTeX: 5_000 is not the number 5 with an index, 1e9999 no product with e, 0x10 no product with x,
# "5 0" no product.
_APART = r"(?:\s|~|\\[,;: ]|\\q?quad|\\[lc]?dots)+"
_NOT_LATEX = re.compile(
    rf"[0-9]_[0-9]{{2}}|[0-9.][eE][-+]?[0-9]{{4}}|(?<![\w.])0[xX][0-9a-fA-F]|(?<!frac )[0-9.]{_APART}[0-9.]"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;: ]|~)[0-9]{3})+(?![0-9])")  # as TeX spaces them
# Commands that math-verify removes anywhere in an answer, and boxes, which it would take for the answer.
_DROPPED = re.compile(r"""\\fbox|\\boxed|\\mathrm\{th\}|\\!\s*|\\text\s*\{\s*\}|\\?\$|["']|\\displaystyle""")
_JOINED = re.compile(rf"[0-9.](?:{_DROPPED.pattern})+[0-9.]")
# math-verify removes everything from the first text to the end as a unit.
_TEXT = re.compile(r"\\(?:mbox|text(?:normal|bf|it|rm)?|math(?:rm|it|bf))\{")
_UNIT = re.compile(rf"{_TEXT.pattern}([^{{}}]*)\}}(?:\^[0-9]|\^?\{{\^?[0-9]\}})?[ .$]*")
_EQUALS = re.compile(r"(?<![\\<>!])=|\\equiv")


def math_verify_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> Results:
    r"""Returns 1.0 if a completion's final answer equals the reference of the column `answer`, else 0.0.

    The final answer follows the last "#### " or is in the last "\boxed{}". A completion is incorrect if it has neither,
    or if math-verify cannot read the answer. Two plain numbers must be exactly equal. An answer is an error if it has
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
            raise _unreadable(answer[rows[0]], rows[0])
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
    if "####" in text or r"\boxed{" in text:
        text = extract_answer(text) or ""
    if not 0 < len(text) <= MAX_ANSWER_LENGTH:
        raise _unreadable(answer, row)
    return text, parse_number(text) is not None


def _unreadable(answer: object, row: int) -> ValueError:
    return ValueError(
        f"Row {row}: math-verify cannot read the reference answer {shortened(answer)}, so no completion can be judged "
        "against it; correct that row's answer."
    )


def _judge(question: tuple[str, str | None]) -> float | None:
    """In a worker, like everything below: returns 1.0 or 0.0; None if the reference cannot be read."""
    from math_verify import verify  # imported here, so that only workers load sympy

    reference, prediction = question
    gold = _read_gold(reference)
    if not gold:
        return None
    if prediction is None:
        return 0.0
    predicted = _read(prediction)
    # The order of the arguments matters: gold first. The pool limits the time; math-verify's own time limit can fail.
    correct = verify(gold, predicted, timeout_seconds=None) and not _differ_exactly(gold[0], predicted[0])
    return float(correct and (prediction == reference or not _contradicts_itself(prediction)))


def _differ_exactly(a, b) -> bool:
    """Returns whether two expressions, or the right-hand sides of two equations, are unequal rational numbers."""
    # math-verify compares the first 15 decimals of a difference, by which 1/2004! equals 1/2006!. Percentages are left
    # to math-verify, which compares them with and without the sign.
    from sympy import Equality, Expr, UnevaluatedExpr

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
    members = [_read(member.strip()) for member in _EQUALS.split(answer)]
    stated = [read[0] for read in members if read and is_stated(read[0])]
    return any(not verify(stated[0], other, timeout_seconds=None) for other in stated[1:])


def _read(answer: str) -> list:
    """Returns the answer as sympy expressions, or as text if it is no expression; empty if it cannot be read."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    while _DROPPED.search(answer):  # repeated, because a removal may create another match
        if _JOINED.search(answer):
            return []
        answer = _DROPPED.sub("", answer)
    answer = _THOUSANDS.sub(lambda number: re.sub(r"[^0-9]", "", number[0]), answer)
    holds_all = extract_answer(rf"\boxed{{{answer}}}") == answer  # false if a brace in the answer closes the box
    mixed = _MIXED_NUMBER.fullmatch(answer)
    if not holds_all or not mixed and _NOT_LATEX.search(answer):
        return []
    if _FLOAT.fullmatch(answer) or parse_number(answer) is not None:
        answer = _EXPONENT.sub(r"\\cdot 10^{\1}", answer)
    elif mixed:
        answer = r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    # Reads the whole box or nothing. By default, math-verify would take any number or formula in it for the answer.
    text = _TEXT.search(answer)
    unit = text and _UNIT.fullmatch(answer, text.start())
    units = text is None or unit is not None and is_unit(unit[1])
    norm = NormalizationConfig(basic_latex=True, units=units, malformed_operators=True, nits=True)
    whole = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=norm)
    return parse(rf"\boxed{{{answer}}}", [whole], parsing_timeout=None, extraction_mode="first_match")


@functools.lru_cache(maxsize=1024)
def _read_gold(reference: str) -> list:
    return _read(reference)


def _warm_up() -> None:
    """Imports sympy and compiles the grammar, which takes longer than the time limit of an answer."""
    logging.disable()  # math-verify logs every answer that it cannot read
    _judge((r"\frac{1}{2}", r"\sqrt{x} + 1"))
