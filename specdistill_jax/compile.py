"""Compiles a study's programs for a TPU slice, without a TPU: memory, roofline, predictions.

  python -m specdistill_jax.compile --config=configs/pod_t5_xl.py
  python -m specdistill_jax.compile --config=... --topology=v5e:4x4,v5e:16x16 --programs=train
  python -m specdistill_jax.compile --config=... --topology=v5e --sweep
  python -m specdistill_jax.compile --config=... --topology=v5e:4x4,v5e:16x16 --grow

Needs libtpu beside JAX: launch/requirements-tpu-compile.txt. Nothing is initialised and no data
are read. The last line of standard output is one JSON document; before it stands a table.
Memory figures are the compiler's own; times are rooflines (`costs/roofline.py`), lower bounds
from published rates, never measurements.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

# Read by libtpu when it is loaded: no metadata server, no lock against a second compiler.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
for _name, _value in dict(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1',
                          TPU_ACCELERATOR_TYPE='v5litepod-16',
                          TPU_WORKER_HOSTNAMES='localhost').items():
  os.environ.setdefault(_name, _value)

# pylint: disable=wrong-import-position
import jax

from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import ahead
from specdistill_jax.costs import chips
from specdistill_jax.costs import programs
from specdistill_jax.costs import report
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.stages import checks
from specdistill_jax.stages import sources
from specdistill_jax.stages import task_checks
# pylint: enable=wrong-import-position

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def widths(config: ml_collections.ConfigDict) -> structs.Widths:
  """Tokens of the longest prompt and completion that the config allows."""
  task = config.task
  if task_checks.is_language_modelling(task):
    return structs.Widths(task.prompt_length, task.max_length - task.prompt_length)
  inputs, targets = sources.lengths(task)
  decoded = [section.max_new_tokens for section in (
      config.distill and config.distill.rollout, config.evaluate) if section is not None]
  new_tokens = decoded[0] if decoded else targets or task.max_length // 2
  prompt = inputs or task.max_length - new_tokens
  return structs.Widths(prompt, targets or task.max_length - prompt)


def build(config: ml_collections.ConfigDict, name: str, topology: str,
          shape: int | tree_lib.Tree | tree_lib.Dynamic) -> programs.Program:
  """One program of the study, laid out on a slice; `shape` as in `programs.decoding`."""
  devices = chips.devices(topology)
  if name in programs.TRAINING:
    return programs.training(config, widths(config), sharding.make_mesh(
        **config.mesh, devices=devices), name=name)
  return programs.decoding(config, widths(config), sharding.make_mesh(
      **config.evaluate.mesh, devices=devices), name=name, shape=shape)


def document(config: ml_collections.ConfigDict, topology: str, decode_topology: str,
             names: Sequence[str], *, gamma: int, tree: str | None = None,
             alpha: float | None = None, tau: float | None = None,
             keep: pathlib.Path | None = None, all_fit: bool = False) -> dict[str, Any]:
  """Compiles programs of a study for a slice, and says what they cost there.

  Args:
    topology: of training, as 'v5e:4x4'; `decode_topology`: of decoding.
    names: of `programs.NAMES`.
    gamma: drafted tokens a cycle, of a chain.
    tree: what is drafted instead, as `config.evaluate.trees` names it; None: a chain.
    alpha, tau: acceptance rate or block efficiency of the prediction; None: a curve.
    keep: folder of finished compilations.
    all_fit: whether to stop at the first program that does not fit.
  """
  rows, shape = {}, gamma if tree is None else tree_names.parse(tree)
  for name in names:
    place = topology if name in programs.TRAINING else decode_topology
    print(f'[compile] {config.study}: {name} for {place}', file=sys.stderr, flush=True)
    program = build(config, name, place, shape)
    rows[name] = report.row(program, ahead.run(program, place, keep), place)
    if all_fit and not rows[name]['fits']:
      break
  return dict(study=config.study, topology=topology, decode_topology=decode_topology,
              jax_version=jax.__version__, fits=all(found['fits'] for found in rows.values()),
              programs=list(rows.values()),
              prediction=config.evaluate and report.prediction(
                  rows, gamma if tree is None else shape.depth, config.evaluate.batch_size, alpha,
                  tau, tree))


def sweep(kind: str) -> list[str]:
  """The slices of a chip, from small to large."""
  if kind not in chips.SLICES:
    raise ValueError(f'--sweep goes over the slices of one chip, and --topology is {kind!r}; it '
                     f'must be one of {", ".join(chips.SLICES)}')
  return [f'{kind}:{shape}' for shape in chips.SLICES[kind]]


def grown(config: ml_collections.ConfigDict, topology: str) -> ml_collections.ConfigDict:
  """The config with as many rows a chip as it trains on its own slice."""
  made = config.copy_and_resolve_references()
  rows = config.distill.train.batch_size * chips.count(topology)
  if config.topology is None or rows % chips.count(config.topology):
    raise ValueError(f'--grow keeps the rows a chip of config.topology, {config.topology}, and '
                     f'{config.distill.train.batch_size} rows there make no whole number of rows '
                     f'on {topology}')
  made.distill.train.batch_size = rows // chips.count(config.topology)
  return made


def run(values: flags.FlagValues) -> dict[str, Any]:
  """What the command does, after its flags: documents of all slices, and the smallest that fits."""
  config = values.config
  checks.check(config)
  names = values.programs or list(programs.names(config))
  for name in names:
    if name not in programs.names(config):
      raise ValueError(f'--programs names {name!r}; this config has '
                       f'{", ".join(programs.names(config)) or "none"}')
  asked = values.topology or [config.topology]
  if asked == [None]:
    raise ValueError('--topology is missing and config.topology is None; give a slice, as in '
                     '--topology=v5e:4x4')
  if values.sweep and len(asked) != 1:
    raise ValueError(f'--sweep goes over the slices of one chip, and --topology names {asked}')
  slices = sweep(asked[0].partition(':')[0]) if values.sweep else asked
  if values.grow and config.distill is None:
    raise ValueError('--grow lets the rows of config.distill grow, which is None')
  gamma = values.gamma or max(config.evaluate.gammas if config.evaluate is not None else (0,))
  tree = values.tree
  if tree == 'own' and config.evaluate is not None:
    if not config.evaluate.trees:
      raise ValueError('--tree=own is the last of config.evaluate.trees, which is empty; name a '
                       "tree, as in --tree='dynamic k10 d6 n59'")
    tree = config.evaluate.trees[-1]
  keep = pathlib.Path(values.keep) if values.keep else None
  documents, smallest = [], None
  for topology in slices:
    own = values.decode_topology or (
        None if values.topology else config.evaluate and config.evaluate.topology)
    try:
      found = document(grown(config, topology) if values.grow else config, topology,
                       own or topology, names, gamma=gamma, tree=tree, alpha=values.alpha,
                       tau=values.tau, keep=keep, all_fit=values.sweep)
    except ValueError as error:
      if not values.sweep:
        raise
      print(f'[compile] {topology}: {error}', file=sys.stderr, flush=True)
      continue
    documents.append(found)
    if values.sweep and found['fits']:
      smallest = topology
      break
  print(report.table(documents))
  growth = report.growth(documents) if values.grow else None
  if growth:
    print('\n' + report.growth_table(growth))
  if values.sweep:
    print(f'\nSmallest slice of {slices[0].partition(":")[0]} that fits: {smallest}')
  return dict(documents=documents, smallest_that_fits=smallest, growth=growth)


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True,
                                  flag_values=values)
  text = dict(
      topology="Slices, as v5e:4x4,v4:2x2x4; None: the config's own.",
      programs=f'Only these, of {",".join(programs.NAMES)}.')
  for name, help_text in text.items():
    flags.DEFINE_list(name, None, help_text, flag_values=values)
  flags.DEFINE_string('decode_topology', None, 'The slice that decodes; None: the same.',
                      flag_values=values)
  flags.DEFINE_string('keep', None, 'A folder of finished compilations, read and written.',
                      flag_values=values)
  flags.DEFINE_integer('gamma', None, 'Drafted tokens; None: the largest of the config.',
                       flag_values=values)
  flags.DEFINE_string('tree', None, "A tree instead, as eagle1 or 'dynamic k10 d6 n59'; own: the "
                      'last that the config evaluates.', flag_values=values)
  flags.DEFINE_float('alpha', None, 'Acceptance rate of the prediction.', flag_values=values)
  flags.DEFINE_float('tau', None, 'Block efficiency of the prediction.', flag_values=values)
  flags.DEFINE_bool('sweep', False, 'Find the smallest slice that fits.', flag_values=values)
  flags.DEFINE_bool('grow', False, 'Rows a step grow with the chips, from those of the config on '
                    'its own slice.', flag_values=values)
  return values


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, 1 if something does not fit, 2 after an error.

  A sweep fits if one of its slices does.
  """
  sys.path.append(str(_ROOT))  # config files import configs.common, wherever they are run from
  values = _flags()
  if '--help' in (sys.argv if argv is None else argv):
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return 0
  try:
    values(list(sys.argv if argv is None else argv))
    if values.config is None:
      raise ValueError('--config is missing; give one, as in --config=configs/pod_t5_xl.py')
    result = run(values)
  except (ValueError, flags.Error, RuntimeError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  print(json.dumps(result))
  fits = [found['fits'] for found in result['documents']]
  return 0 if (any if values.sweep else all)(fits) else 1


if __name__ == '__main__':
  sys.exit(main())
