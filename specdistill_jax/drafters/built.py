"""A draft and its target, made ready to decode together, whatever family the draft is of."""

from typing import Any

import jax

from specdistill_jax import structs
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import feature
from specdistill_jax.drafters import lm
from specdistill_jax.drafters import tree as tree_drafter


def reads_features(draft: Any) -> bool:
  """Whether a module is a feature-level draft."""
  return hasattr(draft, 'unroll')


def target(module: Any, draft: Any) -> Any:
  """The target's module with its layers unrolled, giving the features that the draft reads."""
  if reads_features(draft):
    module = module.capturing(draft.captured)
  return module.unstacked()


def drafter(draft: Any, target_module: Any, shape: int | tree_lib.Tree | tree_lib.Dynamic,
            sampling: sampling_lib.Sampling, min_confidence: float = 0.0) -> structs.Drafter:
  """The drafter of chains of length `shape`, or of trees of that shape.

  Args:
    draft: its module.
    target_module: what a feature-level draft shares embedding and head with; else anything.
    sampling: the law drafted from; siblings are the most probable tokens where it is greedy.
    min_confidence: of chains, as in `lm.LMDrafter`.
  """
  if reads_features(draft):
    bound = feature.Bound(draft, target_module.without_layers())
    if isinstance(shape, int):
      return feature.FeatureDrafter(bound, shape, sampling, min_confidence)
    return tree_drafter.TreeDrafter(bound, shape, sampling)
  module = draft.unstacked()
  if isinstance(shape, int):
    return lm.LMDrafter(module, shape, sampling, min_confidence)
  return tree_drafter.TreeDrafter(tree_drafter.LanguageModel(module), shape, sampling)


def speculate(target_module: Any, draft: Any, prompts_bt: jax.Array, lengths_b: jax.Array,
              key: jax.Array, *, shape: int | tree_lib.Tree | tree_lib.Dynamic, rule: Any,
              sampling: sampling_lib.Sampling, max_new_tokens: int) -> structs.DecodeState:
  """Prompts `[b, t]` of lengths `[b]` in, a finished state out; traceable, as one program.

  Args:
    target_module, draft: modules as they are trained, or unrolled.
    shape: the length of a chain, or a tree.
  """
  built = drafter(draft, target_module, shape, sampling)
  module = target(target_module, draft)
  state = chain.prefill(module, built, prompts_bt, lengths_b, key, max_new_tokens=max_new_tokens)
  return chain.decode(module, built, state, rule=rule, sampling=sampling,
                      eos_id=state_lib.end_ids(module))
