"""A run that hangs says where it does: a silent log is no different from that of a slow step."""

from collections.abc import Iterator
import contextlib
import faulthandler
import sys

SECONDS = 1800.0


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Where no step ends for `SECONDS`, the stacks of this process go to its log, and again later.

  Nothing is ended: a first compilation, or an evaluation, may take as long.
  """
  step_ended()
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()


def step_ended() -> None:
  """Begins to wait anew."""
  faulthandler.dump_traceback_later(SECONDS, repeat=True, file=sys.__stderr__)
