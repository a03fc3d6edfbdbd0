"""A trained policy as a directory that others load: python -m jaxrl_reason.export --workdir=DIR --out=DIR

Writes config.json, safetensors, the tokenizer's files and generation_config.json, as `transformers`, vLLM and llama.cpp's converter
read them. Adapters (config.lora) are merged into the weights.

  --workdir=DIR       the work directory of a run
  --out=DIR           what to write; must not exist, or be empty
  --checkpoint=N      a number under checkpoints/ in the work directory; default the newest
  --reward-model      write the reward model that the run trained instead, as a sequence classifier
  --adapters          write a PEFT adapter directory instead: the adapters alone, for the model of config.model.path
  --dtype=DTYPE       float32 or bfloat16; default as trained
  --config=FILE       the run's recipe, where it registers an estimator of its own
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import sys

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models, runs
from jaxrl_reason.config import ConfigError
from jaxrl_reason.methods import nearest
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards import model_files
from jaxrl_reason.runs.workdir import model_source, tokenizer_of

_FLAGS = ("--workdir", "--out", "--checkpoint", "--reward-model", "--adapters", "--dtype", "--config")
_SWITCHES = ("--reward-model", "--adapters")


def parse_args(argv: Sequence[str]) -> dict[str, str]:
    """Flag -> text; switches stand alone.

    Raises:
      ConfigError: an unknown flag, a flag without a value, or one that is missing.
    """
    argv, texts = list(argv), {}
    while argv:
        flag, equals, text = argv.pop(0).partition("=")
        if flag not in _FLAGS:
            raise ConfigError(f"There is no flag {flag!r}.{nearest(flag, list(_FLAGS))}")
        if flag in _SWITCHES:
            if equals:
                raise ConfigError(f"{flag} takes no value.")
        elif not equals:
            if not argv or argv[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value: {flag}=...")
            text = argv.pop(0)
        texts[flag] = text
    for flag in ("--workdir", "--out"):
        if not texts.get(flag):
            raise ConfigError(f"{flag}=DIR is missing.")
    if "--checkpoint" in texts and not (texts["--checkpoint"].isascii() and texts["--checkpoint"].isdigit()):
        raise ConfigError(f"--checkpoint={texts['--checkpoint']}: expected the number of a checkpoint.")
    if "--reward-model" in texts and {"--adapters", "--checkpoint"} & set(texts):
        raise ConfigError(
            "--reward-model writes the trained reward model, which has neither checkpoints to choose from nor adapters."
        )
    if texts.get("--dtype", "float32") not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype is {texts['--dtype']!r}; it must be float32 or bfloat16.")
    return texts


def load_policy(workdir: pathlib.Path, checkpoint: int | None = None) -> tuple[int, models.Policy]:
    """The policy of a run, on the host, with its adapters if it has any.

    Args:
      workdir: of the run.
      checkpoint: a number; None for the newest that can be read.

    Returns:
      The number of the checkpoint, and the policy.

    Raises:
      ConfigError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    config = runs.load_config(workdir, {})
    if config.regression.tokenizer:
        raise ConfigError(
            f"The run in {workdir} predicts numbers in a vocabulary of its own, which no tokenizer.json spells; only policies that "
            "write text can be exported."
        )
    tokenizer = tokenizer_of(workdir)
    source = model_source(workdir)
    model = config_lib.model_config(config, tokenizer.vocab_size, source)
    # The host has room for models that one accelerator has not.
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), models.abstract_params(model))
    number, params = runs.load_weights(workdir, checkpoint, like, model)
    if source is None:
        source = {"max_position_embeddings": config.max_prompt_length + config.max_completion_length}
    return number, models.Policy(model, params, tokenizer, source, models.tokenizer_files(workdir / "tokenizer"))


def load_reward_model(workdir: pathlib.Path) -> models.RewardModel:
    """The reward model that a run trained, on the host.

    Raises:
      ConfigError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    runs.load_config(workdir, {})
    directory = workdir / "reward_model"
    if not model_files.is_ours(directory):
        raise ConfigError(f"The run in {workdir} has trained no reward model.")
    tokenizer = data.load_tokenizer(directory / "tokenizer")
    host = sharding.make_mesh(1, 1, 1, devices=jax.local_devices(backend="cpu")[:1])
    digest = model_files.tokenizer_digest(tokenizer)
    model, params = model_files.load_reward_model(directory, digest, mesh=host)
    return models.RewardModel(model, params, tokenizer, {}, models.tokenizer_files(directory / "tokenizer"))


def export(
    workdir: pathlib.Path, out: pathlib.Path, *, checkpoint: int | None, adapters: bool, dtype: str | None
) -> int:
    """Writes the directory; returns the number of the checkpoint. See the module's docstring.

    Raises:
      ConfigError, PretrainedError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    number, policy = load_policy(workdir, checkpoint)
    if adapters:
        base = runs.load_config(workdir, {}).model.path
        if dtype:
            raise ConfigError("--dtype is for merged weights; adapters are written as they were trained, in float32.")
        if base.endswith(".gguf"):
            raise ConfigError(
                f"The run in {workdir} began with {base}, which PEFT cannot put adapters on: leave out --adapters."
            )
        if not policy.config.lora_rank:
            raise ConfigError(
                f"The run in {workdir} trained all weights (config.lora.rank is 0): leave out --adapters."
            )
        if not base:
            raise ConfigError(
                f"The run in {workdir} began with random weights, which its adapters need and nobody has."
            )
        models.save_adapters(out, policy, base)
        return number
    config, params = models.lora.merge(policy.config, policy.params)
    _save(out, dataclasses.replace(policy, config=config, params=params), dtype)
    return number


def _save(out: pathlib.Path, policy: models.Policy, dtype: str | None) -> None:
    if dtype:
        params = jax.tree.map(lambda x: x.astype(dtype), policy.params)
        policy = dataclasses.replace(
            policy, config=dataclasses.replace(policy.config, param_dtype=dtype), params=params
        )
    models.save_pretrained(out, policy)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        flags = parse_args(argv)
        if "--config" in flags:
            config_lib.load_module(flags["--config"])
        out = pathlib.Path(flags["--out"]).expanduser()
        workdir = pathlib.Path(flags["--workdir"]).expanduser().resolve()
        if "--reward-model" in flags:
            _save(out, load_reward_model(workdir), flags.get("--dtype"))
            written = "The reward model"
        else:
            number = flags.get("--checkpoint")
            number = None if number is None else int(number)
            dtype = flags.get("--dtype")
            number = export(workdir, out, checkpoint=number, adapters="--adapters" in flags, dtype=dtype)
            written = f"Checkpoint {number}"
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    rich.console.Console(highlight=False, markup=False).print(f"{written} is in {out}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
