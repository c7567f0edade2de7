"""From per-token losses to one number: mask, positions, pooling, temperature, acceptance rate.

An objective returns *sums* and their denominators, so that micro-batches and devices add up
to exactly what one large batch gives: `loss = loss_sum / weight`, gradients likewise.

A mask `[b, t]` is of one law a token (a standalone draft), a mask `[b, t, g]` of `g` draft
positions at each place (`blocks`). A loss is the sum over draft positions, by the number of
tokens at the first: of a standalone draft, whatever its `block`, the mean over its tokens.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax.losses import blocks
from specdistill_jax.losses import divergences
from specdistill_jax.losses import specs

CROSS_ENTROPY = specs.CROSS_ENTROPY
FEATURE = specs.FEATURE  # of feature-level drafts, see `features.feature_loss`
NORMALISATIONS = ('sequence', 'token')


@dataclasses.dataclass(frozen=True)
class Compared:
  """What an objective makes its losses `[b, t, g]` of.

  Attributes:
    laws: the first two arguments of a divergence: student's and teacher's logits.
    log_norm: its `teacher_log_norm`.
    mask_btg: 1 where there is something to learn.
    alpha: mean overlap, of each position `[g]` or of all.
  """
  laws: tuple[jax.Array, jax.Array]
  log_norm: jax.Array | None
  mask_btg: jax.Array
  alpha: Any

  def overlap(self) -> jax.Array:
    return divergences.acceptance(*self.laws, teacher_log_norm=self.log_norm)


def _lk_hybrid(objective, compared):
  alpha = compared.overlap() if objective.alpha_over == 'token' else compared.alpha
  return divergences.lk_hybrid(
      *compared.laws, eta=objective.eta, weight=objective.kl_weight, mean_acceptance=alpha,
      teacher_log_norm=compared.log_norm)


def _yours(objective, compared):
  student, teacher = compared.laws
  return objective.function(student, jax.lax.stop_gradient(teacher)).astype(jnp.float32)


# The objectives that compare with a teacher: (objective, compared) -> float32 `[b, t, g]`.
DIVERGENCES: dict[str, Callable[[Any, Compared], jax.Array]] = {
    'forward_kl': lambda o, c: divergences.forward_kl(*c.laws),
    'reverse_kl': lambda o, c: divergences.reverse_kl(*c.laws),
    'jsd': lambda o, c: divergences.jsd(*c.laws, beta=o.beta),
    'tvd': lambda o, c: divergences.tvd(*c.laws, teacher_log_norm=c.log_norm),
    'acceptance_nll': lambda o, c: divergences.acceptance_nll(
        *c.laws, teacher_log_norm=c.log_norm),
    'lk_hybrid': _lk_hybrid,
    'end_to_end_tvd': lambda o, c: blocks.end_to_end_tvd(c.overlap(), c.mask_btg),
    'dspark': lambda o, c: divergences.dspark(*c.laws, teacher_log_norm=c.log_norm),
}


@dataclasses.dataclass(frozen=True)
class Objective:
  """What is minimised: a hashable value. A field that the named objective lacks is ignored.

  Attributes:
    name: `cross_entropy`, one of `DIVERGENCES`, or `feature`, which ignores the rest; or that of
      `function`.
    beta: the teacher's weight in the mixture of `jsd`.
    normalisation: `sequence`, the mean over rows of the row's mean (DistillSpec, Eq. 2), or
      `token`, the mean over all tokens.
    temperature: divides the logits of both models inside a divergence.
    eta: of `lk_hybrid`: how fast the weight of its KL falls with the acceptance rate.
    kl_weight: of `lk_hybrid`: a fixed weight in place of that; None: exp(-eta alpha).
    alpha_over: of `lk_hybrid`: whose acceptance rate that is: `batch`, the mean at each draft
      position over the whole batch (as in the paper), `previous`, that of the update before,
      which costs nothing, or `token`, each token's own (as in a popular port).
    position_weights: of draft positions: `uniform`, `decay`, or `adaptive` (D-PACE);
      `end_to_end_tvd` weighs them by itself.
    decay: weight of a draft position over that of the one before it (Medusa, LK: 0.8).
    floor: of `adaptive` weights: what an overlap of 0 counts as (D-PACE: 0.5).
    block: tokens in a row that a standalone draft is taken to draft together; 1: each alone.
    keep: share of each row's tokens that are learnt from, those on which the student is furthest
      behind a reference (AdaSPEC, `selection`); 1: all of them.
    function: a divergence that the project lacks, (student_logits, teacher_logits) `[..., v]` to
      a loss `[...]`; None where `name` says all.

  Raises:
    ValueError: a value is impossible; the sentence names it and what is legal.
  """
  name: str = CROSS_ENTROPY
  beta: float = 0.5
  normalisation: str = 'sequence'
  temperature: float = 1.0
  eta: float = 3.0
  kl_weight: float | None = None
  alpha_over: str = 'batch'
  position_weights: str = 'decay'
  decay: float = 0.8
  floor: float = 0.5
  block: int = 1
  keep: float = 1.0
  function: Callable[[jax.Array, jax.Array], jax.Array] | None = None

  def __post_init__(self):
    if self.function is not None:
      _check_function(self.name, self.function)
    names = (CROSS_ENTROPY, *DIVERGENCES, FEATURE)
    for field, value, known in (
        ('objective', self.name, names if self.function is None else (self.name,)),
        ('normalisation', self.normalisation, NORMALISATIONS)):
      if value not in known:
        raise ValueError(f'{field} is {value!r}, and must be one of {", ".join(known)}')
    if not 0 < self.temperature < float('inf'):
      raise ValueError(f'the loss temperature is {self.temperature}, and must be positive')
    if self.name == 'jsd' and not 0 < self.beta < 1:
      raise ValueError(f'beta is {self.beta}, and must lie strictly between 0 and 1')
    for field in specs.FIELDS:
      specs.check(field, getattr(self, field))

  @property
  def needs_teacher(self) -> bool:
    return self.name != CROSS_ENTROPY

  @property
  def mixes_by_alpha(self) -> bool:
    """Whether a token's loss depends on the mean overlap at each draft position."""
    return (self.name == 'lk_hybrid' and self.kl_weight is None and self.alpha_over != 'token')

  @property
  def needs_alpha(self) -> bool:
    """Whether that is the mean over the very batch that the loss is of."""
    return self.mixes_by_alpha and self.alpha_over == 'batch'

  def mixture(self, alpha):
    """The weight of the KL in `lk_hybrid`, by acceptance rate; None in other objectives."""
    if self.name != 'lk_hybrid':
      return None
    return (jnp.exp(-self.eta * alpha) if self.kl_weight is None
            else jnp.full_like(alpha, self.kl_weight))


def from_spec(spec: str, **fields: Any) -> Objective:
  """Of a word of a config (`specs`), beside the fields that it does not speak of."""
  name, found = specs.parse(spec)
  function = specs.yours(name) if specs.is_yours(name) else None
  return Objective(name, function=function, **fields, **found)


def _check_function(name, function):
  """Raises unless it makes losses of logits, one a token."""
  logits = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
  try:
    found = jax.eval_shape(function, logits, logits)
  except Exception as error:  # whatever it raises, it is the objective that is wrong
    raise ValueError(f'objective {name!r} fails on logits of shape [2, 3, 5]: '
                     f'{type(error).__name__}: {error}') from error
  if getattr(found, 'shape', None) != (2, 3) or not jnp.issubdtype(found.dtype, jnp.floating):
    made = (f'{found.dtype} of shape {list(found.shape)}' if hasattr(found, 'shape')
            else f'a {type(found).__name__}')
    raise ValueError(f'objective {name!r} makes {made} of logits of shape [2, 3, 5]; it must be '
                     'a loss for each token, floats of shape [2, 3], neither masked nor averaged')


@struct.dataclass
class Totals:
  """Sums over the supervised tokens of a batch; add them up before dividing.

  Attributes:
    loss_sum: sum of row means (`sequence`) or of tokens (`token`), nats.
    weight: what divides it: rows with a supervised token, or supervised tokens.
    num_tokens: supervised tokens, each counted once however many positions predict it.
    overlap_sum_g: sum over tokens of the overlap of teacher and student, by draft position; 0
      without a teacher.
    count_g: how many these are.
  """
  loss_sum: jax.Array
  weight: jax.Array
  num_tokens: jax.Array
  overlap_sum_g: jax.Array
  count_g: jax.Array

  @property
  def loss(self) -> jax.Array:
    return self.loss_sum / self.weight

  @property
  def alpha(self) -> jax.Array:
    """Mean overlap over all positions."""
    return jnp.sum(self.overlap_sum_g) / jnp.sum(self.count_g)

  @property
  def alpha_g(self) -> jax.Array:
    """Mean overlap at each draft position; 0 where there is none."""
    return self.overlap_sum_g / jnp.maximum(self.count_g, 1)


def no_totals(positions: int) -> Totals:
  """Where adding up begins, for as many draft positions."""
  zero, zeros = jnp.zeros((), jnp.float32), jnp.zeros((positions,), jnp.float32)
  return Totals(zero, zero, zero, zeros, zeros)


def supervised(objective: Objective, student_logits, labels, mask) -> Totals:
  """Cross-entropy on given labels. `mask` is aligned with the logits."""
  return _whole(objective, student_logits, labels, mask, None, None)


def distillation(objective: Objective, student_logits, teacher_logits, mask, alpha=None,
                 restrict=None) -> Totals:
  """A divergence of student and teacher, `[b, t, v]` or `[b, t, g, v]`.

  Args:
    mask: aligned with the logits.
    alpha, restrict: as in `per_token`.
  """
  return _whole(objective, student_logits, teacher_logits, mask, alpha, restrict)


def _whole(objective, student_logits, reference, mask, alpha, restrict):
  weight_btg = placed(objective, token_weights(objective, mask), mask)
  mask_btg = placed(objective, mask, mask)
  loss_btg, overlap_btg = per_token(
      objective, placed(objective, student_logits, mask), placed(objective, reference, mask),
      mask_btg, alpha, restrict)
  return pooled(objective, jnp.sum(loss_btg * weight_btg), position_sums(overlap_btg, mask_btg),
                mask)


def placed(objective: Objective, x, mask):
  """`[b, t, ...]` in blocks where the mask has no draft positions, else as it is."""
  return blocks.cut(x, objective.block) if mask.ndim == 2 else x


def per_token(objective: Objective, student_logits_btgv, reference, mask_btg, alpha=None,
              restrict=None):
  """The loss of each token, as its position weighs it, and the overlap there: `[b, t, g]`.

  Args:
    reference: the teacher's logits, or labels `[b, t, g]` where the objective is supervised.
    alpha: mean overlap over all tokens of the batch, at each position `[g]` or one number, for
      an objective that `mixes_by_alpha`; None: over those that are here.
    restrict: the teacher's logits to those of the tokens that the student can draft; None: it
      has them all.
  """
  student = _blank(student_logits_btgv, mask_btg)
  if not objective.needs_teacher:
    loss_btg = divergences.cross_entropy(student, reference)
    return loss_btg, jnp.zeros_like(loss_btg)
  scale = 1 / objective.temperature
  student = student.astype(jnp.float32) * scale
  teacher = _blank(reference, mask_btg).astype(jnp.float32) * scale
  log_norm = None
  if restrict is not None:
    teacher, log_norm = restrict(teacher), jax.nn.logsumexp(teacher, axis=-1)
  overlap_btg = divergences.acceptance(jax.lax.stop_gradient(student), teacher,
                                       teacher_log_norm=log_norm)
  if alpha is None and objective.mixes_by_alpha:
    alpha = (position_sums(overlap_btg, mask_btg)
             / jnp.maximum(jnp.sum(mask_btg, axis=(0, 1)), 1))
  divergence = DIVERGENCES[objective.name] if objective.function is None else _yours
  loss_btg = divergence(
      objective, Compared((student, teacher), log_norm, mask_btg, alpha))
  if objective.name == 'end_to_end_tvd':
    pass
  elif objective.position_weights == 'decay' and mask_btg.shape[-1] > 1:
    loss_btg *= blocks.decay_weights(mask_btg.shape[-1], objective.decay)
  elif objective.position_weights == 'adaptive':
    loss_btg *= blocks.adaptive_weights(overlap_btg, mask_btg, objective.floor)
  return loss_btg, overlap_btg


def token_weights(objective: Objective, mask):
  """What each token's loss counts in `Totals.loss_sum`, of the mask's shape; 0 where masked."""
  if objective.normalisation == 'token':
    return mask
  tokens_b = jnp.sum(_first(mask), axis=1)
  return mask / jnp.maximum(tokens_b, 1).reshape(-1, *[1] * (mask.ndim - 1))


def position_sums(x_btg, mask_btg):
  """`[g]`, over the tokens that are not masked."""
  return jnp.sum(x_btg * mask_btg, axis=(0, 1))


def pooled(objective: Objective, loss_sum, overlap_sum_g, mask) -> Totals:
  """Sums of losses, weighted by `token_weights`, and of overlaps, with what divides them."""
  tokens_b = jnp.sum(_first(mask), axis=1)
  num_tokens = jnp.sum(tokens_b)
  rows = jnp.sum(tokens_b > 0).astype(jnp.float32)
  return Totals(loss_sum=loss_sum, num_tokens=num_tokens, overlap_sum_g=overlap_sum_g,
                count_g=jnp.sum(placed(objective, mask, mask), axis=(0, 1)),
                weight=rows if objective.normalisation == 'sequence' else num_tokens)


def _first(mask):
  """The mask `[b, t]` of the first draft position."""
  return mask if mask.ndim == 2 else mask[:, :, 0]


def _blank(logits, mask_btg):
  """Zeroes unsupervised logits: a NaN there must reach neither the value nor the gradient."""
  return jnp.where(mask_btg[..., None] > 0, logits, 0)
