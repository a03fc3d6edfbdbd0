"""Chat templates: a prompt becomes the user's turn of the conversation that an instruction-tuned model was trained on."""

from collections.abc import Mapping
import dataclasses
import functools
import json
from typing import Any

import jinja2
from jinja2 import sandbox
import jinja2.ext

from jaxrl_reason.data.prompts import PromptTemplate
from jaxrl_reason.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A prompt template inside a model's own chat template; used like a `PromptTemplate`.

    Attributes:
      inner: what the user says, and what a worked solution looks like.
      text: the chat template, Jinja as Hugging Face writes it. It comes with the model and runs in a sandbox.
      system: the system prompt; empty: none (some templates then put in one of their own).
      options: further names that the template knows, such as {"enable_thinking": False} of Qwen 3.
      bos, eos: the texts of the begin and end tokens, which a template may write.
    """

    inner: PromptTemplate
    text: str
    system: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bos: str = ""
    eos: str = ""

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """The conversation up to where the assistant begins to speak.

        Raises:
          ValueError: the row lacks a column, or the chat template refuses these messages.
        """
        content = self.inner.render_prompt(row).strip()  # a turn ends where its mark does
        return self.render([{"role": "user", "content": content}], add_generation_prompt=True)

    def render_solution(self, row: Mapping[str, Any]) -> str:
        """What the assistant says, without the end of its turn."""
        return self.inner.render_solution(row)

    def render(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation, after the system prompt. Raises ValueError where the template refuses it."""
        messages = ([{"role": "system", "content": self.system}] if self.system else []) + turns
        try:
            return _compiled(self.text).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                **self.options,
            )
        except Exception as e:  # a template is a program: it can fail in any way
            raise ValueError(f"The model's chat template cannot render a prompt: {e}.") from e


def chat_template(
    inner: PromptTemplate, tokenizer: Tokenizer, system: str = "", options: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """`inner` as the user's turn of the tokenizer's chat template.

    Raises:
      ValueError: the tokenizer has no chat template, or it is not Jinja.
    """
    if not tokenizer.chat_template:
        raise ValueError("config.data.chat is set, and the tokenizer has no chat template; set it to False.")
    known = {"messages", "add_generation_prompt", "bos_token", "eos_token"}
    for name in options or {}:
        if not isinstance(name, str) or name in known:
            raise ValueError(
                f"config.data.chat_options names {name!r}; a name must be text, and {', '.join(sorted(known))} are given already."
            )
    spell = lambda i: "" if i is None else tokenizer.backend.id_to_token(i)
    try:
        _compiled(tokenizer.chat_template)
    except jinja2.TemplateError as e:
        raise ValueError(f"The tokenizer's chat template is not Jinja that can be read: {e}.") from e
    bos, eos = spell(tokenizer.bos_id), spell(tokenizer.eos_ids[0])
    return ChatTemplate(inner, tokenizer.chat_template, system, dict(options or {}), bos, eos)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is only text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    """As `transformers` compiles chat templates."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    # Without Jinja's escaping for HTML.
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = _refuse
    # No strftime_now: a run that goes on another day would train on other prompts. Templates fall back to a fixed date.
    return environment.from_string(text)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
