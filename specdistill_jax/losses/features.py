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
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives

Head = Callable[[Any], Any]
PerToken = Float[Array, 'b t']
_SMALLEST_MASK = 1e-5  # added to the number of supervised positions, as released


def smooth_l1(predicted_btd: Float[Array, 'b t d'], taught_btd: Float[Array, 'b t d']
              ) -> PerToken:
  """Huber loss at 1, as PyTorch's SmoothL1Loss, averaged over d. float32.

  0.5 z^2 where |z| < 1, else |z| - 0.5. No gradient reaches `taught_btd`.
  """
  z = jnp.abs(predicted_btd.astype(jnp.float32)
              - jax.lax.stop_gradient(taught_btd).astype(jnp.float32))
  return jnp.mean(jnp.where(z < 1, 0.5 * jnp.square(z), z - 0.5), axis=-1)


def soft_cross_entropy(student_logits: Float[Array, 'b t v'],
                       teacher_logits: Float[Array, 'b t v']) -> PerToken:
  """-sum_v teacher(v) log student(v), nats: the forward KL and the teacher's entropy.

  A token that both forbid (-inf) adds nothing.
  """
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
  student = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  return -jnp.sum(jnp.where(teacher == -jnp.inf, 0, jnp.exp(teacher) * student), axis=-1)


def feature_loss(objective: objectives.Objective, steps: Sequence[structs.DraftStep], head: Head,
                 teacher_head: Head, restrict: Head, *, regression: float = 1.0,
                 classification: float = 1.0, decay: float = 1.0,
                 over_all_positions: bool = False, alpha=None, **heads: Any) -> objectives.Totals:
  """The loss of a draft's unrolled steps: sum over k of decay^k times that of step k.

  Objective 'feature', the papers': at each position `regression` times `smooth_l1` and
  `classification` times `soft_cross_entropy`, over the mean of supervised positions, or of all
  positions, padding included, with `over_all_positions` (EAGLE-3). A divergence: that of the two
  laws, with the objective's own normalisation, by the number of the first step's tokens.

  Args:
    head: of the student, over its own vocabulary; may be a part of the target's.
    teacher_head: the target's, over its vocabulary.
    restrict: logits over the target's vocabulary to those over the student's own. A position
      whose most probable token is left out by it counts, but has no loss.
    alpha: as in `chunked.distillation`; of the first step, for all of them.
    heads: `chunk`, `over_rows` and `frozen_head` of `chunked.totals`.

  Returns:
    `alpha` is the overlap of both laws over the target's whole vocabulary, at step 0.
  """
  is_feature = objective.name == objectives.FEATURE
  if is_feature:
    objective = dataclasses.replace(objective, normalisation='token')
  per_token = functools.partial(_per_token, objective, restrict, classification)
  found = None
  for k, step in enumerate(steps):
    mask_bt = step.mask_bt
    visible = lambda x, mask_bt=mask_bt: jnp.where(mask_bt[..., None] > 0, x, 0)
    totals = chunked.totals(objective, per_token, head, step.read_btd, teacher_head,
                            visible(step.taught_btd), mask_bt, alpha=alpha, **heads)
    if is_feature and regression:
      distance_bt = smooth_l1(visible(step.predicted_btd), visible(step.taught_btd))
      totals = totals.replace(
          loss_sum=totals.loss_sum + regression * jnp.sum(distance_bt * mask_bt))
    if found is None:
      found = totals
      if objective.needs_alpha and alpha is None:
        alpha = jax.lax.stop_gradient(totals.alpha)
    else:
      found = found.replace(loss_sum=found.loss_sum + decay ** k * totals.loss_sum)
  if is_feature:
    found = found.replace(weight=jnp.float32(steps[0].mask_bt.size) if over_all_positions else
                          found.weight + _SMALLEST_MASK)
  return found


def _per_token(objective, restrict, classification, student_btv, whole_btv, mask_bt, alpha):
  """Loss and overlap of a step by position; `whole_btv` are the target's logits."""
  teacher_btv = restrict(whole_btv)
  inside_bt = jnp.max(teacher_btv, axis=-1) >= jnp.max(whole_btv, axis=-1)
  log_norm_bt1 = jax.nn.logsumexp(whole_btv.astype(jnp.float32), axis=-1, keepdims=True)
  overlap_bt = _overlap(student_btv, teacher_btv - log_norm_bt1)
  if objective.name == objectives.FEATURE:
    loss_bt = classification * soft_cross_entropy(student_btv, teacher_btv)
  else:
    if objective.needs_alpha and alpha is None:
      alpha = jnp.sum(overlap_bt * mask_bt) / jnp.sum(mask_bt)
    loss_bt, _ = objectives.per_token(objective, student_btv, teacher_btv, mask_bt, alpha)
  return loss_bt * inside_bt, overlap_bt


def _overlap(student_btv, teacher_log_probs_btv):
  """Sum over the student's vocabulary of the smaller probability, float32 `[b, t]`."""
  student = jax.nn.log_softmax(jax.lax.stop_gradient(student_btv).astype(jnp.float32))
  return jnp.sum(jnp.exp(jnp.minimum(student, teacher_log_probs_btv)), axis=-1)
