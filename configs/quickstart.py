"""Quickstart: the whole path on real text, in minutes, on a laptop."""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  config = common.study('quickstart')
  if arg:
    config.task.name = arg
  return config
