"""Opens a policy to sample from: that of a run, or a pretrained model without a run."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models, runs
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.rl import hosts, programs
from jaxrl_reason.runs import compilation_cache, digests
from jaxrl_reason.runs.command import CHECKPOINT, Flag, path
from jaxrl_reason.runs.workdir import check_checkpoint, model_source, tokenizer_of, with_fields
from jaxrl_reason.tasks import pretrained
from jaxrl_reason.tasks.regression import opening as numbers
from jaxrl_reason.tasks.self_reward import probe_token, ProbeReference, read_reference
from jaxrl_reason.tasks.task import build_programs, Task

WORKDIR = Flag("workdir", "DIR", "the work directory of a run; or give --model", path)
MODEL = Flag(
    "model",
    "NAME_OR_PATH",
    "a model instead of a run: a directory (also of PEFT adapters), a .gguf file or an id of the hub, OWNER/NAME@REVISION",
)
FLAGS = (WORKDIR, MODEL, CHECKPOINT)  # of a command that samples from one policy
SAMPLING = (
    Flag("temperature", "T", "0 is greedy; config.eval.temperature by default", field="eval.temperature"),
    Flag(
        "top_p",
        "P",
        "samples among the most probable tokens that together reach P (1: all); config.eval.top_p by default",
        field="eval.top_p",
        alias="top-p",
    ),
    Flag(
        "top_k",
        "N",
        "samples among the N most probable tokens (0: all); config.eval.top_k by default",
        field="eval.top_k",
        alias="top-k",
    ),
    Flag(
        "max_completion_length",
        "N",
        "the largest number of tokens per completion; config.max_completion_length by default",
        field="max_completion_length",
        alias="max-completion-length",
    ),
)

Source = pathlib.Path | str  # the work directory of a run, or the name or path of a model


class LoadedPolicy(NamedTuple):
    """A policy with its weights on the devices."""

    programs: programs.Programs  # of `OpenedPolicy.config`; text policies have no rewards here
    weights: models.Params  # as rollouts read them
    reference: ProbeReference  # of LaSeR's self-rewards; None without them
    checkpoint: int | None  # the number of the checkpoint; None for a model
    digest: str | None  # of the weights of a run; None for a model


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedPolicy:
    """Everything about a policy but its weights, which `load` reads."""

    name: str  # for titles
    config: Config  # with the fields of the command line
    method: Method
    mesh: jax.sharding.Mesh
    tokenizer: Any  # a data.Tokenizer, or the Digits of a run that predicts numbers
    model: models.ModelConfig  # the decoder; `Programs.model` has the choices of the devices too
    workdir: pathlib.Path | None  # of the run; None for a model
    checkpoint: int | None  # the checkpoint to read; None: the newest
    opened: models.Opened | None  # the model; None for a run
    numbers: Task | None  # the held-out table of a run that predicts numbers; None for text
    changed: float | None = None  # when the newest file of a local model was written, in seconds since 1970

    def load(self) -> LoadedPolicy:
        """Reads the weights onto the mesh. Raises ConfigError or PretrainedError for weights that cannot be read."""
        c, mesh = self.config, self.mesh
        if self.numbers is not None:
            made = build_programs(c, self.method, self.numbers, mesh)
        else:
            made = programs.build(
                c,
                self.method,
                self.model,
                mesh,
                eos_ids=self.tokenizer.eos_ids,
                pad_id=self.tokenizer.pad_id,
                weights={},
                verdict="",
                probe_token=probe_token(self.method, self.tokenizer),
            )
        if self.workdir is None:
            assert self.opened is not None
            params = pretrained.load_weights(c, self.opened, self.opened.source, self.model, mesh)
            return LoadedPolicy(made, made.rollout_weights(params), None, None, None)
        shapes, shardings = models.abstract_params(self.model), models.param_shardings(self.model, mesh)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        number, params = runs.load_weights(self.workdir, self.checkpoint, like, self.model)
        reference = read_reference(self.method, made, self.workdir, params, self.model)
        digest = digests.of_all(params)
        return LoadedPolicy(made, made.rollout_weights(params), reference, number, digest)


def chosen_source(workdir: pathlib.Path | None, model: str | None) -> Source:
    """Returns the policy that --workdir or --model names. Raises ConfigError unless exactly one of them is given."""
    if workdir and model:
        raise ConfigError("--workdir and --model both name a policy; give one of them.")
    if not workdir and not model:
        raise ConfigError("--workdir=DIR is missing, and so is --model=NAME_OR_PATH; give one of them.")
    return workdir or str(model)


def open_policy(source: Source, fields: dict[str, str], checkpoint: int | None = None) -> OpenedPolicy:
    """Opens a policy, on all processes, after connecting them.

    Args:
      source: a path is the work directory of a run; a text is a model.
      fields: fields of the configuration, as texts. A run has its own values; for a model see `config_of_model`.
      checkpoint: the number of a run's checkpoint; None: the newest.

    Raises ConfigError, PretrainedError, ValueError or OSError for a policy that cannot be opened.
    """
    workdir = source if isinstance(source, pathlib.Path) else None
    if workdir is None and checkpoint is not None:
        raise ConfigError("--checkpoint chooses a checkpoint of a run, and a model has none; leave it out.")
    config = config_of_model(str(source), fields) if workdir is None else runs.load_config(workdir, fields)
    if not jax.distributed.is_initialized():  # by an earlier policy
        hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout, saves=False)
    compilation_cache.enable(config.compilation_cache)
    opening = lambda: _open_run(workdir, config, checkpoint) if workdir else _open_model(config, fields)
    return hosts.agree(opening, ConfigError, ValueError, OSError)


def asks_for_boxes(source: Source) -> dict[str, str]:
    """Returns the field by which a model without a run is asked for its final answer in a box, as verifiers read it."""
    return {} if isinstance(source, pathlib.Path) else {"data.template": "boxed"}


def config_of_model(model: str, fields: dict[str, str]) -> Config:
    """Returns the configuration of a model without a run: the defaults, with longer texts and all held-out prompts.

    Prompts of up to 4096 tokens and completions of up to 1024 are allowed, and 32 completions are sampled at once. Raises
    ConfigError for fields that do not fit.
    """
    if "model.path" in fields:
        raise ConfigError("--config.model.path names a second model next to --model; leave it out.")
    config = Config(group_size=2, max_prompt_length=4096, max_completion_length=1024)
    config.model.path, config.eval.prompts = model, ALL
    config.data.chat = bool({"data.system", "data.chat_options"} & fields.keys())  # else the tokenizer decides
    return with_fields(config, fields)


ALL = 10**9  # held-out prompts: all that there are


def _open_run(workdir: pathlib.Path, config: Config, checkpoint: int | None) -> OpenedPolicy:
    method, mesh = config_lib.make_method(config), programs.make_mesh(config)
    task = numbers.open_for_evaluation(config, mesh, workdir) if config.regression.tokenizer else None
    check_checkpoint(workdir, checkpoint)
    tokenizer = tokenizer_of(workdir) if task is None else task.tokenizer
    model = config_lib.model_config(config, tokenizer.vocab_size, model_source(workdir)) if task is None else task.model
    return OpenedPolicy(
        workdir.name, config, method, mesh, tokenizer, model, workdir, checkpoint, opened=None, numbers=task
    )


def _open_model(config: Config, fields: dict[str, str]) -> OpenedPolicy:
    if config.regression.tokenizer:
        raise ConfigError(
            "config.regression.tokenizer is set, and a model without a run predicts no numbers: leave it out."
        )
    name = config.model.path
    opened = models.open_model(name)
    config.model.path = models.pinned(name, opened.source)  # a branch of the hub may move
    if config.data.tokenizer:
        tokenizer = data.load_tokenizer(config.data.tokenizer)
    else:
        tokenizer = pretrained.tokenizer_of(config, opened)
    if "data.chat" not in fields:
        if config.data.chat and tokenizer.chat_template is None:
            raise ConfigError(
                "config.data.system and config.data.chat_options belong to a chat template, and this model has none; leave them out."
            )
        config.data.chat = tokenizer.chat_template is not None
    model = config_lib.model_config(config, tokenizer.vocab_size, opened.source)
    models.check_weights(opened, pretrained.base_shape(model))
    place = pathlib.Path(name).expanduser()
    files = [place] if place.is_file() else [file for file in place.glob("*") if file.is_file()]
    changed = max((file.stat().st_mtime for file in files), default=None)
    title = place.resolve().name if files else name
    method, mesh = config_lib.make_method(config), programs.make_mesh(config)
    return OpenedPolicy(title, config, method, mesh, tokenizer, model, None, None, opened, None, changed)
