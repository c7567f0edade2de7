"""Training that is killed ten times, or asked to stop, at random moments, ends as if nobody had."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def said():
  """In a process of its own: the forks must not have a backend that pytest's process started."""
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'kills.py', '--kills=10', '--asks=3', '--stages=target'],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_ten_kills_lose_and_double_nothing(said):
  assert re.findall(r'^kill \d+: status (\S+),', said, re.MULTILINE) == ['-9'] * 10
  assert re.search(r'^10 kills in \d+ studies: all equal', said, re.MULTILINE)


def test_runs_that_are_asked_to_stop_save_and_go_on(said):
  assert '75' in re.findall(r'^ask \d+: status (\S+),', said, re.MULTILINE)
  assert re.search(r'^3 asks in \d+ studies: all equal', said, re.MULTILINE)
