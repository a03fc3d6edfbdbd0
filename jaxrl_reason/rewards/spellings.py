r"""Two spellings of one text: accents and letters as TeX writes them become Unicode, formulas in Unicode become TeX."""

import re
import unicodedata

# Accents and letters of TeX's text: \"{u}, \'e, \c{c}, \ss.
_ACCENTS = dict(zip("`'^\"~=.cHvurk", "\u0300\u0301\u0302\u0308\u0303\u0304\u0307\u0327\u030b\u030c\u0306\u030a\u0328"))
_ACCENT = re.compile(
    r"(?<!\\)\\(?:([`'^\"~=.])\s*|([cHvurk])(?=\s*\{|\s+[a-zA-Z]))(?:\{\s*(?:\\([ij])|([a-zA-Z]))\s*\}|\s*\\([ij])(?![a-zA-Z])\s*|\s*([a-zA-Z]))"
)
_LETTERS = {"ss": "\u00df", "o": "\u00f8", "O": "\u00d8", "l": "\u0142", "L": "\u0141", "ae": "\u00e6", "AE": "\u00c6"}
_LETTERS |= {"oe": "\u0153", "OE": "\u0152", "aa": "\u00e5", "AA": "\u00c5"}
_LETTER = re.compile(rf"\{{\\({'|'.join(_LETTERS)})\s*\}}|(?<!\\)\\({'|'.join(_LETTERS)})(?![a-zA-Z])(?:\s*\{{\}}|\s*)")
# Formulas in Unicode: \u221a2, x\u00b2, x\u2081.
_RADICAL = re.compile(r"\u221a\s*(?:([0-9]+|[a-zA-Z])|\(([^()]*)\)|\{([^{}]*)\})")
_FRACTION_SIGN = re.compile("([0-9]*)([\u00bc-\u00be\u2150-\u215e])")
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_SCRIPTS = (
    (re.compile(rf"[{''.join(map(chr, _RAISED))}]+"), "^", _RAISED),
    (re.compile("[\u2080-\u2089]+"), "_", _LOWERED),
)


def with_accents(answer: str) -> str:
    """Returns an answer with the accents and letters of TeX's text as Unicode has them, composed."""
    accent = lambda m: "".join(filter(None, m.groups()[2:])) + _ACCENTS[m[1] or m[2]]
    text = _LETTER.sub(lambda letter: _LETTERS[letter[1] or letter[2]], answer)
    return unicodedata.normalize("NFC", _ACCENT.sub(accent, text))


def in_tex(latex: str) -> str:
    r"""Returns LaTeX with the roots, powers, indices and fractions of Unicode as TeX writes them: \sqrt{2}, x^{2}."""
    latex = _RADICAL.sub(lambda root: rf"\sqrt{{{next(part for part in root.groups() if part is not None)}}}", latex)
    for scripts, mark, digits in _SCRIPTS:
        latex = scripts.sub(lambda script: f"{mark}{{{script[0].translate(digits)}}}", latex)
    return _FRACTION_SIGN.sub(_as_fraction, latex)


def _as_fraction(match: re.Match) -> str:
    above, below = unicodedata.normalize("NFKC", match[2]).split("\u2044")
    return f"{match[1]} {above}/{below}" if match[1] else rf"\frac{{{above}}}{{{below}}}"
