"""Being asked to stop: SIGTERM, Ctrl-C, or the maintenance notice of a Cloud TPU machine.

While a run trains, it saves at the next step on which all processes agree, and ends; elsewhere
nothing would be lost and it ends at once. Either way with `processes.EXIT_AGAIN`.

Nothing happens unless an entry point calls `watch`: a notebook keeps its own signal handlers.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
import time
import urllib.request

from specdistill_jax import processes

_POLL_SECONDS = 0.5
_METADATA_SECONDS = 10.0
_METADATA_PATHS = {'instance/maintenance-event': 'NONE', 'instance/preempted': 'FALSE'}
_KEY = 'specdistill/stop'


class Stopped(Exception):
  """The run was asked to stop; its state is saved."""


class Superseded(ValueError):
  """Another launch goes on with this run; nothing more is to be written."""


class Agreement:
  """The step before which all processes stop, once one of them was asked to.

  All processes call `asked` at every step. The one that is told says so to the others; each
  then holds its loop for a moment, says how many calls it is at, and stops at the first call
  that no process has made yet.
  """

  def __init__(self):
    self.told = threading.Event()
    self._lock = threading.Lock()
    self._calls = 0
    self._stop_at = None

  def asked(self) -> bool:
    """Whether to save and stop now: the same answer in every process."""
    with self._lock:
      self._calls += 1
      return self._stop_at is not None and self._calls >= self._stop_at

  def reach(self) -> None:
    """Waits until some process is told, then agrees with the others. For a thread."""
    if processes.count() == 1:
      self.told.wait()
      self._stop_at = 0
      return
    while not self.told.wait(_POLL_SECONDS):
      if (told := processes.look(_KEY)) is not None:
        _notice(told)
    processes.tell(_KEY, f'process {processes.index()} was asked to stop')
    with self._lock:  # until all have said where they are, this one must not go further
      processes.tell(f'{_KEY}/{processes.index()}', str(self._calls))
      self._stop_at = 1 + max(int(processes.wait_for(f'{_KEY}/{index}'))
                              for index in range(processes.count()))


_agreement: Agreement | None = None
_training = 0


def watch(*, second_ends: bool) -> None:
  """Takes over SIGTERM and Ctrl-C, and asks a Cloud TPU machine for notices.

  Ctrl-C is left as it is where it is ignored, as in a job of the background. The second one ends
  this process at once.

  Args:
    second_ends: whether a second SIGTERM does so too; not where a parent that passes it on does.
  """
  global _agreement
  if _agreement is not None:
    return
  _agreement = Agreement()
  # A handler would wait for Python's main thread, which may be compiling for minutes: the
  # number of a signal is written into a pipe at once, and read by a thread.
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.signal(signal.SIGTERM, lambda *_: None)
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _start(_listen, read, second_ends)
  _start(_agreement.reach)
  if host := os.environ.get('GCE_METADATA_IP') or _cloud_tpu_host():
    _start(_poll_metadata, host)


def _start(target, *args) -> None:
  threading.Thread(target=target, args=args, daemon=True).start()


def _cloud_tpu_host() -> str | None:
  """The metadata server, on a machine with TPU devices; None elsewhere: nobody is asked."""
  is_cloud_tpu = 'TPU_WORKER_ID' in os.environ or any(
      os.path.exists(f'/dev/{name}') for name in ('accel0', 'vfio/0'))
  return 'metadata.google.internal' if is_cloud_tpu else None


def _listen(read: int, second_ends: bool) -> None:
  names = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
  heard = []
  while True:
    for number in os.read(read, 64):
      if number in names:
        heard.append(number)
        if len(heard) > 1 and (second_ends or number == signal.SIGINT):
          os._exit(128 + number)
        _notice(names[number])


def _poll_metadata(host: str) -> None:
  """Asks for events of this machine, until there is a new one.

  One that stands when this process asks first has stopped an earlier attempt, and may stand for
  an hour: work goes on until the machine says SIGTERM.
  """
  known = {}
  while True:
    for path, nothing in _METADATA_PATHS.items():
      request = urllib.request.Request(f'http://{host}/computeMetadata/v1/{path}',
                                       headers={'Metadata-Flavor': 'Google'})
      try:
        with urllib.request.urlopen(request, timeout=5) as answer:
          event = answer.read().decode().strip()
      except OSError:
        continue  # no such server, or none that is well
      if event.upper() != nothing and known.get(path, event) != event:
        _notice(f'{path} {event}')
        return
      known[path] = event
    time.sleep(_METADATA_SECONDS)


def _notice(what: str) -> None:
  if _agreement.told.is_set():
    return
  doing = 'saving after this step' if _training else 'nothing to save here'
  print(f'{what}: {doing}, then exit status {processes.EXIT_AGAIN}', file=sys.stderr, flush=True)
  if not _training:
    os._exit(processes.EXIT_AGAIN)
  _agreement.told.set()


def asked() -> bool:
  """Whether to save and stop now; called once a step, by all processes alike."""
  return _agreement is not None and _agreement.asked()


@contextlib.contextmanager
def training() -> Iterator[None]:
  """Where being asked to stop means to save first."""
  global _training
  _training += 1
  try:
    yield
  finally:
    _training -= 1
  # Asked too late for another step: all is saved.
  if _agreement is not None and processes.agree('asked to stop', _agreement.told.is_set):
    raise Stopped('at the end of a run')
