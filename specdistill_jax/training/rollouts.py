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


# Of what is decoded beside a training's state: caches of more rows, or of longer ones, may not fit.
_HELD_OUT_ROWS, _HELD_OUT_TOKENS, _HELD_OUT_SLOTS = 64, 128, 16_384
HELD_OUT_GAMMA = 5


def held_out_rows(batch_size: int, ways: int, prompt_width: int) -> int:
  """Held-out rows of a run: at most those of a step, and a multiple of the mesh's `ways`."""
  most = min(_HELD_OUT_ROWS, _HELD_OUT_SLOTS // (prompt_width + _HELD_OUT_TOKENS))
  return min(batch_size, max(most // ways, 1) * ways)


def held_out(prompt_width: int, max_new_tokens: int) -> Rollout:
  """How held-out prompts are continued while a model trains."""
  return Rollout(sampling_lib.Sampling(1.0), min(max_new_tokens, _HELD_OUT_TOKENS), prompt_width)


def generate(model, batch: structs.Batch, key: jax.Array, rollout: Rollout) -> structs.Batch:
  """Continues the prompts of `batch` by samples of `model`, without gradient.

  Args:
    model: a module with `unstacked`, otherwise a `structs.Decodable`.
    key: one key, folded with each row's index, or one key a row.

  Returns:
    Rows of `rollout.width` tokens; the loss mask covers the sampled tokens, the end token
    included.
  """
  model = jax.lax.stop_gradient(model).unstacked()
  state = autoregressive.generate(
      model, batch.tokens_bt[:, :rollout.prompt_width], batch.prompt_lengths_b, key,
      sampling=rollout.sampling, max_new_tokens=rollout.max_new_tokens,
      eos_id=state_lib.end_ids(model))
  begin_b = batch.prompt_lengths_b[:, None]
  lengths_b = batch.prompt_lengths_b + state.stats.emitted_b
  position_t = jnp.arange(rollout.width)[None]
  is_sampled_bt = (position_t >= begin_b) & (position_t < lengths_b[:, None])
  sampled_bt = jnp.take_along_axis(
      state_lib.new_tokens(state, rollout.max_new_tokens),
      jnp.clip(position_t - begin_b, 0, rollout.max_new_tokens - 1), axis=1)
  prompts_bt = _to_width(batch.tokens_bt[:, :rollout.prompt_width], rollout.width,
                         structs.PAD_ID)
  prompts_bt = jnp.where(position_t < begin_b, prompts_bt, structs.PAD_ID)
  return structs.Batch(
      tokens_bt=jnp.where(is_sampled_bt, sampled_bt, prompts_bt),
      loss_mask_bt=is_sampled_bt.astype(jnp.float32),
      prompt_lengths_b=batch.prompt_lengths_b, lengths_b=lengths_b,
      widths=structs.Widths(rollout.prompt_width, rollout.max_new_tokens))


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
  stored = batch.widths
  widths = stored and structs.Widths(max(stored.prompt, rollout.prompt_width),
                                     max(stored.completion, rollout.max_new_tokens))
  is_student = jax.random.uniform(draw_key) < rollout.student_fraction
  mixed = jax.lax.cond(
      is_student,
      lambda: _pad(generate(student, batch, sample_key, rollout), width, widths),
      lambda: _pad(batch, width, widths))
  return mixed, is_student


def _pad(batch: structs.Batch, width: int, widths: structs.Widths | None) -> structs.Batch:
  return batch.replace(tokens_bt=_to_width(batch.tokens_bt, width, structs.PAD_ID),
                       loss_mask_bt=_to_width(batch.loss_mask_bt, width, 0), widths=widths)


def _to_width(x_bt: jax.Array, width: int, fill: int) -> jax.Array:
  return jnp.pad(x_bt, ((0, 0), (0, width - x_bt.shape[1])), constant_values=fill)
