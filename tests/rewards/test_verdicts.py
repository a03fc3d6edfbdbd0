"""Tests tables of verdicts for the statement of an answer in a completion, and for equal spellings of answers."""

import importlib.util

import pytest

from helpers.hostile_answers import call_reward
from jaxrl_reason.rewards.answers import extract_answer, plain, split_unit
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.latex import normalised
from jaxrl_reason.rewards.math import math_verify_reward, reference_faults
from jaxrl_reason.rewards.task_rewards import judge_reward, strict_reward

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)

# Completions whose answer is 18, for every reward that compares with a reference.
STATES_18 = [
    "so \\boxed{18}\n\n#### Check\n9*2 = 18.", "\\boxed{18}\n#### Step 2", "\\boxed{18}\n#### Verification: 9*2 = 17", "#### 18\n\n#### Check", "#### 18\n##### 5",
    "#### 18\n#### 2 ways to check\n", "\\boxed{18}\n### 5", "\\boxed{18}\n##### 5", "\\boxed{18}\n########5", "#### **18**", "#### __18__", "#### *18*", "#### ***18***",
    "####18", "####\t18", "#### 18 ####", "#### 18\n####", "####\n#### 18", r"\boxed {18}", "\\boxed\n{18}", r"\boxed 18", r"$\boxed 18$", r"\boxed18.", r"so $\boxed 18$.", r"\fbox{18}",
    r"\fbox {18}", r"\fbox 18", r"\boxed{\fbox{18}}", r"\boxed{\boxed 18}", r"\boxed{ \boxed{18} }", r"\boxed{**18**}", r"\boxed{18} and I put it in \boxed{}", "#### 18\n\\boxed{ }",
    r"\boxed{17}, no: \boxed{18}", "\\boxed{17}\n#### 18", "#### 17\n\\boxed{18}", r"\\boxed{18}", r"\boxed{18} as asked, in \boxed", "\\boxed{18}\n#### 检查", "\\boxed{18}\n#### **Check:** done",
    "#### **18**.", r"\boxed{18}" + "\n#### a", "\\boxed{18}\n#### I", "\\boxed{18}\n#### Q.E.D.", "#### 18\n#### A", "#### 18\n#### (a)", "#### 18\n#### Q. E. D.",
    "#### Answer: 18", "#### **Answer:** 18", "#### **Answer**: 18", "#### The answer is 18.", "#### **The answer is 18.**", "#### Final answer: **18**.", "#### The final answer is: 18",
    "**#### 18**", "__#### 18__", "so **#### 18**",
]  # fmt: skip
DO_NOT_STATE_18 = [
    "##### 18", "### 18", "#### Check\n18", r"\boxed{17}" + "\n#### Check\n18", r"\boxed{18} no: \boxed{17", r"\boxed{6 \fbox{18}}", r"\boxed{17 \boxed{18}}", r"\boxedx{18}", r"\fboxes{18}",
    "#### 18\n#### 17", r"\boxed{18} or \fbox{17}", r"\boxed and 18", "#### Step 18", r"\boxed{18", r"\boxed 18 \boxed 17", "#### **18", "18",
    "#### Answer: 17", "#### Answer:\n18", "#### The answer is not 18", "#### 17\n#### A", "#### **18** or **19**.", "**#### 17**",
]  # fmt: skip


@pytest.mark.parametrize("completion", STATES_18)
def test_an_answer_in_any_marker_is_found_by_every_reward(completion):
    assert extract_answer(completion) == "18"
    for reward in (accuracy_reward, last_number_reward, strict_reward, judge_reward):
        assert call_reward(reward, [completion], "18") == [1.0], reward
        assert call_reward(reward, ["#### 18"], "18") == [1.0]
    # The completion can be the reference.
    assert call_reward(accuracy_reward, ["#### 18", "#### 17"], f"Some work. {completion}") == [1.0, 0.0]


@pytest.mark.parametrize("completion", DO_NOT_STATE_18)
def test_what_is_no_answer_is_not_taken_for_one(completion):
    for reward in (accuracy_reward, strict_reward, judge_reward):
        assert call_reward(reward, [completion], "18") == [0.0], reward


def test_words_are_an_answer_only_if_there_is_nothing_better():
    assert extract_answer("#### Evelyn\n") == "Evelyn"
    assert extract_answer("#### Evelyn\n#### 5 apples\n#### Bob") == "5 apples"
    assert extract_answer("#### 5\n#### 6 apples") == "5"
    assert extract_answer("#### C\n#### Check") == "C" and extract_answer("#### C\n#### Q.E.D.") == "C"
    assert extract_answer("#### C\n#### 2 ways to check") == "C" and extract_answer("#### Q.E.D.") == "Q.E.D."
    assert extract_answer("#### Answer: C") == "C" and extract_answer("#### Answer") == "Answer"
    assert extract_answer("#### sqrt(2)\n#### Check") == "sqrt(2)" and extract_answer("#### x = 2 or x = 3") is not None
    assert extract_answer("It is 18.\n#### Check", fallback="last_number") == "18"
    assert extract_answer("It is 18.\n#### 17 apples", fallback="last_number") == "17 apples"


def test_headings_are_no_markers_for_the_format():
    good = [
        "so \\boxed{18}\n\n#### Check\n9*2 = 18.",
        "##### Plan\n#### 18",
        r"\fbox{18}",
        r"\boxed 18",
        "#### **18**",
        "\\boxed{18}\n#### Q.E.D.",
        "\\boxed{18}\n#### I",
    ]
    bad = [
        "#### 18\n\\boxed{18}",
        r"\boxed{18} \fbox{18}",
        "#### Check",
        "#### 18\n#### Check",
        "##### 18",
        "#### 1\n#### 2",
    ]
    assert format_reward(completions=good) == [1.0] * len(good)
    assert format_reward(completions=bad) == [0.0] * len(bad)


PLAIN = {
    r"$ \sqrt{2} $.": r"\sqrt{2}", r"$\displaystyle\pi$.": r"\pi", r"\[ x \]": "x", r"\(x\).": "x", "$$x$$": "x", "$x.$": "x", r"\displaystyle 18": "18", r"\text{18}": "18",
    r"\,x\,": "x", r"x~\ ": "x", "~5": "~5", r"\text{}x": "x", "甲。": "甲", "`x`": "x", r"\!x\!": "x", "$18": "$18", "$5$ and $6$": "$5$ and $6$", r"\(5\) or \(6\)": r"\(5\) or \(6\)",
    "1, 2, ...": "1, 2, ...", r"\displaystyles": r"\displaystyles", "": "", ".": "", "$$": "", r"\text{a}\text{b}": r"\text{a}\text{b}", r"\quad x": "x", r"\textstyle\frac12": r"\frac12",
    "{18}": "18", "{1,2}": "{1,2}", "{1}{2}": "{1}{2}", '"x"': "x", "'x'": "x", "**x**.": "x", "**$x$**.": "x", r"\mathbf{\frac{1}{2}}": r"\frac{1}{2}", r"\text{\{1\}}": r"\{1\}",
    r"\mathbf{a}+\mathbf{b}": r"\mathbf{a}+\mathbf{b}", r"\textbf{$x$}": "x", r"{\rm cm}": "cm", r"\mathrm{a": r"\mathrm{a", r"\text{\}": r"\text{\}", "f'(x)": "f'(x)",
}  # fmt: skip


@pytest.mark.parametrize("answer", PLAIN)
def test_what_surrounds_an_answer_is_taken_away(answer):
    assert plain(answer) == PLAIN[answer]
    assert plain(plain(answer)) == plain(answer)


# (answer, reference, verdict of `accuracy`)
ACCURACY = [
    *((a, "18", True) for a in (
        r"18\,\text{cm}", r"18\ \mathrm{km/h}", r"18\;\mathrm{cm}", r"18~\text{cm}", r"18 \mathrm{~cm}", r"18\mathrm{~cm}.", r"18\text{ cm}^2", r"18\text{ cm}^{2}", r"18\,\mathrm{m/s^2}",
        r"18 \mathrm{~km} / \mathrm{h}", r"18\,\mathrm{kg}\cdot\mathrm{m}", r"18\,\mathrm{km\,h^{-1}}", r"18\,\textrm{cm}", r"18\mbox{ cm}", r"18\operatorname{cm}", r"18^\circ", r"18^{\circ}",
        r"18^{\circ}\text{C}", "18\u00b0", r"18\degree", r"\$18\text{ dollars}", r"18\text{ units}", r"18\text{ square units}", r"$18\,\text{cm}$.", r"\displaystyle 18", r"$\displaystyle 18$", r"\(18\)",
        r"\[18\]", r"$ 18 $", "$$18$$.", r"\text{18}", r"\textbf{18}", r"\mathbf{18}", r"18\!", r"\,18", "18。", "`18`", r"\text{18 }", r"36/2\text{ cm}", r"\frac{36}{2}\,\text{cm}", r"18\text{ 元}",
        "{18}", r"\displaystyle{18}", '"18"', "'18'", "18 cm", "18 km/h", "18 dollars", r"18\,{\rm cm}", r"\mathrm{18\,cm}", r"\text{18 cm}", "18cm", "**18**.", r"\mathbf{\frac{36}{2}}",
        "18 cm^2", "18 square feet", "18€", "18 €", "€18", "€ 18", "£18", "18 euros", "18 USD", "18 °C", "18°F", "18 degrees Celsius", "18 cm²", "18 miles per hour", "18 dollars/day",
        "18 kWh", r"18\text{ €}", r"\underline{18}", r"\bm{18}", r"\color{red}{18}", r"\textcolor{red}{18}", r"\bf 18", r"\begin{equation}18\end{equation}", r"$\$18$", r"$\$18$.", r"\(\$18\)", r"$\$18.00$",
    )),
    *((a, "18", False) for a in (
        r"18\text{ million}", r"18\text{ and a half}", r"18\,\text{00}", r"18\,000", r"18\,\mathrm{e}", r"18\mathrm{e^2}", r"18\mathrm{x}", r"18\text{ cm}\text{ cm}", r"18\text{ dozen}", r"18\text{ if }x",
        r"18\text{ or }19", r"18^2", r"18^{\circ}2", r"x\,\text{cm}", "17", r"$18$ and $19$", r"\text{18}\text{00}", r"18\text{ is even}", "18m", "18 m", "18 million dollars", "18 apples", "{1}8", "'18", "17 cm", "18 19 cm", r"18\text{ prime numbers}", "18..", "C", "18 eggs", "18x", "18 x", "18 1/2", "18 or 19",
        "18 m²", "18 h", "18 € or 19 €", "18 per day", "18 cm per million", "€1 8", "€€18", r"$\$18\$19$", r"\$-\$18", "18 degrees Kelvin or 19", "18 dozen",
    )),
    ("-€18", "-18", True), ("-€18", "18", False), ("18", "18 €", True), ("18 cm", "18 €", True), ("18", r"$\$18$", True), ("18", "The answer is 18.", True), ("17", "The answer is $18$.", False),
    *((a, "50%", True) for a in (r"50\text{ percent}", r"50\,\text{percent}", r"50\text{\%}", r"50\,\%", r"50\text{ per cent}", r"50 \%", r"50\text{ pct}", "0.5", "50", "50 percent", "50 pct")),
    ("50 percent", "50", True), ("50 percent", "1/2", True), ("50", "50 percent", True), ("50 percentage points", "50", False), ("18", "18 cm", True), ("18", "**18**.", True),
    *((a, "1/2", True) for a in (r"\mathbf{\frac{1}{2}}", r"\boldsymbol{\dfrac{1}{2}}", r"\textbf{$\frac{1}{2}$}", r"\mathrm{\frac{1}{2}}")),
    *((r"50\text{ percent}", reference, True) for reference in ("50", "0.5", "1/2", r"50\text{ percent}", "50%")),
    (r"50\text{ percent}", "5000", False), (r"50\text{ percentage points}", "50%", False), (r"0.5\text{ percent}", "50%", False),
    *((a, "C", True) for a in ("C", "C.", "(C)", "(C).", "C)", "C:", r"\text{C}", r"\textbf{(C)}", r"\mathrm{C}", r"(\text{C})", "$C$", "c", r"\text{C.}", "(C) 18", r"\textbf{(C)}\ 18", "C) 18", r"(C) \sqrt{2}", "Option C", "option (C)", "Choice C.", "**C**", "**C**.", r"\textbf{(C) } 18", "C. 18", "C: 18 cm", r"\text{C. 18 cm}", r"C.\ \sqrt{2}")),
    *((a, "C", False) for a in ("D", "CC", "C 5", "C, D", "5", "", "Choice", "K", "(C) or (D)", "(C) and 5", "(C), (D)", "(C) D", "(C)(D)", "\u0131", "C.18", "C. or D.", "C. D", "D. 18", "(D) 18", "Option D", "Option 5")),
    ("e", "E", True), ("E", "(e)", True), ("E", "Option e", True), ("I", "i)", True), ("J", "J", True), ("I", "e:", False),
    *((a, reference, v) for reference in ("c", "(c)", "**C**", "**C**.") for a, v in (("C", True), ("c", True), ("(c)", True), ("(C) 18", True), ("D", False))),
    *(("C.", reference, True) for reference in ("(C)", "C.", r"\text{C}", r"so \boxed{C}", "thus\n#### C", r"\boxed{\textbf{(C)}}")),
    ("18", r"$18$.", True), ("18", r"18\,\text{cm}", True), ("18", r"\[18\]", True), ("18", r"It is \fbox{18}.", True), ("18", "\\boxed{18}\n#### Check", True), ("18", r"\boxed 18", True),
]  # fmt: skip


def test_accuracy_reads_units_wrappings_and_choices():
    for form in ("#### {}", r"It is \boxed{{{}}}."):
        for reward in (accuracy_reward, last_number_reward):
            found = [bool(call_reward(reward, [form.format(a)], reference)[0]) for a, reference, _ in ACCURACY]
            assert not [row for row, verdict in zip(ACCURACY, found) if row[2] is not verdict and row[0]], reward


@pytest.mark.parametrize(
    "reference", ["k", "K", "(C) or (D)", "CD", "C or D", "x", "e", "i", "j.", "$e$", "18 eggs", "18 m"]
)
def test_a_letter_that_is_no_choice_is_refused(reference):
    with pytest.raises(ValueError, match="is not a number"):
        accuracy_reward(completions=["#### C"], answer=[reference])


def test_units():
    assert split_unit(r"3\sqrt{2}\,\text{cm}^2") == (r"3\sqrt{2}", False)
    assert split_unit(r"\sqrt{2}\text{ percent}") == (r"\sqrt{2}", True)
    for text in (
        r"5\text{ million}",
        r"\text{cm}",
        r"x=\text{甲}",
        r"1,\text{cm}",
        r"5\text{ cm}+1",
        r"n\text{ is odd}",
    ):
        assert split_unit(text) == (text, False)


# (answers, references, verdict of `math_verify`): each answer against each reference
MATH = [
    # Blanks and marks around an answer.
    ([r"\displaystyle \frac{\sqrt{3}}{2}", r"$\displaystyle\frac{\sqrt{3}}{2}$", r"\frac{\sqrt{3}}{2}\!", r"\text{}\frac{\sqrt{3}}{2}", r'"\frac{\sqrt{3}}{2}"', r"\,\frac{\sqrt3}{2}\ "],
     [r"\frac{\sqrt{3}}{2}", r"$ \frac{\sqrt{3}}{2} $", r"$\dfrac{\sqrt{3}}{2}$.", r"\[ \frac{\sqrt{3}}{2} \]"], 1),
    ([r"$ \sqrt{2} $", r"\(\sqrt{2}\)", r"\[\sqrt{2}.\]", r"\sqrt2", r"\sqrt 2", r"$\sqrt{2}$.", r"\sqrt{2}。", "$$\\sqrt{2}$$", r"**$\sqrt{2}$**"],
     [r"\sqrt{2}", r"$\sqrt{2}$.", r"\[\sqrt{2}\]", r"\[ \sqrt{2} \].", r"\( \sqrt{2} \)", r"so \boxed {\sqrt{2}}", r"so \fbox{\sqrt{2}}.", "Work.\n#### $\\sqrt{2}$.", r"$$\sqrt{2}.$$"], 1),
    ([r"\displaystyle 18", r"$ 18 $", r"18\!", r"\[18\]", r"18\,\text{cm}", r"\text{18}", r"18.0", r"\sqrt{324}"], ["18", "$18$.", r"\(18\)", r"18\,\text{cm}", 18], 1),
    ([r"\displaystyle 19", r"\displaystyle 1 8", r"1\displaystyle8", r"1\!8", r'1"8', "1$8$"], ["18"], 0),
    (["x^2", r"$ x^2 $", "x^{2}", "x x", r"x \cdot x"], ["$ x^2 $", "x^2", "$x^2$.", r"\[x^2\]"], 1),
    (["x+1", "1+x", r"$x + 1$.", r"\displaystyle x+1"], ["$x+1$.", "x+1.", r"\[x+1.\]"], 1),
    ([r"\pi", "π", r"$\pi$"], [r"$\pi$.", r"\pi", "π"], 1), (["3.14"], [r"$\pi$."], 0),
    (["(1,2)", r"(1,\,2)", r"\left(1,2\right)", "$(1, 2)$."], ["$(1,2)$.", "(1,2)", r"\((1,2)\)."], 1), (["(2,1)", "(1,3)"], ["$(1,2)$."], 0),
    ([r"\frac13", r"\frac1 3", r"\frac 1 3", r"\frac 13", r"\tfrac{1}{3}", "1/3"], [r"\frac{1}{3}", r"\frac1 3"], 1), (["0.333333", r"\displaystyle 0.333333", r"0.333333\,\text{cm}"], [r"\frac{1}{3}", "1/3"], 0),
    ([r"\sqrt{2}", r"$\sqrt{2}$,", r"\sqrt{2};"], [r"$\sqrt{2}$,", r"$\sqrt{2}$;", r"$\sqrt{2}$ .", r"\(\sqrt{2}\),"], 1), (["1,2", "1, 2,"], ["1,2.", "2, 1"], 1),
    # A digit next to a subscript or a power.
    ([r"\log_2 3", r"\log_{2}3", r"\log_2{3}", r"\log_{2} 3", r"\log_2\,3", r"\log_ 2 3", r"\frac{\ln 3}{\ln 2}"], [r"\log_2 3", r"\log_{2}3"], 1),
    ([r"\log_3 2", r"\log_2 5", r"\log_{23}", "3"], [r"\log_2 3"], 0), ([r"\log_2 3.5"], [r"\log_{2}3.5", r"\log_2{3.5}"], 1), ([r"\log_2 3.5"], [r"\log_2 3"], 0), ([r"\log_2 10"], [r"1+\log_2 5"], 1),
    ([r"2\log_3 2", r"\log_3 4"], [r"2\log_3 2", r"2\log_{3}2"], 1), ([r"\frac12\log_3 7", r"\frac{\log_3 7}{2}", r"\log_3\sqrt{7}", r"\frac1 2\log_3 7"], [r"\frac12\log_3 7"], 1),
    (["x^2 3", "3x^2", r"x^{2}\cdot 3"], ["x^2 3", "3x^2"], 1), (["x^{23}", "x^2"], ["x^2 3"], 0), (["a_1 2", "2a_1", "2a_{1}"], ["a_1 2"], 1), (["a_{12}", "a_1"], ["a_1 2"], 0),
    ([r"\sqrt2 3"], [r"3\sqrt{2}"], 1), ([r"\sqrt2 3"], [r"\sqrt{23}"], 0), ([r"\binom5 2", r"\binom{5}{2}", "10"], [r"\binom 5 2", r"\dbinom{5}{2}"], 1), (["5 0", "5^1 0", r"5\,0"], ["50", "0"], 0),
    # Number bases.
    (["1010_2", "1010_{2}", r"1010_{\text{two}}", r"1010_\text{two}", r"(1010)_2", r"1010\text{ (base 2)}", "1010 base 2", "1010_{two}", r"x = 1010_2", "1010"], ["1010_2", "1010_{2}", r"$1010_{2}$."], 1),
    (["1010_3", "1010_{8}", r"1010_{\text{three}}", "(1010)_3", "1011_2", "10", "1011", "x=1010_3", r"1010\text{ base 3}"], ["1010_2"], 0), (["1010_2", "1010_{3}", "x=1010_2"], ["1010", 1010], 0),
    (["3.24_{8}", "3.24_8", "3.240_8"], ["3.24_{8}", "3.24_8"], 1), (["3.24_{7}", "3.25_8"], ["3.24_{8}"], 0), (["12_{10}", "12"], ["12", "12_{10}"], 1),
    (["2A_{16}", "2A", r"2A_{\text{sixteen}}"], ["2A_{16}"], 1), (["2A_{12}", "2B_{16}"], ["2A_{16}"], 0), (["a_{16}"], ["a_{16}"], 1), (["2a_{16}"], ["2a_{15}", "2"], 0), (["24_b"], ["24_b"], 1), (["24_c"], ["24_b"], 0),
    ([r"\{10_2, 11_3\}", r"\{11_3, 10_2\}"], [r"\{10_2, 11_3\}"], 1), ([r"\{10_3, 11_2\}"], [r"\{10_2, 11_3\}"], 0), (["1010_2 + 11_2 = 1101_2"], ["1101_2"], 1), (["5_000", "5_00"], ["5"], 0), (["-101_2"], ["-101_2"], 1),
    ([r"1010_{10}", r"1010_{\text{ten}}", r"1010\text{ base }10", "1010 base 10", r"x = 1010_{10}", "(1010)_{10}"], ["1010_2"], 0), (["1010_{10}", r"1010_{\text{ten}}"], ["1010", 1010, "1010_{10}"], 1),
    (["12_{10}", r"12_{\text{10}}", r"12_{\text{ten}}", r"12\text{ base }10"], ["12_3"], 0), (["12_{10}"], ["12_{10}"], 1), (["12_3"], ["12_{10}"], 0),
    (["1a_{16}", "1A_{16}"], ["1A_{16}"], 1), (["1A_{16}", "1a_{16}"], ["1a_{16}"], 1), (["1b_{16}", "1a_{12}"], ["1A_{16}"], 0), ([r"2\cdot a_{16}"], ["2a_{16}"], 1),
    # Roots, bold and wrappers with braces.
    ([r"\sqrt[3]2", r"\sqrt[3]{2}", r"\sqrt[3] 2", r"2^{1/3}"], [r"\sqrt[3]{2}", r"\sqrt[3]2"], 1), ([r"\sqrt2", r"\sqrt[4]2"], [r"\sqrt[3]{2}"], 0),
    ([r"\sqrt{2}", r"**$\sqrt{2}$**.", r"**\sqrt{2}**"], [r"**$\sqrt{2}$**.", "Work.\n#### **$\\sqrt{2}$**."], 1),
    ([r"\mathbf{\frac{1}{2}}", r"\boldsymbol{\dfrac{1}{2}}", r"\textbf{$\frac{1}{2}$}"], ["1/2", r"\mathbf{\frac{1}{2}}"], 1), ([r"\mathrm{\frac{\sqrt{3}}{2}}", r"\mathbf{\frac{\sqrt3}{2}}"], [r"\frac{\sqrt{3}}{2}"], 1),
    ([r"\mathbf{\frac{1}{3}}"], ["1/2"], 0), ([r"18\,{\rm cm}", r"\mathrm{18\,cm}", r"\text{18 cm}", "{18}", "'18'"], ["18", r"18\text{ cm}"], 1), ([r"\sqrt{2}\,{\rm cm}", r"\mathrm{\sqrt{2}\,cm}"], [r"\sqrt{2}"], 1),
    # Choices.
    (["C)", "C:", "(C) 18", "C. 18", r"\textbf{(C)}\ 18", "Option C", "**C**", "c"], ["C", "(C)", "(c)", "c", "**C**."], 1), (["D)", "(D) 18", "Option D", "(C) or (D)", "(C), (D)"], ["C", "(c)"], 0),
    # Kinds of brackets.
    ([r"\{0,1\}", r"\{1,0\}", r"\left\{0,1\right\}", r"\lbrace 0,1\rbrace", "0,1", r"x \in \{0,1\}"], [r"\{0,1\}", r"$\{0, 1\}$."], 1), (["(0,1)", "[0,1]", "(0,1]", r"x \in (0,1)"], [r"\{0,1\}"], 0),
    (["(0,1)", r"\left(0,1\right)", r"\big(0,1\big)"], ["(0,1)", "$(0,1)$."], 1), ([r"\{0,1\}", "[0,1]", "[0,1)", r"\left\{0,1\right\}", r"x\in\{0,1\}"], ["(0,1)"], 0),
    ([r"\{1,2,3\}", "[1,2,3]", "(1,3,2)"], ["(1,2,3)"], 0), (["(1,2,3)"], [r"\{1,2,3\}"], 0), (["(1,2,3)"], ["(1,2,3)"], 1), (["3,1,2", r"\{3,2,1\}", "1, 2 and 3", "1,2,3"], [r"\{1,2,3\}", "1,2,3"], 1),
    ([r"\{(1,2),(3,4)\}", r"\{(3,4),(1,2)\}", "(1,2),(3,4)"], [r"\{(1,2),(3,4)\}", "(1,2),(3,4)"], 1), ([r"\{\{1,2\},\{3,4\}\}", r"((1,2),(3,4))", r"\{1,2\},\{3,4\}"], [r"\{(1,2),(3,4)\}"], 0),
    ([r"(\{0,1\},2)"], ["((0,1),2)"], 0), ([r"\{\gcd(4,6), 1\}"], [r"\{2,1\}"], 1), ([r"\gcd(4,6)"], ["2"], 1), (["(0,1)\\cup(2,3)", r"(2,3)\cup(0,1)"], [r"(0,1)\cup(2,3)"], 1), ([r"\{5\}"], ["5"], 1), ([r"(-\infty, 2]"], [r"x \le 2"], 1),
    (["(x,y) = (3,4)", r"\left(x,y\right)=\left(3,4\right)", "x=3,y=4", "(3,4)"], ["(3,4)", "(x,y)=(3,4)"], 1), (["(x,y) = (4,3)", "(x,y)=[3,4]", r"(x,y)=\{3,4\}", "x=4,y=3"], ["(3,4)"], 0),
    ([r"(1,2) \text{ and } (3,4)", r"(1,2)\text{ or }(3,4)", "(1,2) and (3,4)", r"(x, y) \in \{(1,2),(3,4)\}"], ["(1,2), (3,4)"], 1), ([r"(1,2) \text{ and } (3,5)", "[1,2] and [3,4]"], ["(1,2), (3,4)"], 0), (["(a,b,c)=(1,2,3)"], ["(1,2,3)"], 1),
    # Equations, and names of values.
    (["x+y-3=0", "y=3-x", "2x+2y=6", "x+y=3"], ["x+y=3"], 1), (["x+y=4", "x+y-4=0", "2x+2y=7", "y=4-x"], ["x+y=3"], 0), (["x^2+y^2-25=0"], ["x^2+y^2=25"], 1), ([r"\frac{x^2}{4}+\frac{y^2}{9}=1"], ["9x^2+4y^2=36"], 1),
    (["x=1/2006!", "1/2006!"], ["x=1/2006!"], 1), (["x=1/2004!", "1/2004!"], ["x=1/2006!"], 0),
    (["P(X>2) = 0.5", r"P(A|B)=\frac12", r"P(A \cap B) = \frac{1}{2}", r"|A \cup B| = 0.5", r"\det(A)=0.5", r"P(X \geq 2) = 0.5", "P(X=2)=0.5", "f(2)=0.5"], ["0.5", "1/2"], 1), (["P(X>2) = 0.4", "P(X>2)", "2+ = 0.5"], ["0.5"], 0),
    (["P(A | B) = 1/2", "0.5"], ["P(A|B) = 0.5"], 1), (["P(B|A) = 0.5", "P(A|B) = 0.4"], ["P(A|B) = 0.5"], 0), (["f(2)=5"], ["f(2)=5"], 1), (["f(x)=2x"], ["g(x)=2x"], 0),
    # The left side of an equation is no name, and a name is of one value.
    (["10", "x=10"], ["x(x+3)=10"], 0), (["3", "x=3"], ["|x-2|=3", r"\log_2(x)=3"], 0), (["3"], ["|z-2i|=3"], 0), (["|z+1|"], ["|z-1|=|z+1|"], 0), ([r"\left(x-1\right)\left(y-2\right)=4"], ["(x-1)(y-2)=4"], 1), (["4"], [r"\left(x-1\right)\left(y-2\right)=4"], 0),
    ([r"y=\frac{2x}{x^2+1}"], ["y(x^2+1)=2x"], 1), ([r"\{-2,8\}"], ["|x-3|=5"], 1), (["f(1)=17, f(2)=18", "|A|=17, |B|=18", r"P(A)=17 \text{ or } P(A)=18"], ["18"], 0), (["x"], ["f(x)=0, f(x)=x"], 0), (["0, x^2"], ["f(x)=0, f(x)=x^2"], 1),
    (["|x|=5", r"\det(A)=5", r"\gcd(x,10)=5"], ["x=5"], 0), ([r"\det(A)=5"], ["A=5"], 0), (["|3| = 7", r"\gcd(4,6)=7", r"\sin(0)=7"], ["7"], 0), (["(y,x)=(3,4)"], ["(3,4)"], 0), ([r"(2,\pi)"], [r"(r,\theta)=(2,\pi)"], 1), (["x - 1/2004! = 0"], ["x=1/2006!"], 0),
    # Times of day.
    ([r"4:30 \text{ p.m.}", "4:30 PM", "4:30pm", "16:30", "4:30"], [r"4:30 \text{ p.m.}", "4:30 PM"], 1), ([r"4:30 \text{ a.m.}", "4:30 AM", "5:30 PM", "4", r"\frac{2}{15}"], [r"4:30 \text{ p.m.}"], 0),
    ([r"7 \text{ p.m.}", "7 pm", "7:00", "7", "19:00"], [r"7 \text{ p.m.}", "7:00 PM"], 1), ([r"7 \text{ a.m.}", "8", "7:01"], [r"7 \text{ p.m.}"], 0), (["6:00 AM", r"6:00\text{ AM}", "6:00"], [r"6:00 \text{ a.m.}", "6:00"], 1),
    ([r"12:00 \text{ p.m.}", "12 noon"], [r"12:00 \text{ noon}"], 1), ([r"12:00 \text{ a.m.}", r"12\text{ midnight}"], [r"12:00 \text{ noon}"], 0), (["3:50", "4:05", r"\frac{3}{5}"], ["3:05"], 0), (["3:00", "6 pm", "18:00", "12 am"], ["15", "18", "6", "0"], 0), (["15:00"], ["3:00"], 1), (["3", "13"], ["15:00", "1:00"], 0),
    (["t=3:05 PM", "3 : 05 PM", r"3{:}05\text{ PM}"], ["3:05 PM"], 1), ([r"\text{noon}", "12 o'clock"], [r"12:00\text{ noon}"], 1), ([r"154\text{ pm}", "154"], ["154", r"154\text{ pm}"], 1), (["1:3", r"\frac13", "2:6"], ["1:3"], 1),
    # Words of every script.
    ([r"\text{甲}", "甲", r"\textbf{甲}", r"\mathrm{甲}", r"\text{ 甲 }", "甲。", r"$\text{甲}$"], ["甲", r"\text{甲}"], 1), (["乙", r"\text{乙}", "甲乙", "5"], ["甲", r"\text{甲}"], 0),
    (["Zürich", r"\text{Zürich}", "zürich", "Zu\u0308rich", r"\text{Zürich}."], ["Zürich", r"\text{Zürich}", "Zu\u0308rich"], 1), (["Zurich", r"\text{Züri}", "Bern"], ["Zürich"], 0),
    (["Москва", r"\text{Москва}"], [r"\text{Москва}"], 1), (["दिल्ली"], [r"\text{दिल्ली}"], 1), (["القاهرة"], [r"\text{القاهرة}"], 1), (["서울"], [r"\text{서울}", "서울"], 1), (["부산"], ["서울"], 0), (["東京都"], ["東京"], 0),
    (["甲, 乙", "甲、乙", "乙，甲", r"\text{甲}, \text{乙}", r"\{甲,乙\}"], [r"\text{甲}, \text{乙}", "甲、乙"], 1), (["甲、丙"], ["甲、乙"], 0), (["x = 甲"], [r"x=\text{甲}", r"\text{甲}"], 1), (["x=乙"], [r"x=\text{甲}"], 0),
    (["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}", "evelyn", r"\mathrm{Evelyn}."], ["Evelyn", r"\text{Evelyn}"], 1), (["silent", r"\text{silent}"], ["listen", r"\text{listen}"], 0), (["yes", r"\text{Yes}", "Yes."], [r"\text{yes}", "yes"], 1), (["no"], ["yes"], 0),
    ([r"\text{no solution}", "no solution", r"\text{no}\ \text{solution}"], [r"\text{no solution}"], 1), (["C", "C.", "(C)", r"\text{(C)}", r"\textbf{(C)}"], ["C", "(C)", "C."], 1), (["D"], ["C"], 0), ([r"\text{B and A}", "A, B"], [r"\text{A and B}"], 1),
    (["rπ", "πr", r"\pi r"], ["πr", r"\pi r"], 1), (["βα"], ["αβ"], 1), ([r"\text{甲}和\text{乙}"], ["甲和乙"], 1),
    ([r"\boldsymbol{5}", r"\mathbf{5}"], ["5"], 1),
    (["18元", r"18\text{元}"], ["18"], 1), (["18或19", "18万"], ["18"], 0), ([r"n\text{ is even}"], [r"n\text{ is odd}"], 0),
    # Letters and marks that math-verify takes for units, or removes.
    (["5", "5n"], ["5m"], 0), (["5m", "m5"], ["5m"], 1), ([r"2\pi r"], [r"2\pi r h"], 0), ([r"\frac{1}{2} b", r"\frac12"], [r"\frac{1}{2} b h"], 0), ([r"\frac{bh}{2}"], [r"\frac{1}{2} b h"], 1), (["x"], ["x + d", "x d"], 0),
    (["5 cm", "5cm", r"5\text{ cm}", "5 miles", "5 square units", r"5\mathrm{~km} / \mathrm{h}", "5 cm^2"], ["5"], 1), ([r"12\pi\text{ cm}", r"12\pi cm"], [r"12\pi", r"12\pi\text{ cm}"], 1),
    (["f(x)=2x"], ["f'(x)=2x"], 0), (["f'(x)=2x", r"f^{\prime}(x)=2x"], ["f'(x)=2x"], 1), (["y'=x"], ["y''=x", "y=x"], 0),
    ([r"50\text{ percent}", "50 percent", r"50\%", "50%", r"50\,\%", "50 pct", r"x=50\%"], ["50", r"50\%", "0.5", "50 percent"], 1), ([r"20\text{ hours and }3\text{ minutes}", r"3\text{ hours and }50\text{ minutes}"], [r"3\text{ hours and }20\text{ minutes}"], 0),
    ([r"x=50\%", r"\sqrt{2500}\%"], [r"x=50\%", r"50\%"], 1), ([r"x=51\%", "51 percent", r"\sqrt{2}\%"], [r"x=50\%", r"50\%", r"\sqrt{3}\%"], 0), ([r"\sqrt{2}\%", r"\sqrt{2}\text{ percent}"], [r"\sqrt{2}\%"], 1),
    # Logarithms, accents of TeX, formulas in Unicode, case.
    ([r"\lg 2", r"\lg{2}", r"\lg(2)", r"\log_{10} 2", r"\log_{10}2", r"\log 2", r"\operatorname{lg} 2", r"\frac{\ln 2}{\ln 10}"], [r"\lg 2", r"\log_{10} 2", r"\log 2"], 1),
    ([r"\ln 2", r"\log_e 2", r"\log_{e}2", r"\log_{\mathrm{e}} 2"], [r"\ln 2", r"\log_e 2"], 1), ([r"\lg 2", r"\log_2 2", r"\ln 3", r"\log_e 3"], [r"\ln 2"], 0), ([r"\lb 8", r"\lg 1000"], ["3"], 1),
    (["1{,}010_2", r"1\,010_2", "1010_2", r"1{,}010_{\text{two}}"], ["1010_2", "1{,}010_2"], 1), (["1{,}010_3", "1{,}011_2"], ["1010_2"], 0), (["1{,}010", r"1\,010"], ["1010", 1010], 1), (["1{,}01"], ["101"], 0),
    ([r"FF_{\text{sixteen}}", "FF_{16}", r"ff_{16}", r"FF_\text{sixteen}"], ["FF_{16}"], 1), (["FE_{16}", "FF_{15}"], ["FF_{16}"], 0), (["AB_1"], ["AB_1", "B_1A"], 1), (["AB_{10}"], ["AB"], 0),
    ([r'Z\"{u}rich', r'Z\"urich', r'\text{Z\"{u}rich}', "Zürich"], ["Zürich", r'Z\"{u}rich'], 1), (["Zurich", r"Z\'urich"], [r'Z\"{u}rich'], 0),
    ([r"caf\'e", r"caf\'{e}", r"\text{caf\'e}", "café"], ["café"], 1), ([r"h\^{o}tel"], ["hôtel"], 1), ([r"Stra\ss e", r"Stra{\ss}e", r"Stra\ss{}e"], ["Straße"], 1), ([r"K\o benhavn", r"K{\o}benhavn"], ["København"], 1),
    ([r"\c{c}a", r"\c ca"], ["ça"], 1), ([r"Ma\~nana"], ["Mañana"], 1), ([r"Erd\H{o}s"], ["Erdős"], 1), ([r'na\"{\i}ve', r'na\"\i ve'], ["naïve"], 1), ([r'\AA ngstr\"om'], ["Ångström"], 1), ([r"\L{}\'od\'z", r"\L\'od\'{z}"], ["Łódź"], 1),
    (["√2", r"\sqrt{2}", "√(2)"], [r"\sqrt{2}", "√2"], 1), (["√12"], [r"2\sqrt{3}"], 1), (["2√3"], [r"2\sqrt{3}"], 1), (["√23"], [r"\sqrt{2}3"], 0), (["x²", "x^2"], ["x^2", "x²"], 1), (["x³", "2x"], ["x^2"], 0),
    (["x₁", "x_1"], ["x_1"], 1), (["x₂"], ["x_1"], 0), (["1010₂"], ["1010_2"], 1), (["1010₃"], ["1010_2"], 0), (["½"], [r"\frac{1}{2}", "1/2"], 1), (["1½"], ["3/2"], 1), (["1½", "¼"], ["1/2"], 0), (["3×4", "3·4"], ["12"], 1), (["(-∞, 2]"], [r"(-\infty, 2]"], 1),
    (["a_1", "a_{1}"], ["a_1"], 1), (["A_1"], ["a_1", "a_1+A_1", "a_1-a_1"], 0), (["X", "2X-X"], ["x"], 0), (["X"], ["X"], 1), (["x^2"], ["X^2"], 0), (["X^2", "X^2+0x"], ["X^2"], 1), (["AB", "BA"], ["AB"], 1), (["ab", "Ab"], ["AB"], 0), (["a-A", "0"], ["A-a"], 0),
    ([r"\Delta"], [r"\delta"], 0), (["Δ"], ["δ"], 0), ([r"\Delta x", "Δx"], [r"\Delta x"], 1), ([r"\Pi", "Π"], [r"\pi"], 0), ([r"\Omega"], [r"\omega", r"\omega+\Omega"], 0),
    ([r"\ensuremath{\sqrt{2}}", r"\underline{\sqrt{2}}", r"\bm{\sqrt2}", r"\color{red}{\sqrt{2}}", r"{\color{red} \sqrt{2}}", r"\textcolor{blue}{\sqrt{2}}", r"\scriptstyle\sqrt{2}", r"\bf \sqrt{2}", r"\hspace{1em}\sqrt2", r"\sqrt{2}\hspace*{2 pt}\enspace", r"\mspace{3mu}\thinspace \sqrt2", r"\scriptsize\sqrt{2}", r"\pmb{\sqrt{2}}", r"\bold{\sqrt2}"],
     [r"\sqrt{2}", r"\begin{equation}\sqrt{2}\end{equation}", r"\begin{align*} \sqrt{2}. \end{align*}"], 1), ([r"\log_2\!3"], [r"\log_{2}3"], 1),
    (["3 hours 20 minutes", r"3\text{ hours }20\text{ minutes}", "3 Hours 20 minutes"], ["3 hours 20 minutes", r"3\text{ hours }20\text{ minutes}"], 1), (["3 hours 20 seconds", "20 hours 3 minutes", "3 hours 20", "60"], ["3 hours 20 minutes"], 0),
    (["E"], ["e"], 0), (["e"], ["e"], 1), (["i"], ["i", "I"], 1), (["I"], ["i"], 0), (["NO", "No", "no"], ["no", "No"], 1), (["Bob", "bob"], ["Bob", "bob"], 1), ([r"x\in\mathbb{R}", r"\mathbb{R}"], [r"x\in\mathbb{R}"], 1), (["monday, tuesday"], ["Monday, Tuesday"], 1),
    (["a", "A"], ["a", "A", "(a)"], 1), ([r"\{r, R\}"], [r"\{R, r\}"], 1), (["n!"], ["N!"], 0), (["Yes, No"], ["yes, no"], 1),
    (["18€", "€18", "£ 18", "18 degrees Celsius", r"$\$18$"], ["18", "18 €", r"$\$18$"], 1), (["18 eggs", "18 m", "18x", "18 or 19", "18 1/2"], ["18"], 0), ([r"\sqrt{2} €", r"€\sqrt{2}"], [r"\sqrt{2}"], 1),
    ([r"\sqrt{2}", r"$\sqrt{2}$"], [r"The answer is $\sqrt{2}$.", r"Answer: $\sqrt{2}$", r"So the final answer is \sqrt{2}."], 1), ([r"\sqrt{3}"], [r"The answer is $\sqrt{2}$."], 0),
    ([r"p\wedge q", r"p \wedge q"], [r"p\wedge q"], 1), ([r"q\wedge p", r"p\vee q"], [r"p\wedge q"], 0), ([">5", "> 5"], [">5"], 1), ([">6", "5"], [">5"], 0), ([r"\langle 1,2\rangle"], [r"\langle 1,2\rangle"], 1), ([r"n \equiv 1 \pmod 3"], [r"n \equiv 1 \pmod 3"], 1), ([r"\langle\alpha,\beta\rangle"], [r"\langle\alpha,\beta\rangle"], 1),
    ([r"90^\circ", "90", r"90^{\circ}", "90\u00b0", r"90\text{ degrees}"], [r"90^\circ", "90"], 1), (["\u2212\\sqrt{2}"], [r"-\sqrt{2}"], 1), ([r"6 \fbox{5}", r"6 \boxed {5}", r"6 \boxed5"], ["5"], 0),
]  # fmt: skip


@needs_math_verify
def test_verdicts_of_math_verify():
    rows = [
        (a, reference, verdict) for answers, references, verdict in MATH for a in answers for reference in references
    ]
    completions = [rf"So it is \boxed{{{a}}}." for a, _, _ in rows]
    results = math_verify_reward(completions=completions, answer=[reference for _, reference, _ in rows])
    assert results.outcomes == ["ok"] * len(rows), results.error
    assert not [row for row, found in zip(rows, results) if found != row[2]]


def test_a_normalised_answer_stays_as_it_is():
    for answers, references, _ in MATH:
        for answer in [*answers, *map(str, references)]:
            latex = normalised(answer)
            assert normalised(latex) in (latex, ""), answer


@needs_math_verify
def test_a_number_apart_from_a_power_is_refused_by_name():
    fault, readable = reference_faults(["2^3 5", "2^3"])
    assert fault is not None and "'2^3 5'" in fault and readable is None
    with pytest.raises(ValueError, match=r"cannot read the reference answer '2\^3 5'"):
        math_verify_reward(completions=["#### 40"], answer=["2^3 5"])


# No completion can equal these references, which are cut off, empty, or sentences around a formula.
UNREADABLE = [
    "x^", "x_", "x+", "x^2 +", "=5", "x=", "2/", "/ 2", "*", "-", "?", "...", "#", "&", "^", "%", r"\%", r"\sqrt", r"\sqrt[3]", r"\sqrt{}", r"\frac", r"\frac{1}", r"\frac{1}{}", "x^{}", r"\log", r"\log_2",
    r"\sin", r"\int", r"\sum", "(", ")", "(1,2", r"\left(1,2", r"\begin{pmatrix}1\\2", "1,,2", r"\times 2", "x<", "|x", "||", r"\frac{1}{0}", "√", r"So $x = 2$.", r"$x=\sqrt{2}$ is the answer",
    r"\text{}", "$", "1/0 + x", r"\boxed{}",
]  # fmt: skip


@needs_math_verify
def test_references_that_nothing_equals_are_named():
    faults = reference_faults(UNREADABLE)
    assert not [reference for reference, fault in zip(UNREADABLE, faults) if fault is None]
    assert "math-verify cannot read the reference answer 'x^'" in faults[0]
    assert (
        reference_faults([">5", r"\geq 5", "^5C_2", r"\|v\|", r"\{x \mid x>0\}", r"x \equiv 1 \pmod 3"]) == [None] * 6
    )  # compared as text
    good = ["[1,2)", "|x|", r"\{\}", r"\pi", "None of the above", r"\emptyset", "5-", r"\infty"]
    assert [fault is None for fault in reference_faults(good)] == [True] * 6 + [False, True]


def test_judge_and_strict_take_the_answer_out_of_a_worked_solution():
    for reference in ("9 * 2 = 18\n#### 18", r"So it is $\boxed{18}$.", "The answer is 18.", "18"):
        for reward in (judge_reward, strict_reward):
            assert call_reward(reward, ["#### 18", r"\boxed{17}", "18"], reference) == [1.0, 0.0, 0.0], reward
    with pytest.raises(ValueError, match="is not a number; correct that row's answer"):
        judge_reward(completions=["#### 18"], answer=["work\n#### eighteen"])
