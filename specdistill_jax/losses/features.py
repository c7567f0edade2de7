"""Losses of feature-level drafts: held to the target's features, to its law, or to both.

EAGLE-1 (arXiv 2401.15077), FSPAD (2408.15562) and EAGLE-3 (2503.01840), with the normalisations
of their released codes. Like `objectives`, a loss returns sums and what divides them. A head is
any function from features `[b, t, d]` to logits `[b, t, v]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specdistill_jax import structs
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
                 over_all_positions: bool = False) -> objectives.Totals:
  """The loss of a draft's unrolled steps: sum over k of decay^k times that of step k.

  Objective 'feature', the papers': at each position `regression` times `smooth_l1` and
  `classification` times `soft_cross_entropy`, over the mean of supervised positions, or of all
  positions, padding included, with `over_all_positions` (EAGLE-3). A divergence: that of the two
  laws, with the objective's own normalisation, by the number of the first step's tokens.

  Args:
    head: of the student, over its own vocabulary; may be a part of the target's.
    teacher_head: the target's, over its vocabulary.
    restrict: logits over the target's vocabulary to those over the student's own. A position
      whose most probable token is left out by it has no loss.

  Returns:
    `alpha` is the overlap of both laws over the target's whole vocabulary, at step 0.
  """
  found = None
  for k, step in enumerate(steps):
    mask_bt = step.mask_bt
    visible = lambda x, mask_bt=mask_bt: jnp.where(mask_bt[..., None] > 0, x, 0)
    student_btv = head(visible(step.read_btd))
    whole_btv = jax.lax.stop_gradient(teacher_head(visible(step.taught_btd)))
    teacher_btv = restrict(whole_btv)
    inside_bt = mask_bt * (jnp.max(teacher_btv, axis=-1) >= jnp.max(whole_btv, axis=-1))
    if objective.name == objectives.FEATURE:
      loss_bt = classification * soft_cross_entropy(student_btv, teacher_btv)
      if regression:
        loss_bt += regression * smooth_l1(visible(step.predicted_btd), visible(step.taught_btd))
      loss_sum = jnp.sum(loss_bt * inside_bt)
      weight = jnp.float32(mask_bt.size) if over_all_positions else (
          jnp.sum(mask_bt) + _SMALLEST_MASK)
    else:
      totals = objectives.distillation(objective, student_btv, teacher_btv, inside_bt)
      loss_sum, weight = totals.loss_sum, totals.weight
    if found is None:
      log_norm_bt1 = jax.nn.logsumexp(whole_btv.astype(jnp.float32), axis=-1, keepdims=True)
      overlap_bt = _overlap(student_btv, teacher_btv - log_norm_bt1)
      found = objectives.Totals(loss_sum=loss_sum, weight=weight, num_tokens=jnp.sum(mask_bt),
                                alpha_sum=jnp.sum(overlap_bt * mask_bt))
    else:
      found = found.replace(loss_sum=found.loss_sum + decay ** k * loss_sum)
  return found


def _overlap(student_btv, teacher_log_probs_btv):
  """Sum over the student's vocabulary of the smaller probability, float32 `[b, t]`."""
  student = jax.nn.log_softmax(jax.lax.stop_gradient(student_btv).astype(jnp.float32))
  return jnp.sum(jnp.exp(jnp.minimum(student, teacher_log_probs_btv)), axis=-1)
