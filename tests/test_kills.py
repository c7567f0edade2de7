"""Training that is killed ten times, at random moments, ends as if nobody had."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_ten_kills_lose_and_double_nothing():
  """In a process of its own: the forks must not have a backend that pytest's process started."""
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'kills.py', '--kills=10', '--stages=target'], cwd=ROOT,
      capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '10 kills' in done.stdout and 'all equal' in done.stdout


def test_runs_that_are_asked_to_stop_save_and_go_on():
  done = subprocess.run(
      [sys.executable, ROOT / 'tests' / 'kills.py', '--kills=3', '--stages=target', '--ask'],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'status 75' in done.stdout and 'all equal' in done.stdout
