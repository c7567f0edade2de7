"""A step that never ends leaves the stacks of its process in the log."""

import faulthandler
import time

from specdistill_jax.training import stalls


def hangs(capfd):
  told, deadline = '', time.monotonic() + 300
  while 'in hangs' not in told and time.monotonic() < deadline:  # one of the stacks is this one
    told += capfd.readouterr().err
  return 'in hangs' in told


def test_a_hang_is_told_until_the_run_ends(monkeypatch, capfd):
  monkeypatch.setattr(stalls, 'SECONDS', 0.05)
  with stalls.watched():
    assert hangs(capfd) and hangs(capfd)
  calls = []
  monkeypatch.setattr(faulthandler, 'dump_traceback_later', lambda *a, **k: calls.append('wait'))
  monkeypatch.setattr(faulthandler, 'cancel_dump_traceback_later', lambda: calls.append('end'))
  with stalls.watched():
    stalls.step_ended()
  assert calls == ['wait', 'wait', 'end']
