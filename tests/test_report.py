"""The report says what the rows say, favourable or not."""

import dataclasses
import json

import numpy as np
import pytest

import results
from specdistill_jax.evaluation import answers
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.stages import cells
from specdistill_jax.stages import distill
from specdistill_jax.stages import report

DISTILLED = 'DistillSpec (forward_kl, draft)'


def summaries_of(**kwargs):
  return summary_lib.summarise(results.study(**kwargs), samples=100)


@pytest.fixture(scope='module')
def summaries():
  return summaries_of()


def find(summaries, method, gamma, temperature=1.0):
  return next(s for s in summaries
              if (s.method, s.gamma, s.temperature) == (method, gamma, temperature))


def test_seeds_are_pooled_by_sums(summaries):
  rows = [row for row in results.study() if row['objective'] == 'forward_kl'
          and row['gamma'] == 5 and row['temperature'] == 1.0]
  counts = np.sum([np.sum(row['counts'], axis=0) for row in rows], axis=0)
  found = find(summaries, DISTILLED, 5)
  assert found.num_seeds == 2
  assert found.block_efficiency == pytest.approx(counts[0] / counts[1])
  assert found.block_efficiency_interval[0] < found.block_efficiency
  assert found.block_efficiency < found.block_efficiency_interval[1]
  reached = np.sum([row['reached_by_position'] for row in rows], axis=0)
  accepted = np.sum([row['accepted_by_position'] for row in rows], axis=0)
  assert found.acceptance_by_position == pytest.approx(list(accepted / reached))


def test_methods_are_told_apart(summaries):
  assert {s.method for s in summaries} == {'standard SD', 'control', DISTILLED}
  assert [s.is_distilled for s in summaries] == [s.method == DISTILLED for s in summaries]
  assert len(summaries) == 2 * 2 * 3


def test_a_row_written_twice_counts_once():
  rows = results.study()
  once, twice = (summary_lib.summarise(made, samples=10) for made in (rows, rows + rows[:1]))
  assert [s.num_seeds for s in once] == [s.num_seeds for s in twice]


def test_gains_are_ratios_of_pooled_figures(summaries):
  one, other = find(summaries, DISTILLED, 5), find(summaries, 'standard SD', 5)
  gain, (low, high) = summary_lib.gain_in_block_efficiency(one, other, samples=100)
  assert gain == pytest.approx(one.block_efficiency / other.block_efficiency)
  assert 1.0 < low < gain < high
  alpha, _ = summary_lib.gain_in_alpha(one, other, samples=100)
  assert alpha == pytest.approx(one.alpha - other.alpha)
  speed, _ = summary_lib.gain_in_speed(one, other, samples=100)
  assert speed == pytest.approx(one.tokens_per_second / other.tokens_per_second)
  same, interval = summary_lib.gain_in_block_efficiency(one, one, samples=100)
  assert same == 1.0 and interval == (1.0, 1.0)  # paired: what is common cancels


def test_table_has_the_target_alone_and_every_method(summaries):
  header, lines = report.table(summaries)
  assert len(lines) == len(summaries) + 2 and all(len(line) == len(header) for line in lines)
  alone = [line for line in lines if line[2] == report.TARGET_ALONE]
  assert len(alone) == 2 and all('1.00x' in line for line in alone)
  assert 'accuracy' not in ' '.join(header)


def test_quality_stands_beside_the_target_quality():
  rows = [dict(row, quality_metric='accuracy', quality=30.0 + row['seed'], target_quality=33.0)
          for row in results.study()]
  header, lines = report.table(summary_lib.summarise(rows, samples=10))
  assert header[-1] == 'accuracy (%)'
  assert {line[-1] for line in lines} == {'33.0', '30.0', '30.5'}  # target, one seed, two


def test_a_lossy_row_says_so():
  rows = [dict(row, lossless=False) for row in results.study()]
  _, lines = report.table(summary_lib.summarise(rows, samples=10))
  assert all('lossy' in line[2] for line in lines if line[2] != report.TARGET_ALONE)


def test_answers_of_a_success(summaries):
  bought, faster, prediction, length = answers.write(summaries, samples=100)
  assert 'a loss' not in bought and 'not distinguishable' not in bought
  assert 'against the control' in bought
  assert faster.count(': yes;') == 2
  assert 'c = 0.10 and v = 1.40' in prediction and 'too far' not in prediction
  assert f'{DISTILLED} at temperature 0: by the clock γ = 5 is best, γ = 4 is predicted' in length
  assert 'standard SD at temperature 0: by the clock γ = 3 is best, γ = 1 is predicted' in length
  assert length.count(' predicted to be best (') == 6 and 'x at 4*; ' in length
  assert 'too far' not in length and faster.count(' at its best γ = ') == 2
  assert length.count('\n- ') == 6 and '\n\nSpeed-ups predicted' in length  # a list
  assert length.count('x by the clock') == 12 and 'x at 3, ' in length


def test_a_single_batch_makes_no_decoding_clearly_faster(summaries):
  alone = [dataclasses.replace(s, speedup_measured_interval=None) for s in summaries]
  _, faster, *_ = answers.write(alone, samples=100)
  assert faster.count(': not clearly;') == 2


def test_answers_of_a_failure_are_honest():
  """Drafts that agree rarely, distillation without effect, a clock that says slower."""
  bought, faster, *_ = answers.write(
      summaries_of(plain=0.3, distilled=0.3, slowdown=2.0), samples=100)
  assert 'not distinguishable from no change' in bought
  assert faster.count('no, it is slower') == 2 and 'yes' not in faster
  bought, *_ = answers.write(summaries_of(plain=0.7, distilled=0.3), samples=100)
  assert 'a loss' in bought


def test_trees_are_compared_with_the_fastest_chain():
  """Their levels are what costs, not their nodes; methods are compared along chains."""
  summaries = summary_lib.summarise(results.tree_study(), samples=50)
  one = next(s for s in summaries if s.is_tree and s.is_distilled)
  assert (one.drafted_per_call, one.gamma) == (25.0, 5)
  assert one.speedup_predicted == pytest.approx(
      one.block_efficiency / (5 * results.COST_RATIO + results.VERIFY_RATIO[5]))
  assert not any(s.is_tree for s in summary_lib.headline(summaries))
  bought, = [text for text in answers.write(summaries, samples=50) if 'What do trees buy' in text]
  assert f'{DISTILLED}, exact, tree eagle1, at temperature 1: 25 nodes in 5 levels' in bought
  assert 'the speed of its fastest chain, γ = ' in bought and 'standard SD' in bought
  _, lines = report.table(summaries)
  assert ('1', '5', DISTILLED, 'exact, tree eagle1') in [line[:4] for line in lines]


def test_prediction_off_by_half_is_said_and_chooses_nothing():
  _, _, prediction, length = answers.write(summaries_of(slowdown=2.0), samples=50)
  assert 'on average 50 %' in prediction and 'too far to choose by' in prediction
  assert 'predicted to be' not in length and 'too far from the clock' in length
  assert length.count(': by the clock the target alone is fastest (') == 6


def test_one_length_that_was_run_is_not_called_the_best(summaries):
  _, faster, _, length = answers.write([s for s in summaries if s.gamma == 5], samples=50)
  assert ' at γ = 5 runs at ' in faster and 'best' not in faster
  assert length.count(': only γ = 5 was run, γ = ') == 6


def test_report_and_plots(tmp_path, capsys):
  config = results.config()
  results.write(tmp_path, results.study())
  report.run(config, tmp_path)
  text = (tmp_path / 'report.md').read_text()
  for name in ('block_efficiency', 'speedup', 'acceptance_by_position', 'training_alpha'):
    assert f'({name}.png)' in text
    content = (tmp_path / f'{name}.png').read_bytes()
    assert content.startswith(b'\x89PNG') and len(content) > 10_000
  assert '| target alone |' in text and DISTILLED in text
  assert not list(tmp_path.glob('*.tmp'))
  report.show(config, tmp_path)
  assert 'target alone' in capsys.readouterr().out


def test_categories_have_a_table_of_their_own_and_change_no_other(tmp_path):
  made = results.study()
  results.write(tmp_path, made)
  report.run(results.config(), tmp_path)
  before = (tmp_path / 'report.md').read_text()
  assert 'By category' not in before
  for category, tau, speedup in (('poems', 1.5, 0.8), ('maths', 3.25, 2.0)):
    for row in made:
      emitted = np.full(4, 26.0)
      counts = dict(zip(rows.COUNTS, np.zeros((len(rows.COUNTS), 4))))
      counts |= dict(emitted=emitted, target_calls=emitted / tau, seconds=1 + 0 * emitted,
                     autoregressive_emitted=emitted, autoregressive_seconds=speedup + 0 * emitted,
                     overlap=emitted, overlap_tokens=emitted)
      line = np.stack([counts[name] for name in rows.COUNTS], axis=1).tolist()
      rows.append(tmp_path / 'results.jsonl', row | dict(category=category, counts=line))
  report.run(results.config(), tmp_path)
  whole, _, section = (tmp_path / 'report.md').read_text().partition('## By category')
  assert whole == before.partition('## Plots')[0]
  assert '| T | γ | method | maths (4) | poems (4) |' in section
  assert f'| 1 | 3 | {DISTILLED} | 3.25, 2.00x | 1.50, 0.80x |' in section


def test_curves_leave_other_stages_out(tmp_path):
  results.write(tmp_path, [])
  found = report.curves(tmp_path / 'metrics.jsonl')
  assert set(found) == {DISTILLED, 'control'}
  assert [points[-1] for points in found[DISTILLED]] == [(100, 0.7), (100, 0.71)]


def test_a_line_of_training_that_a_kill_cut_stops_no_table(tmp_path):
  results.write(tmp_path, [])
  path = tmp_path / 'metrics.jsonl'
  arm = 'forward_kl-draft-seed0'
  whole = json.dumps(dict(stage='distill', run=arm, step=100, validation_cross_entropy=1.5))
  path.write_text(path.read_text() + whole + '\n' + whole[:-9])
  assert set(report.curves(path)) == {DISTILLED, 'control'}
  config = results.config()
  assert cells._training(config, [tmp_path])['forward_kl', 'draft'] == dict(cross_entropy=1.5)


def test_a_time_that_nobody_knows_is_left_blank(tmp_path):
  config = results.config()
  path = tmp_path / 'done' / 'distill.json'
  path.parent.mkdir()
  for seconds, figures in ((600.0, dict(distill_seconds=150.0)), (None, {})):
    path.write_text(json.dumps(dict(stage='distill', wall_seconds=seconds, attempts=2)))
    assert cells._training(config, [tmp_path])['forward_kl', 'draft'] == figures
  assert report._wall_times(tmp_path) == 'distill unknown (an attempt was killed)'


def test_arms_of_another_study_have_no_cost_here_and_the_report_says_whose_they_are(tmp_path):
  config = results.config()
  config.distill.init_from = 'runs/other/distill'
  path = tmp_path / 'done' / 'distill.json'
  path.parent.mkdir()
  path.write_text(json.dumps(dict(stage='distill', wall_seconds=1.0, attempts=1)))
  assert not cells._training(config, [tmp_path])['forward_kl', 'draft']
  assert report._origins(config) == ' Imported: distilled drafts from `runs/other/distill`.'
  config.distill = None
  assert report._origins(config) == ''


def test_an_objective_with_a_hyphen_has_curves_and_a_table(tmp_path):
  arm = 'lk_hybrid,eta=1e-3-draft-seed0'
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(
      dict(stage='distill', run=arm, step=1, validation_alpha=0.5)) + '\n')
  found = report.curves(tmp_path / 'metrics.jsonl')
  assert found == {'DistillSpec (lk_hybrid,eta=1e-3, draft)': [[(1, 0.5)]]}
  config = results.config()
  config.distill.update(objective='lk_hybrid,eta=1e-3', data_source='draft', seeds=(0, 12))
  assert [distill.parse_arm(name) for name in distill.arm_names(config)][::2] == [
      ('lk_hybrid,eta=1e-3', 'draft', 0), ('lk_hybrid,eta=1e-3', 'draft', 12)]
  assert {setting.objective: seeds for setting, seeds in cells.wanted(config).items()}[
      'lk_hybrid,eta=1e-3'] == (0, 12)
  with pytest.raises(ValueError, match="'target' is the name of no arm; it must be <objective>"):
    distill.parse_arm('target')


def test_rows_of_another_config_are_left_out(tmp_path):
  results.write(tmp_path, [dict(row, config_hash='other') for row in results.study()[:2]])
  with pytest.raises(ValueError, match='no line of this config'):
    report.load_rows(results.config(), tmp_path)
