"""Pictures of drafted trees: `evaluate` keeps one tree of each shape, `report` draws it.

`trees.jsonl` has a line for each shape and temperature; of lines written twice the last counts.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from specdistill_jax import storage
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import step_costs
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.models import base

FILE = 'trees.jsonl'


def _one_each(wanted: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
  """The first setting of each tree, by a distilled draft if there is one."""
  found = {}
  for is_distilled in (True, False):
    for name, fields in wanted.items():
      if fields['tree'] != tree_names.CHAIN and is_distilled is (fields['objective'] != 'none'):
        found.setdefault(fields['tree'], name)
  return found


def keep(workdir: pathlib.Path, target: base.Model, wanted: Mapping[Any, Mapping[str, Any]],
         built: Mapping[Any, step_costs.Setting],
         batches: Sequence[tuple[np.ndarray, np.ndarray]], key: jax.Array, *,
         sampling: sampling_lib.Sampling, max_new_tokens: int) -> None:
  """Decodes a little of the first prompt with each tree, and writes one that it drafted.

  Args:
    wanted: fields of the rows that are being measured; likewise `built`.
  """
  vocabulary = target.vocabulary
  word = str if vocabulary is None else lambda token: vocabulary.decode([token])
  rows_lib.repair(workdir / FILE)
  for name in _one_each(wanted).values():
    fields = wanted[name]
    seen = drafted.look(target.module.unstacked(), built[name], *batches[0], key,
                        sampling=sampling, max_new_tokens=max_new_tokens, word=word)
    told = ('temperature', 'tree', 'rule', 'objective', 'data_source', 'config_hash')
    rows_lib.append(workdir / FILE, {field: fields[field] for field in told} | dict(
        picture=dataclasses.asdict(seen)))


def found(workdir: pathlib.Path, config_hash: str) -> list[tuple[str, str, drafted.Tree]]:
  """The trees of a config: title, caption and tree of each."""
  lines = {(line['temperature'], line['tree']): line for line in rows_lib.read(workdir / FILE)
           if line['config_hash'] == config_hash}
  trees = []
  for (temperature, name), line in sorted(lines.items()):
    seen, title = drafted.Tree(**line['picture']), f'tree {name} at temperature {temperature:g}'
    trees.append((title, (
        f'The {title}, drafted by {summary_lib.method(line)} in cycle {seen.cycle} of the first '
        f'prompt, the first of {drafted.MOST_CYCLES} that kept two tokens or else the last. Each '
        f'token has the draft\'s probability after its parent; what rule `{line["rule"]}` kept is '
        'green, what the target put behind it orange.'), seen))
  return trees


def draw(workdir: pathlib.Path, config_hash: str) -> Sequence[tuple[str, str]]:
  """Draws the trees of a config; returns (file name, caption) of each."""
  if not (trees := found(workdir, config_hash)):
    return []
  from specdistill_jax.evaluation import tree_picture  # matplotlib takes a second to import
  pictures = []
  for number, (title, caption, seen) in enumerate(trees, start=1):
    file = f'tree_{number}.png'
    with storage.made(workdir / file) as path:
      tree_picture.draw(seen, path, title)
    pictures.append((file, caption))
  return pictures
