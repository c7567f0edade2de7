"""The ways to speculate that a study compares, each measured once: rule, draft mode and length."""

import dataclasses
from typing import Any

from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to speculate with any draft; fields as in a results row."""
  gamma: int
  draft_sampling: str
  rule: str
  epsilon: float
  min_confidence: float


def distinct(settings: Any, temperature: float) -> list[Way]:
  """What `config.evaluate` asks for at a temperature, without what makes no sense there.

  Ways that draft alike and judge alike are one, known by the name that comes first: at
  temperature 0 all lossless rules agree, and so do sampled and greedy drafts.
  """
  sampling = sampling_lib.Sampling(temperature, settings.top_k, settings.top_p)
  found: dict[Any, Way] = {}
  for rule, epsilon in settings.rules:
    if rules.objection(rule, epsilon, sampling) is not None:
      continue
    for draft_sampling in settings.draft_sampling:
      greedy_drafts = sampling.is_greedy or draft_sampling == 'greedy'
      for min_confidence in settings.min_confidences:
        for gamma in settings.gammas:
          alike = (rules.for_sampling(rule, epsilon, sampling), greedy_drafts, gamma,
                   min_confidence)
          found.setdefault(alike, Way(gamma, draft_sampling, rule, epsilon, min_confidence))
  return list(found.values())
