"""Optimizer, schedule and training state, from a `train` section of a config.

`settings` below is such a section (`configs/common.py:train`), or anything with its fields.
"""

from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import optax

from specdistill_jax import sharding

OPTIMIZERS = ('adamw', 'adafactor')
SCHEDULES = ('cosine', 'linear', 'constant', 'plateau_cosine')


@struct.dataclass
class TrainState:
  """All that training changes; with the seed and the data position, all that resuming needs.

  Attributes:
    step: int32, updates done.
    params: the student, a module that is a pytree of its parameters: float32 masters, whatever
      dtype the passes read.
    opt_state: the optimizer's state.
  """
  step: jax.Array
  params: Any
  opt_state: Any


def check(settings: Any, row_devices: int = 1) -> None:
  """Raises ValueError, with the value and what is legal, if the settings are impossible.

  Args:
    row_devices: devices over which the rows of a batch are spread.
  """
  at_least_one = ('steps', 'batch_size', 'accumulation', 'log_every', 'eval_every',
                  'checkpoint_every', 'keep_checkpoints')
  for name in at_least_one:
    _require(settings, name, settings[name] >= 1, 'at least 1')
  _require(settings, 'optimizer', settings.optimizer in OPTIMIZERS,
           f'one of {", ".join(OPTIMIZERS)}')
  _require(settings, 'schedule', settings.schedule in SCHEDULES,
           f'one of {", ".join(SCHEDULES)}')
  _require(settings, 'warmup_steps', 0 <= settings.warmup_steps <= settings.steps,
           f'between 0 and steps ({settings.steps})')
  if settings.schedule == 'plateau_cosine':
    _require(settings, 'warmup_steps', settings.warmup_steps <= settings.steps // 2,
             f'at most half of steps ({settings.steps}) under plateau_cosine')
  _require(settings, 'learning_rate', settings.learning_rate > 0, 'positive')
  _require(settings, 'clip_norm', settings.clip_norm is None or settings.clip_norm > 0,
           'positive, or None for no clipping')
  _require(settings, 'clip_value', settings.clip_value is None or settings.clip_value > 0,
           'positive, or None for no clipping')
  for name in ('b1', 'b2', 'dropout'):
    _require(settings, name, 0 <= settings[name] < 1, 'in [0, 1)')
  _require(settings, 'final_fraction', 0 <= settings.final_fraction <= 1, 'in [0, 1]')
  _require(settings, 'weight_decay', settings.weight_decay >= 0, 'at least 0')
  unit = settings.accumulation * row_devices
  _require(settings, 'batch_size', settings.batch_size % unit == 0,
           f'a multiple of accumulation x devices = {settings.accumulation} x {row_devices}')


def _require(settings, name, legal, what):
  if not legal:
    raise ValueError(f'train.{name} is {settings[name]!r}, and must be {what}')


def schedule(settings: Any) -> optax.Schedule:
  """Learning rate by step, counted from 0: linear warm-up, then the named decay.

  Step `warmup_steps` is the first at the peak, and the last step (`steps - 1`) has
  `final_fraction` of it. `plateau_cosine` is DistillSpec's: the peak until half of the steps,
  then a cosine.
  """
  kind, warmup, last = settings.schedule, settings.warmup_steps, settings.steps - 1
  begin = max(warmup, settings.steps // 2) if kind == 'plateau_cosine' else warmup

  def learning_rate(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - begin) / max(last - begin, 1), 0, 1)
    if kind == 'constant':
      remaining = jnp.ones_like(done)
    elif kind == 'linear':
      remaining = 1 - done
    else:
      remaining = 0.5 * (1 + jnp.cos(jnp.pi * done))
    decayed = settings.final_fraction + (1 - settings.final_fraction) * remaining
    return settings.learning_rate * jnp.minimum((step + 1) / (warmup + 1), 1) * decayed

  return learning_rate


def optimizer(settings: Any, objective: Any = None) -> optax.GradientTransformationExtraArgs:
  """AdamW or Adafactor, behind clips of each value and of the global norm, unless None.

  With an objective that is mixed by the overlap before, its state holds that (`overlap_before`).

  Adafactor runs as in T5 fine-tuning and DistillSpec: the learning rate is the schedule's
  alone, without relative step size and without scaling by the parameters; b1 and b2 are AdamW's.
  Weight decay is multiplied by the learning rate in both, and leaves norms and biases alone.
  """
  if settings.optimizer == 'adamw':
    rule = optax.adamw(schedule(settings), b1=settings.b1, b2=settings.b2,
                       weight_decay=settings.weight_decay, mask=_decayed)
  elif settings.optimizer == 'adafactor':
    rule = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(settings.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(schedule(settings)))
  else:
    raise ValueError(f'train.optimizer is {settings.optimizer!r}, and must be one of '
                     f'{", ".join(OPTIMIZERS)}')
  clips, memory = [], []
  if settings.clip_value is not None:
    clips.append(optax.clip(settings.clip_value))
  if settings.clip_norm is not None:
    clips.append(optax.clip_by_global_norm(settings.clip_norm))
  if objective is not None and objective.mixes_by_alpha and not objective.needs_alpha:
    memory.append(_remembered_overlap(objective.block))
  return optax.with_extra_args_support(
      optax.chain(*clips, rule, *memory) if clips or memory else rule)


class OverlapState(NamedTuple):
  """Mean overlap at each draft position in the update before; 0 before the first."""
  alpha_g: jax.Array


def _remembered_overlap(block: int) -> optax.GradientTransformationExtraArgs:
  """Changes no update and keeps `alpha_g` of each, here so that checkpoints hold it."""
  def init(params):
    return OverlapState(jnp.zeros(getattr(params, 'positions', block), jnp.float32))

  def update(updates, state, params=None, *, alpha_g, **extra):
    del state, params, extra
    return updates, OverlapState(alpha_g)

  return optax.GradientTransformationExtraArgs(init, update)


def overlap_before(opt_state: Any) -> jax.Array | None:
  """`[g]`, where the optimizer remembers it."""
  for leaf in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, OverlapState)):
    if isinstance(leaf, OverlapState):
      return leaf.alpha_g
  return None


def _decayed(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: sharding.is_matrix(path), params)


def create(params: Any, transformation: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(step=jnp.zeros((), jnp.int32), params=params,
                    opt_state=transformation.init(params))
