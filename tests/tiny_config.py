"""A study of a few seconds for the tests that run the command itself; data as in studies.py."""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent)]

import studies  # noqa: E402


def get_config(arg: str = ''):
  """`arg`: comma-separated fields of the `train` sections, as in steps=20,checkpoint_every=3."""
  fields = dict(field.split('=') for field in arg.split(',') if field)
  config = studies.config(**{name: type(studies.config().target.train[name] or 0.0)(value)
                             for name, value in fields.items()})
  config.evaluate = None
  config.distill.control = False
  return config
