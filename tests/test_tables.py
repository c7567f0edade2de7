"""The tables command: studies side by side and papers' tables, made from their rows alone."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import common
import results
from specdistill_jax import main
from specdistill_jax import tables
from specdistill_jax.evaluation import formats
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import summary
from specdistill_jax.evaluation import table_plots
from specdistill_jax.evaluation import tradeoff
from specdistill_jax.stages import cells
from specdistill_jax.stages import config_files
from specdistill_jax.stages import places
from specdistill_jax.stages import workdirs as workdirs_lib
from specdistill_jax.training import preemption


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """A study with chains, with rows of an older configuration, and one with a tree as well."""
  first, second = (tmp_path_factory.mktemp(name) for name in ('chains', 'trees'))
  old = [dict(row, config_hash='old', block_efficiency=99.0) for row in results.study()]
  results.write(first, old + results.study())
  results.write(second, [dict(row, draft='fspad 1x320', draft_parameters=2_600_000)
                         for row in results.tree_study()])
  return [first, second]


def test_a_draft_that_several_cells_decode_is_one_point(tmp_path, monkeypatch):
  def line(cell, method, cross_entropy, block_efficiency):
    return types.SimpleNamespace(
        about=dict(cell=cell, temperature=0.0, category=None), method=method,
        training=dict(cross_entropy=cross_entropy), summary=types.SimpleNamespace(
            block_efficiency=block_efficiency, block_efficiency_interval=None))
  shown = []
  monkeypatch.setattr(tradeoff, 'save', lambda figure, handles, *_, **__: shown.extend(handles))
  table_plots.scatter([line('a', 'standard SD', 1.0, 2.0), line('a', 'SeqKD', 1.0, 2.5),
                       line('b', 'standard SD', 1.0, 2.0), line('b', 'SeqKD', 1.0, 2.6)],
                      tmp_path / 'x.png', 'cross_entropy', 'nats')
  assert shown == ['standard SD', 'a: SeqKD', 'b: SeqKD']


def test_cells_are_those_of_the_summaries(workdirs):
  header, lines = tables.table(tables.summaries(workdirs, samples=50)[0])
  assert header.pop(0) == 'study'
  assert [line.pop(0) for line in lines] == [str(workdirs[0])] * 3 + [str(workdirs[1])] * 3
  assert header == ['draft', 'parameters', 'method', 'seeds', 'T=0, γ=3', 'T=0, γ=5', 'T=1, γ=3',
                    'T=1, γ=5', 'T=1, eagle1']
  assert [line[:4] for line in lines] == [
      ['decoder 1x96', '0.2M', 'standard SD', '1'], ['decoder 1x96', '0.2M', 'control', '2'],
      ['decoder 1x96', '0.2M', 'DistillSpec (forward_kl, draft)', '2'],
      ['fspad 1x320', '2.6M', 'standard SD', '1'], ['fspad 1x320', '2.6M', 'control', '1'],
      ['fspad 1x320', '2.6M', 'DistillSpec (forward_kl, draft)', '1']]
  found = {(s.method, s.temperature, s.gamma): s
           for s in summary.summarise(results.study(), samples=50)}
  expected = found['DistillSpec (forward_kl, draft)', 1.0, 3]
  low, high = expected.block_efficiency_interval
  assert lines[2][6] == f'{expected.block_efficiency:.2f} [{low:.2f}, {high:.2f}]'
  assert all(not line[8] for line in lines[:3]) and lines[5][8] and not lines[4][8]


def test_other_figures_and_formats(workdirs, capsys):
  path = ','.join(map(str, workdirs))
  few = '--bootstrap_samples=20'
  assert tables.main(['tables', f'--workdir={path}', '--figure=speedup', '--format=csv', few]) == 0
  rows = list(csv.reader(capsys.readouterr().out.splitlines()))
  assert len(rows) == 7 and len({len(row) for row in rows}) == 1
  assert tables.main(['tables', f'--workdir={path}', '--format=latex', few]) == 0
  written = capsys.readouterr().out.splitlines()
  assert written[0] == r'\begin{tabular}{llllllllll}' and written[2].endswith(r'T=1, eagle1 \\')
  assert r'DistillSpec (forward\_kl, draft)' in written[6]
  assert tables.main(['tables', f'--workdir={path}', few]) == 0
  out, err = capsys.readouterr()
  assert out.startswith('| study | draft | parameters | method | seeds | T=0, γ=3 |')
  older = len(results.study())
  assert err == f'{workdirs[0]}: {older} rows are of an older configuration and left out.\n'


def test_studies_of_one_draft_keep_their_lines(workdirs, tmp_path, capsys):
  """Nor do figures of other targets pass for figures of one."""
  other = [dict(row, task='else', block_efficiency=9.0, counts=[
      [2 * count if name == 'emitted' else count for name, count in zip(rows.COUNTS, prompt)]
      for prompt in row['counts']]) for row in results.study()]
  results.write(tmp_path, other)
  few = ['--bootstrap_samples=20', '--format=csv']
  def lines(*folders):
    assert tables.main(['tables', f'--workdir={",".join(map(str, folders))}', *few]) == 0
    out, err = capsys.readouterr()
    return list(csv.reader(out.splitlines()))[1:], err
  (first, _), (second, alone) = lines(workdirs[0]), lines(tmp_path)
  both, told = lines(tmp_path, workdirs[0])
  assert [line[1:] for line in both] == second + first and first != second
  assert 'other tasks or targets' in told and 'other tasks' not in alone
  assert 'other tasks' not in lines(workdirs[0], workdirs[1])[1]


def test_studies_of_one_task_and_other_data_are_told(tmp_path):
  folders = [tmp_path / name for name in ('first', 'same', 'other', 'unknown')]
  for folder in folders:
    folder.mkdir()
    results.write(folder, results.study())
    config = results.config()
    config.task.data_dir = str(folder)
    if folder.name == 'other':
      config.task.train_files = ('mine.jsonl',)
    if folder.name != 'unknown':
      (folder / 'config.json').write_text(json.dumps(workdirs_lib.to_json(config)))
  told, = tables.summaries(folders, samples=5)[1]
  assert told == (f'The data of {folders[0]} (here) and of {folders[2]} (there) are not the same, '
                  "so that their figures may not be comparable: train_files is ['mine.jsonl'] "
                  'there and [] here.')


# Tables of papers: a config of two cells, rows whose figures are known.

CONFIG = '''
"""An imaginary table: two sources of data, two divergences, three arms."""
from configs import common
CELLS = {'': ('fixed', 'draft'), 'small': ('fixed', 'draft')}
PLOTS = ('bars', 'heat_map', 'pareto')
PUBLISHED = common.published(
    'block efficiency', 'An & Other', 'paper', (dict(temperature=1.0),),
    ((dict(cell='fixed', objective='tvd'), (3.1,)), (dict(cell='draft', objective='tvd'), (None,)),
     (dict(cell='elsewhere'), (9.9,))))
def baseline(cell):
  return dict(objective='none')
def study(cell):
  config = common.study(f'imaginary_{cell}')
  config.distill.update(data_source=cell, also=('tvd',), seeds=(0, 1), control=False)
  config.evaluate.update(gammas=(3,), temperatures=(1.0,))
  return config
def get_config(arg=''):
  return study(common.cell_of(arg, CELLS)[1])
def get_sweep(arg=''):
  return common.sweep({cell: study(cell) for cell in CELLS[common.scale_of(arg, CELLS)]},
                      {'draft': dict(target=('fixed', 'target'), draft=('fixed', 'draft'))})
'''
CALLS = np.array([1, 1, 1, 40] * 3)  # prompts are not alike


def line(cell, objective, seed, tau, **fields):
  """A row of block efficiency `tau` on every single prompt, twice as fast as it is by seconds."""
  emitted = 24.0 * CALLS
  columns = dict(emitted=emitted, target_calls=emitted / tau, seconds=emitted / tau,
                 autoregressive_emitted=emitted, autoregressive_seconds=2 * emitted,
                 overlap=emitted / 2, overlap_tokens=emitted, drafted=3 * emitted / tau)
  counts = np.stack([columns[name] for name in rows.COUNTS], axis=1).tolist()
  made = results.row(np.random.default_rng(0), 'h', objective=objective, seed=seed, alpha=0.5,
                     data_source=None if objective == 'none' else cell, temperature=1.0, gamma=3)
  return made | dict(study=f'imaginary_{cell}', counts=counts, block_efficiency=tau) | fields


def cell_rows(cell, objectives=('forward_kl', 'tvd'), seeds=(0, 1), **fields):
  made = [line(cell, 'none', 0, 2.0, **fields)]
  return made + [line(cell, objective, seed, 3.0 if objective == 'tvd' else 2.5, **fields)
                 for objective in objectives for seed in seeds]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('configs') / 'imaginary.py'
  path.write_text(CONFIG)
  return str(path)


def write(workdir, made):
  workdir.mkdir(parents=True, exist_ok=True)
  for one in made:
    rows.append(workdir / 'results.jsonl', one)


def run(capsys, *arguments):
  """Lines of the table by (cell, method), and what standard error says."""
  assert tables.main(['tables', '--bootstrap_samples=50', '--format=csv', *arguments]) == 0
  out, err = capsys.readouterr()
  header, *lines = csv.reader(out.splitlines())
  return {(one[0], one[header.index('method')]): dict(zip(header, one)) for one in lines}, err


def name(objective, source):
  return f'{"DistillSpec" if "draft" in source else "distilled"} ({objective}, {source})'




def test_figures_gains_and_what_was_published_stand_in_one_line(config, tmp_path, capsys):
  write(tmp_path / 'cell-0', cell_rows('fixed'))
  write(tmp_path / 'cell-1', cell_rows('draft'))
  found, err = run(capsys, f'--config={config}', f'--workdir={tmp_path}')
  assert len(found) == 6 + 2 and 'python -m' not in err  # the target alone, of each cell
  mine = found['fixed', name('tvd', 'fixed')]
  assert (mine['seeds'], mine['decoding'], mine['T']) == ('2', 'γ=3', '1')
  assert mine['block efficiency'] == '3.00 [3.00, 3.00]'
  assert mine['speed-up'] == '6.00x [6.00, 6.00]'
  # A difference, since the config draws a heat map; by prompt, so that it has no spread.
  gain = 'gain in block efficiency over standard SD'
  assert mine[gain] == '+1.00 [+1.00, +1.00]' and not found['fixed', 'standard SD'][gain]
  assert mine['published'] == '3.10'
  assert mine['published: what, where, trust'] == 'block efficiency, An & Other (paper)'
  assert found['draft', name('tvd', 'draft')]['published'] == 'not known'
  assert not found['fixed', name('forward_kl', 'fixed')]['published']
  assert '1 published figures stand beside no line' in err
  assert tables.main(['tables', f'--config={config}', f'--workdir={tmp_path}']) == 0
  assert '| elsewhere | 9.90 |' in capsys.readouterr().out


def test_gains_are_paired_by_prompt(tmp_path, capsys):
  """Each prompt gains half as much again, however far prompts are from one another."""
  path = tmp_path / 'ratios.py'
  path.write_text(CONFIG.replace("'bars', 'heat_map', 'pareto'", "'bars',"))
  made = cell_rows('fixed')
  for row in made:
    counts = np.array(row['counts'])
    counts[:, rows.COUNTS.index('target_calls')] *= np.resize([0.5, 1, 1, 0.9, 1.5], len(counts))
    row['counts'] = counts.tolist()
  write(tmp_path / 'cell-0', made)
  found, _ = run(capsys, f'--config={path}', f'--workdir={tmp_path}')
  mine = found['fixed', name('tvd', 'fixed')]
  assert mine['gain in block efficiency over standard SD'] == '+50.0 % [+50.0, +50.0]'
  low, high = map(float, mine['block efficiency'].partition('[')[2].rstrip(']').split(', '))
  assert high - low > 0.1


def test_categories_have_a_mean_in_which_each_has_as_much_weight(config, tmp_path, capsys):
  """A published one stands beside it, or beside all prompts where there are no categories."""
  path = tmp_path / 'means.py'
  path.write_text(CONFIG.replace('dict(temperature=1.0),)',
                                 'dict(temperature=1.0, category=common.MEAN),)'))
  assert common.MEAN == summary.MEAN
  few, many = (line('fixed', 'tvd', seed, tau, category=category)
               for seed in (0, 1) for tau, category in ((2.0, 'few'), (4.0, 'many'))), []
  for row in few:
    if row['category'] == 'few':
      row['counts'] = row['counts'][:1]
    many.append(row)
  whole = [line('fixed', 'tvd', seed, 1.0) for seed in (0, 1)]
  for row in whole:
    row['counts'] = sum((one['counts'] for one in many if one['seed'] == row['seed']), [])
  write(tmp_path / 'cell-0', many + whole)
  write(tmp_path / 'cell-1', cell_rows('draft'))
  asked = f'--config={path}', f'--workdir={tmp_path}', '--bootstrap_samples=50', '--format=csv'
  assert tables.main(['tables', *asked]) == 0
  found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
  mine = {one['category']: one for one in found if (one['cell'], one['method']) == (
      'fixed', name('tvd', 'fixed'))}
  assert list(mine) == ['all', 'mean of categories', 'few', 'many']
  tau = {category: float(one['block efficiency'].split()[0]) for category, one in mine.items()}
  assert (tau['few'], tau['many'], tau['mean of categories']) == (2.0, 4.0, 3.0)
  assert tau['all'] > 3.9
  assert mine['mean of categories']['α'].startswith('0.50')
  assert [one['published'] for one in mine.values()] == ['', '3.10', '', '']
  other, = (one for one in found if one['method'] == name('tvd', 'draft'))
  assert other['published'] == 'not known'


def test_speeds_of_different_devices_are_not_compared(config, tmp_path, capsys):
  made = cell_rows('fixed', ('tvd',))
  for row in made:
    row['device'] = 'TPU v4' if row['objective'] == 'none' else 'TPU v5e'
  write(tmp_path / 'cell-0', made)
  write(tmp_path / 'cell-1', cell_rows('draft', ('tvd',)))
  found, _ = run(capsys, f'--config={config}', f'--workdir={tmp_path}', '--figure=speed')
  mine, other = (found[cell, name('tvd', cell)] for cell in ('fixed', 'draft'))
  assert mine['gain in speed over the baseline'] == ''
  assert mine['baseline'] == 'standard SD, not compared: on TPU v4'
  assert other['gain in speed over the baseline'] and other['baseline'] == 'standard SD'
  found, _ = run(capsys, f'--config={config}', f'--workdir={tmp_path}')  # tokens, not times
  assert found['fixed', name('tvd', 'fixed')]['gain in block efficiency over standard SD']


def test_different_metrics_are_told_apart(config, tmp_path, capsys):
  for number, (cell, metric) in enumerate((('fixed', 'bleu'), ('draft', 'rouge2'))):
    write(tmp_path / f'cell-{number}', cell_rows(
        cell, ('tvd',), quality=27.0, target_quality=27.0, quality_metric=metric))
  found, _ = run(capsys, f'--config={config}', f'--workdir={tmp_path}')
  assert [found[cell, name('tvd', cell)]['quality (%)'] for cell in ('fixed', 'draft')] == [
      '27.0 bleu', '27.0 rouge2']


def test_missing_failed_and_unfinished_lines_each_say_so_with_their_command(
    config, tmp_path, capsys):
  write(tmp_path / 'cell-0', cell_rows('fixed', ('forward_kl',), seeds=(0,)))
  where = (f'--config={config}:small', f'--workdir={tmp_path}', '--config.evaluate.num_prompts=12')
  found, err = run(capsys, *where)
  assert found['fixed', name('forward_kl', 'fixed')]['seeds'] == '1 of 2 seeds'
  assert found['fixed', name('tvd', 'fixed')]['α'] == 'missing'
  assert found['draft', 'standard SD']['α'] == 'missing'
  command = (f'  python -m specdistill_jax.main --config={config}:small '
             f'--workdir={tmp_path}/cell-{{0}} --sweep={{0}} --config.evaluate.num_prompts=12')
  assert err.splitlines()[-4:] == ['cell 0, fixed, is not finished:', command.format(0),
                                   'cell 1, draft, has not run:', command.format(1)]
  workdirs_lib.record_failure(tmp_path / 'cell-0', 'distill', OSError('no\nroom'))
  found, err = run(capsys, *where)
  assert found['fixed', name('tvd', 'fixed')]['α'] == 'failed'
  assert found['fixed', 'standard SD']['α'].startswith('0.50')
  assert 'cell 0, fixed, failed in stage distill, OSError: no room:' in err


def test_a_failed_stage_leaves_a_trace_until_it_ends_well(tmp_path, monkeypatch):
  study, faults = common.study('x'), [ArithmeticError('boiled over'), preemption.Stopped('asked')]
  def stage(*_):
    if faults:
      raise faults.pop(0)
  monkeypatch.setattr(main, '_run_stage', stage)
  with pytest.raises(ArithmeticError):
    main.run(study, tmp_path, ['prepare'])
  trace = json.loads(workdirs_lib.failed_path(tmp_path).read_text())
  assert trace == dict(stage='prepare', error='ArithmeticError', message='boiled over')
  workdirs_lib.forget_failure(tmp_path)
  with pytest.raises(preemption.Stopped):
    main.run(study, tmp_path, ['prepare'])
  assert not workdirs_lib.failed_path(tmp_path).exists()
  workdirs_lib.record_failure(tmp_path, 'prepare', ValueError())
  main.run(study, tmp_path, ['prepare'])
  assert not workdirs_lib.failed_path(tmp_path).exists()


def test_cells_of_several_folders_are_one_table(config, tmp_path, capsys):
  write(tmp_path / 'a' / 'cell-1', cell_rows('draft'))
  write(tmp_path / 'b', cell_rows('fixed'))  # a workdir of its own
  stored = workdirs_lib.to_json(config_files.load(config)) | dict(seed=3)
  (tmp_path / 'b' / 'config.json').write_text(json.dumps(stored))
  found, err = run(capsys, f'--config={config}', f'--workdir={tmp_path}/a,{tmp_path}/b')
  assert all(one['block efficiency'] for one in found.values())
  assert (f'{tmp_path}/b was run with other settings than the config has: seed is 3 there and 0 '
          'here.') in err


def test_foreign_and_doubled_rows_are_left_out_and_told(config, tmp_path, capsys):
  foreign = [line('fixed', 'tvd', 7, 9.0), line('fixed', 'tvd', 0, 9.0, study='quickstart'),
             line('fixed', 'tvd', 0, 9.0, temperature=0.5)]
  old = [line('fixed', 'tvd', 0, 9.0, config_hash='old')]
  write(tmp_path / 'cell-0', [*old, *cell_rows('fixed'), line('fixed', 'tvd', 1, 9.0), *foreign])
  found, err = run(capsys, f'--config={config}', f'--workdir={tmp_path},{tmp_path}/none')
  assert found['fixed', name('tvd', 'fixed')]['block efficiency'] == '3.00 [3.00, 3.00]'
  assert '3 rows are foreign to the table and left out: study imaginary_fixed, tvd, T=1' in err
  assert '1 rows are of settings that are there already' in err
  assert f'{tmp_path}/cell-0: 1 rows are of an older configuration and left out.' in err
  assert f'{tmp_path}/none has no cell of this table yet' in err


def test_speed_of_the_target_alone_is_a_line_to_compare_with(config, tmp_path, capsys):
  fields = dict(quality=40.0, target_quality=50.0, quality_metric='rouge2')
  write(tmp_path / 'cell-0', cell_rows('fixed', **fields))
  altered = tmp_path / 'alone.py'
  altered.write_text(CONFIG.replace("return dict(objective='none')",
                                    "return dict(cell='fixed', objective='target')"))
  found, _ = run(capsys, f'--config={altered}', f'--workdir={tmp_path}', '--figure=alpha')
  assert found['fixed', 'target alone']['rouge2 (%)'] == '50.0'
  found, _ = run(capsys, f'--config={altered}', f'--workdir={tmp_path}', '--figure=speed')
  mine = found['fixed', 'standard SD']
  assert mine['rouge2 (%)'] == '40.0' and mine['tokens/s'] == '2'
  # 2 tokens a second against one in 2 seconds.
  assert mine['gain in speed over target alone'] == '+1.50 [+1.50, +1.50]'


def test_a_line_that_is_decoded_otherwise_says_how_its_baseline_is(tmp_path, capsys):
  altered = tmp_path / 'tree.py'
  altered.write_text(CONFIG.replace("dict(objective='none')", "dict(tree='dynamic')").replace(
      'gammas=(3,)', "gammas=(3,), trees=('dynamic k2 d2 n4',)"))
  tree = dict(tree='dynamic k2 d2 n4', gamma=2, draft_sampling='greedy')
  write(tmp_path / 'cell-0', [line('fixed', 'none', 0, 2.0), line('fixed', 'none', 0, 4.0, **tree)])
  assert tables.main(['tables', f'--config={altered}', f'--workdir={tmp_path}', '--format=csv',
                      '--bootstrap_samples=50']) == 0
  header, *lines = csv.reader(capsys.readouterr().out.splitlines())
  chain = next(one for one in lines if one[header.index('decoding')] == 'γ=3'
               and one[header.index('method')] == 'standard SD')
  over = 'gain in block efficiency over standard SD, tree dynamic k2 d2 n4'
  assert chain[header.index(over)] == '-2.00 [-2.00, -2.00]'


def test_plots_are_drawn(config, tmp_path, capsys):
  fields = dict(quality=40.0, target_quality=50.0, quality_metric='rouge2')
  for number, cell in enumerate(('fixed', 'draft')):
    write(tmp_path / f'cell-{number}', cell_rows(cell, **fields))
  _, err = run(capsys, f'--config={config}', f'--workdir={tmp_path}', f'--plots={tmp_path}/p')
  for name in ('bars', 'heat_map', 'pareto'):
    path = tmp_path / 'p' / f'{name}.png'
    assert str(path) in err and path.read_bytes()[:4] == b'\x89PNG'


def test_latex_keeps_what_it_would_read_otherwise():
  written = formats.latex(['50 %_&#'], [['[3.1, 3.2] γ=7 ~^'], ['{a}\\b$']])
  assert written.splitlines()[2] == r'50 \%\_\&\# \\'
  assert written.splitlines()[4] == (
      r'{[3.1, 3.2] $\gamma$=7 \textasciitilde{}\textasciicircum{}} \\')
  assert written.splitlines()[5] == r'\{a\}\textbackslash{}b\$ \\'


def test_what_a_cell_takes_from_others_is_beside_it(config, tmp_path):
  cell = config_files.load(config, '1')
  assert cell.target.init_from == '{sweep}/cell-0/target' and cell.target.train.steps == 0
  found = places.resolved(cell, tmp_path / 'cell-1')
  assert found.draft.init_from == f'{tmp_path}/cell-0/draft'
  assert places.resolved(config_files.load(config), tmp_path).target.init_from is None
  with pytest.raises(ValueError, match='leave the cell out'):
    config_files.cells(f'{config}:small,draft')


def test_the_page_of_published_figures_is_up_to_date():
  """After a change of PUBLISHED: python -m specdistill_jax.tables --published."""
  page = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'published.md'
  assert page.read_text(encoding='utf-8') == tables.published_page() + '\n'


def test_plots_leave_a_notebook_its_own_backend():
  done = subprocess.run(
      [sys.executable, '-c', 'from specdistill_jax.evaluation import table_plots\n'
       'print(table_plots.plt.get_backend())'], cwd=pathlib.Path(__file__).parents[1],
      env=os.environ | dict(MPLBACKEND='svg'), text=True, capture_output=True, check=True)
  assert done.stdout == 'svg\n'


def test_studies_side_by_side_are_drawn_too(workdirs, tmp_path, capsys):
  found = ','.join(map(str, workdirs))
  assert tables.main(['tables', f'--workdir={found}', '--bootstrap_samples=50',
                      f'--plots={tmp_path / "plots"}']) == 0
  out, err = capsys.readouterr()
  assert '| fspad 1x320 |' in out and f'{tmp_path / "plots" / "bars.png"} is drawn.' in err
  assert (tmp_path / 'plots' / 'bars.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('arguments, sentence', [
    ([], '--workdir is missing'), (['--workdir=/nowhere'], '/nowhere does not exist'),
    (['--workdir=W', '--figure=tau'], 'figure'), (['W'], "'W' is no flag"),
    (['--workdir=W', '--figure=speed'], 'need --config'),
    (['--config=configs/none.py', '--workdir=W'], "'configs/none.py', which is not a file"),
    (['--config={config}:large', '--workdir=W'], "'large' names no study"),
    (['--config={config}', '--workdir=W', '--config.sed=1'], 'did you mean seed?'),
    (['--config={config}', '--workdir={other}'], "the study 'quickstart', which is no cell")])
def test_errors_are_one_sentence(arguments, sentence, config, tmp_path, capsys):
  (tmp_path / 'config.json').write_text('{"study": "quickstart"}')
  arguments = [one.format(config=config, other=tmp_path) for one in arguments]
  assert tables.main(['tables', *arguments]) == 2
  shown = capsys.readouterr().err.strip()
  assert shown.startswith('error: ') and sentence in shown and '\n' not in shown


def test_a_table_asks_for_the_draft_before_distillation_only_if_it_had_learnt_anything():
  path = pathlib.Path(__file__).resolve().parents[1] / 'configs' / 'feature_drafts.py'
  def objectives(draft):
    return {setting.objective for setting in cells.wanted(config_files.load(f'{path}:{draft}'))}
  assert objectives('standalone') == {'none', 'forward_kl'} and objectives('fspad') == {'feature'}
