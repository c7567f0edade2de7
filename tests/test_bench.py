"""The performance suite: what it fakes is declared, what it measures is counted right."""

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import tables
from specdistill_jax import api
from specdistill_jax import bench
from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import simulated
from specdistill_jax.drafters import lm
from specdistill_jax.evaluation import contest
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import machine
from specdistill_jax.evaluation import startup
from specdistill_jax.evaluation import step_costs
from specdistill_jax.evaluation import suite
from specdistill_jax.models import base
from specdistill_jax.models import synthetic
from specdistill_jax.stages import benchmark

RATES = (0.9, 0.5, 0.7)


# Simulated acceptance.

def test_simulated_acceptance_is_what_was_asked_for():
  """In the real loop, over a target that would reject nearly everything."""
  vocab, gamma = 5, len(RATES)
  sampling = sampling_lib.Sampling(1.0)
  target, draft = tables.random_table(0, vocab, scale=4.0), tables.random_table(1, vocab, 4.0)
  drafter = lm.LMDrafter(draft, gamma, sampling)
  prompts_bt = np.full((64, 2), 2, np.int32)
  state = engine.prefill_speculative(target, drafter, prompts_bt, np.full((64,), 2, np.int32),
                                     jax.random.key(0), max_new_tokens=100)
  state = engine.decode_speculative(target, drafter, state, rule=simulated.Simulated(RATES),
                                    sampling=sampling, eos_id=step_costs.NO_TOKEN)
  stats = jax.device_get(state.stats)
  assert np.all(stats.emitted_b == 100)
  reached, accepted = stats.reached_bg.sum(0), stats.accepted_bg.sum(0)
  deviation = (accepted - reached * np.array(RATES)) / np.sqrt(
      reached * np.array(RATES) * (1 - np.array(RATES)))
  assert reached[0] > 1500 and np.all(np.abs(deviation) < 4), (reached, accepted)
  tau = stats.emitted_b.sum() / stats.target_calls_b.sum()
  assert abs(tau - simulated.block_efficiency(RATES)) < 0.1


@pytest.mark.parametrize('rule', [rules.Exact(), rules.Block()],
                         ids=lambda rule: type(rule).__name__)
def test_simulating_does_all_the_work_of_the_rule(rule):
  """A rule whose verdict went unused would be compiled away, and cost nothing."""
  inputs = jnp.zeros((2, 4, 50)), structs.Proposal(
      jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 50)), None)
  keys = jax.random.split(jax.random.key(0), 2)
  flops = lambda call: jax.jit(call).lower(*inputs, keys).compile().cost_analysis()['flops']
  without_next_token = flops(lambda *inputs: rule(*inputs).num_accepted_b)
  assert flops(simulated.Simulated(RATES, rule)) >= flops(rule) > 1.2 * without_next_token


def test_simulated_output_cannot_be_had_by_accident():
  assert not simulated.Simulated(RATES).lossless
  target = models.tiny(0, num_layers=1)
  for name in ('simulated', 'Simulated'):
    with pytest.raises(ValueError, match=f"rule is '{name}'; it must be one of exact"):
      api.speculate(target, target, [[2]], gamma=1, max_new_tokens=2, rule=name,
                    key=jax.random.key(0))


def test_block_efficiency_and_its_inverse():
  rate, gamma = 0.8, 5
  closed = (1 - rate ** (gamma + 1)) / (1 - rate)  # Leviathan et al. 2023, equation 1
  assert simulated.block_efficiency((rate,) * gamma) == pytest.approx(closed)
  np.testing.assert_allclose(simulated.even_acceptance(closed, gamma), (rate,) * gamma)
  assert simulated.even_acceptance(1.0, 2) == pytest.approx((0.0, 0.0))
  assert simulated.even_acceptance(3.0, 2) == pytest.approx((1.0, 1.0))
  with pytest.raises(ValueError, match=r'tau is 3.5; with gamma 2 it must lie in \[1, 3\]'):
    simulated.even_acceptance(3.5, 2)
  with pytest.raises(ValueError, match='acceptance is'):
    simulated.Simulated((0.5, 1.2))
  with pytest.raises(ValueError, match='acceptance has 3 positions and the proposal 1 tokens'):
    simulated.Simulated(RATES)(jnp.zeros((1, 2, 5)), structs.Proposal(
        jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, 5)), None), jax.random.split(
            jax.random.key(0), 1))


# The pair of models.

@pytest.fixture(scope='module')
def pair():
  return synthetic.pair(synthetic.config('tiny'), jax.random.key(0))


def test_the_synthetic_draft_nearly_always_agrees_and_shares_no_buffer(pair):
  target, draft = pair
  assert draft.config.num_layers == 1 and target.config.num_layers == 2
  tokens_bt = np.random.default_rng(0).integers(2, 512, (8, 32))
  best = jax.jit(lambda module: jnp.argmax(module.causal(tokens_bt).logits_btv, -1))
  agreement = np.mean(best(target.module) == best(draft.module))
  assert agreement > 0.95
  pointers = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.module)}
              for model in (target, draft)]
  assert not pointers[0] & pointers[1]


def test_stacking_undoes_unrolling(pair):
  again = synthetic.stacked(pair[0])
  for leaf, stacked in zip(jax.tree.leaves(pair[0].module),
                           jax.tree.leaves(again.module.unstacked()), strict=True):
    np.testing.assert_array_equal(leaf, stacked)


def test_bytes_that_a_step_reads():
  config = synthetic.config('tiny', 'bfloat16')
  target, _ = jax.eval_shape(lambda: [one.module for one in synthetic.pair(
      config, jax.random.key(0))])
  vocab, layers, width, heads, _, head, mlp = synthetic.PRESETS['tiny']
  floats = layers * (4 * width * heads * head + 3 * width * mlp + 2 * width) + width
  floats += vocab * width      # the head; of the embedding only the rows that are fed
  assert synthetic.bytes_read(base.Model(target, config), 3) == 2 * (floats + 3 * width)


# Rounds.

def test_every_competitor_plays_once_a_round_and_none_always_first():
  order = []
  competitors = {name: lambda name=name: order.append(name) or name for name in 'abc'}
  rounds = contest.play(competitors, 3)
  assert ''.join(order) == 'abc' + 'bca' + 'cab'
  assert all(one.results == dict(a='a', b='b', c='c') for one in rounds)


def test_disturbed_rounds_are_left_out_while_enough_remain():
  rounds = [contest.Round({}, share) for share in (0.0, 0.9, 0.01, 0.05, 0.06)]
  assert contest.undisturbed(rounds) == ([rounds[0], rounds[2], rounds[3]], True)
  assert contest.undisturbed(rounds[1:]) == (rounds[1:], False)
  unknown = [contest.Round({}, None)] * 5
  assert contest.undisturbed(unknown) == (unknown, False)


@pytest.mark.parametrize('count, k', [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (50, 18)])
def test_median_interval_agrees_with_the_table(count, k):
  """Ranks of the 95 % interval of the median, as tables of the sign test give them."""
  values = np.random.default_rng(count).permutation(count) + 1.0
  assert contest.median_interval(values) == (k, count + 1 - k)


def test_too_few_rounds_have_no_interval():
  assert contest.median_interval([1.0] * 5) is None


def test_ratios_are_taken_within_rounds():
  """A machine that is ten times slower in one round moves no ratio of that round."""
  rounds = [contest.Round(dict(a=2.0 * slow, b=1.0 * slow), 0.0) for slow in (1, 10, 1, 3, 1, 1)]
  found = contest.ratio(rounds, lambda one: one.results['a'], lambda one: one.results['b'])
  assert found == (2.0, (2.0, 2.0))


def test_share_of_other_processes():
  before, after = (10.0, 4.0, 100.0), (13.0, 6.0, 110.0)
  assert machine.foreign_share(before, after) == pytest.approx(0.1)
  assert machine.foreign_share(after, (13.0, 7.0, 120.0)) == 0.0  # ticks are coarser than clocks
  assert machine.foreign_share(None, after) is None


@pytest.mark.skipif(machine.cpu_seconds() is None, reason='no /proc/stat')
def test_own_cpu_time_is_counted():
  before, until = machine.cpu_seconds(), time.process_time() + 0.1
  while time.process_time() < until:
    pass
  busy, own, total = (b - a for a, b in zip(before, machine.cpu_seconds()))
  assert 0.1 <= own < busy + 0.2 <= total + 0.4  # /proc/stat counts ticks of 10 ms


# Rows from rounds.

def _run(seconds, prefill, emitted, calls, reached=(), accepted=()):
  row = lambda value: np.array([value], np.int32)
  stats = structs.DecodeStats(
      target_calls_b=row(calls), emitted_b=row(emitted), drafted_b=row(calls * len(reached)),
      reached_bg=row(reached), accepted_bg=row(accepted))
  return latency.Run(seconds, prefill,
                     structs.Generation(np.full((1, emitted), 7), row(emitted), stats))


def test_rows_from_rounds_of_known_figures():
  target = models.tiny(0, num_layers=1)
  sampling = sampling_lib.Sampling(0.0)
  drafter = api.make_drafter(target, gamma=2, target_sampling=sampling)
  case = suite.Case(
      module=target.module.unstacked(), drafters={2: drafter}, weight_bytes=1000,
      rules={2: (rules.Greedy(), simulated.Simulated((0.5, 0.5), rules.Greedy()))},
      prompts_bt=np.ones((1, 4), np.int32), new_tokens=10, sampling=sampling)
  results = {
      suite.ALONE: _run(2.0, 1.0, 10, 10),
      suite.CLOCK: {2: step_costs.StepSeconds(0.2, (0.02, 0.01), (0.2, 0.3))},
      suite.MEMORY: dict(slow=1e-6, fast=5e-6),
      (suite.SPECULATIVE, 2): _run(1.0, 1.5, 10, 4, (4, 3), (3, 3)),
      (suite.SIMULATED, 2): _run(1.6, 1.5, 10, 5, (5, 3), (3, 2)),
      suite.PEER: dict(seconds=6.0, tokens=[[7] * 10], target_calls=10),
      (suite.ASSISTED, 2): dict(seconds=4.0, tokens=[[7] * 9 + [8]], target_calls=5),
  }
  found = {row['competitor']: row for row in suite.rows(case, [
      contest.Round(results, 0.0)] * 6)}
  assert list(found) == ['autoregressive', 'hf', 'hf_assisted', 'simulated', 'speculative']

  alone = found['autoregressive']
  # Two key heads of 8, keys and values, 4 bytes: 128 bytes a slot. Steps see 5 to 14 slots.
  assert alone['live_cache_bytes_per_step'] == pytest.approx(128 * 9.5, rel=0.02)
  assert alone['tokens_per_second'] == pytest.approx(5.0)
  assert alone['tokens_per_second_with_prefill'] == pytest.approx(10 / 3)
  assert alone['step_seconds'] == pytest.approx(0.2)
  needed = 1000 + alone['live_cache_bytes_per_step']
  assert alone['share_of_memory_read_ceiling'] == pytest.approx(needed / 0.2 / 5000, rel=1e-3)

  row = found['speculative']
  assert (row['lossless'], row['rule'], row['identical_to_autoregressive']) == (
      True, 'greedy', True)
  assert row['block_efficiency'] == 2.5 and row['acceptance_by_position'] == [0.75, 1.0]
  assert row['cost_ratio'] == pytest.approx(0.1) and row['verify_ratio'] == pytest.approx(1.5)
  assert row['speedup_predicted'] == pytest.approx(2.5 / 1.7)
  assert row['speedup_measured'] == pytest.approx(2.0)
  assert row['speedup_measured_over_predicted'] == pytest.approx(2.0 * 1.7 / 2.5)

  row = found['simulated']
  assert (row['lossless'], row['rule'], row['identical_to_autoregressive']) == (
      False, 'simulated', None)
  assert row['acceptance_asked'] == (0.5, 0.5) and row['block_efficiency'] == 2.0

  assert found['hf']['ours_over_peer'] == pytest.approx(6.0 / 3.0)
  assert found['hf']['identical_to_autoregressive']
  row = found['hf_assisted']
  assert row['ours_over_peer'] == pytest.approx(4.0 / 2.5)
  assert row['speedup_over_own_generate'] == pytest.approx(1.5)
  assert not row['identical_to_autoregressive'] and row['block_efficiency'] == 2.0


# The command.

@pytest.mark.parametrize('arguments, message', [
    (['--preset=huge'], '--preset=huge'),
    (['--gamma=2,x'], "--gamma holds 'x'"),
    (['--gamma=0'], r'--gamma holds 0; each must lie in \[1, inf\]'),
    (['--gamma=2,2'], '--gamma is 2,2; its numbers must differ'),
    (['--acceptance=1.5'], r'--acceptance holds 1.5; each must lie in \[0.0, 1.0\]'),
    (['--tau=9', '--peers=none'], r'tau is 9.0; with gamma 2 it must lie in \[1, 3\]'),
    (['--temperature=1', '--peers=hf'], '--peers=hf'),
    (['big'], "'big' is no flag"),
])
def test_bad_flags_end_with_one_sentence(arguments, message, capsys):
  assert bench.main(['bench', *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert re.search(message, error), error


def test_presets_of_the_flag_are_those_of_the_table():
  """The flag has its own list, so that `--help` imports no JAX."""
  assert bench.PRESETS == tuple(synthetic.PRESETS)


def test_the_last_acceptance_holds_beyond():
  options = benchmark.Options(
      preset='tiny', dtype='float32', gammas=(1, 3), batch_sizes=(1,), new_tokens=8,
      temperature=1.0, acceptance=(0.9, 0.5), tau=None, peers='none', rounds=1)
  chosen = benchmark.make_rules(options)
  assert chosen[1][1].acceptance == (0.9,) and chosen[3][1].acceptance == (0.9, 0.5, 0.5)
  assert chosen[3] == (rules.Exact(), simulated.Simulated((0.9, 0.5, 0.5), rules.Exact()))


def test_the_suite_from_flags_to_its_document(monkeypatch, capsys, tmp_path):
  """Small in everything; figures of such a size mean nothing, their presence does."""
  monkeypatch.setattr(machine, '_CPU_MEGABYTES', 1)
  monkeypatch.setattr(startup, 'import_seconds', lambda: dict(
      import_seconds=0.0, first_use_seconds=0.0, unwanted_imports=[]))
  monkeypatch.setattr(suite, 'CLOCK_STEPS', 2)
  path = tmp_path / 'document.json'
  try:
    status = bench.main(['bench', '--preset=tiny', '--gamma=1', '--batch_sizes=2', '--rounds=2',
                         '--new_tokens=6', '--peers=none', '--tau=1.5', f'--output={path}'])
  finally:
    jax.config.update('jax_enable_compilation_cache', True)
  output = capsys.readouterr()
  assert status == 0
  document = json.loads(output.out.splitlines()[-1])
  assert document == json.loads(path.read_text())
  (batch,) = document['by_batch_size']
  assert batch['compilations_after_warm_up'] == 0
  assert set(batch['compile_seconds']) == {'autoregressive', 'speculative_gamma_1',
                                           'simulated_gamma_1'}
  rows = {row['competitor']: row for row in batch['rows']}
  assert rows['speculative']['identical_to_autoregressive'] is True
  assert rows['speculative']['block_efficiency'] > 1.7  # of 2: an untrained draft that agrees
  assert rows['simulated']['acceptance_asked'] == pytest.approx([0.5])
  assert all(row['tokens_per_second'] > 0 for row in rows.values())
  assert document['no_peers_because'] == 'not asked for'
  assert 'speculative' in output.err and 'DISTURBED' in output.err  # two rounds are too few


def test_peers_on_the_same_weights(pair):
  """Hugging Face's own models say the same tokens, plain and assisted."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  target, draft = pair
  prompts = np.random.default_rng(0).integers(2, 512, (1, 8))
  ours = api.generate(target, prompts.tolist(), max_new_tokens=12, temperature=0,
                      key=jax.random.key(0))
  assert ours.lengths[0] == 12, 'the end token came; choose another prompt'
  with benchmark._peer((target, draft), 'float32') as peer:
    plain, assisted = peer.generate(prompts, 12), peer.generate(prompts, 12, gamma=3)
  assert plain['tokens'] == assisted['tokens'] == ours.tokens.tolist()
  assert plain['target_calls'] == 12 and assisted['target_calls'] < 8
  assert plain['seconds'] > 0
