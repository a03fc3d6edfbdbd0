"""The skeleton of every command: a table of flags, --help, errors as sentences, exit codes.

    COMMAND = Command("export", __doc__, (WORKDIR, Flag("out", "DIR", "where to write", path)), "--workdir=runs/a")

    def main(argv: list[str] | None = None) -> int:
        return run(COMMAND, argv, prepare, work)

`prepare(arguments)` does everything that can refuse the command: it reads configuration and data. `work(prepared)` does
the rest. Exit codes: 0 done; 2 refused before it began (flags, configuration, data); 1 failed while running (diverged,
reward failures, checkpoint, disk); 143 ended by SIGTERM or Ctrl-C, after saving; 130 ended by Ctrl-C, without saving (a
command that has nothing to save, or a second Ctrl-C).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import inspect
import io
import logging
import pathlib
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import types
from typing import Any, TypeVar
import warnings

import jax

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import nearest
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.memory import keep_freed_blocks
from jaxrl_reason.runs.checkpoints import CheckpointError
from jaxrl_reason.runs.files import MetricsError
from jaxrl_reason.runs.terminal import visible
from jaxrl_reason.runs.watch import NonFiniteError

T = TypeVar("T")
# Errors of a running command whose message is a sentence for the user; any other error is a bug and keeps its traceback.
_FAILURES = (ConfigError, CheckpointError, MetricsError, models.PretrainedError, NonFiniteError, OSError)


def number(text: str) -> int:
    """Returns the value of decimal digits."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError("a number")
    return int(text)


def integer(text: str) -> int:
    """Returns the value of decimal digits, with a minus sign or without."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    return sign * number(digits)


def nonempty(text: str) -> str:
    """Returns the text; raises ValueError for an empty one."""
    if not text:
        raise ValueError("a name")
    return text


def local(text: str) -> str:
    """Returns the text of a path; raises ValueError for an empty text, and for the address of another machine."""
    if not text:
        raise ValueError("a path")
    if elsewhere := config_lib.remote(text):
        raise ValueError(f"a path on this machine: {elsewhere}")
    if config_lib.has_unknown_user(text):
        raise ValueError("a path on this machine: no user has the name after ~, and ~/ is your own home directory")
    return text


def path(text: str) -> pathlib.Path:
    """Returns an absolute path; ~ is the home directory."""
    return pathlib.Path(local(text)).expanduser().resolve()


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command, written --name=VALUE or --name VALUE."""

    name: str  # without the dashes; "config." means all flags with this prefix: --config.steps=3 sets the field `steps`
    value: str  # the placeholder of the value in --help; "" for a switch, which takes no value
    help: str
    read: Callable[[str], Any] = str  # raises ValueError with the expected kind of text
    default: Any = None
    required: bool = False
    choices: Sequence[str] = ()  # the allowed texts; () allows all
    field: str = ""  # the field of the configuration that the flag sets, or ""
    alias: str = ""  # another name
    repeated: bool = False  # the flag may be given several times, and its value is the tuple of all values

    @property
    def attribute(self) -> str:
        """The name of the value among the arguments."""
        return self.name.replace("-", "_")

    def describe(self) -> tuple[str, str]:
        """Returns the flag and its meaning for --help."""
        value = "|".join(self.choices) or self.value
        separator = "" if self.name.endswith(".") or not value else "="
        shown = self.default not in (None, ()) and self.value
        note = " (required)" if self.required else f" (default: {self.default})" if shown else ""
        return f"--{self.name}{separator}{value}", self.help + note


WORKDIR = Flag("workdir", "DIR", "the work directory of a run", path, required=True)
CHECKPOINT = Flag("checkpoint", "N", "a number under DIR/checkpoints; the newest by default", number)
RECIPE = Flag("config", "FILE", "the run's recipe, needed if it registers an estimator of its own", path)


def load_recipe(arguments: "Arguments") -> None:
    """Executes the recipe of the flag RECIPE, if it is given, which registers the estimators of the recipe."""
    if arguments.config:
        config_lib.load_module(arguments.config)


# Any field; --help of a command with this flag lists the fields with the values of the recipe --config.
FIELDS = Flag(
    "config.", "FIELD=VALUE", "sets a field of the configuration, such as --config.optimizer.learning_rate=1e-5"
)
# Flags of the commands that train.
TRAINING = (
    Flag("config", "FILE", "the recipe: a Python file with get_config()", local, required=True),
    Flag("workdir", "DIR", "the work directory; runs/NAME by default, for a recipe NAME.py", local),
    FIELDS,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command."""

    name: str  # `python -m jaxrl_reason.NAME` runs it
    doc: str | None  # its purpose, for --help; the first sentence is the summary
    flags: Sequence[Flag]  # all but --help
    example: str  # the flags of an example
    errors: tuple[type[Exception], ...] = ()  # further classes of errors whose message is a sentence for the user
    interrupted: str = "Ended by Ctrl-C, without saving."  # the message of a Ctrl-C that `work` does not handle

    def help(self, argv: Sequence[str] = ()) -> str:
        """Returns the text of --help in the width of the terminal; fields of the configuration have the values of `argv`.

        Raises ConfigError for a recipe that cannot be read, and for a field that it does not have, and ValueError for a
        base of its method that does not exist.
        """
        width = max(shutil.get_terminal_size().columns, 40)
        program = f"python -m jaxrl_reason.{self.name}"
        needed = "".join(f" {flag.describe()[0]}" for flag in self.flags if flag.required)
        flags = config_lib.two_columns([flag.describe() for flag in (*self.flags, _HELP)], width)
        usage = _in_lines(f"Usage: {program}{needed} [flags]", width, "")
        example = _in_lines(f"{program} {self.example}", width, "  ").replace("\n", " \\\n")
        text = f"{_wrapped(self.doc or '', width)}\n\n{usage}\n\nFlags:\n{flags}\n\nExample:\n{example}"
        if FIELDS not in self.flags:
            return text
        config, values = Config(), "their defaults (with --config=FILE --help: the values of this recipe)"
        if any(word.partition("=")[0] == "--config" for word in argv):
            arguments = parse(self, [word for word in argv if word not in _HELP_WORDS], complete=False)
            config, values = arguments.configuration(), f"the values of {arguments.config}"
        title = textwrap.fill(
            f"Fields of the configuration and {values}:", width, break_on_hyphens=False, break_long_words=False
        )
        return f"{text}\n\n{title}\n\n{config_lib.help_text(config, width)}"

    def find(self, name: str) -> Flag:
        """Returns the flag of an argument with dashes; raises ConfigError for an unknown flag."""
        for flag in self.flags:
            prefix = flag.name.endswith(".") and name.startswith(f"--{flag.name}")
            if prefix or name in (f"--{flag.name}", f"--{flag.alias or flag.name}"):
                return flag
        known = [flag.describe()[0].partition("=")[0] for flag in self.flags]
        raise ConfigError(f"There is no flag {name!r}.{nearest(name, known)}")


_HELP_WORDS = ("--help", "-h")
_HELP = Flag("help", "", "prints this text")


def _wrapped(text: str, width: int) -> str:
    """Returns paragraphs in lines of at most `width` characters; indented paragraphs stay as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(" ".join(p.split()), width) for p in paragraphs)


def _in_lines(text: str, width: int, indent: str) -> str:
    """Returns a command line in lines of at most `width` characters, with two left for a backslash; words stay whole."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width - 2, initial_indent=indent, subsequent_indent=f"{indent}    ", **options)


class Arguments(types.SimpleNamespace):
    """The values of a command's flags, by attribute."""

    command_line: str  # the command as it was typed
    fields: dict[str, str]  # field of the configuration -> text of its value
    recipe: dict[str, Any]  # the configuration of the recipe, once `configuration` has read it

    def configuration(self) -> Config:
        """Returns the configuration of the recipe --config with the fields of the command line.

        Raises ConfigError for an unreadable recipe, an unknown field, and a value of another type.
        """
        config = config_lib.load(self.config)
        self.recipe = config_lib.to_dict(config)
        for name, text in self.fields.items():
            config_lib.override(config, name, text)
        return config

    def training_workdir(self) -> str:
        """Returns the work directory of a run to train: --workdir, else runs/NAME for a recipe NAME.py."""
        return self.workdir or f"runs/{pathlib.Path(self.config).stem}"


def parse(command: Command, argv: Sequence[str], *, complete: bool = True) -> Arguments:
    """Reads the flags; raises ConfigError for an unknown one, a value that is missing or of another kind, and, if
    `complete`, for a required flag that is missing."""
    words, own = list(argv), [flag for flag in command.flags if not (flag.field or flag.name.endswith("."))]
    arguments = Arguments(**{flag.attribute: flag.default for flag in own}, fields={})
    arguments.command_line = shlex.join(["python", "-m", f"jaxrl_reason.{command.name}", *argv])
    while words:
        name, equals, text = words.pop(0).partition("=")
        flag = command.find(name)
        if not flag.value:
            if equals:
                raise ConfigError(f"{name} takes no value.")
            setattr(arguments, flag.attribute, True)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{name} needs a value: {name}=...")
            text = words.pop(0)
        if flag.choices and text not in flag.choices:
            raise ConfigError(f"{name} is {text!r}; it must be one of {', '.join(flag.choices)}.")
        try:
            value = flag.read(text)
        except ValueError as e:
            raise ConfigError(f"{name}={text}: expected {e}.") from None
        if flag not in own:
            arguments.fields[flag.field or name.removeprefix("--config.")] = value
            continue
        setattr(arguments, flag.attribute, (*getattr(arguments, flag.attribute), value) if flag.repeated else value)
    for flag in own:
        if complete and flag.required and not getattr(arguments, flag.attribute):
            raise ConfigError(f"--{flag.name}={flag.value} is missing: {flag.help}.")
    return arguments


def run(
    command: Command, argv: Sequence[str] | None, prepare: Callable[[Arguments], T], work: Callable[[T], object]
) -> int:
    """Runs a command, also on several processes, and returns its exit code. Without `argv` it reads sys.argv.

    `prepare` checks everything; the exit code of its errors is 2. `work` takes the result of `prepare`; the exit code
    of its errors is 1. Without `argv`, this process ends next, so that a later Ctrl-C ends it at once.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters of a completion
    try:
        return _run(command, sys.argv[1:] if argv is None else argv, prepare, work)
    finally:
        if argv is None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # else code that runs at exit would show a traceback


def _run(command: Command, argv: Sequence[str], prepare: Callable[[Arguments], T], work: Callable[[T], object]) -> int:
    if any(word in argv for word in _HELP_WORDS) or not argv and any(flag.required for flag in command.flags):
        try:
            print(command.help(argv))
        except ValueError as e:
            return _report(e, 2)
        return 0
    keep_freed_blocks()
    refusals: tuple[type[Exception], ...] = (ValueError, OSError, *command.errors)
    failures: tuple[type[Exception], ...] = (*_FAILURES, *command.errors)
    with hosts.leaving_together(), hosts.leaving_at_once(), _plain_warnings():
        try:
            try:
                prepared = prepare(parse(command, argv))
            except refusals as e:
                if hosts.came_from_devices(e) and jax.process_count() > 1:
                    raise  # another process has ended
                return _report(e, 2)
            work(prepared)
            hosts.barrier("end")
        except failures as e:
            return hosts.leave(_report(e, 1))
        except hosts.Preempted as e:
            hosts.barrier("preempted")
            print(e, file=sys.stderr)
            return hosts.leave(e.exit_code)
        except KeyboardInterrupt:
            return hosts.leave(_report(command.interrupted, hosts.INTERRUPTED))
        except (jax.errors.JaxRuntimeError, ValueError) as e:
            if jax.process_count() == 1 or not hosts.came_from_devices(e):
                raise
            return hosts.leave(_report(hosts.why_it_stopped(e), 1))
    return 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints warnings and our log as sentences, without the file and the source line that raised them.

    Records with an attribute `kind` are printed once per kind.
    """
    before, log, handler = warnings.formatwarning, logging.getLogger(_OURS), _Sentences()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {visible(str(message))}\n"
    log.addHandler(handler)
    try:
        yield
    finally:
        warnings.formatwarning = before
        log.removeHandler(handler)
        for other in logging.getLogger().handlers:
            other.removeFilter(_is_of_others)


_OURS = __name__.partition(".")[0]


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] != _OURS


class _Sentences(logging.StreamHandler):
    """Prints records as warnings: the first one of each kind, and all without a kind."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()
        self.setFormatter(logging.Formatter("warning: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        # Libraries give the root logger a handler at any time, which would print the record again as WARNING:module.
        for other in logging.getLogger().handlers:
            if getattr(other, "stream", None) is sys.stderr or type(other).__module__.startswith("absl"):
                other.addFilter(_is_of_others)
        kind = getattr(record, "kind", None)
        if kind is None or kind not in self._seen:
            super().emit(record)
        self._seen.add(kind)


def _report(error: Exception | str, code: int) -> int:
    print(f"error: {visible(str(error))}", file=sys.stderr)
    return code
