"""The rewards of a run, as its configuration names them: device rewards traced, host rewards called."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_reason.data import PromptBatch, PromptTemplate, Tokenizer
from jaxrl_reason.rewards import host
from jaxrl_reason.rewards.device import match_answer_tokens
from jaxrl_reason.rollout import Rollout

ANSWER_MARKER = "#### "  # what the device reward match_answer looks for


class Scorer:
  """Scores rollouts. Only token ids leave the device, and only for host rewards; only rewards come back.

  Args:
    functions: names as in `config.reward.functions`: "match_answer" runs on the device, others on the host.
    weights: one a function; empty means 1 each.
    verdict: the function whose value > 0.5 means right; empty: the first.
    max_failure_share: see `host.score`.
    tokenizer, template: turn ids and rows into the text that host rewards read.
    sharding: where rewards [P, G] live.

  Attributes:
    names, weights, verdict: as configured, by the names that metrics use.
    on_host: whether a score needs the host.

  Raises:
    RewardError: a function that cannot be found, or two of one name.
  """

  def __init__(self, functions: Sequence[str], weights: Sequence[float], verdict: str, max_failure_share: float, *,
               tokenizer: Tokenizer, template: PromptTemplate, sharding):
    weights = [float(w) for w in weights] or [1.0] * len(functions)
    self._tokenizer, self._template, self._sharding = tokenizer, template, sharding
    self._max_failure_share = max_failure_share
    self._host, self._device, names = [], {}, {}
    for spec, weight in zip(functions, weights, strict=True):
      if spec == "match_answer":
        name, marker = spec, tuple(tokenizer.encode(ANSWER_MARKER))
        self._device[name] = jax.jit(match_answer_tokens(marker, eos_ids=tokenizer.eos_ids))
      else:
        name = spec if spec in host.BUILT_IN else None
        self._host.append(host.HostReward(name, host.load_reward(spec), weight))
        name = self._host[-1].name
      if name in names.values():
        raise host.RewardError(f"Two rewards are named {name!r}; metrics are logged by name, so rename one.")
      names[spec] = name
    if not any(weights):
      raise host.RewardError("No reward has a weight other than 0, so there is nothing to learn from; give at least one.")
    self.names, self.weights = tuple(names.values()), tuple(weights)
    self.verdict = names[verdict or functions[0]]
    self.on_host = bool(self._host)

  def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[dict[str, jax.Array], dict[str, float]]:
    """Scores the completions of a batch.

    Returns:
      name -> f32[P, G] on the device, NaN where missing; and metrics of host rewards
      (`rewards/<name>/error_rate`, `rewards/<name>/none_rate`).
    """
    rewards, metrics = {}, {}
    if self._device:
      columns = {"answer_tokens": jax.device_put(self._answer_tokens(batch), self._sharding)}
      for name, function in self._device.items():
        rewards[name] = function(rollout.tokens, rollout.mask, columns)
    if self._host:
      tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
      ids = [[row[live].tolist() for row, live in zip(*group)] for group in zip(tokens, mask)]
      texts = [self._tokenizer.decode_batch(group) for group in ids]
      prompts = [self._template.render_prompt(row) for row in batch.rows]
      columns = {key: [row.get(key) for row in batch.rows] for key in sorted(set().union(*batch.rows))}
      table = host.score(self._host, prompts, texts, ids, columns, self._max_failure_share)
      rewards |= {k: jax.device_put(v, self._sharding) for k, v in table.per_reward.items()}
      metrics = table.failures()
    return {name: rewards[name] for name in self.names}, metrics

  def _answer_tokens(self, batch: PromptBatch) -> np.ndarray:
    """int32[P, A], padded with -1 to a multiple of 8 so that few shapes are compiled."""
    answers = [str(row["answer"]) for row in batch.rows]
    encoded = self._tokenizer.encode_batch(answers)
    marker = self._tokenizer.encode(ANSWER_MARKER)
    for answer, ids, whole in zip(answers, encoded, self._tokenizer.encode_batch([ANSWER_MARKER + a for a in answers])):
      if whole != marker + ids:
        raise host.RewardError(f"The reward 'match_answer' compares tokens, and this tokenizer joins the answer {answer!r} with the "
                               f"marker {ANSWER_MARKER!r} before it; use the reward 'accuracy', which compares numbers.")
    width = -(-max(map(len, encoded)) // 8) * 8
    out = np.full((len(encoded), width), -1, np.int32)
    for row, ids in zip(out, encoded):
      row[:len(ids)] = ids
    return out
