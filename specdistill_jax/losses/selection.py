"""AdaSPEC (arXiv 2510.19779): learn only from tokens that a draft of this size can learn.

A reference, a draft that was distilled before, says how far that goes: the tokens kept are those
on which the student's forward KL is furthest above the reference's.
"""

import jax
import jax.numpy as jnp

from specdistill_jax.losses import chunked
from specdistill_jax.losses import divergences


def selected(student_head: chunked.Head, student_features, reference_head: chunked.Head,
             reference_features, teacher_head: chunked.Head, teacher_features, mask, *,
             keep: float, temperature: float = 1.0, chunk: int | None = None,
             over_rows: chunked.OverRows = lambda function: function,
             restrict: chunked.Head = lambda logits: logits) -> jax.Array:
  """The mask without the tokens that are left out: `keep` of each row's stay, at least one.

  Rows are chosen from one by one, so that neither micro-batches nor devices matter; of draft
  positions, from each position by itself. Arguments as of `chunked.distillation`.
  """
  heads = student_head, reference_head, teacher_head
  features = [x[:, :, None] if mask.ndim == 2 else x
              for x in (student_features, reference_features, teacher_features)]
  mask_btg = mask[..., None] if mask.ndim == 2 else mask
  whole = [chunked.opened(head, x) for head, x in zip(heads, features)]

  def local(whole, rows):
    def of_chunk(_, rows):
      *inputs, mask_btg = rows
      student, reference, teacher = (
          jnp.where(mask_btg[..., None] > 0, chunked.bound(head, x, weights), 0) / temperature
          for head, x, weights in zip(heads, inputs, whole))
      teacher = restrict(teacher)
      return (), (divergences.forward_kl(student, teacher)
                  - divergences.forward_kl(reference, teacher))
    size = rows[0].shape[1] * rows[0].shape[2] if chunk is None else chunk
    _, excess = jax.lax.scan(of_chunk, (), chunked.split(rows, size))
    return (), chunked.joined(excess, rows[0].shape[1])

  _, excess_btg = over_rows(local)(*jax.lax.stop_gradient((whole, (*features, mask_btg))))
  kept = largest(excess_btg, mask_btg, keep)
  return kept[..., 0] if mask.ndim == 2 else kept


def largest(x_btg, mask_btg, keep: float) -> jax.Array:
  """The mask of the `keep` largest values of each row and position; of equal ones the first."""
  x_btg = jnp.where(mask_btg > 0, x_btg, -jnp.inf)
  rank_btg = jnp.argsort(jnp.argsort(-x_btg, axis=1), axis=1)
  number_bg = jnp.ceil(keep * jnp.sum(mask_btg > 0, axis=1))
  return jnp.where(rank_btg < number_bg[:, None], mask_btg, 0)
