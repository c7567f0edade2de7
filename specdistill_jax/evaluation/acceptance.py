"""Alignment of two models on continuations of the target (DistillSpec, arXiv 2310.08461, Eq. 3).

alpha at one context is sum_v min(target, draft) = 1 - TV(target, draft), both laws after the
same temperature, top-k and top-p. The contexts come from the target; sums over tokens come
before the ratio.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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


@functools.partial(jax.jit, static_argnames=('sampling',))
def alpha_counts(target, drafter, tokens_bt: jax.Array, prompt_lengths_b: jax.Array,
                 lengths_b: jax.Array, *, sampling: sampling_lib.Sampling) -> jax.Array:
  """Teacher-forces both models on continuations drawn from the target.

  Args:
    target: a pytree with `causal(tokens_bt) -> TargetOutput`; likewise `drafter`.
    tokens_bt: prompts and their continuations, right-padded.
    prompt_lengths_b: tokens of each prompt, at least 1.
    lengths_b: tokens of prompt and continuation together.
    sampling: the law both are compared under; at temperature 0 both are one-hot.

  Returns:
    `[b, 2]` float32: the sum of `overlap` over a row's continuation, and its token count.
  """
  target_btv = sampling_lib.warp(target.causal(tokens_bt).logits_btv, sampling)
  draft_btv = sampling_lib.warp(drafter.causal(tokens_bt).logits_btv, sampling)
  # The logits at position t predict token t + 1.
  predicted_t = jnp.arange(1, tokens_bt.shape[1] + 1)
  counted_bt = ((predicted_t >= prompt_lengths_b[:, None])
                & (predicted_t < lengths_b[:, None]))
  overlap_bt = jnp.where(counted_bt, overlap(target_btv, draft_btv), 0.0)
  return jnp.stack([jnp.sum(overlap_bt, axis=1),
                    jnp.sum(counted_bt, axis=1).astype(jnp.float32)], axis=1)


def by_position(accepted_g: np.ndarray, reached_g: np.ndarray) -> list[float | None]:
  """Accepted at draft position i given that it was reached; None where it never was."""
  return [float(accepted) / float(reached) if reached else None
          for accepted, reached in zip(accepted_g, reached_g, strict=True)]
