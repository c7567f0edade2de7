"""Losses of feature-level drafts: held to the target's features, to its law, or to both.

EAGLE-1 (arXiv 2401.15077), FSPAD (2408.15562) and EAGLE-3 (2503.01840), with the normalisations
of their released codes. Like `objectives`, a loss returns sums and what divides them. A head is
any function from features `[b, t, d]` to logits `[b, t, v]`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specdistill_jax import structs
from specdistill_jax.losses import blocks
from specdistill_jax.losses import chunked
from specdistill_jax.losses import divergences
from specdistill_jax.losses import objectives

Head = Callable[[Any], Any]
_SMALLEST_MASK = 1e-5  # added to the number of supervised positions, as released


def smooth_l1(predicted: Float[Array, '*tokens d'], taught: Float[Array, '*tokens d']
              ) -> Float[Array, '*tokens']:
  """Huber loss at 1, as PyTorch's SmoothL1Loss, averaged over d. float32.

  0.5 z^2 where |z| < 1, else |z| - 0.5. No gradient reaches `taught`.
  """
  z = jnp.abs(predicted.astype(jnp.float32) - jax.lax.stop_gradient(taught).astype(jnp.float32))
  return jnp.mean(jnp.where(z < 1, 0.5 * jnp.square(z), z - 0.5), axis=-1)


def soft_cross_entropy(student_logits: Float[Array, '*tokens v'],
                       teacher_logits: Float[Array, '*tokens v']) -> Float[Array, '*tokens']:
  """-sum_v teacher(v) log student(v), nats: the forward KL and the teacher's entropy.

  A token that both forbid (-inf) adds nothing.
  """
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
  student = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  return -jnp.sum(jnp.where(teacher == -jnp.inf, 0, jnp.exp(teacher) * student), axis=-1)


def feature_loss(objective: objectives.Objective, steps: Sequence[structs.DraftStep], head: Head,
                 teacher_head: Head, restrict: Head, *, regression: float = 1.0,
                 classification: float = 1.0, decay: float = 1.0,
                 over_all_positions: bool = False, **heads: Any) -> objectives.Totals:
  """The papers' own loss of a draft's unrolled steps: the sum over k of decay^k times step k's.

  At each place `regression` times `smooth_l1` and `classification` times `soft_cross_entropy`,
  over the mean of supervised places, or of all places, padding included, with
  `over_all_positions` (EAGLE-3).

  Args:
    head: of the student, over its own vocabulary; may be a part of the target's.
    teacher_head: the target's, over its vocabulary. Both as `chunked` takes them.
    restrict: logits over the target's vocabulary to those over the student's own. A place whose
      most probable token is left out by it counts, but has no loss.
    heads: `chunk`, `over_rows` and `frozen_head` of `chunked.totals`.

  Returns:
    Overlaps are of both laws over the target's whole vocabulary.
  """
  objective = dataclasses.replace(objective, normalisation='token')
  stacked = lambda name: jnp.stack([getattr(step, name) for step in steps], axis=2)
  mask_btg, decay_g = stacked('mask_bt'), blocks.decay_weights(len(steps), decay)
  totals = chunked.totals(
      objective, functools.partial(_per_token, restrict, classification * decay_g), head,
      stacked('read_btd'), teacher_head, stacked('taught_btd'), mask_btg, **heads)
  if regression:
    visible = lambda name: jnp.where(mask_btg[..., None] > 0, stacked(name), 0)
    distance_btg = smooth_l1(visible('predicted_btd'), visible('taught_btd'))
    totals = totals.replace(
        loss_sum=totals.loss_sum + regression * jnp.sum(distance_btg * decay_g * mask_btg))
  return totals.replace(weight=jnp.float32(steps[0].mask_bt.size) if over_all_positions
                        else totals.weight + _SMALLEST_MASK)


def _per_token(restrict, classification, student, whole, mask, alpha):
  """Loss and overlap at each place and step; `whole` are the target's logits."""
  del alpha
  visible = lambda x: jnp.where(mask[..., None] > 0, x, 0)
  student, whole = visible(student), visible(whole)
  teacher = restrict(whole)
  is_inside = jnp.max(teacher, axis=-1) >= jnp.max(whole, axis=-1)
  log_norm = jax.nn.logsumexp(whole.astype(jnp.float32), axis=-1)
  overlap = divergences.acceptance(jax.lax.stop_gradient(student), teacher,
                                   teacher_log_norm=log_norm)
  return classification * soft_cross_entropy(student, teacher) * is_inside, overlap
