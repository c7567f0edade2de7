"""What the fields of `config.evaluate` must be to one another; part of `stages.checks`."""

from typing import Any


def _check_rules(evaluate: Any) -> None:
  """Each rule is of use at one of the temperatures, and each temperature has a lossless one."""
  from specdistill_jax.decoding import rules  # brings in JAX, like models above
  from specdistill_jax.decoding import sampling as sampling_lib
  samplings = [sampling_lib.Sampling(temperature, evaluate.top_k, evaluate.top_p)
               for temperature in evaluate.temperatures]
  for name, epsilon in evaluate.rules:
    faults = [rules.objection(name, epsilon, sampling) for sampling in samplings]
    if all(faults):
      raise ValueError(f'config.evaluate.rules has ({name!r}, {epsilon}): {faults[0]}')
  for sampling in samplings:
    if not any(rules.for_sampling(*pair, sampling).lossless for pair in evaluate.rules
               if rules.objection(*pair, sampling) is None):
      raise ValueError(
          f'config.evaluate.rules has no lossless rule at temperature {sampling.temperature:g}, '
          "so that the lossy ones have nothing to stand beside; add ('exact', 1.0)")


def _check_trees(evaluate: Any, vocab_size: int) -> None:
  """Each name is a tree's, and some rule judges trees."""
  from specdistill_jax.decoding import tree_names  # as above
  for name in evaluate.trees:
    try:
      width = tree_names.parse(name).width
    except ValueError as error:
      raise ValueError(f'config.evaluate.trees is {evaluate.trees!r}: {error}') from error
    if width > vocab_size:
      raise ValueError(f'config.evaluate.trees has {name!r}, of up to {width} children a node; '
                       f'there must be at most task.vocab_size, {vocab_size}')
  if evaluate.trees and all(name == 'block' for name, _ in evaluate.rules):
    raise ValueError(f"config.evaluate.trees is {evaluate.trees!r}, but evaluate.rules has 'block' "
                     "alone, which judges whole chains; add ('exact', 1.0)")


def check(evaluate: Any, vocab_size: int) -> None:
  """Raises a ValueError of one sentence at the first field that does not go with the others."""
  _check_rules(evaluate)
  _check_trees(evaluate, vocab_size)
  if evaluate.num_prompts is None and evaluate.batch_size > 1:
    raise ValueError(f'config.evaluate.num_prompts is None, and evaluate.batch_size is '
                     f'{evaluate.batch_size}; all prompts can be had one by one only, so make '
                     'that 1, or say how many')
  if evaluate.num_prompts is not None and evaluate.num_prompts % evaluate.batch_size:
    raise ValueError(f'config.evaluate.num_prompts is {evaluate.num_prompts}; it must be a '
                     f'multiple of evaluate.batch_size, {evaluate.batch_size}')
