"""The best draft length, the ways of a study, the frontier, and what the report makes of them."""

import numpy as np
import pytest

from configs import common
import results
from specdistill_jax.evaluation import advisor
from specdistill_jax.evaluation import answers
from specdistill_jax.evaluation import frontier
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.evaluation import ways
from specdistill_jax.stages import report

DISTILLED = 'DistillSpec (forward_kl, draft)'


def test_curve_is_leviathans_formula_where_acceptance_is_constant():
  """tau = (1 - a^(g+1)) / (1 - a), speed-up tau / (g c + 1) (Theorem 3.8), for v = 1."""
  alpha, cost = 0.8, 0.05
  points = advisor.curve([alpha] * 9, cost, {9: 1.0})
  for point in points:
    tau = (1 - alpha ** (point.gamma + 1)) / (1 - alpha)
    assert point.block_efficiency == pytest.approx(tau)
    assert point.speedup == pytest.approx(tau / (point.gamma * cost + 1))
  assert [point.gamma for point in points] == list(range(1, 10))
  speedups = [point.speedup for point in points]
  assert advisor.best(points).gamma == 1 + int(np.argmax(speedups)) == 8


def test_verification_is_interpolated_between_what_was_run_and_says_so():
  points = advisor.curve([0.5] * 5, 0.0, {1: 1.2, 5: 2.0})
  verify = [point.block_efficiency / point.speedup for point in points]
  np.testing.assert_allclose(verify, [1.2, 1.4, 1.6, 1.8, 2.0])
  assert [point.verify_measured for point in points] == [True, False, False, False, True]


def test_nothing_is_said_beyond_what_was_reached_or_run():
  assert len(advisor.curve([0.5, 0.5, None, None], 0.1, {4: 1.5})) == 2
  assert len(advisor.curve([0.5] * 4, 0.1, {2: 1.5})) == 2
  with pytest.raises(ValueError, match='no draft length was measured'):
    advisor.curve([], 0.1, {})


def test_no_draft_is_best_where_every_length_is_slower():
  assert advisor.best(advisor.curve([0.1] * 3, 0.5, {3: 2.0})) is None


def settings(**fields):
  made = common.study('x').evaluate
  made.update(dict(gammas=(3, 5)) | fields)
  return made


def test_ways_that_are_one_are_measured_once():
  rules = (('exact', 1.0), ('block', 1.0), ('linear', 1.0), ('linear', 0.5),
           ('greedy_lenience', 0.3), ('typical', 0.3))
  asked = settings(rules=rules, draft_sampling=('sampled', 'greedy'))
  greedy = ways.distinct(asked, 0.0)
  assert [(w.rule, w.draft_sampling, w.gamma) for w in greedy] == [
      ('exact', 'sampled', 3), ('exact', 'sampled', 5),
      ('greedy_lenience', 'sampled', 3), ('greedy_lenience', 'sampled', 5)]
  warm = ways.distinct(asked, 1.0)
  assert [w.rule for w in warm] == [name for name in ('exact', 'block', 'linear', 'typical')
                                    for _ in range(4)]
  assert {(w.draft_sampling, w.gamma) for w in warm} == {
      (draft, gamma) for draft in ('sampled', 'greedy') for gamma in (3, 5)}
  assert len(ways.distinct(settings(min_confidences=(0.0, 0.4)), 1.0)) == 4


def test_trees_stand_beside_chains():
  """Dynamic ones hold the most probable tokens; rules that judge whole chains have none."""
  asked = settings(gammas=(3,), rules=(('exact', 1.0), ('block', 1.0)), trees=(
      'eagle1', 'dynamic k2 d2 n4'), draft_sampling=('sampled', 'greedy'), min_confidences=(0.4,))
  warm = [(w.rule, w.draft_sampling, w.gamma, w.tree) for w in ways.distinct(asked, 1.0)]
  assert warm == [
      ('exact', 'sampled', 3, 'chain'), ('exact', 'greedy', 3, 'chain'),
      ('exact', 'sampled', 5, 'eagle1'), ('exact', 'greedy', 2, 'dynamic k2 d2 n4'),
      ('exact', 'greedy', 5, 'eagle1'),
      ('block', 'sampled', 3, 'chain'), ('block', 'greedy', 3, 'chain')]
  assert [w.tree for w in ways.distinct(asked, 0.0)] == ['chain', 'eagle1', 'dynamic k2 d2 n4']
  assert {w.min_confidence for w in ways.distinct(asked, 0.0) if w.tree != 'chain'} == {0.0}


@pytest.fixture(scope='module')
def summaries():
  return summary_lib.summarise(results.lossy_study(), samples=50)


def at_one(summaries):
  return [s for s in summaries if s.temperature == 1.0]


def test_ways_stay_apart_and_name_themselves(summaries):
  chosen = [s for s in summaries if s.method == DISTILLED and s.gamma == 5
            and s.temperature == 1.0]
  assert [s.way for s in chosen] == ['exact', 'block', 'linear ε=0.5, lossy',
                                     'linear ε=0.1, lossy']
  assert [s.lossless for s in chosen] == [True, True, False, False]
  header, lines = report.table(summaries)
  at = header.index('rule')
  assert all(('lossy' in line[at]) == (line[at].startswith('linear')) for line in lines)


def test_methods_are_compared_in_one_lossless_way(summaries):
  """Rows of other ways change none of the comparisons of methods."""
  headline = summary_lib.headline(summaries)
  assert {s.way for s in headline} == {'exact'} and len(headline) == len(summaries) - 3
  plain = [row for row in results.lossy_study() if row['rule'] == 'exact']
  alone = answers.write(summary_lib.summarise(plain, samples=50), samples=50)
  assert answers.write(summaries, samples=50)[:4] == alone


def test_dominated_settings_are_those_that_something_beats_in_both(summaries):
  """Against the definition, pair by pair, the target alone included."""
  chosen = at_one(summaries)
  places = {s.way + s.method + str(s.gamma): (s.tokens_per_second, s.quality) for s in chosen}
  places['alone'] = frontier.target_alone(chosen)
  best = [name for name, (speed, quality) in places.items() if not any(
      (other[0] > speed and other[1] >= quality) or (other[0] >= speed and other[1] > quality)
      for other in places.values())]
  found = [s.way + s.method + str(s.gamma) for s in frontier.undominated(chosen)]
  assert set(found) == set(best) - {'alone'} and 2 <= len(found) < len(chosen)
  speeds = [s.tokens_per_second for s in frontier.undominated(chosen)]
  assert speeds == sorted(speeds)


@pytest.mark.parametrize('drop, way', [(0.0, 'block'), (0.04, 'linear ε=0.5, lossy'),
                                       (0.5, 'linear ε=0.1, lossy')])
def test_the_fastest_within_a_quality_budget(summaries, drop, way):
  found = frontier.fastest_within(at_one(summaries), drop)
  assert found.way == way
  assert f'Fastest within {100 * drop:g} %' in answers.write(
      summaries, samples=20, max_quality_drop=drop)[-1]


def test_a_lossless_setting_is_within_every_budget_though_it_measured_less():
  rows = [dict(row, quality=49.0) for row in results.lossy_study() if row['lossless']]
  found = frontier.fastest_within(at_one(summary_lib.summarise(rows, samples=10)), 0.0)
  assert found.lossless and found.quality < found.target_quality


def test_the_target_alone_is_the_answer_where_nothing_is_faster():
  slow = summary_lib.summarise(results.study(slowdown=9.0), samples=10)
  assert frontier.fastest_within(at_one(slow), 0.1) is None
  with pytest.raises(ValueError, match='max_quality_drop is 1.5'):
    frontier.fastest_within(at_one(slow), 1.5)


def test_report_draws_the_tradeoff(tmp_path, capsys):
  config = results.config()
  config.evaluate.max_quality_drop = 0.05
  results.write(tmp_path, results.lossy_study())
  report.run(config, tmp_path)
  text = (tmp_path / 'report.md').read_text()
  assert '(tradeoff.png)' in text and (tmp_path / 'tradeoff.png').stat().st_size > 10_000
  assert '`exact`, `block`, `linear`' in text and 'What do other lossless ways buy?' in text
  report.show(config, tmp_path)
  assert 'Fastest within 5 %' in ' '.join(capsys.readouterr().out.split())


def test_prediction_counts_the_tokens_that_were_drafted():
  """A draft that stops early pays for the steps it took: 2.5 of gamma 5, at c = 0.1, v = 1.5."""
  assert measures.speedup_predicted(2.8, 2.5, 0.1, 1.5) == pytest.approx(1.6)
