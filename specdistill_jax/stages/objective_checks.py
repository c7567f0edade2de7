"""What a study may minimise; part of `checks`."""

import difflib
from typing import Any

from specdistill_jax.losses import specs

NAMES = (*specs.NAMES, specs.FEATURE)
DEFAULT_BETA = 0.5  # of configs/common.py: says that nobody asked for another


def objective(value: Any) -> str | None:
  """What would be right in place of a wrong objective, or None."""
  name = value.split(',')[0] if isinstance(value, str) else value
  if name not in NAMES and not specs.is_yours(name):
    near = difflib.get_close_matches(str(name), NAMES, n=1)
    hint = f' (did you mean {near[0]!r}?)' if near else ''
    return f'one of {", ".join(NAMES)}, or a function as in my_losses.sharp_kl{hint}'
  try:
    specs.parse(value)
    if specs.is_yours(name):
      from specdistill_jax.losses import objectives  # JAX, which only such a study wants here
      objectives.from_spec(value)
  except ValueError as error:
    kind = 'a function of logits' if specs.is_yours(name) else 'one that there is'
    return f'{kind}, with its fields behind commas: {error}'
  return None


def further(values: Any) -> str | None:
  """The same of a tuple of them, which may be empty."""
  if not isinstance(values, (tuple, list)):
    return 'a tuple of objectives'
  for wish in filter(None, map(objective, values)):
    return f'a tuple in which each value is {wish}'
  return None if len(set(values)) == len(values) else 'a tuple without repeated values'


def check(config: Any, is_feature_draft: bool) -> None:
  """Raises a ValueError of one sentence if the arms of a study don't go together."""
  distill = config.distill
  every = (distill.objective, *distill.also)
  if distill.objective in distill.also:
    raise ValueError(f'config.distill.also is {distill.also}, and {distill.objective!r} is '
                     'distill.objective already; leave it out')
  for index, spec in enumerate(every):
    reference = specs.reference(spec)
    if reference is not None and reference not in every[:index]:
      raise ValueError(f'config.distill has the objective {spec!r}, which keeps tokens by a '
                       f'reference, the draft of {reference!r}: it must come before it')
  specs.serving_temperature(distill.temperature, config.evaluate and config.evaluate.temperatures)
  if specs.FEATURE in every and not is_feature_draft:
    raise ValueError("config.distill.objective is 'feature', which holds a draft to the target's "
                     'features; config.draft.model must be a configs.common.feature_draft()')
  if specs.CROSS_ENTROPY in every and (is_feature_draft or distill.data_source != 'target'):
    raise ValueError(
        "config.distill.objective is 'cross_entropy', which a standalone draft learns from the "
        f"target's own text (SeqKD), but distill.data_source is {distill.data_source!r}"
        f'{", and the draft reads features" * is_feature_draft}; give \'target\', or leave it to '
        'distill.control')
  if not any(specs.parse(spec)[0] == 'jsd' for spec in every) and distill.beta != DEFAULT_BETA:
    raise ValueError(
        f"config.distill.beta is {distill.beta}, but only the objective 'jsd' has a beta and "
        f'distill.objective is {distill.objective!r}; leave it at {DEFAULT_BETA}')
