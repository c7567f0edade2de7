"""The command, run in forks of a process that has imported everything and started no backend.

Such a start costs a second, that of a new interpreter ten.
"""

import os
import pathlib
import socket
import sys
import traceback

import compiler

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT)]
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = compiler.QUICK

import jax  # noqa: E402

from specdistill_jax import main  # noqa: E402
from specdistill_jax.stages import distill  # noqa: E402,F401  (imported before the forks)
from specdistill_jax.stages import evaluate  # noqa: E402,F401
from specdistill_jax.stages import prepare  # noqa: E402,F401
from specdistill_jax.stages import train  # noqa: E402,F401


def start(output: pathlib.Path, cache: pathlib.Path, *arguments: str, devices: int = 1) -> int:
  """Forks a process that runs the command and appends to `output`; returns its number."""
  child = os.fork()
  if child:
    return child
  status = 1
  try:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_num_cpu_devices', devices)
    status = main.main(['main', *arguments])
  except BaseException:  # what leaves by `os._exit` would say nothing
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(status)


def joined(count: int) -> list[list[str]]:
  """The flags of each of `count` processes that are one run."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  return [[f'--coordinator_address=localhost:{port}', f'--num_processes={count}',
           f'--process_id={index}'] for index in range(count)]


def ended(child: int) -> int | None:
  """The exit status of a child, or None while it runs."""
  found, status = os.waitpid(child, os.WNOHANG)
  return os.waitstatus_to_exitcode(status) if found else None
