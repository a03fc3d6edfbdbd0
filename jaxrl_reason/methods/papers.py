"""The five methods, as extensions of an estimator."""

from jaxrl_reason import advantages
from jaxrl_reason.methods.registry import register_extension
from jaxrl_reason.methods.types import ExpertDigits, Extension, Method, SelfReward


def _place_of_weight(method: str, option: str, place: str, estimator: Method, default: str) -> str:
    """Returns "reward" or "advantage": the factor of a weight of prompts. Raises ValueError for one that cancels."""
    place = place or default
    if place not in ("reward", "advantage"):
        raise ValueError(f"{method}: {option} is {place!r}; it must be 'reward' or 'advantage'.")
    if place == "reward" and estimator.divides_by_group_std:
        raise ValueError(
            f"{method}: a weight on a prompt's rewards cancels when {estimator.name} divides them by the standard deviation or the "
            f"mean of their group; set {option} to 'advantage', or use a base that does not divide (dr_grpo, rloo, reinforce_pp)."
        )
    if place == "reward" and "greedy_rewards" in estimator.signals:
        raise ValueError(
            f"{method}: {estimator.name} compares rewards with the greedy completion's, which has no weight; set {option} to "
            "'advantage'."
        )
    return place


@register_extension(base="remax")
def genre2(estimator: Method, *, expert_coefficient: float = 0.0) -> Extension:
    """Builds GenRe2, arXiv 2512.06533: regression by decoding digits, with minus the squared error as the reward.

    The loss is the mean over samples of the sum over digits. `config.regression` sets the reward and number tokenizer.
    """
    if estimator.nonnegative_rewards:
        raise ValueError(f"genre2: its rewards are negative, and {estimator.name} refuses those; choose another base.")
    return Extension(
        loss={"aggregation": "sequence_sum", "constant": None},
        auxiliary=(ExpertDigits(coefficient=expert_coefficient),) if expert_coefficient else (),
        gives_reward=True,
    )


@register_extension(base="grpo")
def hero(
    estimator: Method,
    *,
    alpha: float = 0.05,
    beta: float = 0.05,
    strata_eps: float = 1e-6,
    w_min: float = 0.5,
    w_max: float = 2.0,
    k: float = 5.0,
    momentum: float = 0.9,
    weight_on: str = "",
) -> Extension:
    """Builds HERO, arXiv 2510.07242: the verifier gates, the reward model grades, prompts with more spread weigh more.

    The weight multiplies the advantage. weight_on="reward" is for estimators that do not divide by the std of a group.
    """
    if estimator.nonnegative_rewards and alpha:
        raise ValueError(
            f"hero: incorrect answers have rewards down to -alpha ({-alpha:g}), and {estimator.name} refuses negative ones; set "
            "alpha to 0, or choose another base."
        )
    place = _place_of_weight("hero", "weight_on", weight_on, estimator, "advantage")
    weight = advantages.weight_by_score_spread(w_min, w_max, k, momentum)
    return Extension(
        replace_reward=advantages.stratify_by_verifier(alpha, beta, strata_eps),
        scale_reward=weight if place == "reward" else None,
        scale_advantage=weight if place == "advantage" else None,
        signals=frozenset({"model_scores", "verdicts"}),
        judges=True,
    )


@register_extension(base="grpo")
def laser(
    estimator: Method,
    *,
    alpha: float = 0.1,
    beta_v: float = 0.1,
    tau: float = 0.1,
    min_std: float = 0.1,
    reasoning_warmup: int = 200,
    self_reward_warmup: int = 200,
    reference: str = "constant",
    token: str = "",
) -> Extension:
    """Builds LaSeR, arXiv 2510.14943: the policy learns to judge itself by one log-probability at the end token.

    Its loss (weight alpha) starts after reasoning_warmup steps. The advantage mixes in self-rewards, with share tau,
    after self_reward_warmup more steps.
    """
    if self_reward_warmup < 0:
        raise ValueError(f"laser: self_reward_warmup is {self_reward_warmup}; it must be at least 0.")
    self_reward = SelfReward(
        coefficient=alpha, beta=beta_v, warmup_steps=reasoning_warmup, reference=reference, token=token
    )
    return Extension(
        mix=advantages.after(reasoning_warmup + self_reward_warmup, advantages.mix_self_reward(tau, min_std)),
        auxiliary=(self_reward,),
        signals=frozenset({"self_rewards", "truncated", "verdicts"}),
        judges=True,
    )


@register_extension(base="reinforce_pp")
def rlev(estimator: Method, *, alpha: float = 10.0, clip: float = 1.0, scale_on: str = "") -> Extension:
    """Builds RLEV, arXiv 2510.20187: the human value v of a prompt scales its part, s = 1 + min(alpha v, clip).

    s multiplies the reward. If the base divides by the std of a group or compares with a greedy reward, s multiplies
    the advantage.
    """
    needs_advantage = estimator.divides_by_group_std or "greedy_rewards" in estimator.signals
    place = _place_of_weight("rlev", "scale_on", scale_on, estimator, "advantage" if needs_advantage else "reward")
    scale = advantages.scale_by_value(alpha, clip)
    return Extension(
        scale_reward=scale if place == "reward" else None,
        scale_advantage=scale if place == "advantage" else None,
        signals=frozenset({"values"}),
    )


@register_extension(base="grpo", clip_high=0.28, aggregation="token_mean")
def progrpo(
    estimator: Method,
    *,
    alpha: float = 0.3,
    skip_all_correct: bool = False,
    center: bool = False,
    correct_only: bool = False,
) -> Extension:
    """Builds ProGRPO, arXiv 2602.05281: advantages move towards answers in which the policy has little confidence.

    If no base is named, the loss is the paper's: clip_low=0.2, clip_high=0.28, aggregation="token_mean". center and
    correct_only are not in the paper's formula: see `advantages.reweight_by_confidence`.
    """
    return Extension(
        add=advantages.reweight_by_confidence(alpha, skip_all_correct, center=center, correct_only=correct_only),
        signals=frozenset({"prompt_confidence", "answer_confidence", "verdicts"}),
        judges=True,
    )
