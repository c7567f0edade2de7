"""What is measured on held-out rows while a model trains, with the real decoder.

A draft whose training loss looks fine and that is rarely accepted is the most frequent
complaint about draft trainers: so the speculative sampler runs during training.
"""

import contextlib
import functools
import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from specdistill_jax import api
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.data import records
from specdistill_jax.data import shards
from specdistill_jax.decoding import rules
from specdistill_jax.drafters import built
from specdistill_jax.losses import blocks
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.training import laws
from specdistill_jax.training import rollouts
from specdistill_jax.training import step as step_lib

GAMMA = rollouts.HELD_OUT_GAMMA

_losses = jax.jit(step_lib.losses, static_argnums=0, static_argnames='chunk')
_figures = jax.jit(laws.measure, static_argnames=('temperature', 'chunk'))
_continue = jax.jit(rollouts.generate, static_argnames='rollout')


@functools.partial(jax.jit, static_argnames=('gamma', 'rollout'))
def contest(teacher, student, batch: structs.Batch, key: jax.Array, *, gamma: int,
            rollout: rollouts.Rollout) -> structs.DecodeStats:
  """The prompts of `batch` decoded speculatively, chains of `gamma`: how much was kept."""
  return built.speculate(
      teacher, student, batch.tokens_bt[:, :rollout.prompt_width], batch.prompt_lengths_b, key,
      shape=gamma, rule=rules.Exact(), sampling=rollout.sampling,
      max_new_tokens=rollout.max_new_tokens).stats


class HeldOut:
  """A fixed batch of held-out rows, and the target's own continuations of their prompts."""

  def __init__(self, directory: pathlib.Path, mesh: Mesh, *, batch_size: int, seed: int,
               teacher: base.Model | None, max_new_tokens: int, tensor: int | None = None,
               head_chunk: int | None = None,
               objective: objectives.Objective = objectives.Objective()):
    """
    Args:
      directory: of the shards that have a `validation` split.
      mesh: of training.
      batch_size: rows of a step; of them, and of new tokens, no more are taken than may fit.
      teacher: measured against, if there is one.
      max_new_tokens: of the continuations.
      tensor: devices that share a model's heads while decoding; None: as in training; 0: nothing
        is decoded, and figures of both laws are those on the held-out rows.
      head_chunk: positions of a row whose logits are there at a time; None: all.
      objective: at whose temperature both laws are looked at.
    """
    rows, metadata = (read(directory, 'validation') for read in (shards.rows, shards.read_metadata))
    batch_size = rollouts.held_out_rows(batch_size, sharding.rows_per_step(mesh),
                                        metadata['longest_prompt'])
    order = np.random.default_rng(seed).permutation(len(rows))[:batch_size]
    chosen = [rows[int(index)] for index in order]
    self._mesh, self._teacher, self._tensor = mesh, teacher, tensor
    self._chunk, self._objective = head_chunk, objective
    self._key = jax.random.key(seed)
    self._rows = records.collate(chosen, metadata['max_length'], 'validation',
                                 records.widths(chosen))
    self._batch = self._continued = self._put(self._rows, mesh)
    if teacher is not None and tensor != 0:
      self._rollout = rollouts.held_out(max(row.prompt_length for row in chosen), max_new_tokens)
      with self._decoding() as (mesh, laid_out):
        continued = sharding.fetch(_continue(
            laid_out(teacher.module), self._put(self._rows, mesh), self._key,
            rollout=self._rollout))
      self._continued = self._put(continued, self._mesh)

  def measure(self, student: base.Model) -> dict[str, Any]:
    """Cross-entropy on the rows; with a teacher also alpha, and acceptance when sampling.

    `validation_alpha` is the overlap on continuations drawn from the target; block efficiency
    and acceptance by position come from the speculative sampler at temperature 1. Figures of
    both laws by draft position are at the loss's temperature, on the same continuations;
    `simulated_block_efficiency` is what their overlaps would give, were positions independent.
    """
    supervised = objectives.Objective(normalisation='token')
    module = student.module
    if self._teacher is not None:
      module = api.on_given_text(self._teacher, student)
    with jax.set_mesh(self._mesh):  # what activations are laid out on
      totals = _losses(supervised, module, None, self._batch, chunk=self._chunk)
      figures = dict(validation_cross_entropy=float(totals.loss))
      if self._teacher is None:
        return figures
      figures |= self._by_position(module, student.module)
    if self._tensor == 0:
      return figures
    with self._decoding() as (mesh, laid_out):
      stats = sharding.fetch(contest(
          laid_out(self._teacher.module), laid_out(student.module),
          self._put(self._rows, mesh), self._key, gamma=GAMMA, rollout=self._rollout))
    reached_g, accepted_g = stats.reached_bg.sum(0), stats.accepted_bg.sum(0)
    return figures | dict(
        block_efficiency=float(stats.emitted_b.sum() / stats.target_calls_b.sum()),
        acceptance_by_position=[
            float(accepted / reached) if reached else None
            for accepted, reached in zip(accepted_g, reached_g)])

  def _by_position(self, module, unrolled) -> dict[str, Any]:
    """Both laws on the target's continuations; of a draft that is unrolled, at each position."""
    look = lambda module: _figures(
        module, self._teacher.module, self._continued, chunk=self._chunk,
        temperature=self._objective.temperature).means()
    found = look(module)
    alone = dict(validation_alpha=float(found.alpha[0]))
    if module is not unrolled:
      found = look(unrolled)
    alphas = found.alpha if len(found.alpha) > 1 else found.alpha.repeat(GAMMA)
    mixture = self._objective.mixture(found.alpha)
    return alone | dict(
        simulated_block_efficiency=float(blocks.simulated_block_efficiency(alphas)),
        kl_weight_by_position=None if mixture is None else mixture.tolist(),
        **{f'{name}_by_position': getattr(found, name).tolist() for name in (
            'alpha', 'agreement', 'kl', 'tvd', 'student_entropy', 'teacher_entropy')})

  @contextlib.contextmanager
  def _decoding(self):
    """The mesh that decodes, as the one in context, and how a module gets onto it."""
    mesh = sharding.regrouped(self._mesh, self._tensor)
    laid_out = functools.partial(sharding.laid_out, mesh=mesh)
    with jax.set_mesh(mesh):
      yield mesh, laid_out if self._tensor is not None else lambda module: module

  def _put(self, batch, mesh):
    fits = batch.tokens_bt.shape[0] % sharding.rows_per_step(mesh) == 0
    layout = sharding.batch_sharding if fits else sharding.replicated
    return sharding.put(batch, layout(mesh))


@functools.partial(jax.jit, static_argnames=('rollout', 'dtype', 'mesh', 'layout'))
def _rollout(params, batch, key, *, rollout, dtype, mesh, layout):
  student = step_lib.for_rollout(sharding.matrices_in(params, dtype), mesh, layout)
  return rollouts.generate(student, batch, key, rollout)


def rollout_seconds(params: Any, batch: structs.Batch, key: jax.Array, *,
                    rollout: rollouts.Rollout, dtype: str, mesh: Mesh, layout: str) -> float:
  """Seconds that the rollout of a step takes alone, compiled before.

  Args:
    params: of the student, as training holds them, laid out as `layout`.
    dtype: in which the step reads them.
  """
  with jax.set_mesh(mesh):
    sample = lambda: jax.block_until_ready(_rollout(
        params, batch, key, rollout=rollout, dtype=dtype, mesh=mesh, layout=layout))
    sample()
    started = time.perf_counter()
    sample()
    return time.perf_counter() - started
