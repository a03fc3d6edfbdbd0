"""On hostile answers, math-verify accepts no incorrect one, and every endless computation ends at its limit."""

import importlib.util

import pytest

from helpers.hostile_answers import ANSWERS, braces_close
from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards.math import math_verify_reward

if importlib.util.find_spec("math_verify") is None:  # importorskip would import it in this process
    pytest.skip("math-verify is not installed", allow_module_level=True)

# Answers that are not 5, although math-verify by itself reads 5, or would read 5 in the beginning of the answer.
TAKEN_FOR_5 = [
    "2=5", "x=2=5", "2=x=5", "y=6=x=5", r"5\text{00}", r"5\text{.5}", r"5\text{!}", r"5\mathrm{i}", r"5\textbf{00}", r"5\mbox{00}", r"5\text{ million}",
    r"5\text{ and a half}", r"5\text{cm}+\frac{1}{2}", r"5\text{ or six}", "5_000", r"6 \fbox{5}", r"6 ( final answer is $5$. I hope", r"6 ( answer: $5$",
    "5} or else 6", "5} 6", "1e999", "0x5", "NaN", r"\infty", "5j", "5!", "5²", "５", "½", "5\u200d5", "5\u0338", "5; 6", "5 6", r"5\pm 1", "5,6", r"\frac{0}{0}", "5<6",
    # Commands that appear when math-verify removes others.
    r"6 \f\boxedbox{5}", r"6\phantom{\f\boxedbox{5}}", r"5\te$xt{00}", r"5\te'xt{ or 6}", r"5\tex\!t{ or 6}", r"5\math\displaystylerm{00}", r"5\te\te$xt{00}",
    r"6 \equiv 5", r"1\equiv 6\equiv 5", r"\{6\}=x=5", r"x=\{6\}=5", r"\{6\}=\{5\}", r"5\text{ tenths}", r"5\text{ thousands}", r"5\mathrm{pi}", r"5\text{π}",
    r"5\text{ⁿ}", r"5\text{ 或 6}", r"5\mathrm{c/e}", r"5\mathrm{x}",
]  # fmt: skip
EQUAL_TO_5 = [
    "5",
    "x=5",
    "2+3=5",
    "f(2)=5",
    r"5\text{ cm}",
    r"5\text{ cm}^2",
    r"5 \mathrm{kg}.",
    r"\sqrt{25}",
    r"\fbox{5}",
    r"5\text{ per cent}",
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


def test_math_verify_accepts_no_incorrect_answer():
    table = [("5", a, 0.0) for a in TAKEN_FOR_5] + [("5", a, 1.0) for a in EQUAL_TO_5] + OTHERS
    marked = [
        (reference, form.format(a), verdict)
        for reference, a, verdict in table
        for form in ("#### {}", r"so \boxed{{{}}}.")
        if form[0] != "#" or a not in (r"6 \fbox{5}", r"6 \boxed {5}")  # a box after "####" is the last marker
    ]
    marked = [row for row in marked if row[1].startswith("#") or braces_close(row[1])]
    references, completions, _ = zip(*marked)
    results = math_verify_reward(completions=list(completions), answer=list(references))
    assert results.outcomes == ["ok"] * len(marked), results.error
    assert not [(row, found) for row, found in zip(marked, results) if found != row[2]]


def check_endless(names):
    """Checks that each is incorrect, an error or a timeout, and the next answer is correct. Returns the outcomes."""
    good = r"#### \frac{2}{\sqrt{2}}"
    completions = [c for name in names for c in (f"#### {ENDLESS[name]}", good)]
    results = math_verify_reward(completions=completions, answer=[r"\sqrt{2}"] * len(completions))
    for name, value, outcome in zip(names, results[::2], results.outcomes[::2]):
        assert (value, outcome) in ((0.0, "ok"), (None, "timeout"), (None, "error")), name
    assert results[1::2] == [1.0] * len(names)
    return results.outcomes[::2]


def test_math_verify_ends_endless_answers():
    assert check_endless(["tower", "factorial", "megabyte"]) == ["timeout", "timeout", "error"]


@pytest.mark.slow
def test_math_verify_ends_every_endless_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_endless(list(ENDLESS))
    results = math_verify_reward(
        completions=[f"#### {a.text}" for a in ANSWERS.values()], answer=[r"\sqrt{2}"] * len(ANSWERS)
    )
    assert set(results) <= {0.0, None} and not list(tmp_path.iterdir())
    math_rewards._pool().map([])  # the pool still works
    check_endless(["tower"])
