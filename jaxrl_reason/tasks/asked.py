"""The questions of an evaluation: one configuration per set, for the evaluated policy and for the policy compared with it."""

import copy
import pathlib
import re

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data.named_sets import NAMED_SETS
from jaxrl_reason.data.parsers import kind_of
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.tasks.policies import ALL, OpenedPolicy

Sets = dict[str, tuple[str, int | None]]  # label -> name or path of the set, and its completions per prompt


def read_sets(text: str) -> Sets:
    """Reads the sets of --sets; raises ValueError for a text that names none, and for two sets with one label.

    Example:
      >>> read_sets("aime24@32,mine.jsonl")
      {'aime24': ('aime24', 32), 'mine': ('mine.jsonl', None)}
    """
    sets: Sets = {}
    for item in text.split(","):
        found = re.fullmatch(r"(.+?)(?:@(\d+))?", item.strip())
        if found is None:
            raise ValueError("sets such as aime24@32,math500@4,mine.jsonl@8")
        name, samples = found[1], int(found[2]) if found[2] else None
        stem = pathlib.PurePath(name).name.lstrip(".").partition(".")[0]
        label = name if name in NAMED_SETS else re.sub(r"[^\w-]+", "_", stem)
        if not label:
            raise ValueError(f"sets with names, and {item.strip()!r} has none")
        if label in sets:
            raise ValueError(f"sets with different names, and two are called {label!r}")
        sets[label] = (name, samples)
    return sets


def configs_of_sets(policy: OpenedPolicy, sets: Sets, fields: dict[str, str]) -> dict[str, Config]:
    """Returns one configuration per set for a policy; raises ConfigError if one cannot run.

    A named set has its columns, its verifier and, for a model without a run, its prompt; `fields`, which the command
    line sets, come first. Other data have the columns, rewards and prompt of `policy.config`. All rows are asked if
    `fields` do not name their number.
    """
    if policy.numbers is not None:
        raise ConfigError("--sets are sets of text problems, and this run predicts numbers: leave --sets out.")
    for name in ("data.eval", "data.eval_split"):
        if name in fields:
            raise ConfigError(f"--sets names the data, so config.{name} has no effect: leave one of the two out.")
    configs = {}
    for label, (name, samples) in sets.items():
        c = configs[label] = copy.deepcopy(policy.config)
        c.data.eval, c.data.eval_split = name, "all" if kind_of(name) else "test"
        c.eval.samples = c.eval.samples if samples is None else samples
        if "eval.prompts" not in fields:
            c.eval.prompts = ALL
        if name in NAMED_SETS:
            known = NAMED_SETS[name]
            c.data.eval, c.data.eval_split = known.source, "all"
            if "data.eval_columns" not in fields:
                c.data.eval_columns = known.columns
            if policy.workdir is None and "data.template" not in fields:
                c.data.template = known.template
            if not {"reward.functions", "eval.verdict"} & fields.keys():
                _judge_by(c, known.verifier)
        config_lib.validate(c)
    return configs


def config_like(config: Config, policy: OpenedPolicy) -> Config:
    """Returns the configuration with which another policy gets the prompts of `config`, and the same verdict.

    A model without a run has the prompt of `config` too; a run keeps the prompt with which it was trained.
    """
    if policy.numbers is not None:
        raise ConfigError("--against names a run that predicts numbers, which has no verdicts to compare.")
    c, data = copy.deepcopy(policy.config), copy.deepcopy(config.data)
    shared = {"eval", "eval_split", "on_bad_row", "on_long_prompt", "data_dir"}
    if policy.workdir is None:
        shared |= {"template", "chat", "system", "chat_options", "add_bos"}
    for name in shared:
        setattr(c.data, name, getattr(data, name))
    c.data.eval, c.data.eval_columns = data.eval or data.train, data.eval_columns or data.columns
    c.eval, c.seed = copy.deepcopy(config.eval), config.seed
    c.max_prompt_length, c.max_completion_length = config.max_prompt_length, config.max_completion_length
    for name in ("skip_special_tokens", "workers", "timeout_s", "memory_mb", "max_failure_share"):
        setattr(c.reward, name, getattr(config.reward, name))
    _judge_by(c, config.eval.verdict or config.reward.verdict or config.reward.functions[0])
    config_lib.validate(c)
    return c


def _judge_by(c: Config, verifier: str) -> None:
    """Makes `verifier` the reward, in place, next to a learned reward that the method needs."""
    weights = dict(zip(c.reward.functions, c.reward.weights or [1.0] * len(c.reward.functions)))
    kept = {name: weight for name, weight in weights.items() if name in LEARNED}
    c.reward.functions, c.reward.weights = [verifier, *kept], [1.0, *kept.values()]
    c.reward.verdict, c.eval.verdict = verifier, ""
