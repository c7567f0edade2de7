"""Result rows survive kills, and figures are ratios of sums with honest intervals."""

import json

import numpy as np
import pytest

from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows

# Section 2 of the design: what every line has.
CONTRACT = '''study task target draft objective data_source train_steps seed temperature gamma
  draft_sampling rule epsilon batch_size num_prompts alpha block_efficiency accepted_per_call
  acceptance_by_position cost_ratio verify_ratio tokens_per_second
  autoregressive_tokens_per_second speedup_measured speedup_predicted mbsu quality_metric quality
  target_quality device jax_version commit config_hash'''.split()


def test_every_row_has_every_field_and_null_for_what_was_not_measured():
  row = rows.make(study='x', alpha=0.5)
  assert set(CONTRACT) <= set(row)
  assert row['alpha'] == 0.5 and row['quality'] is None and row['speedup_measured'] is None
  with pytest.raises(ValueError, match='aplha'):
    rows.make(aplha=0.5)


def test_append_and_read(tmp_path):
  path = tmp_path / 'results.jsonl'
  assert rows.read(path) == []
  written = [rows.make(seed=seed, alpha=0.1 * seed) for seed in range(3)]
  for row in written:
    rows.append(path, row)
  assert rows.read(path) == written


@pytest.mark.parametrize('kept', [1, 5, -1])
def test_torn_last_line_is_dropped_and_the_rest_stays(tmp_path, kept):
  """A kill in the middle of a write leaves part of a line; on resume it must not glue to the
  next line."""
  path = tmp_path / 'results.jsonl'
  rows.append(path, rows.make(seed=0))
  whole = path.read_bytes()
  path.write_bytes(whole + whole[:kept])
  assert [row['seed'] for row in rows.read(path)] == [0]
  rows.repair(path)
  assert path.read_bytes() == whole
  rows.append(path, rows.make(seed=1))
  assert [row['seed'] for row in rows.read(path)] == [0, 1]


def test_repair_of_a_file_with_one_torn_line_and_of_none(tmp_path):
  path = tmp_path / 'results.jsonl'
  rows.repair(path)
  assert not path.exists()
  path.write_bytes(b'{"study": "x"')
  rows.repair(path)
  assert path.read_bytes() == b''


def test_bad_line_is_named_by_its_number(tmp_path):
  path = tmp_path / 'results.jsonl'
  path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
  with pytest.raises(ValueError, match='line 2'):
    rows.read(path)


def test_nan_is_refused_rather_than_written(tmp_path):
  with pytest.raises(ValueError):
    rows.append(tmp_path / 'results.jsonl', rows.make(alpha=float('nan')))
  assert not (tmp_path / 'results.jsonl').exists()


def test_identity_ignores_figures_and_sees_settings():
  row = rows.make(study='x', gamma=3, alpha=0.5)
  assert rows.identity(row) == rows.identity({**row, 'alpha': 0.6, 'commit': 'abc'})
  for field in ('gamma', 'seed', 'temperature', 'config_hash', 'objective', 'epsilon',
                'category'):
    assert rows.identity(row) != rows.identity({**row, field: 9})


def test_identity_survives_the_file():
  row = rows.make(gamma=3, temperature=0.0, epsilon=1.0, top_k=None)
  assert rows.identity(json.loads(json.dumps(row))) == rows.identity(row)


def test_config_hash_depends_on_values_not_on_order():
  assert rows.config_hash(dict(a=1, b=2)) == rows.config_hash(dict(b=2, a=1))
  assert rows.config_hash(dict(a=1, b=2)) != rows.config_hash(dict(a=1, b=3))


def test_bootstrap_of_a_constant_ratio_is_that_ratio():
  counts = np.stack([np.arange(1.0, 9.0) * 3, np.arange(1.0, 9.0)], axis=-1)[None]
  low, high = intervals.bootstrap(counts, intervals.ratio, samples=50)
  assert low == pytest.approx(3.0) and high == pytest.approx(3.0)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
  """Ratio of sums of lognormal numerators over Poisson counts: 95 % of 300 intervals, more or
  less, hold the true ratio; so the width is neither that of single prompts nor of nothing."""
  rng = np.random.default_rng(0)
  hits = 0
  for trial in range(300):
    below = rng.poisson(20, size=40) + 1
    above = below * rng.lognormal(0.0, 0.3, size=40)
    low, high = intervals.bootstrap(
        np.stack([above, below], axis=-1)[None], intervals.ratio, samples=200, seed=trial)
    hits += low <= np.exp(0.3 ** 2 / 2) <= high
  assert 0.88 <= hits / 300 <= 0.99


def test_categories_without_their_whole_are_dropped(tmp_path):
  """A kill between two pages of one write: they will be measured again, and were there twice."""
  path = tmp_path / 'results.jsonl'
  def group(gamma):
    return [rows.make(study='s', gamma=gamma, category=name) for name in ('qa', 'maths', None)]
  rows.append(path, *group(3))
  whole = path.read_bytes()
  rows.append(path, *group(5))
  both = path.read_bytes()
  cuts = [length for length in range(len(whole), len(both))
          if length % 97 == 0 or b'\n' in both[length - 2:length + 2]]
  assert len(cuts) > 40
  for length in cuts:
    path.write_bytes(both[:length])
    rows.repair(path)
    assert path.read_bytes() == whole
  path.write_bytes(both)
  rows.repair(path)
  assert path.read_bytes() == both


def test_spread_of_seeds_widens_the_interval():
  """Two seeds that differ, prompts that do not: all the spread is between seeds."""
  one = np.tile([[2.0, 1.0]], (10, 1))
  two = np.tile([[4.0, 1.0]], (10, 1))
  low, high = intervals.bootstrap(np.stack([one, two]), intervals.ratio, samples=500)
  assert (low, high) == (2.0, 4.0)
  pooled = np.concatenate([one, one])[None]
  assert intervals.bootstrap(pooled, intervals.ratio, samples=500) == (2.0, 2.0)


@pytest.mark.parametrize('at_once', [1 << 20, 21])
def test_samples_are_drawn_together_and_summed_as_one_by_one(monkeypatch, at_once):
  """Seven prompts under two seeds; also three samples at a time."""
  monkeypatch.setattr(intervals, '_MOST_NUMBERS', at_once)
  counts = np.random.default_rng(0).integers(1, 50, size=(2, 7, 3)).astype(float)
  counts[..., 2] = counts[..., 0]
  found = intervals._resampled(np.random.default_rng(5), [counts], 10)
  rng, wanted = np.random.default_rng(5), []
  for size in [10] if at_once > 21 else [3, 3, 3, 1]:
    seeds, prompts = rng.integers(2, size=(size, 2)), rng.integers(7, size=(size, 7))
    wanted += [counts[k][:, p].sum(axis=(0, 1)) for k, p in zip(seeds, prompts)]
  np.testing.assert_array_equal(found, wanted)
  assert np.all(found[:, 0] == found[:, 2])


def test_arms_of_as_many_seeds_are_paired_and_others_have_their_own():
  """An arm of one seed over one of three, whose seeds differ and whose prompts do not."""
  seeds = np.broadcast_to(np.array([1., 2., 3.])[:, None], (3, 6))
  wide, narrow = np.stack([seeds, np.ones((3, 6))], -1), np.ones((1, 6, 2))
  compare = lambda *arms: intervals.bootstrap(arms, intervals.ratio_of_ratios, samples=5000)
  assert compare(wide, wide) == (1.0, 1.0)
  assert compare(wide, narrow) == (1.0, 3.0)
  assert compare(narrow, wide) == (pytest.approx(1 / 3), 1.0)
  assert compare(narrow, narrow) == (1.0, 1.0)
  with pytest.raises(ValueError, match=r'\[1, 5, 2\]|\(1, 5, 2\).*of 6 prompts'):
    compare(wide, narrow[:, :5])


def test_one_prompt_has_no_interval():
  assert intervals.bootstrap(np.ones((2, 1, 2)), intervals.ratio, samples=9) is None


def test_wilson_interval_of_a_known_share():
  # 8 of 10, from the formula as printed in textbooks.
  low, high = intervals.wilson(0.8, 10)
  assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
  assert intervals.wilson(0.8, 0) is None


def test_sums_come_before_ratios():
  """Per-prompt ratios 4 and 1 over unequal calls: the mean of ratios would be 2.5."""
  counts = np.zeros((2, len(rows.COUNTS)))
  counts[:, rows.COUNTS.index('emitted')] = [4, 9]
  counts[:, rows.COUNTS.index('target_calls')] = [1, 9]
  total = measures.block_efficiency_counts(counts.sum(axis=0))
  assert intervals.ratio(total) == pytest.approx(1.3)


def test_speedup_of_known_times():
  """Alone 10 tokens in 2 s, speculatively 30 tokens in 3 s: 0.2 s against 0.1 s a token."""
  counts = dict(emitted=30, target_calls=10, seconds=3.0, autoregressive_emitted=10,
                autoregressive_seconds=2.0, overlap=0, overlap_tokens=0, drafted=50)
  row = np.array([counts[name] for name in rows.COUNTS])
  assert intervals.ratio_of_ratios(measures.speedup_counts(row)) == pytest.approx(2.0)


def test_predicted_speedup_and_mbsu_closed_forms():
  # Leviathan et al. 2023, Theorem 3.8, at v = 1: (1 - a^(g+1)) / ((1 - a)(g c + 1)).
  alpha, gamma, cost = 0.8, 5, 0.02
  tau = (1 - alpha ** (gamma + 1)) / (1 - alpha)
  assert measures.speedup_predicted(tau, gamma, cost, 1.0) == pytest.approx(
      (1 - alpha ** 6) / (0.2 * 1.1))
  assert measures.speedup_predicted(3.0, 5, 0.1, 1.5) == pytest.approx(1.5)
  assert measures.mbsu(3.0, 5, 10, 100) == pytest.approx(2.0)
