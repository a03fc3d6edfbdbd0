r"""The final answer of a completion or of a worked solution: where it stands, and the plain spelling that is compared.

`extract_answer` finds the answer in its marker, and `plain` takes away what does not belong to it: "$ \sqrt{2} $." is
\sqrt{2}. `split_unit` separates a unit. Completions and references are read by these functions alike. Every function
takes time linear in the text, evaluates nothing and keeps no state, so any thread can call it.
"""

import collections
from collections.abc import Iterator
import itertools
import re
from typing import NamedTuple
import unicodedata

# Words that change the value or continue the text: "5\text{ million}", "5\text{ or six}" and 5i are not 5. A plural s
# changes nothing.
_NOT_UNITS = frozenset(
    "and or nor not but if to plus minus times over mod modulo choose point negative below base double half halve quarter third fourth "
    "fifth sixth seventh eighth ninth tenth hundredth thousandth millionth percent percentage permille pct factorial squared cubed score "
    "dozen zero one two three four five six seven eight nine ten eleven twelve hundred thousand million billion trillion lakh crore bn "
    "pi oder und ou et are for if when where while all with has have that which only even odd prime real k K M B T e i j n x y z".split()
)
# Of a time of day, see `times`: 154\text{ pm} is a length.
_CLOCK, _MERIDIEM = re.compile(r"(?:[1-9]|1[0-2])(?::[0-5][0-9])?"), re.compile(r"(?i:[ap]\.?\s?m\.?|noon|midnight)")
_NOT_UNIT_CHARACTERS = frozenset("π或和与及半成倍")
# A lump is a run of text that starts like a number. It includes every character that touches the number, so that a
# look-alike is rejected whole instead of being cut short. Such characters are digits of other scripts (\d on purpose),
# a second sign, characters that look like signs or fractions, powers ("5²"), 0x10, and marks that strike digits out. If
# a digit follows, they are also separators that the grammar does not know and invisible characters. A sign after a word
# or a digit ("10-4") is a subtraction, not a sign. Quantifiers are possessive (*+): nothing is tried twice.
_SIGNS = (
    "-+\u00af\u02c9\u02d7\u058a\u05be\u1806\u2010-\u2015\u2043\u207a\u207b\u208a\u208b\u2212\u2296\u23af\u2500\u2795\u2796\u2e3a\u30fc"
    "\ufe58\ufe62\ufe63\uff0b\uff0d"
)
_PARTS = (
    r"[\d.,/\u00b2\u00b3\u00b9\u00bc-\u00be\u066a\u066b\u2030\u2031\u2044\u2070-\u2089\u20d0-\u20ff\u2150-\u2189\u2215"
    r"\u0300-\u036f\u0483-\u0489\u05b0-\u05bd\u1ab0-\u1aff\u1dc0-\u1dff\u3099\u309a\ufe00-\ufe0f\ufe20-\ufe2f\uff05]*+"
)
_BETWEEN_DIGITS = (
    r"[_'`\u00a0\u00ad\u00b4\u00b7\u02bc\u0600-\u0605\u061c\u066c\u06dd\u070f\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180e\u2003-\u200f\u2018-\u201a"
    r"\u2024\u2027\u202a-\u202f\u2032\u205f-\u206f\u2396\u2800\u2e32\u3164\ua4f8\ufe50\ufe52\ufeff\uff0c\uff0e\uff61\uffa0\ufff9-\ufffc"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]++(?=\d)"
)
_RUN = rf"{_PARTS}(?:{_BETWEEN_DIGITS}{_PARTS})*+"
_PART = r"\s?(?:\{[^{}]{1,50}\}|[0-9])"
_FRACTION = rf"\\[dtc]?frac{_PART}{_PART}"
_GROUPED = r"[1-9][0-9]{0,2}(?: [0-9]{3}(?![0-9]))+(?<= 000)"  # 12 000, which is no number, and not 0
_LUMP = re.compile(
    rf"(?:(?<![{_SIGNS}\w)}}])[{_SIGNS}]+)?\$?(?:0[xXoObB]\w++|{_FRACTION}{_RUN}|(?<![\w.,]){_GROUPED}{_RUN}"
    rf"|(?:(?<![\w.])\.)?[\d\u00bc-\u00be\u2150-\u215f]{_RUN}(?:[eE][-+\u2212]?\d{_RUN})*+(?:{_FRACTION}{_RUN})?)(?:\\?%(?:(?![\d.,/]){_RUN})?)?"
)

_FORMULA, _LETTER, _WITH_NUMBER, _WORDS = 3, 2, 1, 0  # how surely a marker announces an answer

# A box: \boxed{x}, \boxed {x}, \fbox{x}, or TeX's \boxed 5, whose content is a number, a letter or a command.
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s*+(?:(?P<open>\{)|(?P<bare>(?=[-+\u2212(.]*+\d|\\[a-zA-Z]|[a-zA-Z](?![a-zA-Z]))"
    r"(?:\\[a-zA-Z]+(?:\{(?:[^{}]++|\{[^{}]*\})*+\})*+|\\[^a-zA-Z\s]|[^\s\\{}$])++))"
)
_BRACES = re.compile(rf"(?P<box>{_BOX.pattern})|\\\\(?!(?:boxed|fbox)(?![a-zA-Z]))|\\[{{}}]|[{{}}]")
_MAX_RANKED = 2_000  # characters of a line that tell whether it is an answer
_BOLD = re.compile(r"(\*{1,3}|__)(?![*_])(.*[^*_])\1", re.DOTALL)
_LONE_LETTER = re.compile(r"(?:(?i:option|choice)\s+)?\(?[a-zA-Z][.:]?\)?[.:]?")  # a choice, or the label of a step
_INITIALS = re.compile(r"(?:[a-zA-Z]\. ?){2,}")  # "Q.E.D."
_ANNOUNCEMENT = re.compile(
    r"[*_]*(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:(?:[*_]*[:=]|is\s*:?)[*_]*)\s*(?=\S)",
    re.IGNORECASE,
)
# Words of prose: two letters or more outside LaTeX commands, except names of functions and what joins numbers.
_WORD = re.compile(
    r"(?<![\\\w])(?!(?:and|or|mod|sqrt|frac|pi|sin|cos|tan|log|ln|exp|inf|infinity|oo)(?![^\W\d_]))[^\W\d_]{2,}"
)

_BLANKS = r"(?:\\[,;:! ]|\\(?:q?quad|enspace|(?:thin|med|thick)space)(?![a-zA-Z])|\\[hm]space\*?\s*\{[^{}]*\}|[\s~])"
TEXT_OPEN = r"\\(?:mbox|operatorname|text(?:normal|bf|it|rm|sf)?|math(?:rm|it|bf|sf)|boldsymbol)\s*\{"
_GROUP = rf"{TEXT_OPEN}((?:[^{{}}]++|\{{[^{{}}]*\}})*+)\}}"
TEXT_GROUP = re.compile(_GROUP)
_DISPLAYS = r"(?:equation|align|gather|displaymath|math)\*?"
_WRAPPED = re.compile(
    r"\$\$((?:[^$\\]|\\.)*+)\$\$|\$((?:[^$\\]|\\.)*+)\$|\\\(((?:(?!\\[()]).)*+)\\\)|\\\[((?:(?!\\[\[\]]).)*+)\\\]|`([^`]*+)`"
    "|\"([^\"]*+)\"|'([^']*+)'|\u201c([^\u201c\u201d]*+)\u201d"
    rf"|\\begin\{{{_DISPLAYS}\}}((?:(?!\\(?:begin|end)\{{).)*+)\\end\{{{_DISPLAYS}\}}",
    re.DOTALL,
)
_OPENED = re.compile(
    rf"{TEXT_OPEN}|\\(?:ensuremath|underline|bm|pmb|bold|emph)\s*\{{|\\textcolor\s*\{{[^{{}}]*\}}\s*\{{|\{{"
)
_DEEP = re.compile(rf"(?:(?:{TEXT_OPEN}|\{{)\s*){{30}}")  # no answer, and one layer at a time would take too long
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it|sf)(?![a-zA-Z])\s*([^{}]*+)\}")
_IDLE = re.compile(
    rf"^(?:(?!~){_BLANKS}|\\(?:(?:display|text|script)style|bf|it|rm|sf)(?![a-zA-Z])|\\color\s*\{{[^{{}}]*\}}"
    r"|\\(?:tiny|(?:script|footnote|normal)size|small|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
    rf"|\\text\s*\{{\s*\}})+|(?:{_BLANKS}|(?<!\\)\\$)+$"
)
_STOPS = (".", "\N{IDEOGRAPHIC FULL STOP}")

CURRENCIES = "\u20ac\u00a3\u00a5\u20b9"  # before or after a number; "$" only before it
_POWER = r"(?:\^[0-9]|\^?\{\^?-?[0-9]\})?"
_UNITS = re.compile(rf"{_GROUP}{_POWER}(?:{_BLANKS}*(?:/|\\cdot|\\times|\\,){_BLANKS}*{_GROUP}{_POWER})*[ .$]*")
_DEGREES = re.compile(r"\s*(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree|\u00b0)\s*$")
# Units in letters: measures and currencies. Single letters are variables: 5m is not 5. Other words are no units: a list
# of all words that change a value ("5 dozen") has no end.
_UNIT_WORD = (
    r"(?:inch|feet|foot|(?:centi|kilo|milli)?met(?:er|re)|mile|yard|(?:milli)?lit(?:er|re)|gallon|(?:kilo|milli)?gram|pound|ton(?:ne)?|hour|"
    r"hr|minute|min|second|sec|day|week|month|year|dollar|cent|euro|rupee|degree|unit)(?:e?s)?|yen|yuan|degrees? (?:Celsius|Fahrenheit)"
)
_UNIT_POWER = r"(?:\^\{?[0-9]\}?|[\u00b2\u00b3])?"
_BARE_UNIT = re.compile(
    rf"(?:(?<=[0-9}})]){_BLANKS}*|(?<=\\pi)\s+)(?:(?:square|sq\.?|cubic|cu\.?)\s+)?(?:(?:[ckm]m|kg|m[lgL]|lbs?|ft|oz|[km]ph|km/h|m/s|[kMG]?Hz|kWh?|"
    rf"USD|EUR|GBP|{_UNIT_WORD}){_UNIT_POWER}(?:(?:\s*/\s*|\s+per\s+)(?:[ckm]m|kg|m[lgL]|[hs]|{_UNIT_WORD}){_UNIT_POWER})?|[{CURRENCIES}]"
    r"|\u00b0 ?[CF]|[\u2103\u2109])$"
)
_NUMBER_WITH_WORD = re.compile(r"[0-9]\s*(?!and|or)[a-zA-Z]{2,}\s")
BARE_PER_CENT = re.compile(r"(?:(?<=[0-9})])|\s)\s*(?:percent|per cent|pct|%|\\%)$")
_PER_CENT = frozenset(("%", r"\%", "percent", "per cent", "pct"))


class Marker(NamedTuple):
    r"""The marker of a final answer. `answer` is None if it is a box that is never closed."""

    answer: str | None
    begin: int  # its place in the text
    is_box: bool
    rank: int  # how surely it announces an answer


def extract_answer(text: str, *, fallback: str | None = None) -> str | None:
    r"""Returns the final answer of a completion as text, stripped and without marks of bold type.

    The answer is in the last marker of either kind: "#### x" to the end of the line, or "\boxed{x}", also written
    "\boxed {x}", "\boxed x" and "\fbox{x}". Five hashes are no marker. "#### Answer: 18" and "#### The answer is 18."
    are 18. A heading, "#### Check", outranks no marker with a number or a formula. It is the answer, as words, only if
    there is no such marker. A single letter after "####" outranks no box and no number or formula alone. The answer is
    None if there is no marker, or if the brace of the last box is never closed. With the fallback "last_number", a text
    without a number, a letter or a formula in a marker has as its answer the last part that looks like a number. Raises
    ValueError for any other fallback but None.
    """
    if fallback not in (None, "last_number"):
        raise ValueError(f'fallback is {fallback!r}; it must be None or "last_number".')
    marker = find_marker(text)
    if marker is not None and (fallback is None or marker.rank > _WORDS):
        return marker.answer
    if fallback is None:
        return None
    last = collections.deque(_LUMP.finditer(text), maxlen=1)
    return last[0].group().rstrip(".,/") if last else None


def find_marker(text: str) -> Marker | None:
    """Returns the marker that announces the final answer, or None: the last of those that do so most surely."""
    begin, answer, _ = _last_box(text)
    box = Marker(answer, begin, True, _FORMULA) if begin >= 0 else None
    best: Marker | None = None
    for begin, answer in _hash_lines(text):
        rank = _rank(answer)
        if best is None or rank > best.rank:
            best = Marker(answer, begin, False, rank)
        if rank == _FORMULA:
            break
    if best is None or box is not None and (box.rank, box.begin) > (best.rank, best.begin):
        return box
    return best


def count_markers(text: str) -> int:
    """Returns the number of boxes, and of hash marks that a number or a formula follows."""
    return _last_box(text)[2] + sum(_rank(answer) in (_FORMULA, _WITH_NUMBER) for _, answer in _hash_lines(text))


def _hash_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (the place of "####", what follows it), from the last to the first, if anything follows."""
    end = len(text)
    while (last := text.rfind("####", 0, end)) >= 0:
        begin = last
        while begin and text[begin - 1] == "#":
            begin -= 1
        line = text[last + 4 : end].partition("\n")[0].rstrip()
        for mark in ("**", "__"):  # "**#### 18**"
            line = line.removesuffix(mark) if text.endswith(mark, 0, begin) and mark not in line[:-2] else line
        answer = without_announcement(_without_bold(line))
        if begin == last and answer:  # more hashes are a heading
            yield begin, answer
        end = begin


def _rank(answer: str) -> int:
    answer = answer[:_MAX_RANKED]
    if answer.isdecimal():
        return _FORMULA
    if _LONE_LETTER.fullmatch(answer):
        return _LETTER
    if _INITIALS.fullmatch(answer):
        return _WORDS
    prose = TEXT_GROUP.sub("x", answer) if "\\" in answer else answer
    if not _WORD.search(prose) and any(map(str.isalnum, answer)):
        return _FORMULA
    return _WITH_NUMBER if any(map(str.isdecimal, answer)) else _WORDS


def _last_box(text: str) -> tuple[int, str | None, int]:
    """Returns (where the last box begins, its content, the number of boxes). Empty boxes do not count.

    The content is None if the last box is never closed; the place is -1 if there is no box. A box in a box is part of
    its content, unless it is all of it.
    """
    depth = count = 0
    opened: list[tuple[int, int, int]] = []  # boxes that are not closed: where they begin, their content, their depth
    last = (-1, -1, 0, 0)  # the last box that was closed: its begin and end, the begin and end of its content
    first = _BOX.search(text)
    for token in _BRACES.finditer(text, first.start() if first else len(text)):
        if token["bare"]:
            last, count = (*token.span(), *token.span("bare")), count + 1
        elif token["box"]:
            opened.append((token.start(), token.end(), depth))
            depth += 1
        elif token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if opened and opened[-1][2] == depth:
                begin, start, _ = opened.pop()
                stop = token.start()
                if last[0] >= start and not text[start : last[0]].strip() and not text[last[1] : stop].strip():
                    start, stop = last[2:]
                if text[start:stop].strip():
                    last, count = (begin, token.end(), start, stop), count + 1
    if opened and opened[-1][0] > last[0]:
        return opened[-1][0], None, count + len(opened)
    content = text[last[2] : last[3]].strip()
    return last[0], _without_bold(content.rstrip(".,:;") if last[1] == last[3] else content), count


def _without_bold(answer: str) -> str:
    answer = answer.strip()
    bold = _BOLD.fullmatch(answer.rstrip("".join(_STOPS))) if answer[:1] in ("*", "_") else None
    return bold[2].strip() if bold else answer


def without_announcement(answer: str) -> str:
    """Returns an answer without "Answer:" or "The answer is" before it, and then without its final dot."""
    announcement = _ANNOUNCEMENT.match(answer[:_MAX_RANKED])
    if not announcement:
        return answer
    stated = _without_bold(answer[announcement.end() :])
    return (stated[:-1] if stated.endswith(_STOPS) and not stated[:-1].endswith(_STOPS) else stated).strip() or answer


def plain(answer: str) -> str:
    r"""Returns an answer without what surrounds it: blanks, signs of TeX, quotes, bold type, braces, a final dot.

    The signs of TeX are dollar signs, \( \), \[ \], \displaystyle and \text{}. A list in braces keeps the braces.
    `plain(r"$\displaystyle\pi$.")` is "\pi". "$18" is money and stays.
    """
    answer = _OLD_FONT.sub(r"\\mathrm{\1}", answer)
    while True:
        shorter = _IDLE.sub("", answer.strip())
        if shorter.endswith(_STOPS) and not shorter[:-1].endswith(_STOPS):
            shorter = shorter[:-1].rstrip()
        wrapped = _WRAPPED.fullmatch(shorter)
        if wrapped:
            shorter = next(part for part in wrapped.groups() if part is not None)
        shorter = _without_braces(_without_bold(shorter))
        if shorter == answer:
            return answer
        answer = shorter


def _without_braces(answer: str) -> str:
    r"""Returns the content if \text{...}, \mathbf{...} or {...} is all of the answer. A list in braces stays."""
    opened = _OPENED.match(answer)
    if not opened or not answer.endswith("}") or _DEEP.match(answer):
        return answer
    depth = 1
    for brace in _BRACE.finditer(answer, opened.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            content = answer[opened.end() : brace.start()]
            is_list = opened[0] == "{" and ("," in content or ";" in content)
            return answer if brace.end() < len(answer) or is_list else content
    return answer


def without_bare_unit(answer: str) -> str:
    """Returns an answer without a unit in letters that ends it: "5 cm" is "5". "3 hours 20 minutes" has two and stays."""
    unit = _BARE_UNIT.search(answer)
    return answer[: unit.start()] if unit and not _NUMBER_WITH_WORD.search(answer, 0, unit.start()) else answer


def without_blanks(answer: str) -> str:
    r"""Returns an answer without blanks at its ends, those of TeX included: "\,5 " is "5"."""
    return _IDLE.sub("", answer).strip()


def split_unit(answer: str) -> tuple[str, bool]:
    r"""Returns (an answer without the unit that ends it, whether the unit is per cent).

    Units are text of TeX and degrees: "5\,\text{cm}^2", "18\ \mathrm{km} / \mathrm{h}", "90^\circ". Text that is no unit
    stays, because it changes the value: "5\text{ million}".
    """
    text = re.search(rf"{TEXT_OPEN}", answer)
    percent = False
    value = without_blanks(answer[: text.start()]) if text else ""
    if text and (value[-1:].isalnum() or value.endswith((")", "}", "!"))) and _UNITS.fullmatch(answer, text.start()):
        words = [_unit_words(group[1]) for group in TEXT_GROUP.finditer(answer, text.start())]
        percent = len(words) == 1 and words[0].lower() in _PER_CENT
        is_time = _CLOCK.fullmatch(value) is not None and _MERIDIEM.fullmatch(words[0]) is not None
        if percent or all(map(is_unit, words)) and not is_time:
            answer = value
    degrees = _DEGREES.search(answer)
    return (answer[: degrees.start()] if degrees and not percent else answer), percent


def _unit_words(words: str) -> str:
    words = re.sub(rf"{_BLANKS}+|\\cdot(?![a-zA-Z])", " ", words)
    return re.sub(rf"(?<=[a-zA-Z]){_POWER}", "", words).strip()


def is_unit(words: str) -> bool:
    r"""Returns whether \text{words} after a number is a unit: true for " cm", false for "00", "!" and " million"."""
    words = words.replace("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}")
    if unicodedata.normalize("NFKC", words) != words or not _NOT_UNIT_CHARACTERS.isdisjoint(words):
        return False
    if not all(
        unicodedata.category(c) in ("Ll", "Lu", "Lo") and not c.isnumeric() or c in f" ./-'°{CURRENCIES}" for c in words
    ):
        return False
    names = [word if len(word) == 1 else word.lower() for word in re.split(r"[ ./-]+", words)]
    per_cent = any(pair in (("per", "cent"), ("per", "mille")) for pair in itertools.pairwise(names))
    return not per_cent and _NOT_UNITS.isdisjoint(names) and _NOT_UNITS.isdisjoint(x.removesuffix("s") for x in names)
