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
