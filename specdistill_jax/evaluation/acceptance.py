"""Alignment of two models on continuations of the target (DistillSpec, arXiv 2310.08461, Eq. 3).

alpha at one context is sum_v min(target, draft) = 1 - TV(target, draft), both laws after the
same temperature, top-k and top-p. The contexts come from the target; sums over tokens come
before the ratio.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib


def overlap(target_log_probs_btv: jax.Array, draft_log_probs_btv: jax.Array) -> jax.Array:
  """sum_v min(target, draft), `[b, t]` float32 in [0, 1]: the chance that a draft is kept.

  Leviathan et al. 2023 (arXiv 2211.17192), Theorem 3.5.
  """
  if target_log_probs_btv.shape != draft_log_probs_btv.shape:
    raise ValueError(f'target law has shape {target_log_probs_btv.shape} and draft law '
                     f'{draft_log_probs_btv.shape}; they must be equal')
  smaller = jnp.minimum(target_log_probs_btv, draft_log_probs_btv)
  return jnp.sum(jnp.exp(smaller.astype(jnp.float32)), axis=-1)


def along(target, drafter, batch: structs.Batch, sampling: sampling_lib.Sampling
          ) -> tuple[jax.Array, jax.Array]:
  """`overlap` where each supervised token of given texts is predicted, and the mask of these.

  Args and laws as in `alpha_counts`; both results are `[b, t]`.
  """
  target_on, drafter_on = target.supervise(batch), drafter.supervise(batch)
  overlap_bt = overlap(
      sampling_lib.warp(target.logits(target_on.features_btd), sampling),
      sampling_lib.warp(drafter.logits(drafter_on.features_btd), sampling))
  return overlap_bt, target_on.mask_bt


@functools.partial(jax.jit, static_argnames=('sampling', 'widths'))
def alpha_counts(target, drafter, tokens_bt: jax.Array, prompt_lengths_b: jax.Array,
                 lengths_b: jax.Array, *, sampling: sampling_lib.Sampling,
                 widths: structs.Widths | None = None) -> jax.Array:
  """Teacher-forces both models on continuations drawn from the target.

  Args:
    target: a module with `supervise` and `logits`; likewise `drafter`, of the same family.
    tokens_bt: prompts and their continuations, right-padded.
    prompt_lengths_b: tokens of each prompt, at least 1.
    lengths_b: tokens of prompt and continuation together.
    sampling: the law both are compared under; at temperature 0 both are one-hot.
    widths: bounds on prompts and continuations, if known.

  Returns:
    `[b, 2]` float32: the sum of `overlap` over a row's continuation, and its token count.
  """
  position_t = jnp.arange(tokens_bt.shape[1])
  is_new_bt = (position_t >= prompt_lengths_b[:, None]) & (position_t < lengths_b[:, None])
  batch = structs.Batch(tokens_bt, is_new_bt.astype(jnp.float32), prompt_lengths_b, lengths_b,
                        widths)
  overlap_bt, mask_bt = along(target, drafter, batch, sampling)
  return jnp.stack([jnp.sum(jnp.where(mask_bt > 0, overlap_bt, 0.0), axis=1),
                    jnp.sum(mask_bt, axis=1)], axis=1)


def by_position(accepted_g: np.ndarray, reached_g: np.ndarray) -> list[float | None]:
  """Accepted at draft position i given that it was reached; None where it never was."""
  return [float(accepted) / float(reached) if reached else None
          for accepted, reached in zip(accepted_g, reached_g, strict=True)]
