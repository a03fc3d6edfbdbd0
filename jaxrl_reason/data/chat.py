"""Chat templates: a prompt becomes the user's turn of the conversation that an instruction-tuned model expects."""

from collections.abc import Mapping
import dataclasses
import functools
import json
from typing import Any

import jinja2
from jinja2 import sandbox
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jaxrl_reason.data.prompts import PromptTemplate
from jaxrl_reason.data.tokenizer import Tokenizer

_GIVEN = {"messages", "add_generation_prompt", "bos_token", "eos_token"}  # names that every template receives


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A prompt template inside a model's own chat template, with the methods of a `PromptTemplate`."""

    inner: PromptTemplate  # of the user's turn and of the worked solution
    text: str  # the model's chat template: Jinja as Hugging Face writes it; it runs in a sandbox
    system: str = ""  # the system prompt; if empty, there is none, and some templates insert their own
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further names: enable_thinking of Qwen 3
    bos: str = ""  # the text of the begin token, which a template may write
    eos: str = ""  # the text of the end token

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """Returns the text before the assistant's. Raises ValueError if a column is missing, or the template fails."""
        content = self.inner.render_prompt(row).strip()  # the template marks the end of a turn
        return self.render([{"role": "user", "content": content}], add_generation_prompt=True)

    def render_solution(self, row: Mapping[str, Any]) -> str:
        """Returns the assistant's text, without the mark at the end of its turn."""
        return self.inner.render_solution(row)

    def render(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Returns a conversation, after the system prompt; raises ValueError if the chat template fails."""
        messages = ([{"role": "system", "content": self.system}] if self.system else []) + turns
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return _compiled(self.text).render(bos_token=self.bos, eos_token=self.eos, **given, **self.options)
        except Exception as e:  # a template is a program, which can fail in any way
            raise ValueError(f"The model's chat template cannot render a prompt: {e}.") from e


def chat_template(
    inner: PromptTemplate, tokenizer: Tokenizer, system: str = "", options: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Returns `inner` as the user's turn of the tokenizer's chat template; see the fields of `ChatTemplate`.

    Raises ValueError if the tokenizer has no chat template, the template is not Jinja, or an option's name is taken.
    """
    if not tokenizer.chat_template:
        raise ValueError("config.data.chat is set, and the tokenizer has no chat template; set it to False.")
    for name in options or {}:
        if not isinstance(name, str) or name in _GIVEN:
            rule = f"a name must be text, and {', '.join(sorted(_GIVEN))} are given already"
            raise ValueError(f"config.data.chat_options names {name!r}; {rule}.")
    try:
        _compiled(tokenizer.chat_template)
    except jinja2.TemplateError as e:
        raise ValueError(f"The tokenizer's chat template is not Jinja that can be read: {e}.") from e
    spell = lambda i: "" if i is None else tokenizer.backend.id_to_token(i) or ""
    bos, eos = spell(tokenizer.bos_id), spell(tokenizer.eos_ids[0])
    return ChatTemplate(inner, tokenizer.chat_template, system, dict(options or {}), bos, eos)


class _Generation(jinja2.ext.Extension):
    """Reads `{% generation %}`, which marks the assistant's text for training, as plain text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    """Compiles a chat template with the settings of `transformers`."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # Jinja's own filter escapes HTML.
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = _raise
    # No strftime_now: a run resumed on another day would train on other prompts. Templates fall back to a fixed date.
    return environment.from_string(text)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
