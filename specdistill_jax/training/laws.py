"""What of a student and its teacher is compared, whichever kind of draft the student is.

A standalone draft gives one law a token, a feature-level draft one for each of its unrolled
steps. From here on both are heads and features, as the losses take them.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import row_sharding
from specdistill_jax import structs
from specdistill_jax.losses import chunked
from specdistill_jax.losses import figures
from specdistill_jax.losses import selection


@struct.dataclass
class Guided:
  """In place of a teacher: with the draft that was distilled before, for selective objectives.

  Attributes:
    teacher: the frozen target.
    reference: of the student's kind and size, see `losses.selection`.
  """
  teacher: Any
  reference: Any


def compared(student, teacher, batch: structs.Batch, *, first: int = 0,
             key=None) -> dict[str, Any]:
  """Arguments of `chunked.distillation`, but for the objective and how it is to be computed.

  Args:
    student, teacher: as in `step.losses`.
    first: positions of a row before it carry no loss.
    key: of dropout, or of a feature-level draft's noise; None: none.
  """
  teacher = jax.lax.stop_gradient(teacher)
  if hasattr(student, 'unroll'):
    steps = student.unroll(teacher, batch, key)
    stacked = lambda name: jnp.stack([getattr(step, name) for step in steps], axis=2)
    student_head, teacher_head = heads(student, teacher)
    return dict(
        student_head=student_head, student_features=stacked('read_btd'),
        teacher_head=teacher_head, teacher_features=stacked('taught_btd'),
        mask=stacked('mask_bt'), restrict=student.restrict,
        frozen_head=student.loss_settings.get('frozen_head', False))
  learnt = student.supervise(batch, first=first, dropout_key=key)
  return dict(
      student_head=student.logits, student_features=learnt.features_btd,
      teacher_head=teacher.logits,
      teacher_features=teacher.supervise(batch, first=first).features_btd, mask=learnt.mask_bt)


def heads(student, teacher) -> tuple[Any, Any]:
  """Of a feature-level draft and its target, for the stacked steps of `unroll`."""
  if getattr(student, 'head_by_position', False):
    own = chunked.ByPosition(lambda read_btgd: student.heads(read_btgd, teacher))
  else:
    own = lambda read_btd: student.head(read_btd, teacher)
  return own, chunked.Sliding(teacher.logits)


def select(found: dict[str, Any], guided: Guided, batch: structs.Batch, *, keep: float,
           temperature: float, first: int = 0, chunk: int | None = None) -> dict[str, Any]:
  """What `compared` found, with a mask of the tokens that are worth learning (AdaSPEC)."""
  reference = jax.lax.stop_gradient(guided.reference)
  other = compared(reference, guided.teacher, batch, first=first)
  mask = selection.selected(
      found['student_head'], found['student_features'], other['student_head'],
      other['student_features'], found['teacher_head'], found['teacher_features'], found['mask'],
      keep=keep, temperature=temperature, chunk=chunk, over_rows=row_sharding.over_rows,
      restrict=found.get('restrict') or (lambda logits: logits))
  return found | dict(mask=mask)


def measure(student, teacher, batch: structs.Batch, *, temperature: float = 1.0,
            chunk: int | None = None) -> figures.Figures:
  """Figures of both laws at each draft position, without dropout or noise."""
  found = compared(student, teacher, batch)
  found.pop('frozen_head', None)
  return figures.measured(**found, temperature=temperature, chunk=chunk,
                          over_rows=row_sharding.over_rows)
