"""What suits the devices of a run: attention, values that the backward pass recomputes, loops over layers, microbatches."""

import dataclasses
import pathlib
import platform
import warnings

import jax

from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.models import sharding

_CPUINFO = pathlib.Path("/proc/cpuinfo")  # of Linux
# Bytes per device that the backward pass of a microbatch may keep on a CPU instead of computing them again.
MAX_KEPT = 2**29
# The backward pass keeps about as many bytes beside the results of products, if it computes nothing again.
_ALL_PER_PRODUCTS = 2
_MAX_UNROLLED = 8  # layers; more take long to compile
# Bytes that a microbatch may keep per device of a CPU, if the run does not choose its microbatches. With the rest of a
# program they are less than 64 MiB, which glibc holds from step to step, see `memory`. A microbatch adds to the gradients
# of the trained weights, so it may keep some times their bytes too.
_MICROBATCH, _PER_WEIGHTS = 2**25, 4


def for_devices(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> models.ModelConfig:
    """Returns the decoder with what config.model.attention and config.model.remat mean on these devices.

    "auto" is: on TPUs "splash" (v2 and v3: "plain") and "layer"; on CPUs and GPUs "blockwise", which leaves short
    sequences to plain attention. CPUs keep as much as fits into `MAX_KEPT`, because their updates are then faster:
    everything, "none", for at most 8 layers and updates of one length; or the results of products, "dots". Otherwise, and
    on GPUs, remat is "layer". Layers are unrolled where "auto" is "none": a loop copies each layer's weights and gradients.

    Raises:
      ConfigError: the devices cannot run the attention.
    """
    if model.compute_dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu" and not multiplies_bfloat16():
        warnings.warn(
            "config.model.compute_dtype is 'bfloat16', which this processor computes more slowly than float32: it has neither "
            "avx512_bf16 nor amx_bf16.",
            stacklevel=2,
        )
    return with_remat(dataclasses.replace(model, attention=_attention(config, mesh)), config, mesh)


def multiplies_bfloat16() -> bool:
    """Returns whether the processor has instructions for products of bfloat16; True if its instructions are not known."""
    if platform.machine() not in ("x86_64", "AMD64") or not _CPUINFO.exists():
        return True
    flags = _CPUINFO.read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _attention(config: Config, mesh: jax.sharding.Mesh) -> str:
    chosen, device = config.model.attention, mesh.devices.flat[0]
    unable = device.device_kind in ("TPU v2", "TPU v3")  # their kernels cannot multiply bfloat16
    if chosen == "auto" and device.platform == "tpu":
        return "plain" if unable else "splash"
    if chosen == "auto":
        return "blockwise"
    if chosen == "splash" and unable:
        raise ConfigError(
            f"config.model.attention is 'splash', whose kernels do not run on {device.device_kind}; set it to 'auto' or 'plain'."
        )
    if chosen == "blockwise" and device.platform == "tpu":
        raise ConfigError(
            "config.model.attention is 'blockwise', which is for CPUs and GPUs, and the devices are TPUs; set it to 'auto'."
        )
    return chosen


def with_remat(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> models.ModelConfig:
    """Returns the decoder with what config.model.remat means on these devices, see `for_devices`."""
    sizes = update_sizes(model, config, mesh)
    return _with_remat(model, config, mesh, kept_bytes(model, config, mesh, **sizes), sizes["lengths"] == 1)


def with_remat_of_pairs(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> models.ModelConfig:
    """Returns the decoder of a reward model for its training on pairs, as `with_remat` does for updates of a policy."""
    texts = 2 * config.reward_model.batch_size / sharding.num_shards(mesh)
    tokens = texts * (config.max_prompt_length + config.max_completion_length)
    return _with_remat(model, config, mesh, tokens * _kept_per_token(model), one_length=True)


def _with_remat(
    model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh, kept: float, one_length: bool
) -> models.ModelConfig:
    if config.model.remat != "auto":
        return dataclasses.replace(model, remat=config.model.remat)
    if mesh.devices.flat[0].platform != "cpu":
        return dataclasses.replace(model, remat="layer")
    if one_length and _keeps_everything(model, kept):
        return dataclasses.replace(model, remat="none", unrolled=True)
    return dataclasses.replace(model, remat="dots" if kept <= MAX_KEPT else "layer")


def _keeps_everything(model: models.ModelConfig, kept: float) -> bool:
    """Returns whether a decoder has few layers and may keep all that the backward pass reads, on a CPU, if products are `kept` bytes."""
    return model.layers <= _MAX_UNROLLED and _ALL_PER_PRODUCTS * kept <= MAX_KEPT


def update_sizes(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Returns `lengths` and `wave_tokens` of the update, as configured or chosen by the sizes and the devices."""
    c, u = config, config.update
    S, T = c.max_prompt_length, c.max_completion_length
    lengths, tokens = min((T // 64).bit_length(), 4), 4096  # the shortest has 64 to 127 tokens
    if mesh.devices.flat[0].platform == "cpu":
        # Unrolled layers gain more than short waves. Else the shortest length has 16 to 31 tokens.
        if T < 128 and not _keeps_everything(model, kept_bytes(model, config, mesh, parts=u.accumulation or 1)):
            lengths = (T // 16).bit_length()
        completions = c.prompts_per_step / u.minibatches * c.group_size / sharding.num_shards(mesh)
        # A wave has at most a quarter of all tokens, if that is a completion: else short completions fill none.
        tokens = max(T, min(512, int(completions * T) // 4))
    return {"lengths": u.lengths or max(lengths if S <= T else 1, 1), "wave_tokens": u.wave_tokens or tokens}


def microbatches(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> int:
    """Returns the microbatches of an update, as configured or chosen by the sizes and the devices.

    Automatic is 1 and, on CPUs, for updates of one length, the fewest of which each keeps at most 32 MiB or, if that is
    more, four times the float32 bytes of the trained weights. A microbatch has at least one prompt.
    """
    return _microbatches(model, config, mesh, update_sizes(model, config, mesh)["lengths"])


def _microbatches(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh, lengths: int) -> int:
    if config.update.accumulation:
        return config.update.accumulation
    if lengths > 1:  # waves are small
        return 1
    tokens = config.max_prompt_length + config.group_size * config.max_completion_length
    return _fewest_parts(model, mesh, config.prompts_per_step // config.update.minibatches, tokens)


def supervised_microbatches(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> int:
    """Returns the microbatches of a supervised update, chosen by its sizes as the automatic ones of `microbatches`."""
    return _fewest_parts(
        model, mesh, config.supervised.batch_size, config.max_prompt_length + config.max_completion_length
    )


def _fewest_parts(model: models.ModelConfig, mesh: jax.sharding.Mesh, prompts: int, tokens: int) -> int:
    """Returns the fewest equal parts of prompts, of so many tokens each, that keep few bytes on a CPU; 1 on other devices."""
    if mesh.devices.flat[0].platform != "cpu":  # other devices are faster with large products
        return 1
    prompts = max(prompts // sharding.num_shards(mesh), 1)
    kept = _ALL_PER_PRODUCTS * prompts * tokens * _kept_per_token(model)
    trained, _ = models.lora.split(model, models.abstract_params(model))
    most = max(_MICROBATCH, _PER_WEIGHTS * 4 * sum(x.size for x in jax.tree.leaves(trained)))
    return next((n for n in range(1, prompts) if prompts % n == 0 and kept <= n * most), prompts)


def check_waves(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError for config.update.wave_tokens if an update has one length, and with it no waves."""
    if config.update.wave_tokens and update_sizes(model, config, mesh)["lengths"] == 1:
        raise ConfigError(
            f"config.update.wave_tokens is {config.update.wave_tokens}, and updates of this run have one length and no waves: set "
            "config.update.lengths to 2 or more, or leave it out."
        )


def kept_bytes(
    model: models.ModelConfig,
    config: Config,
    mesh: jax.sharding.Mesh,
    lengths: int = 1,
    wave_tokens: int = 0,
    parts: int = 0,
) -> float:
    """Returns the bytes per device that the backward pass keeps at once with remat "dots".

    They are the input, the products and the result of the attention of every layer, for every token of the largest
    microbatch or, in waves, of the prompts and of a wave. `lengths` and `wave_tokens` are those of `update_sizes`.
    `parts` is the number of microbatches; 0: as in the run.
    """
    c, S, T = config, config.max_prompt_length, config.max_completion_length
    P, shards = c.prompts_per_step / c.update.minibatches, sharding.num_shards(mesh)
    update = P / (parts or _microbatches(model, config, mesh, lengths)) * (S + c.group_size * T) / shards
    if lengths > 1:
        update = min(update, P * S / shards + max(wave_tokens, T))
    supervised = c.supervised.batch_size / supervised_microbatches(model, config, mesh) * (S + T) / shards
    return max(update, c.supervised.steps and supervised) * _kept_per_token(model)


def _kept_per_token(model: models.ModelConfig) -> int:
    heads = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    itemsize = 4  # products are sums in float32
    return model.layers * (3 * model.width + heads + 2 * model.mlp_width) * itemsize
