"""One program on one process or on many: start, meet, agree, and end together.

Nothing here needs a device. On several processes (a TPU slice of many hosts, SLURM, or flags)
`supervised` runs the program in a child: JAX ends a process whose peers are gone by an abort in
C++, which no Python code sees, and a parent that survives it turns it into one sentence and an
exit status that a launcher understands.

JAX is imported when it is needed, so that a misspelt flag is answered at once.
"""

from collections.abc import Callable
import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import traceback
from typing import Any

# EX_TEMPFAIL of sysexits.h: nothing is wrong; the same command goes on from the last checkpoint.
EXIT_AGAIN = 75
MODES = ('auto', 'off', 'explicit')
_BARRIER_SECONDS = 7 * 24 * 3600  # a dead process ends the wait; a slow one, as in prepare, may not
_PR_SET_PDEATHSIG = 1
# What collectives and the coordination service say when another process has gone.
_LOST = re.compile(r'Gloo .* failed|coordination service|Connection (reset|closed|refused)|'
                   r'Socket closed|UNAVAILABLE|heartbeat|task (died|crashed|was preempted)',
                   re.IGNORECASE)

_meetings = itertools.count()


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where the processes of a run meet; None is found out from the environment.

  Attributes:
    coordinator_address: host:port of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    heartbeat_seconds: a process that was silent for so long is taken for dead, and ends the rest.
  """
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat_seconds: int = 30


def cluster(mode: str, given: Cluster) -> Cluster | None:
  """What to join, or None for a single process.

  Args:
    mode: 'auto' joins what the flags name, else what JAX detects (Cloud TPU, GKE, SLURM,
      Open MPI), if it has several processes; 'off' never; 'explicit' only by flags.

  Raises:
    ValueError: flags that contradict one another, or a cluster that is there but not readable.
  """
  if mode not in MODES:
    raise ValueError(f'--distributed is {mode!r}, and must be one of {", ".join(MODES)}')
  named = dict(coordinator_address=given.coordinator_address, num_processes=given.num_processes,
               process_id=given.process_id)
  missing = [f'--{name}' for name, value in named.items() if value is None]
  if given.heartbeat_seconds < 1:
    raise ValueError(f'--heartbeat_seconds is {given.heartbeat_seconds}; give at least 1')
  if mode == 'off':
    if len(missing) < len(named):
      raise ValueError('--distributed=off takes no coordinator_address, num_processes or '
                       'process_id; leave them out, or give --distributed=explicit')
    return None
  if mode == 'explicit' or len(missing) < len(named):
    if missing:
      raise ValueError(f'{", ".join(missing)} is missing: several processes need '
                       '--coordinator_address=HOST:PORT --num_processes=N --process_id=K')
    if not re.fullmatch(r'.+:\d+', given.coordinator_address):
      raise ValueError(f'--coordinator_address is {given.coordinator_address!r}; give HOST:PORT')
    if not 0 <= given.process_id < given.num_processes:
      raise ValueError(f'--process_id is {given.process_id}; with --num_processes='
                       f'{given.num_processes} it must lie from 0 to {given.num_processes - 1}')
    return given if given.num_processes > 1 else None
  return given if _detected_processes() > 1 else None


def _detected_processes() -> int:
  """Processes of the cluster that JAX's own detection finds; 1 where it finds none."""
  from jax._src import clusters  # pylint: disable=g-import-not-at-top
  kinds = clusters.ClusterEnv._cluster_types  # pylint: disable=protected-access
  found = next((kind for kind in kinds
                if not kind.opt_in_only_method and kind.is_env_present()), None)
  if found is None:
    return 1
  try:
    return found.get_process_count()
  except Exception as error:
    raise ValueError(f'this looks like a cluster ({found.name or found.__name__}), but its size '
                     f'can\'t be read: {error}; run with --distributed=off, or name the '
                     'processes with --distributed=explicit') from error


def join(found: Cluster) -> None:
  """Connects this process to the others; before any device is touched."""
  import jax  # pylint: disable=g-import-not-at-top
  # Its handler would take SIGTERM from training.preemption, and it counts one loop, not many.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      found.coordinator_address, found.num_processes, found.process_id,
      heartbeat_timeout_seconds=found.heartbeat_seconds)
  if not is_first():
    from absl import logging  # pylint: disable=g-import-not-at-top
    logging.set_verbosity(logging.WARNING)


def leave() -> None:
  """Waits for the other processes to be done as well, and disconnects."""
  if _state().client is not None:
    import jax  # pylint: disable=g-import-not-at-top
    jax.distributed.shutdown()


def _state() -> Any:
  """JAX's own record of the cluster. JAX has no public word for barriers without devices."""
  from jax._src import distributed  # pylint: disable=g-import-not-at-top
  return distributed.global_state


def count() -> int:
  return _state().num_processes


def index() -> int:
  return _state().process_id


def is_first() -> bool:
  """Whether this is the process that writes and speaks."""
  return index() == 0


def say(text: str) -> None:
  """Prints a line, once for all processes."""
  if is_first():
    print(text, flush=True)


def meet(name: str) -> None:
  """Waits until every process is here; the processes must meet in the same order."""
  if count() > 1:
    _state().client.wait_at_barrier(f'specdistill/{next(_meetings)}/{name}',
                                    _BARRIER_SECONDS * 1000)


def agree(name: str, decide: Callable[[], Any]) -> Any:
  """What process 0 decides (something that JSON holds), in every process."""
  if count() == 1:
    return decide()
  key = f'specdistill/{next(_meetings)}/{name}'
  if is_first():
    decided = decide()
    tell(key, json.dumps(decided))
    return decided
  return json.loads(wait_for(key))


def tell(key: str, value: str) -> None:
  """Leaves a value for the other processes; overwrites."""
  _state().client.key_value_set(key, value, allow_overwrite=True)


def look(key: str) -> str | None:
  """A value that some process has left; None if none has."""
  if (client := _state().client) is None:  # it has left
    return None
  try:
    return client.key_value_try_get(key)
  except Exception as error:  # of JAX; its class is not public
    if 'NOT_FOUND' in str(error):
      return None
    raise


def wait_for(key: str) -> str:
  """A value that some process has left, or will."""
  return _state().client.blocking_key_value_get(key, _BARRIER_SECONDS * 1000)


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error of a collective, or of a meeting, says that another process has gone."""
  return count() > 1 and _LOST.search(str(error)) is not None


def supervised(program: Callable[[], int]) -> int:
  """Runs `program` in a child and returns its exit status, or one for how it was ended.

  SIGTERM is passed on; a second one ends the child at once.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  parent = os.getpid()
  # A SIGTERM between fork and handler would end the parent alone.
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
  child = os.fork()
  if child == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _run_child(program, parent)
  asked = []

  def pass_on(number, _):
    asked.append(number)
    os.kill(child, signal.SIGKILL if len(asked) > 1 else number)

  before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}  # the child has it too
  signal.pthread_sigmask(signal.SIG_SETMASK, mask)
  _, waited = os.waitpid(child, 0)
  for number, handler in before.items():
    signal.signal(number, handler)
  status = os.waitstatus_to_exitcode(waited)
  if status >= 0:
    return status
  if len(asked) > 1:
    return 128 + signal.SIGTERM
  if status == -signal.SIGABRT:
    print('error: lost the other processes of this run: one of them has ended, see its output; '
          f'exit status {EXIT_AGAIN}: run the same command on all hosts again, and it goes on '
          'from the last checkpoint', file=sys.stderr, flush=True)
    return EXIT_AGAIN
  print(f'error: ended by {signal.Signals(-status).name}', file=sys.stderr, flush=True)
  return 128 - status


def _run_child(program: Callable[[], int], parent: int) -> None:
  """Never returns. Leaves by `os._exit`: JAX's exit handlers would wait for lost processes."""
  if sys.platform == 'linux':  # a child must not outlive a parent that was killed
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)
  status = 1
  try:
    status = program()
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else 1
  except BaseException:  # pylint: disable=broad-exception-caught
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
