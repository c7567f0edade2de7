"""What our own code says in passing, shown: a vocabulary's size, how far sampling has come."""

from collections.abc import Iterator
import contextlib
import logging as std_logging
import pathlib

from absl import logging

from specdistill_jax import processes

_PACKAGE = str(pathlib.Path(__file__).resolve().parents[1])


def _passes(record: std_logging.LogRecord) -> bool:
  """Prints what is ours and below WARNING, once; only WARNING and above go on to any handler.

  Libraries, as they are imported, add handlers that would print it again.
  """
  if record.levelno >= std_logging.WARNING:
    return True
  if record.pathname.startswith(_PACKAGE):
    processes.say(f'  {record.getMessage()}')
  return False


@contextlib.contextmanager
def shown() -> Iterator[None]:
  """Within it the INFO messages of this package are printed, by the first process.

  Orbax writes to the same logger, of absl, and says dozens of things at each checkpoint.
  """
  logger, level = logging.get_absl_logger(), logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  logger.addFilter(_passes)
  try:
    yield
  finally:
    logger.removeFilter(_passes)
    logging.set_verbosity(level)
