"""The policy network: one decoder, its configuration, its shardings and its adapters; pretrained models in and out. See README.md."""

from jaxrl_reason.models import lora, sharding
from jaxrl_reason.models.config import ModelConfig, PROJECTIONS, RopeScaling
from jaxrl_reason.models.decoder import (
    abstract_params,
    apply,
    bind,
    Decoder,
    encoder_dropout,
    init_params,
    logical_axes,
    param_count,
    param_shardings,
    Params,
    project,
)
from jaxrl_reason.models.formats.families import read_config
from jaxrl_reason.models.formats.pretrained import (
    check_weights,
    load_pretrained,
    load_reward_model,
    pad_id_of,
    place_weights,
    Policy,
    RewardModel,
    save_adapters,
    save_pretrained,
)
from jaxrl_reason.models.formats.source import open_model, pinned, read_source, reopen, tokenizer_files
from jaxrl_reason.models.formats.tensors import Opened, PretrainedError
from jaxrl_reason.models.layers import PromptCache, SampleCache
