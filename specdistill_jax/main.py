"""One study: its stages in order, each finished one skipped, an interrupted one resumed.

  python -m specdistill_jax.main --config=configs/quickstart.py --workdir=W
  python -m specdistill_jax.main --config=... --workdir=W --stages=distill,evaluate
  python -m specdistill_jax.main --config=... --workdir=W --config.distill.objective=reverse_kl
  python -m specdistill_jax.main --config=... --workdir=W --stages=report --max_quality_drop=0.01
  python -m specdistill_jax.main --config=... --workdir=W --replay=step_123
  python -m specdistill_jax.main --config=... --workdir=W --sweep=all    (or --sweep=3, one cell)

The same command on every host of a TPU slice, or of a SLURM job, is one run on all of them.
Exit status: 0 done; 2 after one `error:` line about what must be changed; 75 stopped with all
saved, by SIGTERM, Ctrl-C, a maintenance notice or the loss of a host: the same command goes on.

`run` is the same from a notebook. Stages and JAX are imported when they are needed, so that a
misspelt flag is answered at once.
"""

from collections.abc import Sequence
import contextlib
import difflib
import functools
import importlib
import os
import pathlib
import sys
import time
import traceback
from typing import Any

from absl import flags
import ml_collections
from ml_collections import config_flags

from specdistill_jax import processes
from specdistill_jax import storage
from specdistill_jax.stages import checks
from specdistill_jax.stages import config_files
from specdistill_jax.stages import messages
from specdistill_jax.stages import places
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


def _check_slice(config: ml_collections.ConfigDict, workdir: pathlib.Path,
                 stages: Sequence[str]) -> None:
  """A model that trains on many small chips may decode on another kind only: told before days."""
  decoding = config.evaluate and config.evaluate.topology
  kind = lambda topology: topology.partition(':')[0]
  training = [stage for stage in ('target', 'draft', 'distill')
              if stage in stages and not workdirs.done_path(workdir, stage).exists()]
  if (not decoding or not config.topology or not training or 'evaluate' not in stages
      or kind(decoding) == kind(config.topology)):
    return
  if importlib.import_module('jax').default_backend() == 'tpu':
    raise ValueError(f'this study trains on {config.topology} and decodes on {decoding}; run '
                     '--stages=prepare,target,draft,distill on the one and, with the same '
                     '--workdir, --stages=evaluate,report on the other')


def _run_stage(stage: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Training stages run on all processes; the others on the first, while the rest wait."""
  if stage not in ('target', 'draft', 'distill') and not processes.is_first():
    return
  if stage in ('target', 'draft'):
    train = importlib.import_module('specdistill_jax.stages.train')
    train.run(config, workdir, which=stage)
  else:
    importlib.import_module(f'specdistill_jax.stages.{stage}').run(config, workdir)


@contextlib.contextmanager
def _failure_told(workdir: pathlib.Path, stage: str):
  """An error leaves a trace in the workdir; to be stopped or superseded, or lose a host, none."""
  try:
    yield
  except Exception as error:
    preemption = importlib.import_module('specdistill_jax.training.preemption')
    no_failure = isinstance(error, (preemption.Stopped, preemption.Superseded))
    if processes.is_first() and not no_failure and not processes.is_lost_peer(error):
      workdirs.record_failure(workdir, stage, error)
    raise


def run(config: ml_collections.ConfigDict | str, workdir: str | os.PathLike[str],
        stages: Sequence[str] | None = None) -> dict[str, float]:
  """Runs a study, or some of its stages, in `workdir`.

  Args:
    config: as from a file in `configs/`, or the path of one, with its argument behind a colon;
      checked before anything is touched.
    workdir: made if missing; refused if it holds a study of another config.
    stages: names of `STAGES`, run in the order of `STAGES`; None for all that the config has.

  Returns:
    Wall seconds of each stage that ran (finished ones are skipped and not listed; the report
    is written anew each time).

  Raises:
    ValueError: one sentence about the first thing that is wrong with config, stages or workdir.
  """
  started = time.perf_counter()
  workdir = storage.path(workdir)
  if isinstance(config, str):
    config = config_files.load(config)
  config = places.resolved(config, workdir)
  checks.check(config)
  workdirs.check(config, workdir)
  if stages is None:
    stages = planned_stages(config)
  else:
    stages = sorted(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else -1)
  _check_stages(config, workdir, stages)
  _check_slice(config, workdir, stages)
  workdirs.claim(config, workdir)
  seconds = {}
  for stage in stages:
    path = workdirs.done_path(workdir, stage)
    # A report takes seconds, and may be asked another question of the same rows.
    if stage != 'report' and processes.agree(f'{stage} is done', path.exists):
      processes.say(f'[{stage}] already done; delete {path} to run it again')
      continue
    processes.say(f'[{stage}]')
    stage_started = time.perf_counter()
    timed = (workdirs.attempt(workdir, stage) if processes.is_first()
             else contextlib.nullcontext())
    with timed, _failure_told(workdir, stage):
      _run_stage(stage, config, workdir)
      processes.meet(f'end of {stage}')
    seconds[stage] = time.perf_counter() - stage_started
    if processes.is_first():
      workdirs.forget_failure(workdir)
      workdirs.write_done(workdir, stage)
    processes.say(f'[{stage}] {seconds[stage]:.1f} s')
  if 'report' in stages and processes.is_first():
    importlib.import_module('specdistill_jax.stages.report').show(config, workdir)
  each = ', '.join(f'{stage} {spent:.1f} s' for stage, spent in seconds.items())
  total = time.perf_counter() - started
  processes.say(f'total wall time {total:.1f} s ({each or "nothing left to do"})')
  return seconds


def replay(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], step: str) -> None:
  """Repeats a step that was not finite, and prints which row and parameter were so first.

  Args:
    step: `step_123`, or the path of the batch that training kept.
  """
  workdir = storage.path(workdir)
  config = places.resolved(config, workdir)
  checks.check(config)
  workdirs.check(config, workdir)
  module = importlib.import_module('specdistill_jax.stages.replay')
  path, about = module.find(workdir, step)
  fit = functools.partial(module.fit, path=path, about=about)
  if about['stage'] == 'distill':
    importlib.import_module('specdistill_jax.stages.distill').run(config, workdir, fit=fit)
  else:
    importlib.import_module('specdistill_jax.stages.train').run(
        config, workdir, about['stage'], fit=fit)


def quickstart(workdir: str | os.PathLike[str]) -> dict[str, float]:
  """`run` with `configs/quickstart.py`."""
  return run(config_files.load(str(_ROOT / 'configs' / 'quickstart.py')), workdir)


def _split(argv: Sequence[str], wanted: str) -> tuple[str | None, list[str]]:
  """The value of the flag `wanted`, and the other arguments."""
  found, rest = None, []
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name == wanted:
      found = value if equals else next(arguments, '')
    else:
      rest.append(argument)
  return found, rest


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
  """Flags with the config loaded, or None after printing the help."""
  path, argv = _split(argv, 'config')
  cell, argv = _split(argv, 'sweep')
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'Directory of the study: a path, or gs://bucket/folder.',
                      flag_values=values)
  flags.DEFINE_list('stages', None, f'Only these stages, of {",".join(STAGES)}.',
                    flag_values=values)
  flags.DEFINE_float('max_quality_drop', None, "Share of the target's quality that may be spent "
                     'on speed: the report names the fastest setting within it. Short for '
                     '--config.evaluate.max_quality_drop.', flag_values=values)
  flags.DEFINE_string('sweep', None, "A cell of the config's get_sweep(), from 0; or all, one "
                      'after the other, each in a folder of the workdir.', flag_values=values)
  flags.DEFINE_string('replay', None, 'Look again at a step that was not finite: step_123, or '
                      'the path of its batch.', flag_values=values)
  flags.DEFINE_list('profile_steps', None, 'Trace these steps, first and last, as in 10,15, '
                    'into the workdir\'s folder profile.', flag_values=values)
  flags.DEFINE_enum('distributed', 'auto', processes.MODES, 'Several processes: auto joins the '
                    'ones that JAX detects (Cloud TPU, GKE, SLURM), explicit those that the '
                    'next flags name.', flag_values=values)
  flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0.', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'Of the run.', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'Of this one, from 0.', flag_values=values)
  flags.DEFINE_integer('heartbeat_seconds', 30, 'A process that was silent for so long is taken '
                       'for dead.', flag_values=values)
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return None
  if path is None:
    raise ValueError('--config is missing; give one, as in --config=configs/quickstart.py')
  config = config_files.load(path, cell)
  config_files.check_overrides(argv, config)
  argv = config_files.unset(argv, config)
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


def _profiled(steps: Sequence[str] | None) -> tuple[int, int] | None:
  if steps is None:
    return None
  if len(steps) != 2 or not all(step.isdecimal() for step in steps):
    raise ValueError(f'--profile_steps is {",".join(steps)!r}; give the first and the last step, '
                     'as in 10,15')
  return int(steps[0]), int(steps[1])


def _study(values: flags.FlagValues) -> None:
  """What the flags ask for, in this process."""
  if steps := _profiled(values.profile_steps):
    importlib.import_module('specdistill_jax.training.profiling').request(*steps)
  if values.replay is not None:
    replay(values.config, values.workdir, values.replay)
  else:
    run(values.config, values.workdir, values.stages)


def _program(values: flags.FlagValues, cluster: processes.Cluster | None) -> int:
  """The exit status of the study, as one of the processes of `cluster`, or alone."""
  preemption = importlib.import_module('specdistill_jax.training.preemption')
  try:
    if cluster is not None:
      processes.join(cluster)
    preemption.watch(second_ends=cluster is None)
    with messages.shown():
      _study(values)
    processes.leave()
  except preemption.Stopped as stopped:
    processes.leave()
    processes.say(f'stopped and saved: {stopped}; exit status {processes.EXIT_AGAIN}: the same '
                  'command goes on')
    return processes.EXIT_AGAIN
  except Exception as error:  # told apart below; the unexpected goes on with its traceback
    if processes.is_lost_peer(error):
      print(f'error: lost another process of this run ({" ".join(str(error).split())[:300]}); '
            f'exit status {processes.EXIT_AGAIN}: run the same command on all hosts again, and '
            'it goes on from the last checkpoint', file=sys.stderr, flush=True)
      return processes.EXIT_AGAIN
    if not _is_sentence(error):
      raise
    return _refuse(error)
  return 0


def _refuse(error: BaseException) -> int:
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
  return 2


def _all_cells(argv: list[str]) -> int:
  """Runs each cell of a sweep, the others too if one fails; being stopped ends it."""
  path, rest = _split(_split(argv, 'sweep')[1], 'config')
  workdir, rest = _split(rest, 'workdir')
  try:
    if path is None or workdir is None:
      raise ValueError('--sweep=all needs --config and --workdir')
    cells = config_files.cells(path)
  except ValueError as error:
    return _refuse(error)
  failed = {}
  for cell in range(len(cells)):
    print(f'[cell {cell}] {cells[cell]}', flush=True)
    try:
      status = main([*rest, f'--config={path}', f'--workdir={workdir}/cell-{cell}',
                     f'--sweep={cell}'])
    except Exception:  # a bug or a surprise: told in full, and the other cells are still wanted
      traceback.print_exc()
      status = 1
    if status == processes.EXIT_AGAIN:
      return status
    if status:
      failed[cell] = status
    # A compiled program maps some memory, and Linux grants a process 65,530 mappings: a cell with
    # trees was seen to take 16,000, and the fourth in one process died of a segmentation fault.
    importlib.import_module('jax').clear_caches()
  if failed:
    print(f'error: of {len(cells)} cells failed {", ".join(map(str, failed))}; the same command '
          'tries them again', file=sys.stderr, flush=True)
  return min(failed.values(), default=0)


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, 2 after printing one `error:` line, or 75."""
  argv = list(sys.argv if argv is None else argv)
  if _split(argv, 'sweep')[0] == 'all':
    return _all_cells(argv)
  try:
    values = _parse(argv)
    if values is None:
      return 0
    if values.workdir is None:
      raise ValueError('--workdir is missing; give the directory of the study, as in '
                       '--workdir=runs/quickstart')
    if '://' in values.workdir and not values.workdir.startswith(storage.SCHEME):
      raise ValueError(f'--workdir is {values.workdir}; it must be a path of a file system, or '
                       f'{storage.SCHEME}bucket/folder')
    _profiled(values.profile_steps)
    cluster = processes.cluster(values.distributed, processes.Cluster(
        values.coordinator_address, values.num_processes, values.process_id,
        values.heartbeat_seconds))
  except Exception as error:
    if not _is_sentence(error):
      raise
    return _refuse(error)
  program = functools.partial(_program, values, cluster)
  return program() if cluster is None else processes.supervised(program)


if __name__ == '__main__':
  sys.exit(main())
