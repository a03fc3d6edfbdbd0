"""The reference of the decoder in plain numpy and float64, one sequence and one head at a time."""

import zlib

import jax
import numpy as np

from jaxrl_reason import models


def random_params(config, seed=0, scale=0.4):
    """Draws weights, none of them 0 or 1 by construction. Each depends only on its name, its shape and the seed."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        size = 1.0 if "embedding" in name else scale
        values = rng.normal(size=leaf.shape) * size + ("norm" in name) * (1 - config.norm_offset)
        return jax.numpy.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, models.abstract_params(config))


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def rms_norm(x, scale, config):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_eps) * (scale + config.norm_offset)


def frequencies(config, sliding):
    local = sliding and config.local_rope_theta
    theta = config.local_rope_theta if local else config.rope_theta
    result = []
    for i in range(config.head_dim // 2):
        freq, scaling = theta ** (-2 * i / config.head_dim), config.rope_scaling
        if scaling and not local and scaling.kind == "linear":
            freq /= scaling.factor
        elif scaling and not local:
            turns = scaling.original_length * freq / (2 * np.pi)  # full turns within the original context
            keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            keep = min(max(keep, 0.0), 1.0)
            freq = keep * freq + (1 - keep) * freq / scaling.factor
        result.append(freq)
    return np.array(result)


def rotate(x, angles):  # x [S, K], angles [S, K / 2]: pairs (i, i + K / 2) rotate as complex numbers
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(x, w, config, sliding):
    S, K = len(x), config.head_dim
    angles = np.arange(S)[:, None] * frequencies(config, sliding)
    project = lambda name: x @ w[name] + (w[name + "_bias"] if config.qkv_bias else 0.0)
    q, k, v = project("q"), project("k"), project("v")
    heads = []
    for h in range(config.heads):
        n = h * config.kv_heads // config.heads
        qh, kh, vh = q[:, h * K : (h + 1) * K], k[:, n * K : (n + 1) * K], v[:, n * K : (n + 1) * K]
        if config.qk_norm:
            qh, kh = rms_norm(qh, w["q_norm"], config), rms_norm(kh, w["k_norm"], config)
        scores = rotate(qh, angles) @ rotate(kh, angles).T * config.query_scale
        for i in range(S):
            for j in range(S):
                if j > i or (sliding and i - j >= config.sliding_window):
                    scores[i, j] = -np.inf
        heads.append(np.exp(log_softmax(scores)) @ vh)
    return np.concatenate(heads, axis=-1) @ w["o"]


def mlp(x, w, config):
    gate, up = x @ w["gate"], x @ w["up"]
    if config.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gate * up) @ w["down"]


def forward(config, params, tokens):
    """Returns the logits f64[S, V] of one unpadded sequence int[S]; params in float64."""
    x = params["embedding"][np.asarray(tokens)] * config.embedding_scale
    for i in range(config.layers):
        w = {name: value[i] for name, value in params["layers"].items()}
        # As in Gemma: the last layer of each period is global.
        sliding = config.sliding_window > 0 and not (
            config.sliding_period and i % config.sliding_period == config.sliding_period - 1
        )
        y = attention(rms_norm(x, w["attention_norm"], config), w, config, sliding)
        x = x + (rms_norm(y, w["post_attention_norm"], config) if config.post_norms else y)
        y = mlp(rms_norm(x, w["mlp_norm"], config), w, config)
        x = x + (rms_norm(y, w["post_mlp_norm"], config) if config.post_norms else y)
    head = params["embedding"].T if config.tied_embedding else params["head"]
    return rms_norm(x, params["final_norm"], config) @ head


def completion_logits(config, params, prompt_tokens, prompt_mask, completions):
    """Returns the logits f64[P, G, T, V] of completions [P, G, T] after the real tokens of their prompts [P, S]."""
    rows = []
    for tokens, mask, group in zip(*map(np.asarray, (prompt_tokens, prompt_mask, completions)), strict=True):
        prompt = tokens[mask.astype(bool)]
        rows.append([forward(config, params, np.concatenate([prompt, one]))[len(prompt) - 1 : -1] for one in group])
    return np.array(rows)


def sampling_logprobs(logits, temperature, legal=None):
    """Returns the log-probabilities f64[..., V] of the distribution that samples."""
    logits = logits / temperature
    return log_softmax(logits if legal is None else np.where(legal, logits, -np.inf))
