"""A trace of some steps, for xprof, TensorBoard's profile plugin or ui.perfetto.dev.

`request` is for entry points; the first run that comes to the first of these steps is traced, and
the trace ends with it at the latest.
"""

from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any

import jax

from specdistill_jax import processes
from specdistill_jax import storage

FOLDER = 'profile'

_wanted: tuple[int, int] | None = None
_is_on = False
_folder = contextlib.ExitStack()


def request(first: int, last: int) -> None:
  """Asks for a trace of the steps from `first` to `last`, both included."""
  global _wanted
  if not 1 <= first <= last:
    raise ValueError(f'--profile_steps is {first},{last}; give the first and the last step, such '
                     'as 10,15')
  _wanted = first, last


def before(step: int, workdir: pathlib.Path) -> None:
  """Starts the trace where `step` is the first of it; every process traces its own devices."""
  global _is_on
  if _wanted is not None and not _is_on and step == _wanted[0]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # the loop's own calls would bury the device's
    folder = _folder.enter_context(storage.filled(workdir / FOLDER))
    jax.profiler.start_trace(str(folder), profiler_options=options)
    _is_on = True


def after(step: int, done: Any) -> None:
  """Ends the trace after its last step, once `done` is there."""
  if _is_on and step >= _wanted[1]:
    jax.block_until_ready(done)
    _end()


@contextlib.contextmanager
def run() -> Iterator[None]:
  """Ends a trace with the run that it is of, be its last step there or not."""
  try:
    yield
  finally:
    if _is_on:
      processes.say(f'the run ended before step {_wanted[1]}: the trace is of the steps from '
                    f'{_wanted[0]} on')
      _end()


def _end():
  global _is_on, _wanted
  _is_on, _wanted = False, None
  jax.profiler.stop_trace()
  _folder.close()
