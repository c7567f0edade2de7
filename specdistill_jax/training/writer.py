"""Where training figures go: `metrics.jsonl` and TensorBoard always, and the terminal."""

from collections.abc import Iterator
import contextlib
import json
import math
import pathlib
import sys
import time
from typing import Any

from rich import progress
import tensorboardX

from specdistill_jax import processes
from specdistill_jax import storage

METRICS_FILE = 'metrics.jsonl'


class Writer:
  """Writes one line a logged step. A context manager.

  In a terminal a progress bar shows the newest figures; otherwise lines are printed, a few
  for a run. Of several processes only the first writes anything.
  """

  def __init__(self, workdir: pathlib.Path, stage: str, run: str, *, first_step: int,
               steps: int):
    """Drops what an interrupted run wrote after `first_step`, where this one goes on.

    With `first_step` 0 it starts anew, and writes figures of step 0 itself.
    """
    self._labels = dict(stage=stage, run=run)
    self._steps = steps
    self._print_from = first_step
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

  def __exit__(self, *_) -> None:
    if self._active:
      self._lines.sync()
      self._events.close()
      self._open.close()
      if self._bar is not None:
        self._bar.stop()

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._active and self._bar is not None:
      self._bar.update(self._task, completed=step)

  def write(self, step: int, **figures: Any) -> None:
    """Writes the figures of a step: floats, or lists of floats. NaN is written as null."""
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
    self._show(step, figures)

  def sync(self) -> None:
    """Returns when all lines are safe: before the checkpoint that stands on them."""
    if self._active:
      self._lines.sync()
      self._events.flush()
      storage.put(self._folder, self._events_at)

  def _show(self, step, figures):
    shown = '  '.join(f'{name} {figures[name]:.4g}' for name in (
        'loss', 'alpha', 'tokens_per_second', 'data_wait_share', 'validation_cross_entropy',
        'validation_alpha', 'block_efficiency') if figures.get(name) is not None)
    if self._bar is not None:
      self._bar.update(self._task, figures=shown)
    elif step >= self._print_from or step == self._steps:
      print(f'  {self._labels["run"]}  {step}/{self._steps}  {shown}', flush=True)
      self._print_from = step + max(1, self._steps // 10)


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


class Meter:
  """Steps and tokens per second since the start, over training alone, and the wait for data.

  `add` is called when a step's figures have arrived. `pause` says that what comes next is
  not a step alone: compilation, evaluation, a checkpoint. `next_batch` stands for `next`.
  """

  def __init__(self):
    self._arrived = None
    self._seconds, self._steps, self._tokens, self._waited = 0., 0, 0., 0.

  def next_batch(self, data: Iterator[Any]) -> Any:
    """The next of `data`; the time that it took counts as waiting."""
    asked = time.perf_counter()
    batch = next(data)
    if self._arrived is not None:
      self._waited += time.perf_counter() - asked
    return batch

  def pause(self) -> None:
    self._arrived = None

  def add(self, num_tokens: float) -> None:
    now = time.perf_counter()
    if self._arrived is not None:
      self._seconds += now - self._arrived
      self._steps += 1
      self._tokens += num_tokens
    self._arrived = now

  @property
  def tokens_per_second(self) -> float | None:
    return self._tokens / self._seconds if self._steps else None

  @property
  def seconds_per_step(self) -> float | None:
    return self._seconds / self._steps if self._steps else None

  @property
  def data_wait_share(self) -> float | None:
    """Of the training time, what the host waited for batches.

    No less than the share that the device stands idle for want of data: it may still be at
    work on the step before.
    """
    return self._waited / self._seconds if self._steps else None
