r"""Hostile answers with their values, texts that repeat without end, and calls of every reader of completions.

`ANSWERS` has short answers by name. `value` is the value of the text as an answer, or None for texts that are not
numbers. `last` is the value of a completion that is only this text, without a marker, by the rule of the last number.
"""

from fractions import Fraction
from typing import NamedTuple

from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number
from jaxrl_reason.rewards.task_rewards import judge_reward, many_answers_reward, strict_reward
from jaxrl_reason.tasks import evaluation

SUMS = dict(kind="sum", target=18, low=0, high=99)


class Answer(NamedTuple):
    text: str
    value: Fraction | None
    last: Fraction | None


def _nothing(**texts: str) -> dict[str, Answer]:
    """Returns texts that are not numbers and contain none. Look-alikes are rejected as a whole, and never cut."""
    return {name: Answer(text, None, None) for name, text in texts.items()}


def _ends(**texts: tuple[str, str | int]) -> dict[str, Answer]:
    """Returns texts that are not numbers but contain one."""
    return {name: Answer(text, None, Fraction(last)) for name, (text, last) in texts.items()}


def _number(**texts: tuple[str, str | int]) -> dict[str, Answer]:
    """Returns texts that are numbers."""
    return {name: Answer(text, Fraction(value), Fraction(value)) for name, (text, value) in texts.items()}


ANSWERS = {
    **_nothing(
        empty="", space=" ", tab="\t", point=".", points="...", minus="-", plus="+", dollar="$", dollars="$$", percent="%", comma=",", slash="/",
        backslash="\\", backslashes="\\" * 7, open_brace="{", braces="{}", close_brace="}", escaped_brace=r"\}", word="eighteen", none="None", true="True",
    ),
    # Expressions to compute. No reward computes them.
    **_ends(
        power=("9**9", 9), tower=("9**9**9**9", 9), caret=("9^9^9", 9), tex_tower=("9^{9^{9^{9}}}", 9), shift=("1<<10", 10), sum=("2+3", 3),
        difference=("23-5", 5), product=("3*6", 6), modulo=("38%20", 20), factorial=("5!", 5), call=("int(18)", 18), list=("[18]", 18),
        f_string=("f'{18}'", 18), template=("{{7*7}}", 7), assignment=("x=18", 18), walrus=("x:=18", 18), comparison=("18==18", 18), either=("18 or 5", 5),
        parentheses=("(18)", 18), a_tuple=("(18,)", 18), a_set=(r"\{18\}", 18), root=(r"\sqrt{324}", 324),
        frac_open=(r"\frac{1}{2", 2), lambda_call=("(lambda: 18)()", 18), ternary=("18 if True else 5", 5), sql=("18'; DROP TABLE rewards;--", 18),
        repeated=("'5'*10**9", 9), write18=(r"\write18{touch hacked}", 18), percent_n=("%18$n", "18"),
    ),
    **_nothing(
        system="__import__('os').system('touch hacked')", evaluate="eval(input())", execute="exec('while True: pass')", leave="exit()",
        read="open('/etc/passwd').read()", subclasses="().__class__.__bases__", backticks="`touch hacked`", shell="$(touch hacked)", remove="; rm -rf / #",
        jinja="{{ self.__init__.__globals__ }}", log="${jndi:ldap://x}", format_field="{.__class__}", percent_s="%n%n%s", html="<script>alert()</script>",
        tex_input=r"\input{/etc/passwd}", tex_define=r"\def\a{\a\a}\a", tex_loop=r"\loop\iftrue\repeat", markup="[/red][link=x]",
        terminal="\x1b]J;x\x07\x1b[J", json='{"reward": true}', pickled="cos\nsystem\n(S'true'\ntR.", yaml="!!python/object:os",
    ),
    # Numbers for Python, C or a calculator.
    **_nothing(
        nan="nan", nan_mixed="NaN", nan_signed="-nan", inf="inf", inf_signed="-inf", infinity="Infinity", tex_infinity=r"\infty", grouped_python="1_000",
        hexadecimal="0x10", octal="0o17", binary="0b101", too_large="1e999", too_small="1e-999", above_1e100="1e101", below_1e_100="1e-101",
        long_exponent="1e" + "9" * 5000, two_exponents="1e1e1", grouped_exponent="1e9_9", digits_201="9" * 201, digits_5000="9" * 5000,
        googol_cubed="1" + "0" * 300, tiny="0." + "0" * 300 + "1", long_fraction="1/" + "3" * 300,
    ),
    **_ends(imaginary=("1j", 1), suffix_l=("18L", 18), suffix_f=("18f", 18), fortran=("5d0", 0), open_exponent=("18e", 18), e3=("e3", 3)),
    # Signs and separators.
    **_nothing(
        two_signs="--5", mixed_signs="+-5", many_signs="-" * 99 + "5", two_minuses="-−5", list_glued="1,2,3", grouped_2="1,23", grouped_0="0,123",
        grouped_late="1234,567", two_points="1.2.3", version="10.0.0.1", two_bars="1/2/3", over_zero="3/0", over_zeros="3/000", date="2024/01/02",
        apostrophe="1'000", quotation="1’000", middle_dot="1·5", comma_and_points="1.234,56", decimal_over="1.5/2", money_alone=r"\$-\$",
        frac_over_zero=r"\frac{1}{0}", frac_percent_sign="3/0%", tex_mixed=r"5\frac{1}{2}", tex_square=r"\frac{3}{4}²", spaces="1 000", no_break_space="1\u00a0234", thin_space="1\u2009234", narrow_space="1\u202f234",
    ),
    **_ends(
        trailing_minus=("5-", 5), sign_apart=("- 5", 5), money_sign=("$-$5", -5), mixed=("1 1/2", "1/2"), a_range=("5-7", 7),
        ratio=("5:7", 7), negative_below=("3/ -4", -4), semicolon=("5;6", 6), money_after=("18$", 18), apples=("5 apples", 5), not_equal=("!=5", 5),
        about=("~5", 5), less=("<5", 5), plus_minus=("±5", 5), chain=("2=x=5", 5),
    ),
    # Texts after a number that are not units, although TeX shows them.
    **_ends(
        text_zeros=(r"5\text{00}", "0"), text_point=(r"5\text{.5}", "1/2"), text_million=(r"5\text{ million}", 5), text_or=(r"5\text{ or six}", 5),
        text_half=(r"5\text{ and a half}", 5), text_factorial=(r"5\text{!}", 5), text_imaginary=(r"5\mathrm{i}", 5), text_e=(r"5\mathrm{e}", 5),
        text_points=(r"75\text{ percentage points}", 75), text_power=(r"5\text{²}", 5), text_wan=(r"5\text{万}", 5),
        text_tenths=(r"5\text{ tenths}", 5), text_thousands=(r"5\text{ Thousands}", 5), text_lakh=(r"5\text{ lakh}", 5), text_pi=(r"5\text{π}", 5),
        text_pi_word=(r"5\mathrm{pi}", 5), text_raised=(r"5\text{ⁿ}", 5), text_per_mille=(r"5\text{ per mille}", 5),
        text_foreign_or=(r"5\text{ oder sechs}", 5), text_han_or=(r"5\text{ 或 六}", 5), text_wide=(r"5\text{ ｋ}", 5), text_variable=(r"5\text{x}", 5),
        text_over_e=(r"5\mathrm{c/e}", 5), text_word=(r"5\text{ point five}", 5), text_base=(r"5\text{ base six}", 5), text_below_zero=(r"5\text{ below zero}", 5),
        text_twice=(r"5\text{ cm}\text{ cm}", 5), text_below=(r"5\mathrm{_2}", 2), text_sum=(r"5\text{ cm}+\frac{1}{2}", "1/2"),
    ),
    # Other scripts and look-alikes.
    **_nothing(
        full_width="１８", arabic="١٨", arabic_extended="۱۸", devanagari="१८", thai="๑๘", bold="𝟏𝟖", double_struck="𝟙𝟠", monospace="𝟷𝟾", segmented="🯱🯸",
        mixed_scripts="1８", mixed_back="１8", superscripts="¹⁸", square="5²", subscript="5₂", half="½", one_and_half="1½", fraction_slash="3⁄4",
        division_slash="3∕4", roman="Ⅷ", roman_after="5Ⅷ", circled="⑱", han="十八", braille="⠁⠓", arabic_thousands="1٬234", arabic_decimal="1٫5",
        full_width_point="1．5", full_width_comma="1，234", full_width_percent="50％", per_mille="50‰", en_dash="–5", em_dash="—5", hyphen="‐5",
        no_break_hyphen="‑5", full_width_minus="－5", full_width_plus="＋5", small_minus="﹣5", superscript_minus="⁻5", letter_o="lO",
        cyrillic="ооо", greek="ο", keycap="5\ufe0f\u20e3", struck="1\u03368\u0336", crossed="5\u0338", accent="5\u0301", enclosed="5\u20dd",
    ),
    **_ends(digit_o=("1O", 1), letter_l=("l8", 8), full_width_sum=("2＋3", 3), ring=("①8", 8), emoji=("💯5", 5), full_width_slash=("3／4", 4), colon=("3∶4", 4)),
    # Invisible characters.
    **_nothing(
        joined="1\u200d8", zero_width="1\u200b8", non_joiner="1\u200c8", word_joiner="1\u20608", soft_hyphen="1\u00ad8", bom_inside="1\ufeff8",
        override_inside="1\u202e8", isolate_inside="1\u20668", marks_inside="1\u200f\u200e8", nul="\0", controls="\x01\x02\x7f", surrogate="\ud800",
        surrogates="\udfff\ud800", not_a_character="\uffff", private="\ue000", tags="\U000e0031\U000e0038", replacement="\ufffd",
    ),
    **_ends(
        bom=("\ufeff18", 18), override=("\u202e81\u202c", 81), nul_before=("\x0018", 18), nul_after=("18\0", 18), nul_inside=("1\x008", 8),
        backspace=("17\b8", 8), escape=("\x1b[8m18", 18), surrogate_after=("18\ud800", 18), zero_width_after=("18\u200b", 18), bell=("18\a", 18),
        carriage_return=("17\r18", 18), vertical_tab=("17\v18", 18), form_feed=("17\f18", 18), next_line=("17\x8518", 18), line_separator=("17\u202818", 18),
        paragraph=("17\u202918", 18),
    ),
    # Numbers in unusual spellings.
    **_number(
        frac_bare=(r"\frac12", "1/2"), crlf=("18\r", 18), line_end=("18\u2028", 18), ideographic_space=("\u300018\u3000", 18), no_break=("\u00a018\u00a0", 18), zeros=("0" * 150 + "18", 18),
        unicode_minus=("−18", -18), minus_zero=("-0", 0), zero_exponent=("18e-0", 18), unicode_exponent=("18e−1", "9/5"), digits_200=("9" * 200, 10**200 - 1),
        googol=("1e100", 10**100), googolth=("1e-100", Fraction(1, 10**100)), long_decimal=("0." + "3" * 190, Fraction(int("3" * 190), 10**190)),
    ),
    "text_unit": Answer(r"5\text{ miles per hour}", Fraction(5), Fraction(5)),
    "text_joule": Answer(r"5\text{ J}", Fraction(5), Fraction(5)),
    "text_micro": Answer("5\\text{ \u00b5m}", Fraction(5), Fraction(5)),
    "text_speed": Answer(r"5\text{ m.p.h.}", Fraction(5), Fraction(5)),
    "ellipsis": Answer("so it is...18", None, Fraction(18)),
    "ellipsis_short": Answer("we get..18", None, Fraction(18)),
    "sentence": Answer("Wait.18", None, Fraction(18)),
    "point_first": Answer("Total:.5", None, Fraction(1, 2)),
    "text_foreign_unit": Answer(r"5\text{ 元}", Fraction(5), Fraction(5)),
    "tex_money": Answer(r"$\$18$", Fraction(18), Fraction(18)),
    "thousands": Answer(r"1{,}234", Fraction(1234), Fraction(234)),
}  # fmt: skip

# Texts to repeat to any length. A reader in linear time takes twice as long for twice the length.
UNITS = {
    "digits": "9", "zeros": "0", "foreign_digits": "５", "open": "{", "close": "}", "pairs": "{}", "parentheses": "(", "hashes": "#", "markers": "####",
    "marked": "#### 1\n", "boxes": r"\boxed{", "boxed": r"\boxed{1}", "grouped": "1,", "groups": ",123", "python_groups": "1_", "points": ".", "decimals": "1.",
    "exponents": "1e", "long_exponents": "1e1", "fractions": r"\frac{1}{", "open_fractions": r"\frac{", "full_fractions": r"\frac{1}{2}",
    "near_fractions": r"\dfrac{" + "1" * 50 + "}{", "slashes": "1/", "mixed": "1 1/", "signs": "-", "sign_pairs": "−1", "money_signs": "-$",
    "fboxes": r"\fbox{", "bare_boxes": r"\boxed 1 ", "bare_commands": r"\boxed\a{", "bare_pairs": r"\boxed\a{}{{", "headings": "#### Check\n", "bold": "**", "open_texts": r"\text{{}",
    "spaced_boxes": "\\boxed \n", "bold_lines": "#### **1**\n", "degrees": r"^\circ", "tex_blanks": r"\,", "math": r"\(1\)", "dollars": "$", "percents": "1%", "tex_percents": r"\%", "backslashes": "\\", "escapes": r"\{", "tex_commas": "{,}", "thin_commas": r",\!", "texts": r"\text{",
    "units": r"\text{m}", "and": " and ", "numbers": "1 and ", "spaces": " ", "lines": "\n", "letters": "a", "hexadecimal": "0x", "hex_digits": "0xf",
    "joiners": "\u200d", "joined": "1\u200d", "overrides": "\u202e1", "accents": "\u0301", "struck": "1\u0336", "halves": "½", "powers": "5²", "thousands": "1٬",
    "narrow": "1\u202f", "nul": "\0", "surrogates": "\ud800", "emoji": "👩‍👩‍👧", "towers": "9**", "minuses": "- ", "looks": "–",
}  # fmt: skip

# References of a data set can be hostile too. Each either raises ValueError, or is a reference that equals no hostile answer.
REFERENCES = [
    None, "", " ", "nan", "inf", "-Infinity", float("nan"), float("inf"), "1e999", "--5", "1,2,3", "3/0", "9**9**9", "(" * 10_000, "9" * 1_000_000,
    "{" * 100_000, r"\boxed{" * 10_000, "#### ", r"\boxed{}", "\0", "\ud800", "１８", "__import__('os').system('touch hacked')", 10**400, 10**5000, -(10**400),
    Fraction(10**400, 3), Fraction(1, 10**400), 1e300, 5e-324, b"18", [18], {}, object, complex(1, 1),
]  # fmt: skip


def call_reward(reward, texts, reference):
    """Returns the rewards of texts, all with one reference."""
    return reward(
        prompts=[""] * len(texts), completions=texts, completion_ids=[[]] * len(texts), answer=[reference] * len(texts)
    )


def call_many_answers(texts, constraint):
    """Returns the rewards `many_answers` of texts, all with one constraint."""
    return many_answers_reward(completions=texts, **{name: [value] * len(texts) for name, value in constraint.items()})


def call_all(text):
    """Returns the results of every function that reads a completion in this process."""
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
        call_many_answers([text], SUMS),
        many_answers_reward.answer_of(text, {}),
        evaluation.final_answer(text, {}),
    )


def braces_close(text):
    """Returns whether every brace of a text is closed, so that a box around it ends after it."""
    return text.count("{") == text.count("}") and not text.endswith("\\")
