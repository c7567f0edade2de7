"""Where training figures go: `metrics.jsonl` and TensorBoard always, and the terminal."""

from collections.abc import Iterator
import contextlib
import json
import math
import operator
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
from rich import progress
import tensorboardX

from specdistill_jax import processes
from specdistill_jax import storage
from specdistill_jax.training import preemption

METRICS_FILE = 'metrics.jsonl'
# Outside a terminal: a line so often at least, and no oftener but for evaluations.
_MOST_QUIET_SECONDS, _LEAST_QUIET_SECONDS = 60.0, 10.0
_TOLD_WAIT = 0.01  # of the time, for data


class Writer:
  """Writes one line a logged step. A context manager.

  In a terminal a progress bar shows the newest figures; otherwise lines are printed: the first
  logged step, evaluations, every tenth of a run, and by time. Of several processes only the
  first writes anything.
  """

  def __init__(self, workdir: pathlib.Path, stage: str, run: str, *, first_step: int,
               steps: int):
    """Drops what an interrupted run wrote after `first_step`, where this one goes on.

    With `first_step` 0 it starts anew, and writes figures of step 0 itself.
    """
    self._labels = dict(stage=stage, run=run)
    self._steps = steps
    self._print_from = first_step
    self._shown_at = time.perf_counter()  # the last line; as yet, the start
    self._first_done = None  # when the first step was, and which
    self._has_written = False
    self._active = processes.is_first()
    if not self._active:
      return
    self._path = workdir / METRICS_FILE
    drop_after(self._path, first_step if first_step else -1, **self._labels)
    self._lines = storage.Lines(self._path)
    self._events_at = workdir / 'tensorboard' / run
    self._open = contextlib.ExitStack()
    self._folder = self._open.enter_context(storage.filled(self._events_at))
    self._events = tensorboardX.SummaryWriter(
        str(self._folder), purge_step=first_step + 1 if first_step else 0)
    self._bar = None
    if sys.stdout.isatty():
      self._bar = progress.Progress(
          '{task.description}', progress.BarColumn(), progress.MofNCompleteColumn(),
          progress.TimeRemainingColumn(), '{task.fields[figures]}')
      self._bar.start()
      self._task = self._bar.add_task(run, total=steps, completed=first_step, figures='')

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    if self._active:
      self._events.close()
      if kind is None or not issubclass(kind, preemption.Superseded):  # a bucket takes whole files
        self._lines.sync()
        self._open.close()
      if self._bar is not None:
        self._bar.stop()

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._active and self._bar is not None:
      self._bar.update(self._task, completed=step)

  def write(self, step: int, *, seconds_per_step: float | None = None, **figures: Any) -> None:
    """Writes the figures of a step: floats, or lists of floats. NaN is written as null.

    `seconds_per_step`, of the steps since the last line, is shown only.
    """
    if not self._active:
      return
    figures = {name: _plain(value) for name, value in figures.items()}
    line = json.dumps(self._labels | dict(step=step) | figures) + '\n'
    self._lines.append(line)
    for name, value in figures.items():
      values = {f'{name}/{i}': x for i, x in enumerate(value)} if isinstance(
          value, list) else {name: value}
      for tag, x in values.items():
        if x is not None:
          self._events.add_scalar(tag, x, step)
    self._see(step)
    if self._bar is not None or self._is_due(step, figures):
      self._show(step, seconds_per_step, figures)
    self._has_written |= step > 0

  def tell(self, step: int, *, seconds_per_step: float | None = None, **figures: Any) -> None:
    """Shows a step that is not written, where nothing was shown for long."""
    if not self._active:
      return
    self._see(step)
    if self._bar is None and self._quiet() >= _MOST_QUIET_SECONDS:
      self._show(step, seconds_per_step, {name: _plain(value) for name, value in figures.items()})

  def sync(self) -> None:
    """Returns when all lines are safe: before the checkpoint that stands on them."""
    if self._active:
      self._lines.sync()
      self._events.flush()
      storage.put(self._folder, self._events_at)

  def _see(self, step):
    if self._first_done is None and step > 0:
      self._first_done = time.perf_counter(), step

  def _quiet(self):
    """Seconds since the last line."""
    return time.perf_counter() - self._shown_at

  def _is_due(self, step, figures):
    """Whether a step that is written is shown as a line too."""
    is_first = step > 0 and not self._has_written
    is_evaluated = any(name.startswith('validation_') for name in figures)
    if is_first or is_evaluated or step in (0, self._steps):
      return True
    return self._quiet() >= (
        _LEAST_QUIET_SECONDS if step >= self._print_from else _MOST_QUIET_SECONDS)

  def _show(self, step, seconds_per_step, figures):
    words = [f'{name} {figures[name]:.4g}' for name in (
        'loss', 'alpha', 'tokens_per_second', 'validation_cross_entropy', 'validation_alpha',
        'block_efficiency') if figures.get(name) is not None]
    if (share := figures.get('data_wait_share') or 0.0) >= _TOLD_WAIT:
      words.append(f'{share:.0%} waiting for data')
    if seconds_per_step is not None:
      words.append(f'{seconds_per_step:.3g} s a step')
    if (peak := _peak_gib()) is not None:
      words.append(f'peak {peak:.1f} GiB a device')
    if self._bar is not None:
      self._bar.update(self._task, figures='  '.join(words))
      return
    if (left := self._seconds_left(step, seconds_per_step)) is not None:
      words.append(f'{_duration(left)} left')
    print(f'  {self._labels["run"]}  {step}/{self._steps}  {"  ".join(words)}', flush=True)
    self._shown_at = time.perf_counter()
    self._print_from = step + max(1, self._steps // 10)

  def _seconds_left(self, step, seconds_per_step):
    """At the pace so far, evaluations and checkpoints included; None where that isn't known."""
    if self._first_done is None or step == self._steps:
      return None
    at, first = self._first_done
    if step > first:
      seconds_per_step = (time.perf_counter() - at) / (step - first)
    return None if seconds_per_step is None else seconds_per_step * (self._steps - step)


def _peak_gib() -> float | None:
  """The most memory that one of this process's devices has held; None where they don't tell."""
  try:
    found = [device.memory_stats() or {} for device in jax.local_devices()]
  except jax.errors.JaxRuntimeError:  # a backend without this
    return None
  return max((one.get('peak_bytes_in_use', 0) for one in found), default=0) / 2**30 or None


def _duration(seconds: float) -> str:
  """'40 s', '12 min', '5 h 3 min', '2 d 7 h'."""
  if seconds < 60:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 60:
    return f'{minutes} min'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours < 24 else f'{hours // 24} d {hours % 24} h'


def drop_after(path: pathlib.Path, step: int, **labels: str) -> None:
  """Removes the lines of `labels` past `step`, so that a resumed run has no step twice.

  A last line without its end was cut off by a kill, and goes too.
  """
  if not path.exists():
    return
  lines = path.read_bytes().decode('utf-8', 'replace').splitlines(keepends=True)
  def stays(number, line):
    if not line.endswith('\n'):
      return False
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{path}, line {number} is not JSON ({error}); remove the line') from error
    return row['step'] <= step or any(row[name] != label for name, label in labels.items())
  kept = [line for number, line in enumerate(lines, start=1) if stays(number, line)]
  if len(kept) < len(lines):
    storage.write(path, ''.join(kept))


def _plain(value):
  if value is None or isinstance(value, (str, int)):
    return value
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value]
  value = float(value)
  return value if math.isfinite(value) else None


class _Spent(NamedTuple):
  """What the steps of a stretch took, and waited for."""
  seconds: float = 0.0
  steps: int = 0
  tokens: float = 0.0
  waited: float = 0.0

  def __add__(self, other):
    return _Spent(*map(operator.add, self, other))

  def __sub__(self, other):
    return _Spent(*map(operator.sub, self, other))


class Meter:
  """Speed and the wait for data, over training alone, since the last line that was written.

  `add` is called when a step's figures have arrived. `pause` says that what comes next is
  not a step alone: compilation, evaluation, a checkpoint. `mark`: a line was written.
  `next_batch` stands for `next`.
  """

  def __init__(self):
    self._arrived = None
    self._total = self._marked = _Spent()

  def next_batch(self, data: Iterator[Any]) -> Any:
    """The next of `data`; the time that it took counts as waiting."""
    asked = time.perf_counter()
    batch = next(data)
    if self._arrived is not None:
      self._total += _Spent(waited=time.perf_counter() - asked)
    return batch

  def pause(self) -> None:
    self._arrived = None

  def mark(self) -> None:
    self._marked = self._total

  def add(self, num_tokens: float) -> None:
    now = time.perf_counter()
    if self._arrived is not None:
      self._total += _Spent(seconds=now - self._arrived, steps=1, tokens=num_tokens)
    self._arrived = now

  @property
  def tokens_per_second(self) -> float | None:
    spent = self._total - self._marked
    return spent.tokens / spent.seconds if spent.steps else None

  @property
  def seconds_per_step(self) -> float | None:
    spent = self._total - self._marked
    return spent.seconds / spent.steps if spent.steps else None

  @property
  def mean_seconds_per_step(self) -> float | None:
    """Since the start."""
    return self._total.seconds / self._total.steps if self._total.steps else None

  @property
  def data_wait_share(self) -> float | None:
    """Of the training time, what the host waited for batches.

    No less than the share that the device stands idle for want of data: it may still be at
    work on the step before.
    """
    spent = self._total - self._marked
    return spent.waited / spent.seconds if spent.steps else None
