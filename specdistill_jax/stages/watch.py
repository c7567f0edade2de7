"""`sd.trace` and `sd.overlap`: speculation on one text, token by token."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Float
import numpy as np

from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.evaluation import acceptance
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import step_costs
from specdistill_jax.models import base

_along = jax.jit(acceptance.along, static_argnums=3)


def trace(target: base.Model, drafter: base.Model, prompt: Any, *, gamma: int | None = None,
          tree: str | None = None, max_new_tokens: int, temperature: float = 1.0,
          top_k: int | None = None, top_p: float | None = None, rule: str = 'exact',
          epsilon: float = 1.0, draft_sampling: str = 'sampled', min_confidence: float = 0.0,
          key: jax.Array, prompt_width: int | None = None) -> list[drafted.Call]:
  """Decodes one prompt as `sd.speculate` does, and tells each call of the target.

  Args: as those of `sd.speculate`, but for `prompt`, which is one of its prompts.

  Returns:
    A `drafted.Call` each: what was drafted, which of it was kept, and the target's own token
    behind that. What they `emitted`, in a row, is the text. The loop is left after every call,
    which makes it slow: to look at, not to measure.

  Raises:
    ValueError: as `sd.speculate`.
  """
  sampling = sampling_lib.Sampling(temperature, top_k, top_p)
  built_rule = rules.for_sampling(rule, epsilon, sampling)
  target, drafter = api.check_pair(target, drafter)
  inputs = api.pad_prompts(target, [prompt], max_new_tokens, prompt_width)
  built_drafter = api.make_drafter(
      drafter, gamma=gamma, tree=tree, target_sampling=sampling, target=target,
      draft_sampling=draft_sampling, min_confidence=min_confidence)
  return list(drafted.calls(
      api.decoding_module(target, drafter), step_costs.Setting(built_drafter, built_rule),
      *inputs, key, sampling=sampling, max_new_tokens=max_new_tokens))


def overlap(target: base.Model, drafter: base.Model, prompt: Any, tokens: Sequence[int], *,
            temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
            ) -> Float[np.ndarray, ' t']:
  """Along a text, the chance that a token drafted there is accepted by the rule 'exact'.

  sum_v min(target, draft) of both next-token laws (Leviathan et al. 2023, Theorem 3.5), which
  see the text before. Its mean over texts of the target is alpha.

  Args:
    prompt: token ids, or a string where the target has a vocabulary.
    tokens: the ids that follow it, as `Generation.tokens` has them.
    temperature, top_k, top_p: of both laws; at temperature 0 they are one-hot, and the overlap
      says whether the two models agree.

  Returns:
    `[len(tokens)]`, in [0, 1].

  Raises:
    ValueError: as `sd.speculate`; no tokens.
  """
  tokens = [int(token) for token in tokens]
  if not tokens:
    raise ValueError('tokens is empty; give at least one token that follows the prompt')
  sampling = sampling_lib.Sampling(temperature, top_k, top_p)
  target, drafter = api.check_pair(target, drafter)
  prompts_bt, lengths_b = api.pad_prompts(target, [prompt], len(tokens))
  text = [*prompts_bt[0, :lengths_b[0]].tolist(), *tokens]
  tokens_bt, whole_b = api.pad_prompts(target, [text], 1)
  position_t = np.arange(tokens_bt.shape[1])
  mask_bt = ((position_t >= lengths_b[0]) & (position_t < whole_b[0]))[None]
  batch = structs.Batch(tokens_bt, mask_bt.astype(np.float32), lengths_b, whole_b)
  overlap_bt, is_told_bt = _along(
      target.module, api.on_given_text(target, drafter), batch, sampling)
  return np.asarray(overlap_bt)[np.asarray(is_told_bt) > 0]
