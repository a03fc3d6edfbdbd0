"""Methods: an advantage chain, a policy loss and the signals both need, a dozen lines each.

There are estimators, which stand alone, and extensions, which change an estimator (their `base`) and stack. To
add an estimator, decorate a function with keyword-only parameters; its name becomes `config.method.name`
and its parameters become `config.method.*`:

    @register
    def centered_reinforce(*, clip: float = 0.2):
      '''REINFORCE with a group baseline.'''
      return Method(chain(center_by_group()), PolicyLoss(clip_low=clip, clip_high=clip))
"""

from collections.abc import Callable
import dataclasses
import difflib
import inspect
from typing import Any, ClassVar

from jaxrl_reason.advantages import (
    AdvantageInputs,
    AdvantageTransform,
    after,
    center_by_group,
    chain,
    leave_one_out,
    mix_self_reward,
    reweight_by_confidence,
    scale_by_value,
    soft_overlong_penalty,
    standardize_by_group,
    stratify_by_verifier,
    subtract_greedy,
    weight_by_score_spread,
    whiten_by_token,
)
from jaxrl_reason.losses import AGGREGATIONS, RATIOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDigits:
    """GenRe2's dense expert term, arXiv 2512.06533: cross-entropy on the digits that bring a generated prefix nearest to the target.

    Attributes:
      coefficient: its weight in the loss.
    """

    name: ClassVar[str] = "expert"
    coefficient: float

    def __post_init__(self):
        if self.coefficient < 0:
            raise ValueError(f"method.expert_coefficient is {self.coefficient}; it must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfReward:
    """LaSeR's self-reward beta_v * (log pi(z | x, y, <end>) - c_ref) and its loss, arXiv 2510.14943.

    Attributes:
      coefficient: weight of `losses.self_reward_loss`.
      beta: beta_v.
      warmup_steps: training steps before the loss sets in.
      reference: c_ref is "constant", its mean over completions of the policy that RL began with, or "exact", the
        reference policy's own log-probability of each completion.
      token: z, as text of one token; empty: the tokenizer's padding token.
    """

    name: ClassVar[str] = "self_reward"
    coefficient: float = 0.1
    beta: float = 0.1
    warmup_steps: int = 200
    reference: str = "constant"
    token: str = ""

    def __post_init__(self):
        if self.coefficient < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"laser: alpha is {self.coefficient} and reasoning_warmup is {self.warmup_steps}; both must be at least 0."
            )
        if self.beta <= 0:
            raise ValueError(f"laser: beta_v is {self.beta}; it must be greater than 0.")
        if self.reference not in ("constant", "exact"):
            raise ValueError(f"laser: reference is {self.reference!r}; it must be 'constant' or 'exact'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The keywords of `losses.policy_loss`, as a value, and the auxiliary terms beside it.

    Attributes:
      auxiliary: settings of the auxiliary losses, each a frozen dataclass with a `name` and a `coefficient`; `rl.auxiliary` computes them.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    aggregation: str = "token_mean"
    constant: float | None = None
    auxiliary: tuple[Any, ...] = ()

    def __post_init__(self):
        for field, value, allowed in (("ratio", self.ratio, RATIOS), ("aggregation", self.aggregation, AGGREGATIONS)):
            if value not in allowed:
                raise ValueError(f"method.{field} is {value!r}; it must be one of {allowed}.")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(
                f"method.clip_low and method.clip_high are {self.clip_low} and {self.clip_high}; "
                "they are widths around 1 and must be at least 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"method.dual_clip is {self.dual_clip}; it must be greater than 1.")

    def find(self, name: str) -> Any:
        """Returns the settings of an auxiliary loss, or None if the method does not have it."""
        return next((settings for settings in self.auxiliary if settings.name == name), None)

    def policy_keywords(self) -> dict[str, object]:
        """What `losses.policy_loss` takes."""
        return {k: getattr(self, k) for k in ("clip_low", "clip_high", "dual_clip", "ratio", "aggregation", "constant")}


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes one method from another.

    Attributes:
      advantage: the chain from rewards to advantages.
      loss: the policy loss.
      signals: names of the fields of AdvantageInputs that the chain needs beyond rewards and completion_mask.
      dynamic_sampling: keep a group only if some but not all of its completions are right, and refill
        the batch with further prompts (DAPO, arXiv 2503.14476, section 3.2).
      divides_by_group_std: multiplying a prompt's rewards by a number changes nothing, so that a weight
        of prompts has to go on the advantage.
      name: what it was created as.
    """

    advantage: AdvantageTransform
    loss: PolicyLoss
    signals: frozenset[str] = frozenset()
    dynamic_sampling: bool = False
    divides_by_group_std: bool = False
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "signals", frozenset(self.signals))  # from a set or a list too: a method is hashed
        unknown = sorted(self.signals - set(AdvantageInputs._fields))
        if unknown:
            raise ValueError(f"A method asks for the signals {unknown}, which AdvantageInputs does not have.")
        # A bare transformation starts from the rewards too.
        object.__setattr__(self, "advantage", chain(self.advantage))


@dataclasses.dataclass(frozen=True)
class Extension:
    """What a method adds to the estimator it stands on.

    Attributes:
      reward: transformations in front of the estimator's, with the place each takes among those of a stack: what
        replaces the reward (0) before what weighs it (1).
      advantage: transformations behind it: weights (0) before additions (1) before mixtures (2).
      loss: fields of PolicyLoss that it sets.
      auxiliary: auxiliary losses that it adds.
      signals: as `Method.signals`.
      judges: whether it needs verdicts, right or wrong.
      gives_reward: whether it brings a reward that knows no right and wrong.
    """

    reward: tuple[tuple[int, AdvantageTransform], ...] = ()
    advantage: tuple[tuple[int, AdvantageTransform], ...] = ()
    loss: tuple[tuple[str, object], ...] = ()
    auxiliary: tuple[Any, ...] = ()
    signals: frozenset[str] = frozenset()
    judges: bool = False
    gives_reward: bool = False


_REGISTRY: dict[str, Callable[..., Method]] = {}
_EXTENSIONS: dict[str, tuple[Callable[..., Extension], str]] = {}  # the factory and its usual base


def register(factory: Callable[..., Method]) -> Callable[..., Method]:
    """Makes `factory(**keywords) -> Method` available to `create` under its function name."""
    _check_factory(factory, _REGISTRY)
    _REGISTRY[factory.__name__] = factory
    return factory


def register_extension(base: str) -> Callable:
    """Makes `factory(estimator: Method, **keywords) -> Extension` available under its function name, by default on `base`."""

    def register_it(factory):
        _check_factory(factory, {name: f for name, (f, _) in _EXTENSIONS.items()}, skip=1)
        _EXTENSIONS[factory.__name__] = factory, base
        return factory

    return register_it


def _check_factory(factory: Callable, known: dict[str, Callable], skip: int = 0) -> None:
    name = factory.__name__
    taken = known.get(name) or _REGISTRY.get(name) or (_EXTENSIONS.get(name) or [None])[0]
    # A notebook's cell or a recipe may run twice.
    if taken and (taken.__module__, taken.__qualname__) != (factory.__module__, factory.__qualname__):
        raise ValueError(f"A method named {name!r} is registered already.")
    for parameter in list(inspect.signature(factory).parameters.values())[skip:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise TypeError(f"Method {name!r}: parameter {parameter.name!r} must be keyword-only and have a default.")


def names() -> tuple[str, ...]:
    """The registered methods, estimators first."""
    return (*_REGISTRY, *_EXTENSIONS)


def _own_keywords(factory: Callable) -> dict[str, object]:
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def keywords(name: str, base: str = "") -> dict[str, object]:
    """The parameters of a method and their defaults: an extension's own, `base`, and those of the base.

    Of a stack ("hero+rlev"): a dict an extension, `base`, and those of the base.

    Raises:
      ValueError: unknown names, or a base that is not an estimator.
    """
    if name in _REGISTRY:
        return _own_keywords(_REGISTRY[name])
    parts = name.split("+")
    for part in parts:
        if part not in _EXTENSIONS:
            near = nearest(part, (*_REGISTRY, *_EXTENSIONS))
            if len(parts) > 1 and part in _REGISTRY:
                near = f" It is an estimator: give it as base={part!r}."
            raise ValueError(f"There is no method {part!r}{' to stack' if len(parts) > 1 else ''}.{near}")
    base = base or (_EXTENSIONS[name][1] if len(parts) == 1 else "grpo")
    if base not in _REGISTRY:
        why = "a method stands on an estimator; use stack() for several methods" if base in _EXTENSIONS else "unknown"
        raise ValueError(f"method.base is {base!r} ({why}).{nearest(base, _REGISTRY)}")
    own = {part: _own_keywords(_EXTENSIONS[part][0]) for part in parts}
    return (own[name] if len(parts) == 1 else own) | {"base": base} | _own_keywords(_REGISTRY[base])


def create(name: str, **options) -> Method:
    """The method `name` with its parameters set.

    An extension (genre2, hero, laser, rlev, progrpo) stands on the estimator `base`, whose parameters it takes too; a
    stack is written "hero+rlev", see `stack`.

    Raises:
      ValueError: unknown name or parameter (naming the nearest valid ones), a value out of range, or a combination that
        contradicts itself or cancels.
    """
    base = options.get("base", "")
    if name not in _REGISTRY and not isinstance(base, str):
        raise ValueError(f"method.base is {base!r}; it must be the name of an estimator.")
    known = keywords(name, base)
    for key in options:
        if key not in known:
            raise ValueError(f"Method {name!r} has no parameter {key!r}.{nearest(key, known)}")
    if name in _REGISTRY:
        return dataclasses.replace(_REGISTRY[name](**options), name=name)

    parts = name.split("+")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name!r} names a method twice; each acts once.")
    base = known["base"]
    estimator = create(base, **{k: options[k] for k in _own_keywords(_REGISTRY[base]) if k in options})
    extensions = {}
    for part in parts:
        factory = _EXTENSIONS[part][0]
        own = _own_keywords(factory)
        given = options if len(parts) == 1 else options.get(part, {})
        if not isinstance(given, dict):
            raise ValueError(f"method.{part} is {given!r}; it must be a dict of {part}'s parameters.")
        for key in given:
            if len(parts) > 1 and key not in own:
                raise ValueError(f"Method {part!r} has no parameter {key!r}.{nearest(key, own)}")
        extensions[part] = factory(estimator, **{k: v for k, v in given.items() if k in own})
        for field, value in extensions[part].loss:
            if field in options and field not in own:
                raise ValueError(
                    f"method.{field} is {options[field]!r}, and {part} sets it to {value!r}; leave it out."
                )
    return _combine(name, estimator, extensions)


def stack(*parts: str, base: str = "grpo", **options) -> Method:
    """Several methods on one estimator.

        stack("hero", "rlev", "progrpo", base="rloo", hero={"alpha": 0.1}, clip_high=0.28)

    Rewards are replaced and scaled first, then the estimator, then weights of prompts, then what is added to the advantage
    (ProGRPO), then what is mixed with it (LaSeR), whatever order they are named in.

    Args:
      parts: names of extensions.
      base: the estimator.
      options: a dict an extension, and the estimator's parameters.

    Raises:
      ValueError: as `create`.
    """
    if not parts:
        raise ValueError("stack() needs at least one method; for a bare estimator use create().")
    if len(parts) == 1:
        own = options.pop(parts[0], {})
        if not isinstance(own, dict):
            raise ValueError(f"method.{parts[0]} is {own!r}; it must be a dict of {parts[0]}'s parameters.")
        options |= own
    return create("+".join(parts), base=base, **options)


def _combine(name: str, estimator: Method, extensions: dict[str, Extension]) -> Method:
    giving = [n for n, e in extensions.items() if e.gives_reward]
    judging = [n for n, e in extensions.items() if e.judges]
    if giving and judging:
        raise ValueError(
            f"{name!r} contradicts itself: {judging[0]} needs verdicts, right or wrong, and the reward of {giving[0]} is a "
            "distance that knows none, so its part would never act."
        )
    if giving and estimator.dynamic_sampling:
        raise ValueError(
            f"{name!r} contradicts itself: {estimator.name} keeps groups with both right and wrong answers, and the reward of "
            f"{giving[0]} is a distance that knows neither; set dynamic_sampling to False."
        )
    parts = extensions.values()
    auxiliary = estimator.loss.auxiliary + tuple(settings for e in parts for settings in e.auxiliary)
    in_order = lambda placed: [transform for _, transform in sorted(placed, key=lambda x: x[0])]
    return Method(
        chain(
            *in_order(x for e in parts for x in e.reward),
            estimator.advantage,
            *in_order(x for e in parts for x in e.advantage),
        ),
        dataclasses.replace(estimator.loss, auxiliary=auxiliary, **dict(x for e in parts for x in e.loss)),
        signals=estimator.signals.union(*(e.signals for e in parts)),
        dynamic_sampling=estimator.dynamic_sampling,
        divides_by_group_std=estimator.divides_by_group_std,
        name=name,
    )


def nearest(word: str, known) -> str:
    """ " Did you mean ...?" or a list of what there is."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " There are: " + ", ".join(known) + "." if known else " It has none."


# -- estimators ------------------------------------------------------------------------------------


@register
def grpo(
    *,
    eps: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "sequence_mean",
):
    """Group Relative Policy Optimization, arXiv 2402.03300."""
    return Method(
        chain(standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation),
        divides_by_group_std=True,
    )


@register
def dr_grpo(*, clip_low: float = 0.2, clip_high: float = 0.2):
    """GRPO without its length and difficulty biases, arXiv 2503.20783."""
    return Method(chain(center_by_group()), PolicyLoss(clip_low=clip_low, clip_high=clip_high, aggregation="constant"))


@register
def dapo(
    *,
    eps: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dynamic_sampling: bool = True,
    overlong_max_length: int = 0,
    overlong_cache_length: int = 0,
):
    """DAPO, arXiv 2503.14476: clip-higher, token-mean loss, dynamic sampling, soft overlong penalty.

    The penalty is on where overlong_max_length > 0 (normally max_completion_length).
    """
    if bool(overlong_max_length) != bool(overlong_cache_length):
        raise ValueError(
            "method.overlong_max_length and method.overlong_cache_length go together: set both or neither."
        )
    penalty = (soft_overlong_penalty(overlong_max_length, overlong_cache_length),) if overlong_max_length else ()
    return Method(
        chain(*penalty, standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        dynamic_sampling=dynamic_sampling,
        divides_by_group_std=True,
    )


@register
def gspo(*, eps: float = 1e-6, clip_low: float = 3e-4, clip_high: float = 4e-4):
    """Group Sequence Policy Optimization, arXiv 2507.18071: one ratio a completion."""
    return Method(
        chain(standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high, ratio="sequence", aggregation="sequence_mean"),
        divides_by_group_std=True,
    )


@register
def cispo(*, eps: float = 1e-6, clip_high: float = 5.0):
    """CISPO, arXiv 2506.13585: the clipped ratio is a constant weight (clip_high from arXiv 2510.13786)."""
    return Method(
        chain(standardize_by_group(eps)), PolicyLoss(clip_high=clip_high, ratio="cispo"), divides_by_group_std=True
    )


@register
def rloo(*, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE leave-one-out, arXiv 2402.14740, with a clipped ratio for further updates on a rollout."""
    return Method(chain(leave_one_out()), PolicyLoss(clip_low=clip_low, clip_high=clip_high))


@register
def reinforce_pp(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE++, arXiv 2501.03262: advantages whitened over the global batch's tokens."""
    return Method(
        chain(whiten_by_token(kl_coef)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        signals=frozenset({"kl"}) if kl_coef else frozenset(),
    )


@register
def reinforce_pp_baseline(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE++ with the group mean subtracted before the whitening."""
    return Method(
        chain(center_by_group(), whiten_by_token(kl_coef)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        signals=frozenset({"kl"}) if kl_coef else frozenset(),
    )


@register
def remax(*, aggregation: str = "token_mean"):
    """ReMax, arXiv 2310.10505: the greedy completion's reward is the baseline; no ratio, no std."""
    return Method(
        chain(subtract_greedy()),
        PolicyLoss(ratio="none", aggregation=aggregation),
        signals=frozenset({"greedy_rewards"}),
    )


# -- extensions ------------------------------------------------------------------------------------


def _weight_place(method: str, what: str, where: str, estimator: Method, default: str) -> str:
    """Whether a weight of prompts goes on "reward" or "advantage"; refuses the place where it would do nothing."""
    where = where or default
    if where not in ("reward", "advantage"):
        raise ValueError(f"{method}: {what} is {where!r}; it must be 'reward' or 'advantage'.")
    if where == "reward" and estimator.divides_by_group_std:
        raise ValueError(
            f"{method}: a weight on a prompt's rewards cancels when {estimator.name} divides them by the standard deviation of "
            f"their group; set {what} to 'advantage', or use a base that does not divide (dr_grpo, rloo, reinforce_pp)."
        )
    if where == "reward" and "greedy_rewards" in estimator.signals:
        raise ValueError(
            f"{method}: {estimator.name} compares rewards with the greedy completion's, which has no weight; set {what} to "
            "'advantage'."
        )
    return where


@register_extension(base="remax")
def genre2(estimator: Method, *, expert_coefficient: float = 0.0):
    """GenRe2, arXiv 2512.06533: regression by decoding digits, with minus the squared error as the reward.

    The loss is the mean over samples of the sum over their digits. The reward and the numeric tokenizer come from
    `config.regression`.
    """
    return Extension(
        loss=(("aggregation", "sequence_sum"), ("constant", None)),
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
):
    """HERO, arXiv 2510.07242: the verifier gates, the reward model grades; prompts with more spread weigh more.

    The weight goes on the advantage; weight_on="reward" is for estimators that do not divide by a group's std.
    """
    weight = weight_by_score_spread(w_min, w_max, k, momentum)
    place = _weight_place("hero", "weight_on", weight_on, estimator, "advantage")
    return Extension(
        reward=((0, stratify_by_verifier(alpha, beta, strata_eps)), *(((1, weight),) if place == "reward" else ())),
        advantage=((0, weight),) if place == "advantage" else (),
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
):
    """LaSeR, arXiv 2510.14943: the policy learns to judge itself by one log-probability at the end token.

    Its loss (weight alpha) sets in after reasoning_warmup steps, and self_reward_warmup steps later its
    self-rewards are mixed into the advantage with share tau.
    """
    if self_reward_warmup < 0:
        raise ValueError(f"laser: self_reward_warmup is {self_reward_warmup}; it must be at least 0.")
    self_reward = SelfReward(
        coefficient=alpha, beta=beta_v, warmup_steps=reasoning_warmup, reference=reference, token=token
    )
    return Extension(
        advantage=((2, after(reasoning_warmup + self_reward_warmup, mix_self_reward(tau, min_std))),),
        auxiliary=(self_reward,),
        signals=frozenset({"self_rewards", "truncated", "verdicts"}),
        judges=True,
    )


@register_extension(base="reinforce_pp")
def rlev(estimator: Method, *, alpha: float = 10.0, clip: float = 1.0, scale_on: str = ""):
    """RLEV, arXiv 2510.20187: a prompt counts by its human value, s = 1 + min(alpha v, clip).

    s multiplies the reward, or, where the base divides by a group's std or compares with a greedy reward, the advantage.
    """
    needs_advantage = estimator.divides_by_group_std or "greedy_rewards" in estimator.signals
    place = _weight_place("rlev", "scale_on", scale_on, estimator, "advantage" if needs_advantage else "reward")
    scale = scale_by_value(alpha, clip)
    return Extension(
        reward=((1, scale),) if place == "reward" else (),
        advantage=((0, scale),) if place == "advantage" else (),
        signals=frozenset({"values"}),
    )


@register_extension(base="grpo")
def progrpo(estimator: Method, *, alpha: float = 0.3, skip_all_correct: bool = False):
    """ProGRPO, arXiv 2602.05281: advantages move towards answers in which the policy has little confidence.

    The paper's loss is clip_low=0.2, clip_high=0.28, aggregation="token_mean" on grpo.
    """
    return Extension(
        advantage=((1, reweight_by_confidence(alpha, skip_all_correct)),),
        signals=frozenset({"prompt_confidence", "answer_confidence", "verdicts"}),
        judges=True,
    )
