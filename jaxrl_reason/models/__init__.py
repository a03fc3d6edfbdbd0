"""The policy network: one decoder, its configuration and its sharding; pretrained models in and out."""

from jaxrl_reason.models import lora, sharding
from jaxrl_reason.models.config import ModelConfig, PROJECTIONS, RopeScaling
from jaxrl_reason.models.decoder import (
    abstract_params,
    apply,
    bind,
    Decoder,
    init_params,
    logical_axes,
    param_count,
    Params,
    project,
    PromptCache,
    SampleCache,
)
from jaxrl_reason.models.formats.families import PretrainedError, read_config
from jaxrl_reason.models.formats.pretrained import (
    check_weights,
    load_pretrained,
    load_reward_model,
    open_model,
    Opened,
    pinned,
    place_weights,
    Policy,
    read_source,
    RewardModel,
    save_pretrained,
)
