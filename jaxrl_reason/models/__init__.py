"""The policy network: one decoder, its configuration and its sharding; pretrained models in and out."""

from jaxrl_reason.models import lora, sharding
from jaxrl_reason.models.config import PROJECTIONS, ModelConfig, RopeScaling
from jaxrl_reason.models.decoder import (
    Decoder,
    Params,
    PromptCache,
    SampleCache,
    abstract_params,
    apply,
    bind,
    init_params,
    logical_axes,
    param_count,
    project,
)
from jaxrl_reason.models.families import PretrainedError, read_config
from jaxrl_reason.models.pretrained import (
    Opened,
    Policy,
    RewardModel,
    check_weights,
    load_pretrained,
    load_reward_model,
    open_model,
    pinned,
    place_weights,
    read_source,
    save_pretrained,
)
