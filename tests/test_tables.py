"""The tables command: studies side by side, made from their rows alone."""

import csv

import pytest

import results
from specdistill_jax import tables
from specdistill_jax.evaluation import summary


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """A study with chains, with rows of an older configuration, and one with a tree as well."""
  first, second = (tmp_path_factory.mktemp(name) for name in ('chains', 'trees'))
  old = [dict(row, config_hash='old', block_efficiency=99.0) for row in results.study()]
  results.write(first, old + results.study())
  results.write(second, [dict(row, draft='fspad 1x320', draft_parameters=2_600_000)
                         for row in results.tree_study()])
  return [first, second]


def test_cells_are_those_of_the_summaries(workdirs):
  header, lines = tables.table(workdirs, samples=50)
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
  assert tables.main(['tables', f'--workdir={path}', '--figure=speedup', '--format=csv']) == 0
  rows = list(csv.reader(capsys.readouterr().out.splitlines()))
  assert len(rows) == 7 and len({len(row) for row in rows}) == 1
  assert tables.main(['tables', f'--workdir={path}', '--format=latex']) == 0
  written = capsys.readouterr().out.splitlines()
  assert written[0] == r'\begin{tabular}{lllllllll}' and written[2].endswith(r'T=1, eagle1 \\')
  assert r'DistillSpec (forward\_kl, draft)' in written[6]
  assert tables.main(['tables', f'--workdir={path}']) == 0
  assert capsys.readouterr().out.startswith('| draft | parameters | method | seeds | T=0, γ=3 |')


@pytest.mark.parametrize('arguments, sentence', [
    ([], '--workdir is missing'), (['--workdir=/nowhere'], '/nowhere has no results.jsonl'),
    (['--workdir=W', '--figure=tau'], 'figure'), (['W'], "'W' is no flag")])
def test_errors_are_one_sentence(arguments, sentence, capsys):
  assert tables.main(['tables', *arguments]) == 2
  shown = capsys.readouterr().err.strip()
  assert shown.startswith('error: ') and sentence in shown and '\n' not in shown
