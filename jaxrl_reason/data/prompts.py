"""Prompt templates as data: the prompt of a row, and the worked solution that the supervised phase teaches."""

from collections.abc import Mapping
import dataclasses
import difflib
import re
from typing import Any, Protocol

_FIELD = re.compile(r"\{(\w+)\}")


class Template(Protocol):
    """Renders rows: a `PromptTemplate`, or a `ChatTemplate` around one."""

    def render_prompt(self, row: Mapping[str, Any]) -> str: ...
    def render_solution(self, row: Mapping[str, Any]) -> str: ...


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Two texts in which `{column}` is replaced by a column of the row. Other braces do not change."""

    name: str  # the name in error messages
    prompt: str  # the text before the completion
    solution: str = "{solution}"  # the completion that the supervised phase teaches, without the end token

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """Returns the prompt of a row. Raises ValueError if a column is missing, or is neither text nor a number."""
        return self._render(self.prompt, row)

    def render_solution(self, row: Mapping[str, Any]) -> str:
        """Returns the worked solution of a row. Raises ValueError as `render_prompt` does."""
        return self._render(self.solution, row)

    def _render(self, text: str, row: Mapping[str, Any]) -> str:
        def written(match: re.Match) -> str:
            if match[1] not in row:
                fault = f"names the column {match[1]!r}, which the data does not have"
                raise ValueError(f"Prompt template {self.name!r} {fault}; its columns are {', '.join(sorted(row))}.")
            value = row[match[1]]
            if value is None or isinstance(value, list | dict):  # `str` would teach the policy the word "None"
                use = f"prompt template {self.name!r} writes it; it has to be text or a number"
                raise ValueError(f"column {match[1]!r} is {value!r:.80}, and {use}.")
            return str(value)

        return _FIELD.sub(written, text)  # one pass over the template: braces inside values stay


_TEMPLATES = (
    PromptTemplate("plain", prompt="{question}\n"),
    # The instruction of Qwen's mathematical models: a verifier finds the answer in the box.
    PromptTemplate("boxed", "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."),
    # For a base model, which thinks first. The prompt ends after the opening mark.
    PromptTemplate(
        "think",
        prompt="A conversation between a user and an assistant. The assistant first thinks the problem through between <think> and "
        "</think>, and then gives the solution, with the final answer within \\boxed{}.\nUser: {question}\nAssistant: <think>",
    ),
    PromptTemplate("qa", prompt="Question: {question}\nAnswer:", solution=" {solution}"),
)
TEMPLATES: dict[str, PromptTemplate] = {template.name: template for template in _TEMPLATES}


def get_template(name_or_inline: str | PromptTemplate) -> PromptTemplate:
    """Returns a template of `TEMPLATES`, or one from a text with a column, "Q: {question}"; else raises ValueError."""
    if isinstance(name_or_inline, PromptTemplate):
        return name_or_inline
    if name_or_inline in TEMPLATES:
        return TEMPLATES[name_or_inline]
    if _FIELD.search(name_or_inline):
        return PromptTemplate("inline", prompt=name_or_inline)
    nearest = difflib.get_close_matches(name_or_inline, TEMPLATES, n=1, cutoff=0.0)[0]
    hint = f"(did you mean {nearest!r}? there are {', '.join(TEMPLATES)})"
    fault = "and as the text of a prompt it names no {column}"
    raise ValueError(f"No prompt template is called {name_or_inline!r} {hint}, {fault}.")
