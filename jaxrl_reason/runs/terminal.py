"""Texts of models, data and users on a terminal."""

import unicodedata


def visible(text: str) -> str:
    """Returns a text in which control characters are shown as escapes, so that a terminal does not obey them."""
    acts = lambda x: unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp") and x not in "\n\t" or x in _DIRECTIONS
    return "".join(x.encode("unicode_escape").decode() if acts(x) else x for x in text)


_DIRECTIONS = (
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder the text around them
)
