"""Writes content into page.html: the content is inert data, and a policy forbids everything but the page's own script."""

import base64
from collections.abc import Mapping
import functools
import hashlib
from importlib import resources
import json
import os
from typing import Any

from jaxrl_reason.runs.files import write_text

# JSON may hold these characters only inside of strings, where their escapes mean the same.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def write_page(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes a page with this content, a JSON object; the file is complete or absent. Raises OSError on failure.

    The content has "title", "subtitle", and any of "facts" [[name, text]], "warnings" [{"step", "text"}], "charts" (see
    `curves`), "tables" [{"title", "note", "head", "rows"}], "completions" (see `completions`) and "fields".
    """
    head, tail = _template()
    write_text(path, f"{head}{to_script(content)}{tail}")


def to_script(content: Mapping[str, Any]) -> str:
    """Returns JSON in ASCII that cannot end the script element around it, whatever text is in it."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


@functools.cache
def _template() -> tuple[str, str]:
    """Returns page.html before and after the content, with the policy that allows its script and its style by their hashes."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    inside = lambda tag: page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {digest(inside('script'))}",
            f"style-src {digest(inside('style'))}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head, _, tail = page.replace("POLICY", policy, 1).partition("CONTENT")
    return head, tail
