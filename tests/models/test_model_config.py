"""Tests the checks of a decoder's configuration."""

import pytest

from helpers.tiny_decoders import make
from jaxrl_reason.models import RopeScaling


@pytest.mark.parametrize(
    "overrides, named",
    [
        (dict(heads=3), "heads"),
        (dict(layers=0), "layers"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(head_dim=7), "head_dim"),
        (dict(head_dim=0, width=18), "width"),
        (dict(activation="relu"), "activation"),
        (dict(remat="all"), "remat"),
        (dict(param_dtype="float16"), "param_dtype"),
        (dict(compute_dtype="f32"), "compute_dtype"),
        (dict(sliding_period=2), "sliding_period"),
        (dict(sliding_window=4, sliding_period=1), "sliding_period"),
        (dict(local_rope_theta=1e4), "local_rope_theta"),
    ],
)
def test_an_invalid_field_raises_a_sentence_with_its_name(overrides, named):
    with pytest.raises(ValueError, match=rf"model\.{named}.*\.$"):
        make(**overrides)


@pytest.mark.parametrize(
    "overrides, named",
    [
        (dict(sliding_window=-1), "sliding_window"),
        (dict(rope_theta=0.0), "rope_theta"),
        (dict(head_dim=-2), "head_dim"),
        (dict(norm_eps=-1.0), "norm_eps"),
    ],
)
def test_values_that_give_nan_or_nothing_raise(overrides, named):
    with pytest.raises(ValueError, match=rf"model\.{named}"):
        make(**overrides)


@pytest.mark.parametrize(
    "wrong, named", [(dict(kind="yarn", factor=2.0), "kind"), (dict(kind="linear", factor=0.0), "factor")]
)
def test_an_invalid_rope_scaling_raises(wrong, named):
    with pytest.raises(ValueError, match=rf"rope_scaling\.{named}"):
        RopeScaling(**wrong)


def test_sliding_layers_follow_the_period():
    assert make(layers=6, sliding_window=2, sliding_period=3).sliding_layers == (True, True, False) * 2
    assert make(sliding_window=2).sliding_layers == (True,) * 3
    assert make().sliding_layers == (False,) * 3
