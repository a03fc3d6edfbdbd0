"""Prompt templates as data: the prompt of a row, and the worked solution that the supervised phase teaches."""

from collections.abc import Mapping
import dataclasses
import difflib
import json
import re
from typing import Any, Protocol

_FIELD = re.compile(r"\{(\w+)\}")
_OBJECTS = re.compile(r"\s*(?:\[\s*)?\{")
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
_RENAMED = {"human": "user", "gpt": "assistant"}  # names of roles in ShareGPT's files
WITHOUT_SOLUTIONS = "; --config.supervised.steps=0 leaves the supervised start out."

Turn = dict[str, Any]  # of a conversation: "role", "content", and what else the chat template reads


def turns_of(question: Any) -> list[Turn]:
    """Returns a question as a conversation: turns with a role and a text, of which the last is the user's.

    A question can be text or a number; a list of turns, {"role": "user", "content": "1 + 1?"}; or, as TFDS stores them,
    {"role": [...], "content": [...]}. A content can be a list of parts {"type": "text", "text": ...}, which are joined.
    Raises ValueError if a turn has no role or no text, or the last one is not the user's.
    """
    if isinstance(question, Mapping) and all(isinstance(question.get(key), list) for key in ("role", "content")):
        question = [dict(zip(question, turn)) for turn in zip(*question.values(), strict=True)]
    if not isinstance(question, list | Mapping):
        return [{"role": "user", "content": str(question)}]
    if not question or not isinstance(question, list):
        raise ValueError("it has to be text, a number, or a list of turns with role and content")
    turns = [_turn(i, turn) for i, turn in enumerate(question)]
    if turns[-1]["role"] in ("assistant", "system"):
        last = f"its last turn is the {turns[-1]['role']}'s"
        raise ValueError(f"{last}; it has to be the user's, because the policy writes the next one")
    return turns


def parse_turns(question: Any) -> Any:
    """Returns the turns of a question that is a conversation, or one turn, as JSON text; any other question as it is.

    Raises ValueError for turns in Python's spelling, which pandas writes into CSV files.
    """
    if not isinstance(question, str) or not _OBJECTS.match(question):
        return question
    try:
        found = json.loads(question)
    except (ValueError, RecursionError):
        if not _CONVERSATION.match(question):
            return question
        raise ValueError(
            "the question is text that begins like a list of turns, and is not JSON; write it with json.dumps"
        ) from None
    if isinstance(found, dict):
        return found if {"role", "content"} <= found.keys() else question
    return found if all(isinstance(turn, dict) and "role" in turn for turn in found) else question


def _turn(i: int, turn: Any) -> Turn:
    turn = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    role, content = turn.get("role"), turn.get("content", "" if "tool_calls" in turn else None)
    if isinstance(content, list):
        parts = [x for x in content if isinstance(x, Mapping) and x.get("type") == "text"]
        texts = [x["text"] for x in parts if isinstance(x.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(role, str) or not role or not isinstance(content, str):
        raise ValueError(f"turn {i} has to have a role and a content that is text")
    if role in _RENAMED:
        raise ValueError(f"turn {i} has the role {role!r}; name it {_RENAMED[role]!r}, as chat templates do")
    if not content.strip() and "tool_calls" not in turn:
        raise ValueError(f"turn {i}, the {role}'s, is empty")
    return {**turn, "role": role, "content": content}


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
        """Returns the prompt of a row. Raises ValueError if a column is missing, or is neither text nor a number.

        A question that is a conversation must have one turn only, because this template writes no roles.
        """
        *earlier, last = self.turns(row)
        if earlier:
            fault = f"is a conversation of {len(earlier) + 1} turns, and prompt template {self.name!r} writes no roles"
            raise ValueError(f"column 'question' {fault}; set config.data.chat to True for the model's chat template.")
        return last["content"]

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """Returns the prompt as a conversation: the template writes the last turn, and earlier turns do not change."""
        if "{question}" not in self.prompt or not isinstance(row.get("question"), list | dict):
            return [{"role": "user", "content": self._render(self.prompt, row)}]
        try:
            *earlier, last = turns_of(row["question"])
        except ValueError as error:
            raise ValueError(f"column 'question' is {row['question']!r:.80}, and {error}.") from error
        return [*earlier, {**last, "content": self._render(self.prompt, {**row, "question": last["content"]})}]

    def render_solution(self, row: Mapping[str, Any]) -> str:
        """Returns the worked solution of a row. Raises ValueError as `render_prompt` does."""
        return self._render(self.solution, row)

    def _render(self, text: str, row: Mapping[str, Any]) -> str:
        def written(match: re.Match) -> str:
            if match[1] not in row:
                fault = f"names the column {match[1]!r}, which this row does not have"
                known = f"its columns are {', '.join(sorted(row))}"
                advice = "Of a Parquet file, only columns that config.data.columns names are read, and those of this package."
                advice = (
                    f"Solutions are for the supervised start{WITHOUT_SOLUTIONS}" if match[1] == "solution" else advice
                )
                raise ValueError(f"Prompt template {self.name!r} {fault}; {known}. {advice}")
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
