"""What is logged of two laws at each draft position: not a loss, and without gradient.

The LK paper's quantities (arXiv 2602.23881): acceptance rate, KL, total variation, and how often
the most probable token is the same, which is the acceptance rate at temperature 0.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specdistill_jax.losses import chunked
from specdistill_jax.losses import divergences
from specdistill_jax.losses import objectives

PerToken = Float[Array, '*tokens']


@struct.dataclass
class Figures:
  """Sums over tokens, `[g]` each, or with `means` their means. Nats.

  Attributes:
    count: tokens.
    alpha: overlap.
    agreement: 1 where the most probable token is the same.
    kl: forward; the teacher renormalised on what the student can draft.
    tvd: total variation, one minus the overlap.
    student_entropy, teacher_entropy: of the laws, the teacher's over all tokens.
  """
  count: jax.Array
  alpha: jax.Array
  agreement: jax.Array
  kl: jax.Array
  tvd: jax.Array
  student_entropy: jax.Array
  teacher_entropy: jax.Array

  def means(self) -> 'Figures':
    """0 at a position without tokens."""
    return jax.tree.map(lambda x: x / jnp.maximum(self.count, 1), self).replace(count=self.count)


def measured(student_head: chunked.Head, student_features, teacher_head: chunked.Head,
             teacher_features, mask, *, temperature: float = 1.0, chunk: int | None = None,
             over_rows: chunked.OverRows = lambda function: function,
             restrict: chunked.Head | None = None) -> Figures:
  """Sums by draft position. Arguments as of `chunked.distillation`."""
  rows = tuple(objectives.placed(objectives.Objective(), x, mask)
               for x in (student_features, teacher_features, mask))
  whole = chunked.opened(student_head, rows[0]), chunked.opened(teacher_head, rows[1])

  def local(whole, rows):
    def of_chunk(rows):
      student, teacher, mask_btg = rows
      visible = mask_btg[..., None] > 0
      return _sums(jnp.where(visible, chunked.bound(student_head, student, whole[0]), 0),
                   jnp.where(visible, chunked.bound(teacher_head, teacher, whole[1]), 0),
                   mask_btg, temperature, restrict)
    size = rows[0].shape[1] * rows[0].shape[2] if chunk is None else chunk
    return chunked.summed(of_chunk, chunked.split(rows, size)), None

  return Figures(**over_rows(local)(*jax.lax.stop_gradient((whole, rows)))[0])


def _sums(student, teacher, mask_btg, temperature, restrict) -> dict[str, jax.Array]:
  """Fields of `Figures`."""
  student, teacher = (x.astype(jnp.float32) / temperature for x in (student, teacher))
  all_tokens, log_norm = teacher, None
  if restrict is not None:
    teacher, log_norm = restrict(all_tokens), jax.nn.logsumexp(all_tokens, axis=-1)
  alpha = divergences.acceptance(student, teacher, teacher_log_norm=log_norm)
  agreement = ((jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1))
               & (jnp.max(teacher, axis=-1) >= jnp.max(all_tokens, axis=-1)))
  add = functools.partial(objectives.position_sums, mask_btg=mask_btg)
  return dict(
      count=add(jnp.ones_like(mask_btg)), alpha=add(alpha), agreement=add(agreement),
      kl=add(divergences.forward_kl(student, teacher)), tvd=add(1 - alpha),
      student_entropy=add(entropy(student)), teacher_entropy=add(entropy(all_tokens)))


def entropy(logits: Float[Array, '*tokens v']) -> PerToken:
  """-sum_v p log p, nats; a forbidden token adds nothing."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return -jnp.sum(jnp.where(log_probs == -jnp.inf, 0, jnp.exp(log_probs) * log_probs), axis=-1)
