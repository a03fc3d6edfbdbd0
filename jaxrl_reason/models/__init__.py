"""The policy network: one decoder, its configuration and its sharding."""

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig, RopeScaling
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
