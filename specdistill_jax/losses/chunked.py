"""Objectives from features: heads and loss over chunks of positions, never `[b, t, v]` at once.

At a vocabulary of 128,256 the float32 logits of 8,192 tokens take 4.2 GB, for each model, and the
loss makes several arrays of their size. Here the heads run on `chunk` positions of every row at a
time. A chunk's gradient on the student's features and head is taken while its logits are there,
in the forward pass; the backward pass scales it. So no product runs twice, except for an
objective that `needs_alpha`: its heads run once more before, over all tokens.

With `chunk=None` the logits are made whole, and differentiated like any other function.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from specdistill_jax.losses import objectives

Head = Callable[[Any], Any]  # features [b, t, d] -> logits [b, t, v]
# (student logits, reference, mask_bt, alpha) -> loss and overlap [b, t], as `objectives.per_token`.
PerToken = Callable[..., Any]
# A function of arrays that all rows share and arrays by rows, which returns sums and arrays by
# rows, to one that does it with the rows spread over devices.
OverRows = Callable[[Callable[..., Any]], Callable[..., Any]]
_NOTHING = (0.0, 0.0)


def supervised(objective: objectives.Objective, student_head: Head, features_btd, labels_bt,
               mask_bt, *, chunk: int | None = None,
               over_rows: OverRows = lambda function: function) -> objectives.Totals:
  """Cross-entropy on given labels, as `objectives.supervised` of `student_head(features_btd)`.

  Args:
    chunk: positions of a row at a time, at most; None: all of them.
    over_rows: `sharding.over_rows`, where rows are spread over devices.
  """
  return totals(objective, functools.partial(objectives.per_token, objective), student_head,
                features_btd, lambda labels: labels, labels_bt, mask_bt, chunk=chunk,
                over_rows=over_rows)


def distillation(objective: objectives.Objective, student_head: Head, student_features_btd,
                 teacher_head: Head, teacher_features_btd, mask_bt, *, chunk: int | None = None,
                 alpha=None, over_rows: OverRows = lambda function: function
                 ) -> objectives.Totals:
  """A divergence, as `objectives.distillation` of both heads' logits; widths `d` may differ.

  Args:
    chunk, over_rows: as in `supervised`.
    alpha: as in `objectives.per_token`.
  """
  return totals(objective, functools.partial(objectives.per_token, objective), student_head,
                student_features_btd, teacher_head, _blank(teacher_features_btd, mask_bt), mask_bt,
                chunk=chunk, alpha=alpha, over_rows=over_rows)


def totals(objective: objectives.Objective, per_token: PerToken, student_head: Head,
           student_features_btd, reference_head: Head, reference, mask_bt, *,
           chunk: int | None = None, alpha=None,
           over_rows: OverRows = lambda function: function,
           frozen_head: bool = False) -> objectives.Totals:
  """Of any loss by token: `per_token(student logits, reference_head(reference), mask_bt, alpha)`.

  Args:
    objective: how tokens are pooled, and whether they need alpha.
    reference: labels, or features of the teacher; gets no gradient.
    frozen_head: whether the student's head is left as it is: it costs no gradient then.
  """
  features_btd = _blank(student_features_btd, mask_bt)
  reference = jax.lax.stop_gradient(reference)
  if chunk is None:
    return objectives.totals(objective, *per_token(
        student_head(features_btd), reference_head(reference), mask_bt, alpha), mask_bt)

  def sums(student, fixed):
    """Loss and overlap of a chunk, by what is differentiated and what is not."""
    weights, features_btd = student
    frozen, reference_weights, alpha, reference, mask_bt, weight_bt = fixed
    loss_bt, alpha_bt = per_token(
        _opened(student_head, features_btd)[0](features_btd, *weights, *frozen),
        _opened(reference_head, reference)[0](reference, *reference_weights), mask_bt, alpha)
    return jnp.sum(loss_bt * weight_bt), jnp.sum(alpha_bt * mask_bt)

  weights, frozen = _opened(student_head, features_btd)[1], []
  if frozen_head:
    weights, frozen = frozen, jax.lax.stop_gradient(weights)
  reference_weights = jax.lax.stop_gradient(_opened(reference_head, reference)[1])
  rows = (features_btd, reference, mask_bt, objectives.token_weights(objective, mask_bt))
  if objective.needs_alpha and alpha is None:
    (_, overlap), _ = over_rows(functools.partial(_sums, sums, chunk))(
        jax.lax.stop_gradient((weights, frozen, reference_weights, 0.0)),
        jax.lax.stop_gradient(rows))
    alpha = overlap / jnp.sum(mask_bt)
  found = _differentiable(sums, chunk, over_rows)(
      (weights, frozen, reference_weights, alpha), rows)
  return objectives.pooled(objective, *found, mask_bt)


def _opened(head, features):
  """`(function, weights)` with `function(features, *weights)` equal to `head(features)`.

  It holds for features of this shape, on the devices that see it: so it is asked for anew
  wherever the head is applied. The weights are the same ones each time.
  """
  return jax.closure_convert(lambda features: head(features), features)


def _differentiable(sums, chunk, over_rows):
  """The sums of all chunks, whose gradients are taken on the way."""
  @jax.custom_vjp
  def summed(whole, rows):
    return over_rows(functools.partial(_sums, sums, chunk))(whole, rows)[0]

  def forward(whole, rows):
    (found, on_weights), on_features = over_rows(
        functools.partial(_sums_and_gradients, sums, chunk))(whole, rows)
    return found, ([g.astype(w.dtype) for g, w in zip(on_weights, whole[0])], on_features)

  def backward(grads, cotangents):
    on_weights, on_features = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), grads)
    return (on_weights, None, None, None), (on_features, None, None, None)

  summed.defvjp(forward, backward)
  return summed


def _sums(sums, chunk, whole, rows):
  """Sums over the chunks of `rows`, and, of no row, nothing: as `over_rows` takes it."""
  weights, *fixed = whole
  def body(found, rows):
    features_btd, *inputs = rows
    return jax.tree.map(jnp.add, found, sums((weights, features_btd), (*fixed, *inputs))), None
  return jax.lax.scan(body, _NOTHING, _split(rows, chunk))[0], None


def _sums_and_gradients(sums, chunk, whole, rows):
  """The same, with the loss's gradients: on the head, summed in float32, and on the features."""
  weights, *fixed = whole
  def body(carry, rows):
    features_btd, *inputs = rows
    found, (on_weights, on_features) = jax.value_and_grad(sums, has_aux=True)(
        (weights, features_btd), (*fixed, *inputs))
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), carry,
                        (found, on_weights)), on_features
  zeros = [jnp.zeros(weight.shape, jnp.float32) for weight in weights]
  summed, on_features = jax.lax.scan(body, (_NOTHING, zeros), _split(rows, chunk))
  on_features = jnp.swapaxes(on_features, 0, 1).reshape(rows[0].shape[0], -1, rows[0].shape[2])
  return summed, on_features[:, :rows[0].shape[1]]


def _split(arrays, chunk):
  """`[b, t, ...]` to `[chunks, b, <= chunk, ...]`: of equal sizes, the end filled with zeros.

  Positions are split, not rows: these are spread over devices.
  """
  length = arrays[0].shape[1]
  count = -(-length // chunk)
  size = -(-length // count)
  def split(x):
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], count, size, *x.shape[2:]), 0, 1)
  return jax.tree.map(split, arrays)


def _blank(features_btd, mask_bt):
  """Zeroes unsupervised features: a NaN there must not reach the head's gradient either."""
  return jnp.where(mask_bt[..., None] > 0, features_btd, 0)
