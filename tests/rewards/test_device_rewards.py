"""Tests `match_answer_tokens` against hand-made cases and a reference on lists."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.rewards.device import match_answer_tokens

MARKER, EOS = (3, 4), (0, 9)
REWARD = match_answer_tokens(MARKER, eos_ids=EOS)
JITTED = jax.jit(REWARD)


def reference(live, answer):
    """Computes the reward of one completion on lists."""
    if not live or live[-1] not in EOS:
        return 0.0
    body = live[:-1]
    starts = [i for i in range(len(body) - len(MARKER) + 1) if tuple(body[i : i + len(MARKER)]) == MARKER]
    return float(bool(starts) and body[starts[-1] + len(MARKER) :] == answer)


def arrays(rows, answers, length, width, filler=3):
    """Returns tokens, mask and columns of [P][G] lists. Tokens after the mask are `filler`, which must not matter."""
    shape = (len(rows), len(rows[0]), length)
    tokens, mask = np.full(shape, filler, np.int32), np.zeros(shape, np.int32)
    for p, g in np.ndindex(*shape[:2]):
        tokens[p, g, : len(rows[p][g])] = rows[p][g]
        mask[p, g, : len(rows[p][g])] = 1
    padded = np.full((len(rows), width), -1, np.int32)
    for p, answer in enumerate(answers):
        padded[p, : len(answer)] = answer
    return tokens, mask, {"answer_tokens": padded}


CASES = [  # completion, answer [5, 6], verdict
    ([1, 3, 4, 5, 6, 0], 1),
    ([3, 4, 5, 6, 9], 1),
    ([3, 4, 7, 3, 4, 5, 6, 0], 1),  # the last marker counts
    ([3, 4, 5, 6, 3, 4, 7, 0], 0),
    ([3, 4, 5, 6, 3, 4, 0], 0),
    ([3, 4, 5, 6], 0),  # cut off
    ([3, 4, 5, 6, 7, 0], 0),  # the answer is longer
    ([3, 4, 5, 0], 0),  # the answer is shorter
    ([5, 6, 0], 0),  # no marker
    ([3, 5, 6, 0], 0),
    ([0], 0),
    ([], 0),
]


@pytest.mark.parametrize("jit", [False, True])
def test_hand_made_cases(jit):
    completions = [completion for completion, _ in CASES]
    for filler in (0, 3, 4, 5):
        rewards = (JITTED if jit else REWARD)(*arrays([completions], [[5, 6]], 8, 3, filler))
        assert rewards.dtype == jnp.float32 and rewards.shape == (1, len(CASES))
        np.testing.assert_array_equal(rewards[0], [verdict for _, verdict in CASES])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_agrees_with_the_reference(data):
    tokens = st.sampled_from([3, 4, 4, 5, 6])
    answers = data.draw(st.lists(st.lists(st.sampled_from([3, 5, 6]), max_size=3), min_size=2, max_size=2))
    rows = []
    for answer in answers:
        row = []
        for _ in range(3):
            body = data.draw(st.lists(tokens, max_size=6))
            if data.draw(st.booleans()):
                body = body + [3, 4] + answer
            row.append((body + data.draw(st.sampled_from([[], [0], [9]])))[:10])
        rows.append(row)
    rewards = JITTED(*arrays(rows, answers, 10, 3, filler=data.draw(st.sampled_from([0, 3, 4, 5]))))
    np.testing.assert_array_equal(
        rewards, [[reference(live, answer) for live in row] for row, answer in zip(rows, answers)]
    )


def test_shapes_smaller_than_the_marker_or_the_answer():
    rewards = jax.jit(match_answer_tokens((3, 4, 5), eos_ids=(0,)))(*arrays([[[3, 0], [0]]], [[5, 6, 7, 8]], 2, 4))
    np.testing.assert_array_equal(rewards, [[0, 0]])


def test_a_bool_mask_works():
    tokens, mask, columns = arrays([[[3, 4, 5, 0]]], [[5]], 6, 2)
    np.testing.assert_array_equal(JITTED(tokens, mask.astype(bool), columns), [[1]])


def test_mistakes_raise():
    with pytest.raises(ValueError, match=r"marker is \(\)"):
        match_answer_tokens((), eos_ids=(0,))
    with pytest.raises(ValueError, match=r"eos_ids is \(\)"):
        match_answer_tokens((3,), eos_ids=())
    with pytest.raises(ValueError, match="none negative"):
        match_answer_tokens((-1,), eos_ids=(0,))
    with pytest.raises(ValueError, match="contains an end token"):
        match_answer_tokens((3, 0), eos_ids=(0,))
    tokens, mask, columns = arrays([[[3, 4, 5, 0]]], [[5]], 6, 2)
    with pytest.raises(KeyError, match="answer_tokens.*'answer'"):
        REWARD(tokens, mask, {"answer": mask})
    with pytest.raises(AssertionError):
        REWARD(tokens, mask[0], columns)
    with pytest.raises(AssertionError):
        REWARD(tokens, mask, {"answer_tokens": jnp.zeros((2, 3), jnp.int32)})
