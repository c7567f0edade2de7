"""On-policy data: continuations sampled from the current student, inside the training step.

DistillSpec, Algorithm A.2: one draw a step decides between fresh samples of the student and
rows of a fixed set (ground truth, or samples of the target stored before).
"""

import dataclasses

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import autoregressive
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How continuations are sampled. Hashable: static under jit.

  Attributes:
    sampling: temperature, top-k and top-p.
    max_new_tokens: tokens after the prompt, at most; the end token ends a row earlier.
    prompt_width: tokens of the longest prompt in the data.
    shortest_prompt: tokens of the shortest one; losses skip the positions that lie in every
      row's prompt.
    student_fraction: probability that a step trains on rollouts (lambda).
  """
  sampling: sampling_lib.Sampling
  max_new_tokens: int
  prompt_width: int
  shortest_prompt: int = 1
  student_fraction: float = 1.0

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(f'rollout.max_new_tokens is {self.max_new_tokens}, and must be at least 1')
    if not 1 <= self.shortest_prompt <= self.prompt_width:
      raise ValueError(f'prompts have {self.shortest_prompt} to {self.prompt_width} tokens: a '
                       'rollout needs prompts of at least 1 token')
    if not 0 <= self.student_fraction <= 1:
      raise ValueError(f'student_fraction is {self.student_fraction}, and must lie in [0, 1]')

  @property
  def is_mixture(self) -> bool:
    return self.student_fraction < 1

  @property
  def width(self) -> int:
    """Tokens of a row: prompt and continuation."""
    return self.prompt_width + self.max_new_tokens

  @property
  def first_supervised(self) -> int:
    """The first position whose logits can carry loss, whatever the row."""
    return 0 if self.is_mixture else self.shortest_prompt - 1


def generate(model, batch: structs.Batch, key: jax.Array, rollout: Rollout) -> structs.Batch:
  """Continues the prompts of `batch` by samples of `model`, without gradient.

  Args:
    model: a module with `unstacked` and `init_cache`, otherwise a `structs.TargetFn`.
    key: one key, folded with each row's index, or one key a row.

  Returns:
    Rows of `rollout.width` tokens; the loss mask covers the sampled tokens, the end token
    included.
  """
  model = jax.lax.stop_gradient(model).unstacked()
  b = batch.tokens_bt.shape[0]
  slots = state_lib.num_slots(rollout.prompt_width, rollout.max_new_tokens, 0)
  state = autoregressive.generate(
      model, model.init_cache(b, slots), batch.tokens_bt[:, :rollout.prompt_width],
      batch.prompt_lengths_b, key, sampling=rollout.sampling,
      max_new_tokens=rollout.max_new_tokens, eos_id=state_lib.end_ids(model))
  position_t = jnp.arange(rollout.width)[None]
  is_sampled_bt = ((position_t >= batch.prompt_lengths_b[:, None])
                   & (position_t < state.lengths_b[:, None]))
  return structs.Batch(
      tokens_bt=state.tokens_bs[:, :rollout.width],
      loss_mask_bt=is_sampled_bt.astype(jnp.float32),
      prompt_lengths_b=batch.prompt_lengths_b, lengths_b=state.lengths_b)


def mix(student, batch: structs.Batch, key: jax.Array, rollout: Rollout
        ) -> tuple[structs.Batch, jax.Array]:
  """Rollouts of the student with probability `student_fraction`, else `batch` as it is.

  Returns the rows to train on, padded to one width in a mixture, and whether they are the
  student's (bool scalar).
  """
  draw_key, sample_key = jax.random.split(key)
  if not rollout.is_mixture:
    return generate(student, batch, sample_key, rollout), jnp.ones((), bool)
  width = max(rollout.width, batch.tokens_bt.shape[1])
  is_student = jax.random.uniform(draw_key) < rollout.student_fraction
  mixed = jax.lax.cond(
      is_student,
      lambda: _pad(generate(student, batch, sample_key, rollout), width),
      lambda: _pad(batch, width))
  return mixed, is_student


def _pad(batch: structs.Batch, width: int) -> structs.Batch:
  missing = width - batch.tokens_bt.shape[1]
  return batch.replace(
      tokens_bt=jnp.pad(batch.tokens_bt, ((0, 0), (0, missing)),
                        constant_values=structs.PAD_ID),
      loss_mask_bt=jnp.pad(batch.loss_mask_bt, ((0, 0), (0, missing))))
