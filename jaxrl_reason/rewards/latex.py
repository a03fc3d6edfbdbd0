r"""One spelling for LaTeX answers, in text: nothing is computed, and this file does not need math-verify.

`normalised` rewrites a reference and an answer before math-verify reads them. `same_words` and `differ_in_brackets`
compare what math-verify ignores or misreads.
"""

import collections
from collections.abc import Callable
import itertools
import re
import unicodedata

from jaxrl_reason.rewards.answers import (
    BARE_PER_CENT,
    CURRENCIES,
    plain,
    split_unit,
    TEXT_GROUP,
    TEXT_OPEN,
    without_bare_unit,
    without_blanks,
)
from jaxrl_reason.rewards.numeric import parse_number
from jaxrl_reason.rewards.spellings import in_tex, with_accents

# Forms that LaTeX would misread: "1e-7" as Euler's number minus 7, and "1 1/2" as 1.
_EXPONENT = re.compile(r"(?<=[0-9.])[eE]([-+]?[0-9]+)")
_MIXED_NUMBER = re.compile(r"([-+]?[0-9]+) +([0-9]+) ?/ ?([0-9]+)")
_FLOAT = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]{1,3}")
# Forms that are not LaTeX: 5_000 is not the number 5 with an index, 1e9999 no product with e, 0x10 no product with x,
# "5 0" no product. A box that is not the whole answer would be taken for the answer.
_APART = r"(?:\s|~|\\[,;: ]|\\q?quad|\\[lc]?dots)+"
_NOT_LATEX = re.compile(
    rf"[0-9]_[0-9]{{2}}|[0-9.][eE][-+]?[0-9]{{4}}|(?<![\w.])0[xX][0-9a-fA-F]|[0-9.]{_APART}[0-9.]"
    r"|\\fbox|\\boxed|####"
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;: ]|~|\{,\}|,\\!)[0-9]{3})+(?![0-9])")  # as TeX spaces them
_MONEY = re.compile(rf"^([-+]?)[{CURRENCIES}] ?(?=[0-9.\\])")
_LOGARITHMS = (
    (re.compile(r"\\(?:lg(?![a-zA-Z])|operatorname\*?\{lg\})"), r"\log_{10} "),
    (re.compile(r"\\(?:lb(?![a-zA-Z])|operatorname\*?\{lb\})"), r"\log_{2} "),
    (re.compile(r"\\log\s*_\s*(?:e(?![a-zA-Z])|\{\s*e\s*\}|\{\s*\\(?:mathrm|text)\{e\}\s*\})"), r"\ln "),
)
# Arguments of one digit get braces: \log_2 3 is \log_{2} 3, \frac1 2 is \frac{1}{2}, and \sqrt2 3 is \sqrt{2} 3.
_SCRIPT = re.compile(rf"(?<=[a-zA-Z)}}\]])\s*([_^])\s*([0-9])(?={_APART}[0-9.])")
_SCRIPT_BEFORE_NOTHING = re.compile(r"([_^])\s*([0-9])(?=\\!)")
_ARGUMENTS = re.compile(r"\\([dtc]?frac|[dt]?binom)\s*([0-9])\s*([0-9])")
_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*([0-9])")
# What math-verify removes anywhere in an answer. Removed between two digits, it would join them.
_DROPPED = re.compile(r"""\\mathrm\{th\}|\\!\s*|\\text\s*\{\s*\}|\\?\$|["']|\\(?:display|text)style(?![a-zA-Z])""")
_JOINED = re.compile(rf"[0-9.](?:{_DROPPED.pattern})+[0-9.]")
_PRIMES = re.compile(r"(?<=[a-zA-Z)\]}])('+)(?![0-9])")
_PUNCTUATION = str.maketrans(
    {
        "\u2212": "-",
        "\uff0c": ", ",
        "\u3001": ", ",
        "\uff1b": "; ",
        "\uff08": "(",
        "\uff09": ")",
        "\uff1a": ":",
        "\uff1d": "=",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u22c5": "\\cdot ",
        "\u221e": "\\infty ",
        "\u222a": "\\cup ",
        "\u2229": "\\cap ",
        "\u00b1": "\\pm ",
    }
)
_BASES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_DIGITS = r"(?=[A-F]*[0-9]|[A-F]{2})[0-9A-F]+(?:\.[0-9A-F]+)?"
_BASE_NAME = rf"([0-9]{{1,2}}|[a-z]|{'|'.join(_BASES)})"
_BASE = rf"\s*(?:base\s*)?\(?{_BASE_NAME}\)?\s*"
_BASED = re.compile(
    rf"(?:(?<![\w.\\])({_DIGITS})|(?<![a-zA-Z])\(({_DIGITS})\))\s*_\s*(?:([0-9a-z])(?![0-9.a-zA-Z])|\{{{_BASE}\}}"
    rf"|\{{\s*{TEXT_OPEN}{_BASE}\}}\s*\}}|{TEXT_OPEN}{_BASE}\}})"
)
_LETTER_DIGITS = r"(?<![\w.\\])(?=[A-F]*[0-9]|[A-F]{2})[0-9A-F]*[A-F][0-9A-F]*(?=_\s*\{\s*1[1-6]\s*\})"
_CAPITAL_DIGITS, _ANY_DIGITS = re.compile(_LETTER_DIGITS), re.compile(_LETTER_DIGITS, re.IGNORECASE)
_BASE_WORDS = re.compile(
    rf"(?:\\ |[\s~])*(?:{TEXT_OPEN}\s*\(?(?:in\s+)?base[\s~]+{_BASE_NAME}\)?\s*\}}"
    rf"|{TEXT_OPEN}\s*\(?(?:in\s+)?base\s*\}}\s*{_BASE_NAME}\)?|\(?(?:in\s+)?base[\s~]+{_BASE_NAME}\)?)$"
)
# A number after words: "3 hours 20 minutes" is no product. Only "and" and "or" are between the members of a list.
_NUMBER_AFTER_WORDS = re.compile(
    rf"{TEXT_OPEN}(?!\s*,?\s*(?:and|or)\s*\}})(?![^{{}}]* base \w+\}})[^{{}}]*\}}(?:\s|~|\\[,;: ])*[0-9]"
    r"|(?<![\\a-zA-Z])(?!(?:and|or|base|mod|sqrt|frac|sin|cos|tan|log|exp|gcd|lcm|min|max)\b)[a-zA-Z]{3,}\s+[0-9]"
)
_NAMED_BASE = re.compile(r"\\text\{(\S+) base \w+\}")
_FORMULA = re.compile(r"\$[^$]*\$")
_VERB = re.compile(r"\b(?i:is|are|so|thus|hence|therefore|then|equals?|gives?|have|has|get|answer|value|that)\b")
# Operators without an operand, and commands without an argument.
_OPERATOR = r"[-+*/=<>^_&:]|(?<!\\)\||\\(?:times|cdot|div|pm|mp|leq?|geq?|neq?|in|to|cup|cap|wedge|vee)(?![a-zA-Z])"
_CUT = re.compile(
    rf"(?:{_OPERATOR}|\\(?:sqrt(?:\[[^\[\]]*\])?|[dtc]?frac|[dt]?binom|log|ln|sin|cos|tan|int|sum|prod|lim)(?:\s*[_^]\s*(?:\w|\{{[^{{}}]*\}}))*)\s*$"
    r"|^\s*(?:[*/=&:]|\\(?:times|cdot|div|in|to|cup|cap|wedge|vee)(?![a-zA-Z]))|[_^]\s*\{\s*\}|[dtc]?frac\s*\{[^{}]*\}\s*(?!\s*[\w\\{])"
    r"|(?:sqrt|[dtc]?frac(?:\s*\{[^{}]*\})?)\s*\{\s*\}|,\s*,|\?|^\|[^|]*$"
)
# Commands, environments, words, and single letters, which are symbols.
_NAMES = re.compile(
    r"\\math(?:bb|cal|frak|scr)\s*\{[^{}]*\}|\\[a-zA-Z]+|[a-zA-Z]{4,}|\b(?i:yes|no)\b|[a-zA-Z\u0391-\u03a9\u03b1-\u03c9]"
)
_GREEK = re.compile(r"\\(?i:gamma|delta|theta|lambda|xi|pi|sigma|upsilon|phi|psi|omega)")
_SYMBOLS = re.compile(r"(?i:(?!(?:no|yes)$)(?:[a-z]{1,3}|[\u0391-\u03c9]))(?<![A-Z][a-z]{2})")
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus|times|bigcup|bigcap|backslash)(?![a-zA-Z])|[\u222a\u2229\u2216]")
_BRACE_NAMES = re.compile(r"\\([lr])brace(?![a-zA-Z])\s*")
_SIZES = re.compile(r"\\[bB]igg?[lr]?(?![a-zA-Z])\s*")
# What joins the members of a list, and the names before it: (1,2) \text{ or } (3,4), and (x,y) = (3,4).
_AND = re.compile(rf"{TEXT_OPEN}\s*,?\s*(?:and|or)\s*\}}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_NAME = r"\s*(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?\s*"
_NAMES_OF_LIST = re.compile(
    rf"^\s*(?:\\left)?\s*\((?P<names>{_NAME}(?:,{_NAME})+)(?:\\right)?\s*\)\s*(?:=|:|\\in(?![a-zA-Z])|\\equiv)"
)
# The name of a value: P(X>2) = 0.5, |A \cup B| = 12, \det(A) = 5.
_NAMED_VALUE = re.compile(
    r"(?P<name>(?!\\left)\\?[a-zA-Z]+(?:_\w|_\{\w+\}|\{[a-zA-Z]+\})?\s*(?:\\left)?\s*[(\[][^()=]*[)\]]"
    r"|(?:\\left)?\s*\|\s*[A-Z][^|=]*\|)\s*(?<![<>!])=\s*(?P<value>[^=]+)"
)
_INNERMOST = re.compile(r"(?P<called>[a-zA-Z](?=\())?(?P<open>[(\[{])(?P<inside>[^()\[\]{}]*)(?P<close>[)\]}])")


def normalised(answer: str) -> str:
    r"""Returns an answer or a reference in the spelling that is compared, "" if it has no meaning.

    "$ \sqrt{2} $." is \sqrt{2}; \log_2 3 is \log_{2} 3; 5\,\text{cm} is 5; 1010_2 is the text "1010 base 2"; words that
    are not ASCII are text.
    """
    latex = plain(plain(with_accents(answer)).rstrip(",; ")).translate(_PUNCTUATION)
    for logarithm, spelled in _LOGARITHMS:
        latex = logarithm.sub(lambda _: spelled, latex)
    latex = _SIZES.sub("", _BRACE_NAMES.sub(lambda name: r"\{" if name[1] == "l" else r"\}", latex))
    latex = _outside_text(latex, lambda part: _PRIMES.sub(_as_primes, _wrap_words(in_tex(part))))
    latex = _SCRIPT_BEFORE_NOTHING.sub(r"\1{\2}", latex)
    while _DROPPED.search(latex):  # repeated, because a removal may create another match
        if _JOINED.search(latex):
            return ""
        latex = _DROPPED.sub("", latex)
    latex = _THOUSANDS.sub(lambda number: re.sub(r"[^0-9]", "", number[0]), without_blanks(latex))
    latex, percent = split_unit(BARE_PER_CENT.sub(r"\\%", _based_as_text(latex)))
    latex = _MONEY.sub(r"\1", without_bare_unit(latex))
    latex = _ROOT.sub(r"\\sqrt\1{\2}", _ARGUMENTS.sub(r"\\\1{\2}{\3}", _SCRIPT.sub(r"\1{\2}", latex)))
    mixed = _MIXED_NUMBER.fullmatch(latex)
    if mixed:
        latex = r"{}\frac{{{}}}{{{}}}".format(*mixed.groups())
    elif _NOT_LATEX.search(latex):
        return ""
    elif _FLOAT.fullmatch(latex) or parse_number(latex) is not None:
        latex = _EXPONENT.sub(r"\\cdot 10^{\1}", latex)
    return latex + r"\%" * percent


def with_distinct_case(a: str, b: str) -> tuple[str, str]:
    r"""Returns two normalised answers with new names for capitals whose small letter occurs too.

    math-verify takes A_1 for a_1. Letters of words, of commands and in \mathbb{R} keep their names.
    """
    letters = {letter for answer in (a, b) for letter in _letters(answer)}
    both = sorted(letter for letter in letters if letter != letter.lower() and letter.lower() in letters)
    unused = [letter for letter in "qwzvukpmjotysrlcbnxa" if not {letter, letter.upper()} & letters]
    names = dict(zip(both, unused))
    rename = lambda part: _NAMES.sub(lambda name: names.get(_as_command(name[0]), name[0]), part)
    return _outside_text(a, rename), _outside_text(b, rename)


def _letters(latex: str) -> list[str]:
    names = map(_as_command, _NAMES.findall(TEXT_GROUP.sub(" ", latex)))
    return [name for name in names if len(name) == 1 or _GREEK.fullmatch(name)]


def _as_command(name: str) -> str:
    r"""Returns the command for a Greek letter of Unicode, \Delta; other names do not change."""
    if len(name) > 1 or name.isascii():
        return name
    letter = unicodedata.name(name, name).split()[-1].lower().replace("lamda", "lambda")
    return "\\" + (letter.capitalize() if name.isupper() else letter)


def is_sentence(answer: str) -> bool:
    """Returns whether an answer is a sentence with a formula in it, such as "So $x = 2$.", which nothing equals."""
    text = plain(answer)
    return "$" in text and _VERB.search(_FORMULA.sub(" ", TEXT_GROUP.sub(" ", text))) is not None


def is_broken(latex: str) -> bool:
    r"""Returns whether a normalised answer that math-verify takes for text is cut off, such as x^, \sqrt or (1,2.

    Other such texts, p\wedge q, are compared as they are.
    """
    words = TEXT_GROUP.sub("x", latex)
    symbols = re.sub(r"\\(?:left|right)(?![a-zA-Z])\s*\.?", "", words)
    opened = [len(re.findall(bracket, symbols)) for bracket in (r"\\begin\{", r"(?<!\\)\{|\\\{|[(\[]")]
    closed = [len(re.findall(bracket, symbols)) for bracket in (r"\\end\{", r"(?<!\\)\}|\\\}|[)\]]")]
    return opened != closed or not re.search(r"[^\W_]", words) or _CUT.search(words) is not None


def without_bases(latex: str) -> str:
    """Returns a normalised answer without the bases of its numbers."""
    return _NAMED_BASE.sub(r"\1", latex)


def states_base_ten(answer: str) -> bool:
    """Returns whether an answer says that one of its numbers is in base ten: 12_{10} is not 12_3, but 12 may be."""
    latex = _base_as_subscript(without_blanks(_DROPPED.sub("", plain(answer))))
    return any(_digits_and_base(number)[1] == "10" for number in _BASED.finditer(latex))


def with_capital_digits(a: str, b: str) -> tuple[str, str]:
    """Returns two answers with their digits as capitals if one has such digits: 1a_{16} is 1A_{16}.

    If neither has, 2a_{16} may be a product.
    """
    if not _CAPITAL_DIGITS.search(a) and not _CAPITAL_DIGITS.search(b):
        return a, b
    capitals = [_ANY_DIGITS.sub(lambda digits: digits[0].upper(), answer) for answer in (a, b)]
    return capitals[0], capitals[1]


def is_phrase(latex: str) -> bool:
    r"""Returns whether a normalised answer has a number after words, so that only equal texts are equal answers."""
    return _NUMBER_AFTER_WORDS.search(latex) is not None


def same_words(a: str, b: str) -> bool | None:
    r"""Returns whether two answers have the same words, up to case and \text{}; None if one is not clearly words.

    A product of variables is no word, so words of up to three ASCII letters are left to math-verify if they differ.
    """
    words = [_only_words(answer) for answer in (a, b)]
    if words[0] is None or words[1] is None:
        return None
    if words[0] == words[1]:
        return True
    are_certain = all(re.search("[a-z]{4}", text) or any(map(_is_foreign, text)) for text in words if text is not None)
    return False if are_certain else None


def without_name(latex: str, other: str) -> str:
    r"""Returns a normalised answer without the name of its value if the other answer has no name, or the same one.

    P(X>2) = 0.5 is 0.5, and |A \cup B| = 12 is 12: names that math-verify cannot read, so that it takes the answer for text.
    """
    found, same = _NAMED_VALUE.fullmatch(latex), _NAMED_VALUE.fullmatch(other)
    named = lambda match: "".join(match["name"].split())
    if found is None or (named(found) != named(same) if same else "=" in other):
        return latex
    return found["value"].strip()


def differ_in_brackets(a: str, b: str) -> bool:
    r"""Returns whether two normalised lists have different kinds of brackets: \{0,1\} is not (0,1).

    Without outer brackets, a list may be of any kind: "0, 1". Unions and the like are left to math-verify.
    """
    if _SET_OPERATION.search(a) or _SET_OPERATION.search(b):
        return False
    (kinds, is_bare), (other_kinds, other_is_bare) = _brackets(a), _brackets(b)
    if not (kinds or is_bare) or not (other_kinds or other_is_bare):
        return False
    if is_bare == other_is_bare:
        return kinds != other_kinds
    more, fewer = (other_kinds, kinds) if is_bare else (kinds, other_kinds)
    return not fewer <= more or (more - fewer).total() != 1


def _brackets(latex: str) -> tuple[collections.Counter[str], bool]:
    """Returns how many brackets of each kind are around lists, and whether a list has none."""
    text = TEXT_GROUP.sub("", _AND.sub(",", _NAMES_OF_LIST.sub(_unless_sorted, latex)))
    text = re.sub(r"\\(?:left|right|in)(?![a-zA-Z])", " ", text)
    text = re.sub(r"(?<!\\)[{}]", "", text).replace(r"\{", "{").replace(r"\}", "}")
    kinds: collections.Counter[str] = collections.Counter()
    while match := _INNERMOST.search(text):
        if re.search("[,;]", match["inside"]) and not match["called"]:
            kinds[match["open"] + match["close"]] += 1
        text = text[: match.start()] + text[match.end() :]
    return kinds, bool(re.search("[,;]", text))


def _unless_sorted(match: re.Match) -> str:
    """Returns "" for names in the order of the alphabet, (x,y); other names can be in any order, and stay."""
    names = [name.strip().lstrip("\\") for name in match["names"].split(",")]
    return "" if names == sorted(names) else match[0]


def _only_words(answer: str) -> str | None:
    text = re.sub(r"\\ |~", " ", TEXT_GROUP.sub(r"\1", plain(with_accents(answer))))
    runs = re.findall(r"[^\W\d_]+", text)
    are_symbols = all(map(_SYMBOLS.fullmatch, runs)) and (text == text[:1] or not TEXT_GROUP.search(answer))
    words = (text if are_symbols else text.casefold()).split()
    is_word = all(_is_letter(c) or c in " -'\u2019" for c in text) and any(map(_is_letter, text))
    return " ".join(words) if is_word and not {"and", "or"} & set(words) else None


def _is_letter(c: str) -> bool:
    return c.isalpha() or unicodedata.category(c).startswith("M")


def _is_foreign(c: str) -> bool:
    """Returns whether a character is a letter of words only: neither ASCII nor Greek, whose letters are variables."""
    return c.isalpha() and not c.isascii() and not "\u0370" <= c <= "\u03ff"


def _outside_text(latex: str, rewrite: Callable[[str], str]) -> str:
    r"""Returns LaTeX with the parts outside of \text{} and the like rewritten."""
    parts, end = [], 0
    for group in TEXT_GROUP.finditer(latex):
        parts += [rewrite(latex[end : group.start()]), group[0]]
        end = group.end()
    return "".join([*parts, rewrite(latex[end:])])


def _as_primes(match: re.Match) -> str:
    return "^{" + r"\prime" * len(match[1]) + "}"


def _wrap_words(latex: str) -> str:
    r"""Returns LaTeX with words of other letters than ASCII and Greek as \text{word}."""
    runs = ("".join(run) for _, run in itertools.groupby(latex, _is_letter))
    return "".join(rf"\text{{{run}}}" if any(map(_is_foreign, run)) else run for run in runs)


def _based_as_text(latex: str) -> str:
    def as_text(match: re.Match) -> str:
        digits, base = _digits_and_base(match)
        if base == "10" and not re.search("[A-F]", digits):
            return digits
        if not digits.isdecimal() and re.search("[A-F]", digits) and not (base.isdecimal() and 10 < int(base) <= 16):
            return match[0]
        whole, point, decimals = digits.partition(".")
        return rf"\text{{{(whole.lstrip('0') or '0') + (point + decimals).rstrip('0').rstrip('.')} base {base}}}"

    return _BASED.sub(as_text, _base_as_subscript(latex))


def _digits_and_base(match: re.Match) -> tuple[str, str]:
    digits, base = match[1] or match[2], next(name for name in match.groups()[2:] if name)
    return digits, str(_BASES.index(base) + 2) if base in _BASES else base


def _base_as_subscript(latex: str) -> str:
    words = _BASE_WORDS.search(latex)
    return f"{latex[: words.start()]}_{{{words[words.lastindex or 0]}}}" if words else latex
