"""One study: its stages in order, each finished one skipped, an interrupted one resumed.

  python -m specdistill_jax.main --config=configs/quickstart.py --workdir=W
  python -m specdistill_jax.main --config=... --workdir=W --stages=distill,evaluate
  python -m specdistill_jax.main --config=... --workdir=W --config.distill.objective=reverse_kl
  python -m specdistill_jax.main --config=... --workdir=W --stages=report --max_quality_drop=0.01

`run` is the same from a notebook. Stages and JAX are imported when they are needed, so that a
misspelt flag is answered at once.
"""

from collections.abc import Sequence
import difflib
import importlib
import importlib.util
import os
import pathlib
import sys
import time
import traceback
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from specdistill_jax.stages import checks
from specdistill_jax.stages import workdirs

_ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ('prepare', 'target', 'draft', 'distill', 'evaluate', 'report')
PREDECESSORS = dict(
    prepare=(), target=('prepare',), draft=('prepare',), distill=('target', 'draft'),
    evaluate=('target', 'draft', 'distill'), report=('evaluate',))


def planned_stages(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The stages that this config has: a section set to None leaves its stage out."""
  section = lambda stage: dict(prepare='task', report='evaluate').get(stage, stage)
  return tuple(stage for stage in STAGES if config[section(stage)] is not None)


def _ancestors(stage: str) -> set[str]:
  return {name for parent in PREDECESSORS[stage] for name in {parent} | _ancestors(parent)}


def _check_stages(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                  stages: Sequence[str]) -> None:
  planned = planned_stages(config)
  for index, stage in enumerate(stages):
    if stage not in STAGES:
      near = difflib.get_close_matches(stage, STAGES, n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      raise ValueError(f'stages names {stage!r}; the stages are {", ".join(STAGES)}{hint}')
    if stage not in planned:
      raise ValueError(f'stage {stage!r} is left out by this config, which has only '
                       f'{", ".join(planned)}')
    missing = [needed for needed in planned
               if needed in _ancestors(stage) and needed not in stages[:index]
               and not workdirs.done_path(workdir, needed).exists()]
    if missing:
      raise ValueError(
          f'stage {stage!r} needs {", ".join(missing)}, not finished in {workdir}; '
          f'run --stages={",".join([*missing, stage])}')


def _run_stage(stage: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  if stage in ('target', 'draft'):
    train = importlib.import_module('specdistill_jax.stages.train')
    train.run(config, workdir, which=stage)
  else:
    importlib.import_module(f'specdistill_jax.stages.{stage}').run(config, workdir)


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str],
        stages: Sequence[str] | None = None) -> dict[str, float]:
  """Runs a study, or some of its stages, in `workdir`.

  Args:
    config: as from a file in `configs/`; checked before anything is touched.
    workdir: made if missing; refused if it holds a study of another config.
    stages: names of `STAGES`, run in the order of `STAGES`; None for all that the config has.

  Returns:
    Wall seconds of each stage that ran (finished ones are skipped and not listed; the report
    is written anew each time).

  Raises:
    ValueError: one sentence about the first thing that is wrong with config, stages or workdir.
  """
  started = time.perf_counter()
  workdir = pathlib.Path(workdir)
  checks.check(config)
  workdirs.check(config, workdir)
  if stages is None:
    stages = planned_stages(config)
  else:
    stages = sorted(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else -1)
  _check_stages(config, workdir, stages)
  workdirs.claim(config, workdir)
  seconds = {}
  for stage in stages:
    path = workdirs.done_path(workdir, stage)
    # A report takes seconds, and may be asked another question of the same rows.
    if path.exists() and stage != 'report':
      print(f'[{stage}] already done; delete {path} to run it again', flush=True)
      continue
    print(f'[{stage}]', flush=True)
    stage_started = time.perf_counter()
    _run_stage(stage, config, workdir)
    seconds[stage] = time.perf_counter() - stage_started
    workdirs.write_atomically(path, dict(stage=stage, wall_seconds=round(seconds[stage], 3)))
    print(f'[{stage}] {seconds[stage]:.1f} s', flush=True)
  if 'report' in stages:
    importlib.import_module('specdistill_jax.stages.report').show(config, workdir)
  each = ', '.join(f'{stage} {spent:.1f} s' for stage, spent in seconds.items())
  total = time.perf_counter() - started
  print(f'total wall time {total:.1f} s ({each or "nothing left to do"})', flush=True)
  return seconds


def quickstart(workdir: str | os.PathLike[str]) -> dict[str, float]:
  """`run` with `configs/quickstart.py`."""
  return run(_load_config(str(_ROOT / 'configs' / 'quickstart.py')), workdir)


def _explain_override(argv: Sequence[str], config: Any) -> str | None:
  """A sentence about the first `--config.a.b=` that names no field, or None."""
  for argument in argv:
    if not argument.lstrip('-').startswith('config.'):
      continue
    section, walked = config, ''
    for name in argument.lstrip('-').split('=', 1)[0].split('.')[1:]:
      if not isinstance(section, ml_collections.ConfigDict):
        return (f'config.{walked.rstrip(".")} is {section!r} and has no field {name!r}, '
                f'so {argument.split("=", 1)[0]} cannot be set')
      if name not in section:
        return checks.unknown_name(walked, name, list(section))
      section, walked = section[name], f'{walked}{name}.'
  return None


def _load_config(path: str) -> ml_collections.ConfigDict:
  """`get_config()` of a config file, or `get_config(argument)` of `file:argument`, locked."""
  file, colon, argument = path.partition(':')
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config names {file!r}, which is not a file; name one such as '
                     'configs/quickstart.py')
  if str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))  # config files import configs.common, wherever they are run from
  spec = importlib.util.spec_from_file_location('config_file', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*[argument] if colon else []).lock()


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
  """The path after --config, and the other arguments."""
  path, rest = None, []
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name == 'config':
      path = value if equals else next(arguments, '')
    else:
      rest.append(argument)
  return path, rest


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
  """Flags with the config loaded, or None after printing the help."""
  path, argv = _split_config(argv)
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'Directory of the study.', flag_values=values)
  flags.DEFINE_list('stages', None, f'Only these stages, of {",".join(STAGES)}.',
                    flag_values=values)
  flags.DEFINE_float('max_quality_drop', None, "Share of the target's quality that may be spent "
                     'on speed: the report names the fastest setting within it. Short for '
                     '--config.evaluate.max_quality_drop.', flag_values=values)
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return None
  if path is None:
    raise ValueError('--config is missing; give one, as in --config=configs/quickstart.py')
  config = _load_config(path)
  sentence = _explain_override(argv, config)
  if sentence:
    raise ValueError(sentence)
  config_flags.DEFINE_config_dict('config', config, 'Fields are set with --config.field=value.',
                                  lock_config=True, flag_values=values, sys_argv=argv)
  try:
    rest = values(argv)
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if len(rest) > 1:
    raise ValueError(f'{rest[1]!r} is no flag; settings are written --config.field=value')
  if values.max_quality_drop is not None:
    if config.evaluate is None:
      raise ValueError(f'--max_quality_drop is {values.max_quality_drop}, but this config leaves '
                       'evaluation out')
    config.evaluate.max_quality_drop = values.max_quality_drop
  return values


def _is_sentence(error: BaseException) -> bool:
  """Whether one of our own `raise` statements made this error, and not a failing expression.

  What we raise says what is wrong and what would be right; anything else is a bug, or a
  surprise, whose traceback is worth having.
  """
  if not isinstance(error, (ValueError, OSError, ArithmeticError)):
    return False
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  path = pathlib.Path(innermost.filename).resolve()
  ours = path.is_relative_to(_ROOT / 'specdistill_jax') or path.is_relative_to(_ROOT / 'configs')
  return ours and (innermost.line or '').startswith('raise ')


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 2 after printing one `error:` line."""
  argv = list(sys.argv if argv is None else argv)
  try:
    values = _parse(argv)
    if values is None:
      return 0
    if values.workdir is None:
      raise ValueError('--workdir is missing; give the directory of the study, as in '
                       '--workdir=runs/quickstart')
    run(values.config, values.workdir, values.stages)
  except Exception as error:  # told apart below; the unexpected goes on with its traceback
    if not _is_sentence(error):
      raise
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
