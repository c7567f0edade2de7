"""Divergences between the student's and the teacher's next-token laws, per token, unreduced.

DistillSpec (arXiv 2310.08461), Eq. 2 and its divergence table, and LK losses (arXiv
2602.23881). Every function takes logits `[..., v]` (any float type, already divided by a
temperature) and returns float32 `[...]` in nats. Everything is computed in float32 log
space, and no gradient reaches the teacher.

A student that drafts from a part of the vocabulary is compared on that part: both logits are of
its tokens alone, and `teacher_log_norm` is the logsumexp of the teacher's logits over all of
them. The overlap is then that of the whole laws, in which the student gives the other tokens
nothing; a KL or JSD, which would be infinite, renormalises the teacher on the part (LK, 4.4).

Logits of -inf forbid a token. A token forbidden by both models adds nothing. A divergence
that is infinite by definition (the student forbids what the teacher allows in the forward
KL, the other way round in the reverse KL) is +inf, never NaN, and its gradient stays finite.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Logits = Float[Array, '*tokens v']
# The width is left to `_log_probs`, whose sentence says what is wrong.
TeacherLogits = Float[Array, '*tokens _']
PerToken = Float[Array, '*tokens']
# The teacher's normaliser, None where the logits are of all tokens.
LogNorm = Float[Array, '*tokens'] | None

# Stands for the logarithm of zero where an infinity would make 0 * inf or inf - inf. It lies
# below the logarithm of the smallest float32, so its exponential is exactly zero.
_LOG_ZERO = -1e4

# exp(80) is a float32, and so is the sum of a vocabulary of them.
_LIFT = 80.


def forward_kl(student_logits: Logits, teacher_logits: TeacherLogits) -> PerToken:
  """KL(teacher || student): mode covering. Gradient on the logits: student - teacher."""
  student, teacher = _log_probs(student_logits, teacher_logits)
  return _kl(teacher, student)


def reverse_kl(student_logits: Logits, teacher_logits: TeacherLogits) -> PerToken:
  """KL(student || teacher): mode seeking."""
  student, teacher = _log_probs(student_logits, teacher_logits)
  return _kl(student, teacher)


def jsd(student_logits: Logits, teacher_logits: TeacherLogits, *, beta: float = 0.5) -> PerToken:
  """JSD[beta] = beta KL(teacher || mix) + (1 - beta) KL(student || mix).

  The mixture is beta * teacher + (1 - beta) * student. At beta = 0.5 it is symmetric and at
  most log 2. JSD[beta] / beta tends to the forward KL for beta to 0, and
  JSD[beta] / (1 - beta) to the reverse KL for beta to 1.

  Args:
    beta: the teacher's weight, strictly between 0 and 1.

  Raises:
    ValueError: beta lies outside (0, 1), where the divergence is identically zero.
  """
  if not 0 < beta < 1:
    raise ValueError(f'jsd: beta is {beta}, and must lie strictly between 0 and 1 '
                     '(use forward_kl or reverse_kl for the limits)')
  student, teacher = _log_probs(student_logits, teacher_logits)
  # Logarithms of the teacher's and the mixture's ratio to the student. Their own gradients add up
  # to a multiple of the student's total, which is 1; so they need none.
  teacher_ratio = jax.lax.stop_gradient(_finite(teacher) - _finite(student))
  mixture_ratio = jnp.maximum(
      jnp.log(1 - beta + beta * jnp.exp(jnp.minimum(teacher_ratio, _LIFT))),
      math.log(beta) + teacher_ratio)
  teacher_part, student_part = beta * jnp.exp(teacher), (1 - beta) * jnp.exp(student)
  return jnp.sum(teacher_part * teacher_ratio - (teacher_part + student_part) * mixture_ratio,
                 axis=-1)


def tvd(student_logits: Logits, teacher_logits: TeacherLogits, *,
        teacher_log_norm: LogNorm = None) -> PerToken:
  """Total variation, half the L1 distance: exactly one minus the acceptance rate."""
  return 1 - acceptance(student_logits, teacher_logits, teacher_log_norm=teacher_log_norm)


def acceptance(student_logits: Logits, teacher_logits: TeacherLogits, *,
               teacher_log_norm: LogNorm = None) -> PerToken:
  """The overlap sum_v min(teacher, student): the chance that a drafted token is accepted."""
  return _overlap(*_log_probs(student_logits, teacher_logits, teacher_log_norm))


def acceptance_nll(student_logits: Logits, teacher_logits: TeacherLogits, *,
                   teacher_log_norm: LogNorm = None) -> PerToken:
  """-log of the acceptance rate; its gradient is that of `tvd` over the rate (LK, Eq. 6).

  Supports without a common token give +inf with a gradient of zero.
  """
  student, teacher = _log_probs(student_logits, teacher_logits, teacher_log_norm)
  # A logsumexp would take its maximum in one more pass over the logits. Lifted by a constant, a
  # float32 holds the overlap down to exp(-160), and the gradient is exact; the value, near one a
  # difference of large numbers, is that of the overlap as it is.
  lifted = jnp.sum(jnp.exp(jnp.minimum(student, teacher) + _LIFT), axis=-1)
  disjoint = lifted == 0
  value = _LIFT - jnp.log(jnp.where(disjoint, 1., lifted))
  overlap = jax.lax.stop_gradient(_overlap(student, teacher))
  plain = jnp.where(overlap < 1e-30, value, -jnp.log(jnp.maximum(overlap, 1e-30)))
  return jnp.where(disjoint, jnp.inf, value + jax.lax.stop_gradient(plain - value))


def lk_hybrid(student_logits: Logits, teacher_logits: TeacherLogits, *, eta: float = 3.0,
              weight: float | None = None, mask_bt: Float[Array, '*tokens'] | None = None,
              mean_acceptance: Float[Array, '...'] | float | None = None,
              teacher_log_norm: LogNorm = None) -> PerToken:
  """weight * forward KL + (1 - weight) * TVD, weight = exp(-eta * mean acceptance) (LK, Eq. 4).

  The weight has no gradient.

  Args:
    weight: a fixed one, in place of that formula.
    mean_acceptance: of which tokens the weight speaks: one number, one a draft position (the
      last axis of the tokens), or one a token. None: the mean of this call's positions where
      `mask_bt` is 1 (all of them without a mask).

  Raises:
    ValueError: eta is negative, or the weight lies outside [0, 1].
  """
  if eta < 0:
    raise ValueError(f'lk_hybrid: eta is {eta}, and must be at least 0')
  if weight is not None and not 0 <= weight <= 1:
    raise ValueError(f'lk_hybrid: weight is {weight}, and must lie in [0, 1]')
  divergence, distance = _kl_and_tvd(student_logits, teacher_logits, teacher_log_norm)
  if weight is None:
    if mean_acceptance is None:
      mask_bt = jnp.ones_like(distance) if mask_bt is None else mask_bt.astype(jnp.float32)
      mean_acceptance = 1 - (jnp.sum(jnp.where(mask_bt > 0, distance, 0.) * mask_bt)
                             / jnp.maximum(jnp.sum(mask_bt), 1e-8))
    weight = jax.lax.stop_gradient(jnp.exp(-eta * mean_acceptance))
  return weight * divergence + (1 - weight) * distance


def dspark(student_logits: Logits, teacher_logits: TeacherLogits, *,
           teacher_log_norm: LogNorm = None) -> PerToken:
  """0.1 cross-entropy + 0.9 L1, L1 being twice `tvd`: DSpark's mixture (arXiv 2607.05147).

  The cross-entropy is against the teacher's law, less its entropy, which has no gradient: the
  mean over the teacher's samples of what a sampled label gives, and zero for equal models. Its
  confidence head is not here; `decay=0.7788` gives its weights of draft positions,
  exp(-(n - 1) / 4).
  """
  divergence, distance = _kl_and_tvd(student_logits, teacher_logits, teacher_log_norm)
  return 0.1 * divergence + 0.9 * 2 * distance


def cross_entropy(student_logits: Logits, labels_bt: Int[Array, '...']) -> PerToken:
  """-log student(label), for supervised training."""
  if student_logits.shape[:-1] != labels_bt.shape:
    raise ValueError(f'cross_entropy: logits of shape {student_logits.shape} need labels of '
                     f'shape {student_logits.shape[:-1]}, not {labels_bt.shape}')
  logits = student_logits.astype(jnp.float32)
  label_logits = jnp.take_along_axis(logits, labels_bt[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - label_logits


def _log_probs(student_logits, teacher_logits, teacher_log_norm=None):
  if student_logits.shape != teacher_logits.shape:
    raise ValueError(f'the student\'s logits have shape {student_logits.shape} and the '
                     f'teacher\'s {teacher_logits.shape}: both models must read the same '
                     'tokens and share one vocabulary')
  teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
  student = jax.nn.log_softmax(student_logits.astype(jnp.float32), axis=-1)
  if teacher_log_norm is None:
    return student, jax.nn.log_softmax(teacher_logits, axis=-1)
  return student, teacher_logits - jax.lax.stop_gradient(teacher_log_norm)[..., None]


def _kl_and_tvd(student_logits, teacher_logits, teacher_log_norm):
  """Both from the same log-probabilities, which are as large as the logits."""
  student, teacher = _log_probs(student_logits, teacher_logits, teacher_log_norm)
  distance = 1 - _overlap(student, teacher)
  if teacher_log_norm is not None:
    teacher = jax.nn.log_softmax(teacher, axis=-1)
  return _kl(teacher, student), distance


def _overlap(student, teacher):
  # Not the exponential of the smaller logarithm, one more array beside these two, which other parts
  # of a loss and its gradient need too.
  return jnp.sum(jnp.minimum(jnp.exp(student), jnp.exp(teacher)), axis=-1)


def _finite(log_probs):
  return jnp.where(log_probs == -jnp.inf, _LOG_ZERO, log_probs)


def _kl(first, second):
  """KL(first || second) of log-probabilities; +inf where `second` forbids what `first` has.

  The infinity is added apart and without gradient: inf - inf in the backward pass of a
  softmax would be NaN.
  """
  probs = jnp.exp(first)
  value = jnp.sum(probs * (_finite(first) - _finite(second)), axis=-1)
  uncovered = jnp.any((probs > 0) & (second == -jnp.inf), axis=-1)
  return value + jax.lax.stop_gradient(jnp.where(uncovered, jnp.inf, 0.))
