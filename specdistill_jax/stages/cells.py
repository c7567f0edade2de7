"""What workdirs have of a paper's table: its cells, what is missing of each, and what failed."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import shlex
from typing import Any

import ml_collections

from specdistill_jax.evaluation import paper_tables
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import ways
from specdistill_jax.stages import distill
from specdistill_jax.stages import workdirs

MAIN = 'python -m specdistill_jax.main'
_STAGES = ('prepare', 'target', 'draft', 'distill', 'evaluate')
_SHOWN = 3  # of a list in a sentence


@dataclasses.dataclass(frozen=True)
class Found:
  """A cell, the workdirs that it was found in, and what still has to be run of it, if anything."""
  cell: paper_tables.Cell
  places: Sequence[pathlib.Path]
  is_complete: bool


def wanted(config: ml_collections.ConfigDict) -> dict[paper_tables.Setting, tuple[int, ...]]:
  """The settings that a study evaluates, each with the seeds of its arm."""
  if config.evaluate is None:
    return {}
  arms = {} if distill.from_scratch(config) else {('none', None): (config.seed,)}
  for name in distill.arm_names(config) if config.distill is not None else ():
    *arm, seed = distill.parse_arm(name)
    arms[tuple(arm)] = (*arms.get(tuple(arm), ()), seed)
  return {paper_tables.Setting(*arm, temperature, **dataclasses.asdict(way)): seeds
          for temperature in config.evaluate.temperatures
          for way in ways.distinct(config.evaluate, temperature) for arm, seeds in arms.items()}


def _places(configs: Sequence[ml_collections.ConfigDict],
            roots: Sequence[pathlib.Path]) -> tuple[dict[int, list[pathlib.Path]], list[str]]:
  """Workdirs of each cell: folders `cell-<number>` of a root, or a root that is one itself.

  Raises:
    ValueError: a root is the workdir of another study.
  """
  studies = [config.study for config in configs]
  found: dict[int, list[pathlib.Path]] = {}
  notes = []
  for root in roots:
    stored, before = workdirs.stored_config(root), sum(map(len, found.values()))
    if stored is not None:
      if stored['study'] not in studies:
        raise ValueError(f'{root} holds the study {stored["study"]!r}, which is no cell of this '
                         f'table; its studies are {", ".join(studies)}')
      found.setdefault(studies.index(stored['study']), []).append(root)
    for number in range(len(configs)):
      if (root / f'cell-{number}').is_dir():
        found.setdefault(number, []).append(root / f'cell-{number}')
    if sum(map(len, found.values())) == before:
      notes.append(f'{root} has no cell of this table yet: neither cell-0 to '
                   f'cell-{len(configs) - 1} nor a study of its own.')
  return found, notes


def _several(values: Sequence[str]) -> str:
  more = f', and {len(values) - _SHOWN} more' if len(values) > _SHOWN else ''
  return '; '.join(values[:_SHOWN]) + more


def _rows(config, settings, places) -> tuple[list[Mapping[str, Any]], list[str]]:
  """Rows of the cell that its table asks for, each setting once; sentences about the others."""
  kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
  foreign, doubled, notes = [], 0, []
  for place in places:
    found, older = rows_lib.of_last_config(rows_lib.read(place / 'results.jsonl'))
    notes += rows_lib.older_told(place, older)
    for row in found:
      setting = paper_tables.setting(row)
      if row['study'] != config.study or row['seed'] not in settings.get(setting, ()):
        foreign.append(f'study {row["study"]}, {row["objective"]}, T={row["temperature"]:g}, '
                       f'{paper_tables.shape(setting._asdict())}, seed {row["seed"]}')
      elif (setting, row['seed'], row.get('category')) in kept:
        doubled += 1
      else:
        kept[setting, row['seed'], row.get('category')] = row
  names = ', '.join(map(str, places))
  if foreign:
    notes.append(f'{names}: {len(foreign)} rows are foreign to the table and left out: '
                 f'{_several(list(dict.fromkeys(foreign)))}.')
  if doubled:
    notes.append(f'{names}: {doubled} rows are of settings that are there already and left out; '
                 'the first ones count.')
  return list(kept.values()), notes


def _other_settings(config, places) -> list[str]:
  """A sentence for each workdir that was run with other settings than the config's."""
  notes = []
  for place in places:
    stored, expected = workdirs.stored_config(place), workdirs.to_json(config)
    if stored is None:
      continue
    if differences := workdirs.differences(stored, expected):
      notes.append(f'{place} was run with other settings than the config has: '
                   f'{_several(differences)}.')
  return notes


def _failure(places) -> str | None:
  for place in places:
    path = workdirs.failed_path(place)
    if path.exists():
      told = json.loads(path.read_text(encoding='utf-8'))
      return f'stage {told["stage"]}, {told["error"]}: {told["message"]}'
  return None


def _last_cross_entropy(place: pathlib.Path) -> dict[str, float]:
  """Held-out cross-entropy of each run after its last step, and before its first, as 'none'."""
  found = {}
  for record in rows_lib.read(place / 'metrics.jsonl'):
    value = record.get('validation_cross_entropy')
    if record['stage'] == 'distill' and value is not None:
      found['none' if record['step'] == 0 else record['run']] = value
  return found


def _training(config, places) -> dict[tuple[str, str | None], dict[str, float]]:
  """Of each arm what its training tells: cross-entropy, mean over seeds, and wall seconds.

  Seconds are those of the stage `distill` in all attempts, the target's samples included, over
  its arms; there are none where an attempt was killed, since nobody knows how long it was, nor
  where the arms are another study's.
  """
  names = distill.arm_names(config) if config.distill is not None else []
  found: dict[tuple[str, str | None], dict[str, list[float]]] = {}
  for place in places:
    done = workdirs.done_path(place, 'distill')
    seconds = (json.loads(done.read_text())['wall_seconds']
               if done.exists() and config.distill.init_from is None else None)
    last = _last_cross_entropy(place)
    for name in names:
      arm = found.setdefault(distill.parse_arm(name)[:2], {})
      if seconds is not None:
        arm.setdefault('distill_seconds', []).append(seconds / len(names))
      if name in last:
        arm.setdefault('cross_entropy', []).append(last[name])
    if 'none' in last:
      found.setdefault(('none', None), {}).setdefault('cross_entropy', []).append(last['none'])
  return {arm: {name: sum(values) / len(values) for name, values in figures.items()}
          for arm, figures in found.items()}


def read(names: Sequence[str], configs: Sequence[ml_collections.ConfigDict],
         roots: Sequence[pathlib.Path], *,
         with_training: bool = False) -> tuple[list[Found], list[str]]:
  """The cells of a table as workdirs have them, and sentences about what is odd.

  Args:
    names: of the cells; `configs`: their studies.
    roots: folders that hold the cells' workdirs, or such workdirs.
    with_training: with figures of training.

  Raises:
    ValueError: a root is the workdir of another study.
  """
  placed, notes = _places(configs, roots)
  cells = []
  for number, (name, config) in enumerate(zip(names, configs, strict=True)):
    places, settings = placed.get(number, []), wanted(config)
    rows, told = _rows(config, settings, places)
    notes += _other_settings(config, places) + told
    have = {(paper_tables.setting(row), row['seed']) for row in rows
            if row.get('category') is None}
    last = [stage for stage in _STAGES if config[{'prepare': 'task'}.get(stage, stage)] is not None
            ][-1]
    is_complete = (all((setting, seed) in have for setting, seeds in settings.items()
                       for seed in seeds) if settings else
                   any(workdirs.done_path(place, last).exists() for place in places))
    cells.append(Found(paper_tables.Cell(
        name, config.task.name, settings, rows, None if is_complete else _failure(places),
        config.distill is not None, _training(config, places) if with_training else {}),
        places, is_complete))
  return cells, notes


def commands(path: str, cells: Sequence[Found], root: pathlib.Path,
             words: Sequence[str] = (), in_sweep: bool = True) -> list[tuple[str, str]]:
  """For each cell that is not complete what is the matter, and the command that goes on with it.

  Args:
    path: of the config file, with its argument.
    root: where new cells go.
    words: overrides of the config's fields, `--config.a=b`.
    in_sweep: whether the file has a sweep.
  """
  made = []
  for number, found in enumerate(cells):
    if found.is_complete:
      continue
    place = found.places[0] if found.places else root / f'cell-{number}'
    command = [f'--config={path}', f'--workdir={place}',
               *([f'--sweep={number}'] if in_sweep else []), *words]
    state = (f'failed in {found.cell.failure}' if found.cell.failure else
             'is not finished' if found.places else 'has not run')
    made.append((f'cell {number}, {found.cell.name}, {state}', f'{MAIN} {shlex.join(command)}'))
  return made
