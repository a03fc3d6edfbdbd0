"""A second implementation of the methods for comparison, in plain numpy and float64, one group at a time."""

import numpy as np

ESTIMATORS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax")
# MaxRL, "maxrl", is left out, because it refuses the rewards of HERO and GenRe2.
DIVIDES = ("grpo", "dapo", "gspo", "cispo")  # by the group's standard deviation


def strata(scores, correct, present, alpha=0.05, beta=0.05, eps=1e-6):
    """Returns HERO's reward, which is NaN for completions without one."""
    out = np.full(scores.shape, np.nan)
    for p, row in enumerate(np.asarray(scores, np.float64)):
        for stratum, floor, width in ((correct[p], 1 - beta, beta), (~correct[p], -alpha, alpha)):
            at = np.flatnonzero(stratum & present[p])
            if at.size:
                low, high = row[at].min(), row[at].max()
                out[p, at] = floor + 2 * width * (row[at] - low) / (high - low + eps)
    return out


def spread_weights(scores, present, mean=None, w_min=0.5, w_max=2.0, k=5.0, momentum=0.9):
    """Returns HERO's weights f64[P] and the running mean after this batch. For the first batch, mean is None."""
    groups = [np.asarray(row, np.float64)[there] for row, there in zip(scores, present)]
    sigmas = np.array([g.std(ddof=1) if len(g) > 1 else 0.0 for g in groups])
    counted = sigmas[[len(g) > 1 for g in groups]]
    if counted.size:
        mean = counted.mean() if mean is None else momentum * mean + (1 - momentum) * counted.mean()
    return w_min + (w_max - w_min) / (1 + np.exp(-k * (sigmas - (mean or 0.0)))), mean


def value_scale(values, alpha=10.0, clip=1.0):
    return 1 + np.minimum(alpha * np.asarray(values, np.float64), clip)


def mixed(advantages, self_rewards, truncated, present, tau=0.1, min_std=0.1):
    """Returns LaSeR's advantages from advantages of the verifier, [P, G] or [P, G, T]."""
    out = np.array(advantages, np.float64)
    for p, there in enumerate(present):
        at = np.flatnonzero(there)
        own = np.where(np.isfinite(self_rewards[p]) & ~truncated[p], self_rewards[p], 0.0)[at]
        own = np.clip(own.astype(np.float64), 0, 1)
        if len(at) > 1 and own.std(ddof=1) > min_std:
            for g, a in zip(at, (own - own.mean()) / own.std(ddof=1)):
                out[p, g] = (1 - tau) * out[p, g] + tau * a
    return out


def reweighted(
    advantages,
    prompt_confidence,
    answer_confidence,
    correct,
    present,
    alpha=0.3,
    skip_all_correct=False,
    center=False,
    correct_only=False,
):
    """Returns ProGRPO's advantages."""
    out = np.array(advantages, np.float64)
    for p, there in enumerate(present):
        if not correct[p][there].any() or (skip_all_correct and correct[p][there].all()):
            continue
        acts = np.flatnonzero(there & correct[p] if correct_only else there)
        gaps = [float(prompt_confidence[p]) - float(answer_confidence[p, g]) for g in acts]
        for g, gap in zip(acts, gaps):
            out[p, g] += alpha * (gap - np.mean(gaps) if center else gap)
    return out


def overlong(lengths, max_length, cache_length):
    return np.clip((max_length - cache_length - lengths) / cache_length, -1.0, 0.0)


def estimate(base, rewards, x, eps=1e-6, kl_coef=0.0):
    """Returns an estimator's advantages f64[P, G] (0 for a NaN reward), or [P, G, T] with KL in the reward."""
    out = np.zeros(rewards.shape)
    for p, row in enumerate(rewards):
        there = np.flatnonzero(~np.isnan(row))
        r = row[there]
        if base == "remax":
            greedy = float(x.greedy_rewards[p])
            out[p, there] = 0.0 if np.isnan(greedy) else r - greedy
        elif base == "reinforce_pp":
            out[p, there] = r
        elif len(r) > 1 and np.ptp(r) > 0:
            if base == "rloo":
                out[p, there] = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
            elif base == "maxrl":
                out[p, there] = (r - r.mean()) / (r.mean() + eps)
            else:
                out[p, there] = (r - r.mean()) / (r.std(ddof=1) + eps if base in DIVIDES else 1.0)
    if base.startswith("reinforce_pp"):
        live = x.completion_mask.astype(bool) & ~np.isnan(rewards)[..., None]
        returns = np.where(live, out[..., None], 0.0)
        if kl_coef:
            for p, g in np.ndindex(rewards.shape):
                tokens = np.flatnonzero(live[p, g])
                for i, t in enumerate(tokens):
                    returns[p, g, t] -= kl_coef * x.kl[p, g, tokens[i:]].sum(dtype=np.float64)
        every = returns[live]
        whitened = np.where(live, (returns - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8), 0.0)
        out = whitened if kl_coef else whitened.sum(axis=-1) / np.maximum(live.sum(axis=-1), 1)  # equal on all tokens
    return out


def compose(base, parts, x, *, mean=None, mixes=True, places=None, base_options=None, **options):
    """Returns advantages of the methods `parts` on an estimator, and HERO's running mean after this batch.

    Args:
      x: AdvantageInputs of numpy arrays.
      mixes: whether LaSeR's warm-up is over.
      places: {"hero" or "rlev": "reward" or "advantage"}, if not the usual place.
      base_options: options of the estimator.
      options: a dict per part.
    """
    present = ~np.isnan(x.rewards)
    if "hero" in parts:
        present &= np.isfinite(x.model_scores)
    correct = (x.rewards > 0.5 if x.verdicts is None else x.verdicts) & present
    own = {name: dict(options.get(name, {})) for name in parts}
    usual = {"hero": "advantage", "rlev": "advantage" if base in (*DIVIDES, "remax", "maxrl") else "reward"}
    places = usual | (places or {})
    rewards = np.where(present, x.rewards, np.nan).astype(np.float64)
    weights = {}
    if "hero" in parts:
        names = ("alpha", "beta", "strata_eps")
        alpha, beta, eps = (own["hero"].pop(n, d) for n, d in zip(names, (0.05, 0.05, 1e-6)))
        rewards = strata(x.model_scores, correct, present, alpha, beta, eps)
        weights["hero"], mean = spread_weights(x.model_scores, present, mean, **own["hero"])
    if "rlev" in parts:
        weights["rlev"] = value_scale(x.values, **own["rlev"])
    for name, weight in weights.items():
        if places[name] == "reward":
            rewards = rewards * weight[:, None]
    out = estimate(base, rewards, x, **(base_options or {}))
    for name, weight in weights.items():
        if places[name] == "advantage":
            out = out * weight.reshape(-1, *[1] * (out.ndim - 1))
    if "progrpo" in parts:
        out = reweighted(out, x.prompt_confidence, x.answer_confidence, correct, present, **own["progrpo"])
    if "laser" in parts and mixes:
        out = mixed(out, x.self_rewards, x.truncated, present, **own["laser"])
    return np.where(present.reshape(present.shape + (1,) * (out.ndim - 2)), out, 0.0), mean


def self_reward_loss(self_rewards, verdicts, valid):
    """Returns LaSeR's loss by its definition, a mean with the class weights N / 2 N_c."""
    rows = [(float(s), bool(v)) for s, v, ok in zip(np.ravel(self_rewards), np.ravel(verdicts), np.ravel(valid)) if ok]
    total = 0.0
    for s, v in rows:
        weight = len(rows) / (2 * sum(v == other for _, other in rows))
        total += weight * (s - v) ** 2
    return total / len(rows) if rows else 0.0
