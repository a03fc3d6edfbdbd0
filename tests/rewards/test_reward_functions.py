"""Tests the built-in rewards `accuracy` and `format`."""

import pytest

from jaxrl_reason.rewards.functions import accuracy_reward, format_reward


def test_accuracy_judges_row_by_row():
    rewards = accuracy_reward(
        prompts=["q"] * 4,
        completions=["#### 18", "#### 17", "18", r"\boxed{1/2}"],
        completion_ids=[[1]] * 4,
        answer=["18", 18, 18, 0.5],
        skill=["sum"] * 4,
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0]


def test_accuracy_raises_on_a_reference_that_is_not_a_number():
    with pytest.raises(ValueError, match="'eighteen' is not a number"):
        accuracy_reward(completions=["#### 18"], answer=["eighteen"])


FORMATS = {
    "9 + 9 = 18\n#### 18": 1,
    "#### 18": 1,
    "#### 18\n": 1,
    "#### -1,234.5": 1,
    r"so it is $\boxed{18}$.": 1,
    r"\boxed{\frac{1}{2}}": 1,
    "18": 0,
    "": 0,
    "#### ": 0,
    "#### eighteen": 0,
    "#### 18\nDone.": 0,
    "The answer: #### 18": 0,
    "####18": 0,
    "##### 18": 0,
    "#### 17\n#### 18": 0,
    r"\boxed{17} \boxed{18}": 0,
    r"\boxed{18" + "\n#### 18": 0,
    r"\boxed{18": 0,
    r"#### \boxed{18}": 0,
}


@pytest.mark.parametrize("text", FORMATS)
def test_format(text):
    assert format_reward(prompts=["q"], completions=[text], completion_ids=[[1]]) == [FORMATS[text]]
