"""Objectives from features: heads and loss over chunks of positions, never `[b, t, v]` at once.

At a vocabulary of 128,256 the float32 logits of 8,192 tokens take 4.2 GB, for each model, and the
loss makes several arrays of their size. Here the heads run on `chunk` positions of every row at a
time. A chunk's gradient on the student's features and head is taken while its logits are there,
in the forward pass; the backward pass scales it. So no product runs twice, except for an
objective that `mixes_by_alpha` and is not given it: its heads run once more before, over all
tokens.

With `chunk=None` the logits are made whole, and differentiated like any other function.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from specdistill_jax.losses import objectives

Head = Callable[[Any], Any]  # features [b, t, d] -> logits [b, t, v]
# (student logits, reference, mask_btg, alpha) -> loss and overlap [b, t, g], as
# `objectives.per_token`.
PerToken = Callable[..., Any]
# A function of arrays that all rows share and arrays by rows, which returns sums and arrays by
# rows, to one that does it with the rows spread over devices.
OverRows = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class ByPosition:
  """A head that differs between draft positions: `head` of `[b, t, g, d]` gives `[b, t, g, v]`."""
  head: Head

  def __call__(self, features):
    return self.head(features)


@dataclasses.dataclass(frozen=True)
class Sliding:
  """A head of `[b, t, g, d]` where (t, g) is (t + 1, g - 1) once more: run on each only once.

  The target's law of a token is what every position is compared with that drafts this token.
  """
  head: Head

  def __call__(self, features):
    length, positions = features.shape[1:3]
    logits = self.head(jnp.concatenate([features[:, :, 0], features[:, -1, 1:]], axis=1))
    return jnp.stack([logits[:, n:n + length] for n in range(positions)], axis=2)


def supervised(objective: objectives.Objective, student_head: Head, features, labels, mask, *,
               chunk: int | None = None,
               over_rows: OverRows = lambda function: function) -> objectives.Totals:
  """Cross-entropy on given labels, as `objectives.supervised` of `student_head(features)`.

  Args:
    chunk: positions of a row at a time, at most; None: all of them.
    over_rows: `row_sharding.over_rows`, where rows are spread over devices.
  """
  return totals(objective, functools.partial(objectives.per_token, objective), student_head,
                features, None, labels, mask, chunk=chunk, over_rows=over_rows)


def distillation(objective: objectives.Objective, student_head: Head, student_features,
                 teacher_head: Head, teacher_features, mask, *, chunk: int | None = None,
                 alpha=None, over_rows: OverRows = lambda function: function,
                 restrict: Head | None = None, frozen_head: bool = False
                 ) -> objectives.Totals:
  """A divergence, as `objectives.distillation` of both heads' logits; widths `d` may differ.

  Args:
    student_features: `[b, t, d]` with a mask `[b, t]`, or of several draft positions
      `[b, t, g, d]` with a mask `[b, t, g]`; `teacher_features` likewise.
    chunk: as in `supervised`; the draft positions of a place stay together in one chunk.
    over_rows: as in `supervised`.
    alpha, restrict: as in `objectives.per_token`.
    frozen_head: as in `totals`.
  """
  return totals(
      objective, functools.partial(objectives.per_token, objective, restrict=restrict),
      student_head, student_features, teacher_head, teacher_features, mask, chunk=chunk,
      alpha=alpha, over_rows=over_rows, frozen_head=frozen_head)


def logits(head: Head | None, features):
  """`head` of features `[b, t, d]` or `[b, t, g, d]`; without a head, what is given."""
  if head is None:
    return features
  return _taking(head)(features)


def _taking(head):
  """`head` of `[b, t, g, d]`, or `[b, t, d]`; most take all positions as `[b, t g, d]`."""
  if isinstance(head, (ByPosition, Sliding)):
    return head
  def whole(features):
    flat = features.reshape(features.shape[0], -1, features.shape[-1])
    return head(flat).reshape(*features.shape[:-1], -1)
  return whole


def totals(objective: objectives.Objective, per_token: PerToken, student_head: Head,
           student_features, reference_head: Head | None, reference, mask, *,
           chunk: int | None = None, alpha=None,
           over_rows: OverRows = lambda function: function,
           frozen_head: bool = False) -> objectives.Totals:
  """Of any loss by token: `per_token(student logits, reference_head(reference), mask, alpha)`.

  Args:
    objective: how tokens are pooled, and whether they need alpha.
    reference: features of the teacher; without `reference_head`, labels. Gets no gradient.
    frozen_head: whether the student's head is left as it is: it costs no gradient then.
  """
  rows = tuple(objectives.placed(objective, x, mask) for x in (
      _blank(student_features, mask), jax.lax.stop_gradient(reference), mask,
      objectives.token_weights(objective, mask)))
  if chunk is None:
    features, reference, mask_btg, weight_btg = rows
    loss_btg, overlap_btg = per_token(
        logits(student_head, features), logits(reference_head, reference), mask_btg, alpha)
    return objectives.pooled(objective, jnp.sum(loss_btg * weight_btg),
                             objectives.position_sums(overlap_btg, mask_btg), mask)

  def sums(student, fixed):
    """Loss, and overlap by position, by what is differentiated and what is not."""
    weights, features = student
    frozen, reference_weights, alpha, reference, mask_btg, weight_btg = fixed
    loss_btg, overlap_btg = per_token(
        bound(student_head, features, [*weights, *frozen]),
        bound(reference_head, reference, reference_weights), mask_btg, alpha)
    return jnp.sum(loss_btg * weight_btg), objectives.position_sums(overlap_btg, mask_btg)

  weights, frozen = opened(student_head, rows[0]), []
  if frozen_head:
    weights, frozen = frozen, jax.lax.stop_gradient(weights)
  reference_weights = jax.lax.stop_gradient(opened(reference_head, rows[1]))
  if objective.mixes_by_alpha and alpha is None:
    (_, overlap_g), _ = over_rows(functools.partial(_sums, sums, chunk))(
        *jax.lax.stop_gradient(((weights, frozen, reference_weights, 0.0), rows)))
    alpha = overlap_g / jnp.maximum(jnp.sum(rows[2], axis=(0, 1)), 1)
  found = _differentiable(sums, chunk, over_rows)(
      (weights, frozen, reference_weights, alpha), rows)
  return objectives.pooled(objective, *found, mask)


def opened(head, features):
  """The weights that `head` reads, in the order in which `bound` takes them."""
  return [] if head is None else _converted(head, features)[1]


def bound(head, features, weights):
  """`logits(head, features)`, of these weights in place of its own."""
  if head is None:
    return features
  # For features of this shape, on the devices that see it: so asked for anew.
  return _converted(head, features)[0](features, *weights)


def _converted(head, features):
  function = _taking(head)
  return jax.closure_convert(lambda features: function(features), features)


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
  def of_chunk(rows):
    return sums((weights, rows[0]), (*fixed, *rows[1:]))
  return summed(of_chunk, split(rows, chunk)), None


def summed(function, chunks):
  """The sum of `function` over the leading axis of `chunks`."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(function, jax.tree.map(lambda x: x[0], chunks)))
  return jax.lax.scan(
      lambda found, rows: (jax.tree.map(jnp.add, found, function(rows)), None), zeros, chunks)[0]


def _sums_and_gradients(sums, chunk, whole, rows):
  """The same, with the loss's gradients: on the head, summed in float32, and on the features."""
  weights, *fixed = whole
  def body(carry, rows):
    features, *inputs = rows
    found, (on_weights, on_features) = jax.value_and_grad(sums, has_aux=True)(
        (weights, features), (*fixed, *inputs))
    return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), carry,
                        (found, on_weights)), on_features
  zeros = [jnp.zeros(weight.shape, jnp.float32) for weight in weights]
  nothing = jnp.zeros(()), jnp.zeros(rows[0].shape[2])
  found, on_features = jax.lax.scan(body, (nothing, zeros), split(rows, chunk))
  return found, joined(on_features, rows[0].shape[1])


def split(arrays, chunk):
  """`[b, t, g, ...]` to `[chunks, b, <= chunk / g, g, ...]`: of equal sizes, filled with zeros.

  Positions are split, not rows: these are spread over devices.
  """
  length, positions = arrays[0].shape[1:3]
  count = -(-length // max(chunk // positions, 1))
  size = -(-length // count)
  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], count, size, *x.shape[2:]), 0, 1)
  return jax.tree.map(cut, arrays)


def joined(x, length):
  """The inverse for one array, less what was filled in."""
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _blank(features, mask):
  """Zeroes unsupervised features: a NaN there must not reach the head's gradient either."""
  return jnp.where(mask[..., None] > 0, features, 0)
