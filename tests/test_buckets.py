"""A study whose workdir and data are in a bucket, killed and resumed, ends as one on a disk."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_a_study_in_a_bucket_ends_as_one_on_a_disk():
  """In a process of its own, as in test_kills.py. Two processes: buckets.py --more."""
  done = subprocess.run([sys.executable, ROOT / 'tests' / 'buckets.py'], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'all rows and metrics as on a disk' in done.stdout
