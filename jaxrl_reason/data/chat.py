"""Chat templates: a prompt becomes the user's turn of the conversation that an instruction-tuned model expects."""

from collections.abc import Callable, Mapping
import dataclasses
import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2 import sandbox
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from jaxrl_reason.data.prompts import PromptTemplate, Turn
from jaxrl_reason.data.tokenizer import Tokenizer

# Names that every template receives and options cannot change. Like `transformers`, we also give tools and documents, which are
# None, and the texts of the padding token and the unknown token: some templates ask whether these names are defined.
_GIVEN = {"messages", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"}
# The day that `strftime_now` tells: a run that is resumed on another day keeps its prompts. It is the one that Llama's
# templates fall back to.
DAY = "2024-07-26"
_TRIAL = ("You answer in full sentences.", "How much is 7 + 5, and why?")  # a system prompt and a question


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A prompt template inside a model's own chat template, with the methods of a `PromptTemplate`."""

    inner: PromptTemplate  # of the user's turn and of the worked solution
    text: str  # the model's chat template: Jinja as Hugging Face writes it; it runs in a sandbox
    system: str = ""  # the system prompt; if empty, there is none, and some templates insert their own
    # Further names, such as enable_thinking of Qwen 3; `today`, such as "2026-01-31", is the day of `strftime_now`.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The texts of the special tokens that a template may write, as bos_token, eos_token, pad_token and unk_token.
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """Returns the text before the assistant's: the system prompt, earlier turns of the row, and the user's turn.

        Raises ValueError if a column is missing, the template fails, or it leaves a turn out.
        """
        *earlier, last = self.inner.turns(row)
        turns = [*earlier, {**last, "content": last["content"].strip()}]  # the template marks the end of a turn
        if self.system and turns[0]["role"] in ("system", "developer"):
            raise ValueError("config.data.system is set, and the question begins with a system turn: leave one out.")
        text = self.render(turns, add_generation_prompt=True)
        self.check_complete(text, turns)
        return text

    def render_solution(self, row: Mapping[str, Any]) -> str:
        """Returns the assistant's text, without the mark at the end of its turn."""
        return self.inner.render_solution(row)

    def check_complete(self, text: str, turns: list[Turn]) -> None:
        """Raises ValueError if a rendered conversation lacks the system prompt or a turn.

        Templates may cut white space at both ends of a turn, and the thoughts of an earlier assistant.
        """
        for turn in sorted(self._messages(turns), key=lambda turn: -len(turn["content"])):
            content = turn["content"]
            content = (content.rpartition("</think>")[2] if turn["role"] == "assistant" else content).strip()
            spelled = next((x for x in (content, json.dumps(content, ensure_ascii=False)[1:-1]) if x in text), None)
            if spelled is None:
                what = f"the {turn['role']}'s turn {content!r:.80}"
                if turn["role"] == "system" and self.system:
                    what = f"the system prompt {self.system!r:.80}"
                remedy = "use another template, or put the text into the user's turn by config.data.template"
                raise ValueError(f"The model's chat template leaves out {what}: {remedy}.")
            text = text.replace(spelled, "\0", 1)  # each turn needs a place of its own

    def _messages(self, turns: list[Turn]) -> list[Turn]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + turns

    def render(self, turns: list[Turn], add_generation_prompt: bool) -> str:
        """Returns a conversation, after the system prompt; raises ValueError if the chat template fails."""
        messages = self._messages(turns)
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        options = {name: value for name, value in self.options.items() if name != "today"}
        named = {"tools": None, "documents": None, **self.tokens, **options}
        try:
            return _compiled(self.text).render(strftime_now=_clock(self.options.get("today", DAY)), **given, **named)
        except Exception as e:  # a template is a program, which can fail in any way
            raise ValueError(f"The model's chat template cannot render a prompt: {e}.") from e


def chat_template(
    inner: PromptTemplate, tokenizer: Tokenizer, system: str = "", options: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """Returns `inner` as the user's turn of the tokenizer's chat template; see the fields of `ChatTemplate`.

    Raises ValueError if the tokenizer has no chat template, the template is not Jinja or leaves out the system prompt or
    the user's turn, or an option's name is taken.
    """
    if not tokenizer.chat_template:
        raise ValueError("config.data.chat is set, and the tokenizer has no chat template; set it to False.")
    for name in options or {}:
        if not isinstance(name, str) or name in _GIVEN:
            rule = f"a name must be text, and {', '.join(sorted(_GIVEN))} are given already"
            raise ValueError(f"config.data.chat_options names {name!r}; {rule}.")
    _clock((options or {}).get("today", DAY))
    try:
        _compiled(tokenizer.chat_template)
    except jinja2.TemplateError as e:
        raise ValueError(f"The tokenizer's chat template is not Jinja that can be read: {e}.") from e
    spell = lambda i: "" if i is None else tokenizer.backend.id_to_token(i) or ""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_ids[0], "pad_token": tokenizer.pad_id}
    tokens = {name: spell(i) for name, i in ids.items()}
    tokens |= {} if tokenizer.unk_token is None else {"unk_token": tokenizer.unk_token}
    chat = ChatTemplate(inner, tokenizer.chat_template, system, dict(options or {}), tokens)
    # Tried with long texts, because short ones can occur in the template's own text.
    trial, turns = dataclasses.replace(chat, system=system and _TRIAL[0]), [{"role": "user", "content": _TRIAL[1]}]
    try:
        text = trial.render(turns, add_generation_prompt=True)
    except ValueError:  # it may depend on the conversation; the rows will tell
        return chat
    trial.check_complete(text, turns)
    return chat


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
    return environment.from_string(text)


def _clock(day: Any) -> Callable[[str], str]:
    """Returns `strftime_now` of chat templates, at midnight of a day. Raises ValueError unless it is YYYY-MM-DD."""
    try:
        return datetime.datetime.strptime(day, "%Y-%m-%d").strftime
    except (TypeError, ValueError) as e:
        raise ValueError(f"config.data.chat_options names the day {day!r}; write it as {DAY!r}.") from e


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
