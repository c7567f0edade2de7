"""From per-token losses to one number: mask, pooling, temperature, and the acceptance rate.

An objective returns *sums* and their denominators, so that micro-batches and devices add up
to exactly what one large batch gives: `loss = loss_sum / weight`, gradients likewise.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax.losses import divergences

DIVERGENCES = {
    'forward_kl': divergences.forward_kl,
    'reverse_kl': divergences.reverse_kl,
    'jsd': divergences.jsd,
    'tvd': divergences.tvd,
    'acceptance_nll': divergences.acceptance_nll,
    'lk_hybrid': divergences.lk_hybrid,
}
CROSS_ENTROPY = 'cross_entropy'
FEATURE = 'feature'  # of feature-level drafts, see `features.feature_loss`
NORMALISATIONS = ('sequence', 'token')


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised: a hashable value.

  Attributes:
    name: `cross_entropy`, one of `DIVERGENCES`, or `feature`, which ignores the rest.
    beta: the teacher's weight in the mixture of `jsd`; other objectives ignore it.
    normalisation: `sequence`, the mean over rows of the row's mean (DistillSpec, Eq. 2), or
      `token`, the mean over all tokens.
    temperature: divides the logits of both models inside a divergence.

  Raises:
    ValueError: a value is impossible; the sentence names it and what is legal.
  """
  name: str = CROSS_ENTROPY
  beta: float = 0.5
  normalisation: str = 'sequence'
  temperature: float = 1.0

  def __post_init__(self):
    known = (CROSS_ENTROPY, *DIVERGENCES, FEATURE)
    if self.name not in known:
      raise ValueError(f'objective is {self.name!r}, and must be one of {", ".join(known)}')
    if self.normalisation not in NORMALISATIONS:
      raise ValueError(f'normalisation is {self.normalisation!r}, and must be one of '
                       f'{", ".join(NORMALISATIONS)}')
    if not 0 < self.temperature < float('inf'):
      raise ValueError(f'the loss temperature is {self.temperature}, and must be positive')
    if self.name == 'jsd' and not 0 < self.beta < 1:
      raise ValueError(f'beta is {self.beta}, and must lie strictly between 0 and 1')

  @property
  def needs_teacher(self) -> bool:
    return self.name != CROSS_ENTROPY

  @property
  def needs_alpha(self) -> bool:
    """Whether a token's loss depends on the mean overlap over the whole batch."""
    return self.name == 'lk_hybrid'


@struct.dataclass
class Totals:
  """Sums over the supervised tokens of a batch; add them up before dividing.

  Attributes:
    loss_sum: sum of row means (`sequence`) or of tokens (`token`), nats.
    weight: what divides it: rows with a supervised token, or supervised tokens.
    alpha_sum: sum over tokens of the overlap of teacher and student; 0 without a teacher.
    num_tokens: supervised tokens.
  """
  loss_sum: jax.Array
  weight: jax.Array
  alpha_sum: jax.Array
  num_tokens: jax.Array

  @property
  def loss(self) -> jax.Array:
    return self.loss_sum / self.weight

  @property
  def alpha(self) -> jax.Array:
    return self.alpha_sum / self.num_tokens


def no_totals() -> Totals:
  """Where adding up begins."""
  return Totals(*[jnp.zeros((), jnp.float32)] * 4)


def supervised(objective: Objective, student_logits_btv, labels_bt, mask_bt) -> Totals:
  """Cross-entropy on given labels. `mask_bt` is aligned with the logits."""
  return totals(objective, *per_token(objective, student_logits_btv, labels_bt, mask_bt), mask_bt)


def distillation(objective: Objective, student_logits_btv, teacher_logits_btv, mask_bt,
                 alpha=None) -> Totals:
  """A divergence of student and teacher. `mask_bt` is aligned with the logits.

  `alpha`: as in `per_token`.
  """
  return totals(objective, *per_token(objective, student_logits_btv, teacher_logits_btv, mask_bt,
                                      alpha), mask_bt)


def per_token(objective: Objective, student_logits_btv, reference, mask_bt, alpha=None):
  """The objective of each token and the overlap of both models there, float32 `[b, t]`.

  Args:
    reference: the teacher's logits, or labels `[b, t]` where the objective is supervised.
    alpha: mean overlap over all tokens of the batch, for an objective that `needs_alpha` and
      sees only some of them; None: these are all.
  """
  student_btv = _blank(student_logits_btv, mask_bt)
  if not objective.needs_teacher:
    loss_bt = divergences.cross_entropy(student_btv, reference)
    return loss_bt, jnp.zeros_like(loss_bt)
  scale = 1 / objective.temperature
  student_btv = student_btv.astype(jnp.float32) * scale
  teacher_btv = _blank(reference, mask_bt).astype(jnp.float32) * scale
  options = {'jsd': dict(beta=objective.beta),
             'lk_hybrid': dict(mask_bt=mask_bt, mean_acceptance=alpha)}
  loss_bt = DIVERGENCES[objective.name](
      student_btv, teacher_btv, **options.get(objective.name, {}))
  return loss_bt, divergences.acceptance(jax.lax.stop_gradient(student_btv), teacher_btv)


def token_weights(objective: Objective, mask_bt):
  """What each token's loss counts in `Totals.loss_sum`, float32 `[b, t]`; 0 where masked."""
  if objective.normalisation == 'token':
    return mask_bt
  return mask_bt / jnp.maximum(jnp.sum(mask_bt, axis=1, keepdims=True), 1)


def totals(objective: Objective, loss_bt, alpha_bt, mask_bt) -> Totals:
  """Pools what `per_token` says of whole rows."""
  return pooled(objective, jnp.sum(loss_bt * token_weights(objective, mask_bt)),
                jnp.sum(alpha_bt * mask_bt), mask_bt)


def pooled(objective: Objective, loss_sum, alpha_sum, mask_bt) -> Totals:
  """Sums of losses, weighted by `token_weights`, and of overlaps, with what divides them."""
  tokens_b = jnp.sum(mask_bt, axis=1)
  num_tokens = jnp.sum(tokens_b)
  rows = jnp.sum(tokens_b > 0).astype(jnp.float32)
  return Totals(loss_sum=loss_sum, alpha_sum=alpha_sum, num_tokens=num_tokens,
                weight=rows if objective.normalisation == 'sequence' else num_tokens)


def _blank(logits_btv, mask_bt):
  """Zeroes unsupervised logits: a NaN there must reach neither the value nor the gradient."""
  return jnp.where(mask_bt[..., None] > 0, logits_btv, 0)
