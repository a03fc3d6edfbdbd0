"""The configuration of a run: one typed definition for defaults, help, overrides, validation and the saved file.

A recipe is a Python file whose `get_config()` returns a `Config`. The command line sets any field with
`--config.section.field=value`. `validate` checks everything before anything compiles.
"""

from jaxrl_reason.config.build import begins_with_bos, make_method, model_config, prompt_template
from jaxrl_reason.config.command_line import help_text, load, load_baselines, load_module, override, two_columns
from jaxrl_reason.config.paths import has_unknown_user, remote
from jaxrl_reason.config.schema import (
    Checkpoint,
    Config,
    ConfigError,
    Data,
    Eval,
    from_dict,
    Log,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Regression,
    Reward,
    RewardModel,
    Sampling,
    Supervised,
    to_dict,
    Update,
)
from jaxrl_reason.config.validate import validate
