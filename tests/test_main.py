"""The command: order, skipping, resuming, refusing; one sentence for whoever mistyped."""

import json
import logging as std_logging
import os
import pathlib
import subprocess
import sys
import time

from absl import logging
import jax
import pytest

from configs import common
from specdistill_jax import main
from specdistill_jax.stages import workdirs
from specdistill_jax.training import preemption

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICKSTART = f'--config={ROOT / "configs" / "quickstart.py"}'


@pytest.fixture
def ran(monkeypatch):
  """Stages that ran, in order, in place of the real ones."""
  stages = []

  def fake(stage, config, workdir):
    assert not (workdir / 'done' / f'{stage}.json').exists()
    assert json.loads((workdir / 'config.json').read_text())['study'] == config.study
    stages.append(stage)

  monkeypatch.setattr(main, '_run_stage', fake)
  return stages


def run(workdir, stages=None, **changes):
  config = common.study('x')
  config.update_from_flattened_dict(changes)
  return main.run(config, workdir, stages)


WITHOUT_REPORT = list(main.STAGES[:-1])


def test_stages_run_in_order_once(tmp_path, ran):
  seconds = run(tmp_path / 'w', WITHOUT_REPORT[::-1])
  assert ran == WITHOUT_REPORT == list(seconds)
  assert run(tmp_path / 'w', WITHOUT_REPORT) == {}
  assert ran == WITHOUT_REPORT
  done = json.loads((tmp_path / 'w' / 'done' / 'target.json').read_text())
  assert done['stage'] == 'target' and done['wall_seconds'] >= 0


def test_a_slip_that_stopped_the_first_stage_does_not_use_up_its_workdir(tmp_path, monkeypatch):
  def stage(name, config, workdir):
    assert not (workdir / 'failed.json').exists(), 'a third launch would take this for free'
    if config.seed == 1:
      raise ValueError('no such file')
    (workdir / 'data').mkdir()
    raise ValueError('half of it')

  monkeypatch.setattr(main, '_run_stage', stage)
  with pytest.raises(ValueError, match='no such file'):
    run(tmp_path, seed=1)
  with pytest.raises(ValueError, match='half of it'):
    run(tmp_path, seed=2)
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 2
  with pytest.raises(ValueError, match='seed is 2 there and 3 here; use another workdir'):
    run(tmp_path, seed=3)
  (tmp_path / 'data').rmdir()
  (tmp_path / 'failed.json').unlink()  # killed, or still at it
  with pytest.raises(ValueError, match='seed is 2 there and 3 here; use another workdir'):
    run(tmp_path, seed=3)


def test_a_config_may_be_named_by_its_path(tmp_path, ran):
  main.run(f'{ROOT}/configs/quickstart.py:arithmetic', tmp_path, ['prepare'])
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert ran == ['prepare'] and stored['task']['name'] == 'arithmetic'


def test_an_interrupted_stage_runs_again(tmp_path, monkeypatch):
  ran = []

  def fails_once(stage, config, workdir):
    ran.append(stage)
    if ran.count('draft') == 1 and stage == 'draft':
      raise KeyboardInterrupt

  monkeypatch.setattr(main, '_run_stage', fails_once)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, WITHOUT_REPORT)
  assert not (tmp_path / 'done' / 'draft.json').exists()
  run(tmp_path, WITHOUT_REPORT)
  assert ran == ['prepare', 'target', 'draft', 'draft', 'distill', 'evaluate']


def test_the_time_of_a_stage_is_that_of_all_its_attempts(tmp_path, monkeypatch):
  """Where one was killed, nobody knows how long it had worked, and there is no figure."""
  now, during, path = [0.0], [], workdirs.attempts_path(tmp_path, 'prepare')
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

  def stage(*_):
    during.append(path.read_bytes())
    now[0] += 3.0
    if len(during) % 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(main, '_run_stage', stage)

  def told(is_killed):
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, ['prepare'])
    if is_killed:
      path.write_bytes(during[-1])
    run(tmp_path, ['prepare'])
    done = workdirs.done_path(tmp_path, 'prepare')
    found = json.loads(done.read_text())
    done.unlink()  # to run it again
    return found

  assert told(is_killed=False) == dict(stage='prepare', wall_seconds=6.0, attempts=2)
  assert told(is_killed=False) == dict(stage='prepare', wall_seconds=12.0, attempts=4)
  assert told(is_killed=True) == dict(stage='prepare', wall_seconds=None, attempts=6)


def test_the_earlier_of_two_launches_stops_and_leaves_no_failure(tmp_path, monkeypatch):
  """Both have seen the same attempts before: they began at once."""
  path = workdirs.attempts_path(tmp_path, 'prepare')

  def stage(*_):
    workdirs.check_alone(tmp_path, 'prepare')  # nobody else as yet
    workdirs.write_atomically(path, dict(stage='prepare', seconds=[None], launch='other'))
    workdirs.check_alone(tmp_path, 'prepare')

  monkeypatch.setattr(main, '_run_stage', stage)
  with pytest.raises(preemption.Superseded, match='another launch has begun'):
    run(tmp_path, ['prepare'])
  assert json.loads(path.read_text())['launch'] == 'other'
  assert not workdirs.failed_path(tmp_path).exists()


def test_left_out_sections_have_no_stage(tmp_path, ran):
  config = common.study('x')
  config.distill = None
  config.evaluate = None
  main.run(config, tmp_path)
  assert ran == ['prepare', 'target', 'draft']
  with pytest.raises(ValueError, match="'distill' is left out by this config"):
    main.run(config, tmp_path, ['distill'])


def test_a_stage_needs_what_comes_before(tmp_path, ran):
  with pytest.raises(ValueError, match='--stages=prepare,target,draft,distill'):
    run(tmp_path / 'w', ['distill'])
  assert not (tmp_path / 'w').exists() and not ran
  run(tmp_path / 'w', ['prepare', 'draft'])
  with pytest.raises(ValueError, match="'distill' needs target, not finished"):
    run(tmp_path / 'w', ['distill'])
  with pytest.raises(ValueError, match="did you mean 'evaluate'"):
    run(tmp_path / 'w', ['evalute'])


def test_a_workdir_of_another_config_stays_as_it_is(tmp_path, ran):
  run(tmp_path, ['prepare'])
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  with pytest.raises(ValueError, match=r"objective is 'forward_kl' there "
                                       r"and 'tvd' here; seed is 0 there and 7 here"):
    run(tmp_path, ['target'], **{'seed': 7, 'distill.objective': 'tvd'})
  assert ran == ['prepare']
  assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_an_illegal_config_touches_nothing(tmp_path, ran):
  with pytest.raises(ValueError, match='student_fraction'):
    run(tmp_path / 'w', **{'distill.student_fraction': 2.0})
  assert not (tmp_path / 'w').exists()


def test_a_model_of_an_unfinished_stage_is_not_taken(tmp_path, ran):
  other = tmp_path / 'other'
  for name in ('draft', 'distill/tvd-draft-seed0'):
    (other / name).mkdir(parents=True)
  config = common.study('x')
  config.draft.train.steps = 0
  for name, stage in (('draft', 'draft'), ('distill/tvd-draft-seed0', 'distill')):
    config.draft.init_from = str(other / name)
    (other / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match=f"stage '{stage}' of the study in .*other has not finis"):
      main.run(config, tmp_path / 'work')
    (other / 'done').mkdir(exist_ok=True)
    (other / 'done' / f'{stage}.json').write_text('{}')
    with pytest.raises(ValueError, match='draft.init_from is .*model.json'):  # it looks further
      main.run(config, tmp_path / 'work')
  assert not ran and not (tmp_path / 'work').exists()


def test_a_study_for_two_kinds_of_chips_is_told_to_run_twice(tmp_path, ran, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  changes = {'topology': 'v5e:4x4', 'evaluate.topology': 'v4:2x2x1'}
  with pytest.raises(ValueError, match='trains on v5e:4x4 and decodes on v4:2x2x1; run --stages='):
    run(tmp_path, **changes)
  assert not ran and not (tmp_path / 'config.json').exists()
  run(tmp_path, ['prepare', 'target', 'draft', 'distill'], **changes)
  run(tmp_path, ['evaluate'], **changes)
  run(tmp_path / 'alike', WITHOUT_REPORT, **changes | {'evaluate.topology': 'v5e:2x2'})
  assert ran == WITHOUT_REPORT * 2


def test_a_workdir_that_is_a_file(tmp_path, ran):
  (tmp_path / 'w').write_text('mine')
  with pytest.raises(ValueError, match='is a file'):
    run(tmp_path / 'w')
  assert (tmp_path / 'w').read_text() == 'mine'


def command(capsys, *arguments) -> tuple[int, str, str]:
  status = main.main(['main', *map(str, arguments)])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.mark.parametrize('arguments,words', [
    ([], ['--config is missing', 'configs/quickstart.py']),
    (['--config=configs/nope.py'], ['configs/nope.py', 'not a file']),
    ([QUICKSTART], ['--workdir is missing']),
    ([QUICKSTART, '--workdir=W', '--config.distil.objective=tvd'], ['distil', 'distill']),
    ([QUICKSTART, '--workdir=W', '--config.distill.objectiv=tvd'],
     ['distill.objectiv', 'did you mean objective']),
    ([QUICKSTART, '--workdir=W', '--config.seed.x=1'], ['config.seed is 0']),
    ([QUICKSTART, '--workdir=W', '--config.distill.objective=forwad_kl'],
     ["'forwad_kl'", 'forward_kl']),
    ([QUICKSTART, '--workdir=W', '--config.evaluate.gammas=0,3'], ['(0, 3)', 'at least 1']),
    ([QUICKSTART, '--workdir=W', '--config.distill.beta=half'], ['half']),
    ([QUICKSTART, '--workdir=W', '--workdri=V'], ['workdri']),
    ([QUICKSTART, '--workdir=W', 'distill'], ["'distill' is no flag"]),
    ([QUICKSTART, '--workdir=W', '--profile_steps=15'], ['--profile_steps', '10,15']),
    ([QUICKSTART, '--workdir=W', '--num_processes=2'], ['--coordinator_address', 'missing']),
    ([QUICKSTART, '--workdir=s3://bucket/study'], ['s3://bucket/study', 'gs://bucket/folder']),
    ([QUICKSTART, '--workdir=W', '--stages=evaluate'], ["'evaluate' needs", 'prepare']),
])
def test_mistakes_end_in_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, words):
  monkeypatch.chdir(tmp_path)
  status, out, err = command(capsys, *arguments)
  assert status == 2 and out == ''
  assert err.startswith('error: ') and err.count('\n') == 1
  for word in words:
    assert word in err
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_ends_in_one_line(capsys, tmp_path, ran):
  (tmp_path / 'file').write_text('mine')
  status, _, err = command(capsys, QUICKSTART, f'--workdir={tmp_path / "file" / "w"}')
  assert status == 2 and err.count('\n') == 1 and "can't be written: Not a directory" in err


def test_overrides_and_config_argument_reach_the_study(capsys, tmp_path, ran):
  status, out, err = command(
      capsys, '--config', ROOT / 'configs' / 'quickstart.py', f'--workdir={tmp_path}',
      '--stages=prepare,target', '--config.distill.seeds=3,4', '--config.evaluate.gammas=2',
      '--config.distill.objective=reverse_kl', '--config.distill.rollout.top_p=0.9')
  assert status == 0, err
  assert ran == ['prepare', 'target'] and 'total wall time' in out
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert stored['distill']['seeds'] == [3, 4] and stored['evaluate']['gammas'] == [2]
  assert stored['distill']['objective'] == 'reverse_kl'
  assert stored['distill']['rollout']['top_p'] == 0.9


def test_a_finished_report_answers_another_question(capsys, tmp_path, monkeypatch):
  """--max_quality_drop is asked of finished measurements: only the report runs again."""
  asked = []
  monkeypatch.setattr(main, '_run_stage', lambda stage, config, workdir: asked.append(
      (stage, config.evaluate.max_quality_drop)))
  shown = []
  monkeypatch.setattr('specdistill_jax.stages.report.show', lambda config, workdir: shown.append(
      config.evaluate.max_quality_drop))
  arguments = (QUICKSTART, f'--workdir={tmp_path}')
  assert command(capsys, *arguments)[0] == 0
  asked.clear()
  assert command(capsys, *arguments, '--max_quality_drop=0.01')[0] == 0
  assert asked == [('report', 0.01)] and shown == [None, 0.01]
  status, _, err = command(capsys, *arguments, '--max_quality_drop=1.5')
  assert status == 2 and 'max_quality_drop' in err and '1.5' in err


SWEEP = '''
from configs import common
def get_config(arg=None):
  return common.study('swept')
def get_sweep():
  return [{'distill.objective': name} for name in ('tvd', 'reverse_kl')]
'''


def test_a_sweep_runs_its_cells_each_in_its_folder(capsys, tmp_path, ran):
  (tmp_path / 'swept.py').write_text(SWEEP)
  flags = (f'--config={tmp_path / "swept.py"}', '--stages=prepare', '--config.seed=7')
  stored = lambda folder: json.loads((folder / 'config.json').read_text())
  assert command(capsys, *flags, f'--workdir={tmp_path / "one"}', '--sweep=1')[0] == 0
  assert stored(tmp_path / 'one')['distill']['objective'] == 'reverse_kl'
  assert command(capsys, *flags, f'--workdir={tmp_path / "all"}', '--sweep=all')[0] == 0
  found = [stored(tmp_path / 'all' / f'cell-{cell}') for cell in (0, 1)]
  assert [one['distill']['objective'] for one in found] == ['tvd', 'reverse_kl']
  assert ran == ['prepare'] * 3 and found[0]['seed'] == 7
  for cell in ('2', 'x'):
    status, _, err = command(capsys, *flags, f'--workdir={tmp_path / "two"}', f'--sweep={cell}')
    assert status == 2 and 'from 0 to 1' in err
  status, _, err = command(capsys, QUICKSTART, f'--workdir={tmp_path / "q"}', '--sweep=all')
  assert status == 2 and 'get_sweep()' in err


def test_a_cell_that_fails_leaves_the_others_to_run(capsys, tmp_path, monkeypatch):
  ran = []

  def fails_first(stage, config, workdir):
    ran.append(workdir.name)
    if workdir.name == 'cell-0':
      int('not a number')

  monkeypatch.setattr(main, '_run_stage', fails_first)
  (tmp_path / 'swept.py').write_text(SWEEP)
  status, _, err = command(capsys, f'--config={tmp_path / "swept.py"}', '--stages=prepare',
                           f'--workdir={tmp_path / "all"}', '--sweep=all')
  assert status == 1 and ran == ['cell-0', 'cell-1']
  assert 'invalid literal' in err and 'of 2 cells failed 0' in err

  def stopped(*_):
    ran.append('stopped')
    raise preemption.Stopped('at step 3')

  monkeypatch.setattr(main, '_run_stage', stopped)
  status, *_ = command(capsys, f'--config={tmp_path / "swept.py"}', '--stages=prepare',
                       f'--workdir={tmp_path / "again"}', '--sweep=all')
  assert status == 75 and ran[2:] == ['stopped']


def test_a_bucket_stands_in_every_path(capsys, tmp_path, ran):
  flags = (QUICKSTART, f'--workdir={tmp_path / "w"}', '--stages=prepare',
           '--config.task.name=xsum', '--config.task.data_dir={bucket}/tfds',
           '--config.task.max_length=1088')
  status, _, err = command(capsys, *flags)
  assert status == 2 and not ran
  assert "config.task.data_dir is '{bucket}/tfds' and config.bucket is None" in err
  assert command(capsys, *flags, f'--config.bucket={tmp_path}/')[0] == 0
  stored = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert stored['task']['data_dir'] == f'{tmp_path}/tfds' and 'bucket' not in stored
  assert ran == ['prepare']


def test_a_field_that_may_be_none_is_unset(capsys, tmp_path, ran):
  flags = (QUICKSTART, '--stages=prepare')
  assert command(capsys, *flags, f'--workdir={tmp_path / "w"}',
                 '--config.distill.train.clip_norm=None')[0] == 0
  stored = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert stored['distill']['train']['clip_norm'] is None
  assert command(capsys, *flags, f'--workdir={tmp_path / "v"}', '--config.distill=None')[0] == 0
  assert json.loads((tmp_path / 'v' / 'config.json').read_text())['distill'] is None
  status, _, err = command(capsys, *flags, f'--workdir={tmp_path / "u"}', '--config.seed=None')
  assert status == 2 and 'config.seed is set to None, and must have a value' in err
  status, _, err = command(capsys, *flags, f'--workdir={tmp_path / "u"}', '--config.distill=None',
                           '--config.distill.beta=None')
  assert status == 2 and 'config.distill.beta is set to None, and must have a value' in err


def test_a_sweep_forgets_the_programs_of_a_cell_before_the_next(capsys, tmp_path, monkeypatch):
  """They pile up until Linux grants no more memory mappings, and the process dies."""
  functions, alive = [], []

  def compiles(*_):
    alive.append(len(jax.devices()[0].client.live_executables()))
    functions.extend(jax.jit(lambda x, number=number: x * number) for number in range(5))
    for function in functions[-5:]:
      function(1.0)

  monkeypatch.setattr(main, '_run_stage', compiles)
  (tmp_path / 'swept.py').write_text(SWEEP)
  jax.clear_caches()
  assert command(capsys, f'--config={tmp_path / "swept.py"}', '--stages=prepare',
                 f'--workdir={tmp_path / "all"}', '--sweep=all')[0] == 0
  first, second = alive
  assert second < first + 5


def test_our_messages_are_shown_and_those_of_libraries_are_not(capsys, tmp_path, monkeypatch):
  def say(path, text):
    exec(compile(f'logging.info({text!r})', path, 'exec'), dict(logging=logging))

  def stage(*_):
    say(main.__file__, 'sampling 7 continuations')
    say('/packages/orbax/checkpoint/manager.py', 'one of dozens')

  # As a library adds one where it is imported.
  handler = std_logging.StreamHandler(sys.stdout)
  monkeypatch.setattr(std_logging.root, 'handlers', [*std_logging.root.handlers, handler])
  monkeypatch.setattr(main, '_run_stage', stage)
  before = logging.get_verbosity()
  for _ in range(2):  # the cells of a sweep are one process
    (tmp_path / 'done' / 'prepare.json').unlink(missing_ok=True)
    status, out, err = command(capsys, QUICKSTART, f'--workdir={tmp_path}', '--stages=prepare')
    assert status == 0 and (out + err).count('sampling 7 continuations') == 1
    assert 'dozens' not in out + err
  assert logging.get_verbosity() == before


def test_the_unexpected_keeps_its_traceback(tmp_path, monkeypatch):
  """A ValueError that no `raise` statement of ours made is a bug, not a sentence."""
  monkeypatch.setattr(main, '_run_stage', lambda *_: int('not a number'))
  with pytest.raises(ValueError, match='invalid literal'):
    main.main(['main', QUICKSTART, f'--workdir={tmp_path}', '--stages=prepare'])


def test_a_stage_may_end_in_a_sentence_too(capsys, tmp_path):
  status, _, err = command(
      capsys, f'--config={ROOT / "configs" / "local_files.py"}', f'--workdir={tmp_path}',
      f'--config.task.train_files={tmp_path / "missing.jsonl"}', '--stages=prepare')
  assert status == 2 and err.startswith('error: ') and 'missing.jsonl' in err
  assert not (tmp_path / 'done' / 'prepare.json').exists()


def test_the_module_runs_as_a_command_and_helps():
  run = lambda *arguments: subprocess.run(
      [sys.executable, '-m', 'specdistill_jax.main', *arguments], cwd=ROOT, text=True,
      capture_output=True)
  helped = run('--help')
  assert helped.returncode == 0
  assert '--workdir' in helped.stdout and '--stages' in helped.stdout
  assert run().returncode == 2


def test_local_sh_says_how_it_is_used():
  done = subprocess.run(['bash', ROOT / 'launch' / 'local.sh'], text=True, capture_output=True)
  assert done.returncode == 2 and 'usage' in done.stderr


@pytest.mark.parametrize('script', ['launch/local.sh', 'tests/run.sh', '.ci/run'])
def test_scripts_are_executable(script):
  assert os.access(ROOT / script, os.X_OK)
