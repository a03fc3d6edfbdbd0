"""Task: the data, the rewards and the evaluation of a run. Training and the evaluate command share it."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import pathlib
from typing import Any, Self

import jax
import numpy as np

from jaxrl_reason import data, models
from jaxrl_reason.config import Config
from jaxrl_reason.data import PromptBatch, SolutionBatch
from jaxrl_reason.methods import Method
from jaxrl_reason.rewards.scorer import RewardModelScorer, RewardScorer
from jaxrl_reason.rl import hosts, programs
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs.workdir import Workdir
from jaxrl_reason.tasks.regression import Digits, NumberScorer, Stream
from jaxrl_reason.tasks.self_reward import ProbeReference

Generate = Callable[..., Rollout]  # (batch, temperature=None), see `Programs.generate_eval`


@dataclasses.dataclass(frozen=True)
class Judged:
    """Judged samples of held-out prompts."""

    summary: Callable[[], dict[str, float]]  # metrics of a run in progress; their names begin with eval/
    metrics: Callable[[], dict[str, float]]  # all metrics, NaN if there is nothing to average
    accuracies: Callable[[], np.ndarray]  # the accuracy of each prompt, f64[N]; of predicted numbers, f64[0]
    per_prompt: Callable[[], dict[str, np.ndarray]]  # the metrics that are means over prompts, f64[N] each, in [0, 1]
    file: str  # name of the file that holds `lines`
    lines: Callable[[], Iterator[dict[str, Any]]]  # JSON objects, one per sample or per row
    draw: Callable[[Mapping[str, float], pathlib.Path, str], None]  # (metrics, path, title); writes a PNG


@dataclasses.dataclass(frozen=True)
class Task:
    """Held-out data, and how a policy is judged on them."""

    tokenizer: data.Tokenizer | Digits  # maps ids to text, or to numbers
    model: models.ModelConfig  # shape of the decoder for this vocabulary
    source: tuple[str, str]  # name and fingerprint of the held-out data
    held_out: list[PromptBatch]  # batches of held-out prompts, all of one size
    scorer: RewardScorer | NumberScorer  # computes the rewards of a rollout
    verdict: str  # the reward that judges held-out samples
    # (generate, scorer, reference, journal=None): samples and judges, see `evaluate`; a journal keeps text completions
    judge: Callable[..., Judged]
    legal: np.ndarray | None = None  # bool[T, V], tokens allowed at each position; None: all
    expert: Callable | None = None  # targets of the expert term, see `experience.make_experience`
    probe_token: int | None = None  # id of LaSeR's probe token; None without self-rewards

    def evaluate(
        self,
        generate: Generate,
        scorer: RewardScorer | NumberScorer,
        reference: ProbeReference = None,
        keep: Callable[[Iterator[dict[str, Any]], np.ndarray], None] | None = None,
    ) -> dict[str, float]:
        """Evaluates a run in progress and returns metrics named eval/...

        The keys of `generate` are the same in every evaluation; `scorer` is the task's, with a reward model if the run
        has one; `reference` is that of LaSeR's self-rewards. On the first process, `keep` takes the lines of the samples and
        the accuracy of each prompt.
        """
        judged = self.judge(generate, scorer, reference)
        if keep and hosts.is_first():
            keep(judged.lines(), judged.accuracies())
        return judged.summary()

    def with_reward_model(self, score: RewardModelScorer) -> Self:
        """Returns the task with a reward model in its scorer, see `RewardScorer.with_reward_model`."""
        if not isinstance(self.scorer, RewardScorer):
            raise TypeError("The rewards of numbers include no learned reward.")
        return dataclasses.replace(self, scorer=self.scorer.with_reward_model(score))


@dataclasses.dataclass(frozen=True)
class TrainingTask(Task):
    """A task with its training data and its work directory."""

    _: dataclasses.KW_ONLY
    work: Workdir  # checked but not yet written to
    # Reads all training rows when it is called first. Returns the streams of the supervised phase, None without it, and
    # of RL; `batch(i)` of a stream returns its i-th batch.
    streams: Callable[
        [], tuple[data.SolutionStream | Stream[SolutionBatch] | None, data.PromptStream | Stream[PromptBatch]]
    ]
    validation: list[SolutionBatch] = dataclasses.field(default_factory=list)  # chooses the end of the supervised phase
    # Metrics of other approaches on the same data, measured once per run.
    baselines: Callable[[], dict[str, float]] = dict
    # The model that a new run begins with; None if there is none or the work directory records it already.
    pretrained: models.Opened | None = None
    load_weights: Callable[[], models.Params] | None = None  # the pretrained weights, on the mesh; None: random weights

    prompts = property(lambda self: self.streams()[1])
    solutions = property(lambda self: self.streams()[0])

    def trimmed_lengths(self, config: Config) -> str:
        """Returns a sentence if batches are shorter than the configured lengths; they are padded to their longest row."""
        found = {"Prompts": (self.prompts.batch(0).tokens.shape[1], "max_prompt_length")}
        if self.solutions:
            found["Solutions"] = self.solutions.batch(0).completion_tokens.shape[1], "max_completion_length"
        return " ".join(
            f"{kind} have at most {length} tokens, and are padded to {length} instead of config.{field} ({limit})."
            for kind, (length, field) in found.items()
            if length < (limit := getattr(config, field))
        )


def build_programs(config: Config, method: Method, task: Task, mesh: jax.sharding.Mesh) -> programs.Programs:
    """Builds a task's programs; compiles nothing. Raises ConfigError when the mesh does not divide prompts or model."""
    return programs.build(
        config,
        method,
        task.model,
        mesh,
        eos_ids=task.tokenizer.eos_ids,
        pad_id=task.tokenizer.pad_id,
        weights=task.scorer.weights,
        verdict=task.scorer.verdict,
        probe_token=task.probe_token,
        legal=task.legal,
        expert=task.expert,
    )
