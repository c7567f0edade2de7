"""The jitted update: rollouts, losses, gradients over micro-batches, optimizer.

One compiled program a run. Arrays are laid out by `sharding`; the state's layout is pinned on
the way out, since a second call with another layout would compile again.
"""

import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections
import optax

from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.losses import chunked
from specdistill_jax.losses import features
from specdistill_jax.losses import objectives
from specdistill_jax.training import laws
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as state_lib


@struct.dataclass
class Metrics:
  """Scalars of one update.

  Attributes:
    loss: nats, normalised as the objective says.
    alpha: mean overlap of student and teacher over the supervised tokens; NaN without one.
    grad_norm: global norm of the gradient before clipping.
    learning_rate: as applied.
    num_tokens: supervised tokens.
    on_policy: 1 if the rows were the student's own.
    alpha_g: the overlap at each draft position.
    kl_weight_g: weight of the KL at each, in `lk_hybrid`; NaN in other objectives.
  """
  loss: jax.Array
  alpha: jax.Array
  grad_norm: jax.Array
  learning_rate: jax.Array
  num_tokens: jax.Array
  on_policy: jax.Array
  alpha_g: jax.Array | None = None
  kl_weight_g: jax.Array | None = None


def losses(objective: objectives.Objective, student, teacher, batch: structs.Batch, *,
           dropout_key=None, first: int = 0, chunk: int | None = None,
           alpha=None) -> objectives.Totals:
  """Forward passes and loss sums; the teacher runs only where the objective reads it.

  Args:
    student: a module with `supervise` and `logits`; `teacher` likewise, of the same family. Or a
      feature-level draft, with `unroll`, whose noise is drawn from `dropout_key`. Of a
      selective objective a `laws.Guided` in place of the teacher.
    first: positions of a row before it carry no loss: their logits are not computed.
    chunk: positions of a row whose logits are there at a time; None: all.
    alpha: mean overlap over the rows that `batch` is a part of, by draft position, for an
      objective that `mixes_by_alpha`; None: the batch is no part.
  """
  guided, teacher = teacher, getattr(teacher, 'teacher', teacher)
  if objective.name == objectives.FEATURE:
    teacher = jax.lax.stop_gradient(teacher)
    return features.feature_loss(
        objective, student.unroll(teacher, batch, dropout_key),
        *laws.heads(student, teacher), student.restrict,
        chunk=chunk, over_rows=row_sharding.over_rows, **student.loss_settings)
  if not objective.needs_teacher:
    learnt = student.supervise(batch, first=first, dropout_key=dropout_key)
    return chunked.supervised(objective, student.logits, learnt.features_btd, learnt.labels_bt,
                              learnt.mask_bt, chunk=chunk, over_rows=row_sharding.over_rows)
  found = laws.compared(student, teacher, batch, first=first, key=dropout_key)
  if objective.keep < 1:
    found = laws.select(found, guided, batch, keep=objective.keep, first=first, chunk=chunk,
                        temperature=objective.temperature)
  return chunked.distillation(objective, **found, chunk=chunk, alpha=alpha,
                              over_rows=row_sharding.over_rows)


def gradients(objective: objectives.Objective, student, teacher, batch: structs.Batch,
              dropout_key, *, accumulation: int, first: int, mesh: Mesh,
              chunk: int | None = None, alpha=None):
  """Gradient of the whole batch's loss, and its totals, a micro-batch at a time.

  Loss sums are accumulated and divided once at the end, so any `accumulation` gives the
  gradient of the one large batch, however the supervised tokens fall. An objective that
  `needs_alpha` costs a forward pass of both models over all micro-batches before, unless
  `alpha` is given, as in `losses`.
  """
  def loss_sum(student, batch, key, alpha=None):
    totals = losses(objective, student, teacher, batch, dropout_key=key, first=first,
                    chunk=chunk, alpha=alpha)
    return totals.loss_sum, totals

  grad_fn = jax.grad(loss_sum, has_aux=True)
  if accumulation == 1:
    grads, totals = grad_fn(student, batch, dropout_key, alpha)
  else:
    keys = None if dropout_key is None else jax.random.split(dropout_key, accumulation)
    scanned = _micro_batches(batch, accumulation, mesh), keys
    add = lambda sums, found: (jax.tree.map(jnp.add, sums, found), None)
    one = jax.tree.map(lambda x: x[0], scanned)
    positions = jax.eval_shape(lambda: loss_sum(student, *one, alpha=0.0)[1].count_g).shape[0]
    no_totals = objectives.no_totals(positions)
    if objective.needs_alpha and alpha is None:
      alpha = jax.lax.scan(lambda sums, xs: add(sums, loss_sum(student, *xs, alpha=0.0)[1]),
                           no_totals, scanned)[0].alpha_g
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), student), no_totals
    (grads, totals), _ = jax.lax.scan(
        lambda sums, xs: add(sums, grad_fn(student, *xs, alpha=alpha)), zeros, scanned)
  return jax.tree.map(lambda g: g.astype(jnp.float32) / totals.weight, grads), totals


def _micro_batches(batch, accumulation, mesh):
  """`[b, ...]` to `[accumulation, b / accumulation, ...]`.

  Micro-batch i takes every accumulation-th row from i on, so that each device splits the rows
  that it already holds.
  """
  layout = NamedSharding(mesh, PartitionSpec(None, *sharding.batch_sharding(mesh).spec))
  def split(x):
    x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
    return jax.lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1), layout)
  return jax.tree.map(split, batch)


def for_rollout(student: Any, mesh: Mesh, layout: str) -> Any:
  """Weights as a rollout reads them, once a token: gathered over fsdp before, not in its loop."""
  return jax.lax.with_sharding_constraint(student, sharding.parameter_shardings(
      student, mesh, 'tensor' if layout == 'sharded' else layout))


def make(settings: Any, objective: objectives.Objective, rollout: rollouts.Rollout | None,
         mesh: Mesh, abstract_state: state_lib.TrainState,
         layout: str = sharding.DEFAULT_LAYOUT):
  """The jitted `update(state, teacher, batch, key) -> (state, Metrics)`; donates `state`.

  The passes and the rollout read a copy of the parameters in `settings.weights_dtype`, made
  here from the float32 masters that the optimizer changes: what travels between devices has
  that dtype. `layout` is that of the state (`sharding.LAYOUTS`); the teacher has its own.

  `key` is the run's; the step number is folded in, so that a resumed run draws the same
  dropout and rollouts. Equal arguments give the same compiled function: runs that differ in
  their seed alone share one compilation.
  """
  shardings = sharding.parameter_shardings(abstract_state, mesh, layout)
  leaves, treedef = jax.tree.flatten(shardings)
  frozen = ml_collections.FrozenConfigDict(dict(settings))
  return _make(frozen, objective, rollout, mesh, layout, tuple(leaves), treedef)


@functools.lru_cache(maxsize=8)
def _make(settings, objective, rollout, mesh, layout, sharding_leaves, treedef):
  transformation = state_lib.optimizer(settings, objective)
  schedule = state_lib.schedule(settings)

  def update(state, teacher, batch, key):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what `constrain` lays out on
      return _update(state, teacher, batch, key)

  def _update(state, teacher, batch, key):
    student = sharding.matrices_in(state.params, settings.weights_dtype)
    dropout_key, rollout_key = jax.random.split(jax.random.fold_in(key, state.step))
    on_policy = jnp.zeros((), bool)
    if rollout is not None:
      batch, on_policy = rollouts.mix(for_rollout(student, mesh, layout), batch, rollout_key,
                                      rollout)
    grads, totals = gradients(
        objective, student, teacher, batch,
        dropout_key if settings.dropout or hasattr(student, 'unroll') else None,
        accumulation=settings.accumulation, mesh=mesh, chunk=settings.head_chunk,
        alpha=state_lib.overlap_before(state.opt_state),
        first=0 if rollout is None else rollout.first_supervised)
    updates, opt_state = transformation.update(
        grads, state.opt_state, state.params, alpha_g=totals.alpha_g)
    metrics = Metrics(
        loss=totals.loss, alpha=totals.alpha if objective.needs_teacher else jnp.nan,
        grad_norm=optax.tree.norm(grads), learning_rate=schedule(state.step),
        num_tokens=totals.num_tokens, on_policy=on_policy, **_by_position(
            objective, totals, state_lib.overlap_before(state.opt_state)))
    params = optax.apply_updates(state.params, updates)
    return state_lib.TrainState(step=state.step + 1, params=params,
                                opt_state=opt_state), metrics

  pinned = jax.tree.unflatten(treedef, sharding_leaves)
  return jax.jit(update, donate_argnums=0,
                 out_shardings=(pinned, sharding.replicated(mesh)))


def _by_position(objective, totals, alpha_before):
  """Overlap, and what `lk_hybrid` made of it or of the overlap before."""
  unknown = jnp.full_like(totals.alpha_g, jnp.nan)
  mixed_by = totals.alpha_g if alpha_before is None else alpha_before
  weight = objective.mixture(mixed_by)
  return dict(alpha_g=totals.alpha_g if objective.needs_teacher else unknown,
              kl_weight_g=unknown if weight is None else weight)


def check_finite(metrics: Metrics, step: int) -> None:
  """Raises FloatingPointError, naming the step, if its loss or gradient is not finite."""
  for name in ('loss', 'grad_norm'):
    value = float(getattr(metrics, name))
    if not math.isfinite(value):
      raise FloatingPointError(
          f'{name} is {value} at step {step}, and must be finite: lower the learning rate, or '
          'look at the data of that step; the last checkpoint is from before it')
