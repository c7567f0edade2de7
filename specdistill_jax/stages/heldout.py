"""What is measured on held-out rows while a model trains, with the real decoder.

A draft whose training loss looks fine and that is rarely accepted is the most frequent
complaint about draft trainers: so the speculative sampler runs during training.
"""

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
from specdistill_jax.losses import blocks
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.training import laws
from specdistill_jax.training import rollouts
from specdistill_jax.training import step as step_lib

GAMMA = 5
TEMPERATURE = 1.0

_losses = jax.jit(step_lib.losses, static_argnums=0, static_argnames='chunk')
_figures = jax.jit(laws.measure, static_argnames=('temperature', 'chunk'))
_rollout = jax.jit(rollouts.generate, static_argnames='rollout')


class HeldOut:
  """A fixed batch of held-out rows, and the target's own continuations of their prompts."""

  def __init__(self, directory: pathlib.Path, mesh: Mesh, *, batch_size: int, seed: int,
               teacher: base.Model | None, max_new_tokens: int, head_chunk: int | None = None,
               objective: objectives.Objective = objectives.Objective()):
    """
    Args:
      directory: of the shards that have a `validation` split.
      teacher: measured against, if there is one.
      max_new_tokens: of the continuations.
      head_chunk: positions of a row whose logits are there at a time; None: all.
      objective: at whose temperature both laws are looked at.
    """
    rows = shards.rows(directory, 'validation')
    order = np.random.default_rng(seed).permutation(len(rows))[:batch_size]
    chosen = [rows[int(index)] for index in order]
    width = shards.read_metadata(directory, 'validation')['max_length']
    self._mesh, self._teacher, self._max_new_tokens = mesh, teacher, max_new_tokens
    self._chunk, self._objective = head_chunk, objective
    self._key = jax.random.key(seed)
    self._batch = self._put(records.collate(
        chosen, width, 'validation', records.widths(chosen)))
    if teacher is not None:
      self._prompts = [row.tokens[:row.prompt_length].tolist() for row in chosen]
      self._continued = self._put(self._continue_prompts())

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
    totals = _losses(supervised, module, None, self._batch, chunk=self._chunk)
    figures = dict(validation_cross_entropy=float(totals.loss))
    if self._teacher is None:
      return figures
    stats = sharding.fetch(api.speculate(
        self._teacher, student, self._prompts, gamma=GAMMA, temperature=TEMPERATURE,
        max_new_tokens=self._max_new_tokens, key=self._key).stats)
    reached_g, accepted_g = stats.reached_bg.sum(0), stats.accepted_bg.sum(0)
    return figures | self._by_position(module, student.module) | dict(
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

  def _continue_prompts(self) -> structs.Batch:
    generated = sharding.fetch(api.generate(
        self._teacher, self._prompts, max_new_tokens=self._max_new_tokens,
        temperature=TEMPERATURE, key=self._key))
    rows = []
    for prompt, tokens, length in zip(self._prompts, generated.tokens, generated.lengths):
      mask = [0] * len(prompt) + [1] * int(length)
      rows.append(records.Row(
          np.concatenate([prompt, tokens[:length]]).astype(np.int32), len(prompt),
          np.array(mask, np.uint8), '', ''))
    return records.collate(rows, max(len(row.tokens) for row in rows), 'validation',
                           records.widths(rows))

  def _put(self, batch):
    fits = batch.tokens_bt.shape[0] % sharding.rows_per_step(self._mesh) == 0
    layout = sharding.batch_sharding if fits else sharding.replicated
    return sharding.put(batch, layout(self._mesh))


def rollout_seconds(student: Any, batch: structs.Batch, key: jax.Array,
                    rollout: rollouts.Rollout) -> float:
  """Seconds that sampling one batch takes alone, compiled before."""
  jax.block_until_ready(_rollout(student, batch, key, rollout=rollout))
  started = time.perf_counter()
  jax.block_until_ready(_rollout(student, batch, key, rollout=rollout))
  return time.perf_counter() - started
