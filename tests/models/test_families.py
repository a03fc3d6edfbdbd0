"""Tests families with config.json in the spellings of transformers 4 and 5."""

import json

import pytest

from helpers.golden import GOLDEN, NAMES
from jaxrl_reason.models import PretrainedError, RopeScaling
from jaxrl_reason.models.formats import families


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_a_config_give_the_same_decoder(name):
    """Rewrites the directories, which transformers 5 wrote, into the spelling of transformers 4."""
    new = json.loads((GOLDEN / name / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    rope = new["rope_parameters"]
    if name == "gemma3":
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 2}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    assert families.read_config(old) == families.read_config(new)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen3", dict(rope_parameters={"rope_type": "default", "rope_theta": None}), "rope_theta None"),
        ("qwen3", dict(rope_parameters="linear"), "has rope_parameters 'linear'; it must hold the settings of all"),
        (
            "qwen3",
            dict(rope_parameters={"rope_type": "linear", "factor": 0}),
            "has factor 0; it must be a finite number above 0",
        ),
        ("qwen3", dict(tie_word_embeddings="false"), "tie_word_embeddings 'false'; it must be true or false"),
        ("qwen3", dict(rms_norm_eps=0), "rms_norm_eps 0; it must be a finite number above 0"),
        ("qwen3", dict(layer_types=5), "an invalid model|layer_types"),
        ("qwen3", dict(model_type=["qwen3"]), "has model_type"),
        ("qwen3", dict(hidden_size=10**9), "hidden_size 1000000000; it must be a whole number from 1 to"),
        ("gemma3", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar 0"),
        ("gemma3", dict(layer_types=None, sliding_window_pattern=0), "sliding_window_pattern 0"),
        (
            "gemma3",
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
            "scales the rotary positions of sliding layers",
        ),
    ],
)
def test_an_invalid_config_raises_one_sentence(name, changes, message):
    source = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    with pytest.raises(PretrainedError, match=message):
        families.read_config(source)


def test_defaults_of_absent_keys_depend_on_the_family():
    source = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    found = families.read_config(source | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    assert (found.rope_theta, found.local_rope_theta) == (1e6, 1e4)
    found = families.read_config(source | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (found.rope_theta, found.local_rope_theta) == (7.0, 1e4)
    mistral = json.loads((GOLDEN / "mistral" / "config.json").read_text())
    del mistral["sliding_window"]
    assert families.read_config(mistral).sliding_window == 4096
    assert families.read_config(mistral | {"sliding_window": None}).sliding_window == 0
    qwen = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": False}
    assert families.read_config(qwen | sliding).sliding_window == 0
    assert families.read_config(qwen | sliding | {"use_sliding_window": True}).sliding_window == 9
    for name in ("qwen2", "qwen3"):  # layers from max_window_layers on slide, 28 if it is absent
        deep = json.loads((GOLDEN / name / "config.json").read_text()) | sliding | {"use_sliding_window": True}
        del deep["layer_types"], deep["max_window_layers"]
        assert families.read_config(deep | {"num_hidden_layers": 28}).sliding_window == 0
        with pytest.raises(PretrainedError, match="layer_types without a period"):
            families.read_config(deep | {"num_hidden_layers": 29})


def test_configs_in_the_spelling_of_transformers_4():
    llama = families.read_config(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
        }
    )
    assert llama.rope_scaling == RopeScaling(kind="llama3", factor=32.0) and llama.rope_theta == 500000.0
    assert llama.tied_embedding and llama.head_dim == 64 and llama.norm_eps == 1e-5
    qwen = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
    found = families.read_config(qwen)
    assert found.qkv_bias and not found.sliding_window and found.head_dim == 128 and found.rope_theta == 1e6
    found = families.read_config(qwen | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 99})
    assert found.sliding_window == 99 and all(found.sliding_layers)
    with pytest.raises(PretrainedError, match="every n-th layer is global"):
        families.read_config(qwen | {"use_sliding_window": True})
    gemma = families.read_config(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    )
    assert gemma.tied_embedding and gemma.norm_offset == 1 and gemma.post_norms and gemma.qk_norm
    assert gemma.embedding_scale == 1152**0.5 and gemma.query_scale == 1 / 16 and gemma.activation == "gelu"
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)
    assert [i for i, slides in enumerate(gemma.sliding_layers) if not slides] == [5, 11, 17, 23]


PLAIN = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
GEMMA = PLAIN | {"model_type": "gemma3_text"}
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = {"original_max_position_embeddings": 128}


def full(**rope):
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}}


@pytest.mark.parametrize(
    "base, changes, theta, scaling",
    [
        # transformers 5.24 reads the same rope_theta, rope_type and factor.
        (PLAIN, dict(rope_scaling=LINEAR), 1e4, 4.0),
        (PLAIN, dict(rope_scaling=LINEAR, rope_theta=5e5), 5e5, 4.0),
        (PLAIN, dict(rope_scaling=LINEAR | {"rope_theta": 5e5}), 5e5, 4.0),
        (PLAIN, dict(rope_scaling={}, rope_theta=5e5), 5e5, None),
        (PLAIN, dict(rope_scaling=LINEAR, rope_parameters={"rope_type": "default", "rope_theta": 1e4}), 1e4, 4.0),
        (PLAIN, dict(rope_scaling=LINEAR, rope_parameters=LLAMA3 | LENGTH), 1e4, 4.0),
        (PLAIN, dict(rope_scaling=None, rope_parameters={"rope_type": "linear", "factor": 2}), 1e4, 2.0),
        (PLAIN, dict(rope_parameters={"type": "linear", "factor": 2, "rope_theta": 7.0}), 7.0, 2.0),
        (PLAIN, dict(rope_parameters={"rope_type": "default"}, rope_theta=5e5), 5e5, None),
        (PLAIN, dict(rope_scaling={"rope_type": "default", "factor": 1.0}), 1e4, None),
        (
            PLAIN,
            dict(partial_rotary_factor=1.0, rope_scaling={"rope_type": "linear", "type": "linear", "factor": 3}),
            1e4,
            3.0,
        ),
        (GEMMA, dict(rope_scaling={"rope_type": "linear", "factor": 8.0}), 1e6, 8.0),
        (GEMMA, dict(rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=7.0), 7.0, 8.0),
        (
            GEMMA,
            full(rope_type="default", rope_theta=7.0) | dict(rope_scaling={"rope_type": "linear", "factor": 8.0}),
            7.0,
            8.0,
        ),
        # Both spellings can have settings per kind of layers. Global layers have the settings of full_attention.
        (PLAIN, dict(rope_scaling={"full_attention": LINEAR | {"rope_theta": 7.0}}), 7.0, 4.0),
        (GEMMA, dict(rope_scaling={"full_attention": LINEAR, "sliding_attention": None}), 1e6, 4.0),
        # transformers 5.24 ignores this base of 7. Such a file was changed by hand.
        (PLAIN, dict(rope_scaling=LINEAR, rope_parameters={"rope_type": "default", "rope_theta": 7.0}), 7.0, 4.0),
    ],
)
def test_rotary_positions_in_two_spellings(base, changes, theta, scaling):
    found = families.read_config(base | changes)
    assert found.rope_theta == theta
    assert found.rope_scaling == (None if scaling is None else RopeScaling(kind="linear", factor=scaling))


@pytest.mark.parametrize(
    "base, changes, message",
    [
        (PLAIN, dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "of type 'yarn'"),
        (
            PLAIN,
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters={"rope_type": "default"}),
            "of type 'yarn'",
        ),
        (PLAIN, dict(rope_scaling={"type": "dynamic", "factor": 4.0}, rope_theta=1e4), "of type 'dynamic'"),
        (
            PLAIN,
            dict(rope_scaling=LINEAR | {"rope_type": "default"}),
            "has rope_type 'default' and type 'linear', which",
        ),
        (
            PLAIN,
            dict(rope_parameters={"rope_type": "linear", "type": "yarn", "factor": 2}),
            "rope_type 'linear' and type",
        ),
        (PLAIN, dict(rope_scaling={"factor": 4.0}), "without a type with {'factor': 4.0}: name the rope_type"),
        (PLAIN, dict(rope_parameters={"factor": 4.0, "rope_theta": 1e4}), "without a type with {'factor': 4.0}"),
        (PLAIN, dict(rope_scaling={"rope_type": "default", "factor": 4.0}), "'default', which scales nothing, with"),
        (PLAIN, dict(rope_scaling={"long_factor": [1.0]}), "without a type with {'long_factor'"),
        (
            PLAIN,
            dict(rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            "rope_theta 500000.0",
        ),
        (PLAIN, dict(rope_theta=5e5, rope_scaling=LINEAR | {"rope_theta": 1e4}), "rope_scaling.rope_theta 10000.0 and"),
        (PLAIN, dict(partial_rotary_factor=0.5), "only whole heads can be rotated"),
        (PLAIN, dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}), "only whole heads"),
        (PLAIN, dict(rope_scaling=LLAMA3), "of type 'llama3' without 'original_max_position_embeddings'"),
        (PLAIN, dict(rope_scaling=LLAMA3 | LENGTH, original_max_position_embeddings=64), "128 and original_max"),
        (GEMMA, full(rope_type="default", type="linear", factor=4.0), "rope_type 'default' and type 'linear'"),
        (GEMMA, full(rope_type="default", rope_theta=7.0) | dict(rope_theta=8.0), "rope_parameters.rope_theta 7.0 and"),
        (
            GEMMA,
            dict(rope_parameters={"sliding_attention": {"rope_theta": 7.0}}, rope_local_base_freq=8.0),
            "rope_theta 7.0 and rope_local_base_freq 8.0",
        ),
        (GEMMA, dict(layer_types=["full_attention"] * 6, sliding_window_pattern=6), "layer_types .*differ"),
        (PLAIN, dict(compression_config={"format": "pack"}), "has a compression_config"),
        (PLAIN, dict(rope_scaling=LINEAR | {"factor": True}), "has factor True; it must be a finite number above 0"),
        (PLAIN, dict(rope_scaling=LINEAR | {"factor": "4.0"}), "has factor '4.0'; it must be a finite number above 0"),
        (PLAIN, dict(rope_scaling=[4.0]), r"has rope_scaling \[4.0\]; it must hold the settings of all layers"),
        (PLAIN, dict(rope_scaling={"chunked_attention": LINEAR}), "has rope_scaling {'chunked_attention'"),
        (GEMMA, dict(rope_parameters={"full_attention": LINEAR, "rope_theta": 7.0}), "or those of full_attention and"),
        (GEMMA, dict(rope_scaling={"sliding_attention": LINEAR}), r"rotary positions of sliding layers \(linear\)"),
    ],
)
def test_spellings_that_contradict_each_other_raise_a_sentence(base, changes, message):
    with pytest.raises(PretrainedError, match=message):
        families.read_config(base | changes)


def test_a_length_next_to_the_scaling_counts():
    found = families.read_config(PLAIN | LENGTH | dict(rope_scaling=LLAMA3))
    assert found.rope_scaling is not None and found.rope_scaling.original_length == 128
