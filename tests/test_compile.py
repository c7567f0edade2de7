"""The compile command: its answers without a TPU compiler, and with one where it is installed."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import common
from specdistill_jax import compile as compile_command
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import ahead
from specdistill_jax.costs import chips
from specdistill_jax.costs import needed
from specdistill_jax.costs import programs
from specdistill_jax.costs import report
from specdistill_jax.decoding import tree_names
from specdistill_jax.models import families
from specdistill_jax.models import variants
import test_configs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler is not installed: launch/requirements-tpu-compile.txt')
CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def config():
  """A study whose programs compile in seconds."""
  made = common.study('tiny')
  made.topology = 'v5e:2x2'
  made.mesh.update(data=1, fsdp=2, tensor=2)
  made.task.update(vocab_size=256, max_length=32, prompt_length=8)
  for name in ('target', 'draft'):
    made[name].model.update(num_layers=1, width=64, num_heads=2, num_kv_heads=2, head_dim=32,
                            mlp_width=128, dtype='bfloat16')
  made.distill.rollout.max_new_tokens = 8
  made.evaluate.update(max_new_tokens=8, gammas=(2,), weights_dtype='bfloat16')
  made.evaluate.mesh.tensor = 2
  return made


@pytest.mark.parametrize('arguments, sentence', [
    ([], '--config is missing'),
    ([f'--config={CONFIGS}/pod_lm1b.py', '--programs=trian'], "--programs names 'trian'"),
    ([f'--config={CONFIGS}/quickstart.py'], '--topology is missing and config.topology is None'),
    ([f'--config={CONFIGS}/pod_lm1b.py', '--topology=v9:2x2'], "topology is 'v9:2x2'"),
    ([f'--config={CONFIGS}/pod_lm1b.py', '--topology=v9', '--sweep'], "--topology is 'v9'"),
    ([f'--config={CONFIGS}/pod_lm1b.py', '--tree=own'], 'config.evaluate.trees, which is empty'),
])
def test_errors_are_one_sentence(arguments, sentence, capsys):
  assert compile_command.main(['compile', *arguments]) == 2
  shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
  assert len(shown) == 1 and sentence in shown[0]


def test_its_own_tree_is_the_last_that_the_config_evaluates(monkeypatch, capsys):
  def refused(*_, tree, **__):
    raise ValueError(f'asked for {tree}')
  monkeypatch.setattr(compile_command, 'document', refused)
  assert compile_command.main(
      ['compile', f'--config={CONFIGS}/pod_feature_vicuna.py:33b-fspad', '--tree=own']) == 2
  assert 'asked for dynamic k10 d6 n47' in capsys.readouterr().err


@pytest.mark.parametrize('name, tensor, held', [
    ('held_out', None, 1), ('held_out', 4, 2), ('samples', 4, 2)])
def test_what_decodes_beside_training_is_a_program_with_all_that_is_held(name, tensor, held):
  """The optimizer's state, or both models as training has them, are there and not read."""
  made = config()
  assert programs.names(made) == tuple(n for n in programs.NAMES if n != 'samples')
  made.distill.data_source, made.distill.rollout.tensor = 'draft_stored', tensor
  assert programs.names(made) == programs.NAMES
  mesh = sharding.make_mesh(**made.mesh, devices=jax.devices()[:4])
  program = programs.training(made, structs.Widths(8, 24), mesh, name=name)
  assert program.mesh.shape['tensor'] == (tensor or 2) and not program.tokens
  assert len(program.arguments[0]) == held
  text = program.lower().as_text()
  rows = made.distill.train.batch_size
  assert f'tensor<{rows}x{8 + 8}xi32>' in text


@pytest.mark.parametrize('name, programs_of_it', [
    ('distillspec_transfer.py:xxl', ('target', *programs.DECODING)),
    ('distillspec_garden.py:raw_xl', ('target', *programs.DECODING)),
    ('distillspec_garden.py:distil_base', ('target', 'train', 'on_policy', 'held_out')),
    ('lk_table1.py', ('train', 'held_out', 'samples', *programs.DECODING)),
    ('pod_feature_llama3.py:8b-eagle3', ('train', 'held_out', *programs.DECODING)),
    ('pod_feature_llama3.py:70b-eagle3', ('train', *programs.DECODING))])
def test_a_study_has_the_programs_of_its_stages(name, programs_of_it, monkeypatch, capsys):
  asked = []
  def document(config, *where, **how):
    found = compile_command.widths(config)
    assert found.prompt > 0 and found.completion > 0
    asked.append((where, how))
    return dict(fits=True, programs=[], prediction=None, study=config.study)
  monkeypatch.setattr(compile_command, 'document', document)
  monkeypatch.setattr(report, 'table', lambda documents: '')
  assert compile_command.main(['compile', f'--config={CONFIGS}/{name}']) == 0
  ((training, decoding, names), _), = asked
  assert tuple(names) == programs_of_it and training and decoding
  assert compile_command.main(
      ['compile', f'--config={CONFIGS}/{name}', '--programs=serve']) == 2
  assert f"this config has {', '.join(programs_of_it)}" in capsys.readouterr().err


def test_the_targets_own_update_is_laid_out_as_it_is_trained():
  made = config()
  made.target.update(layout='sharded', teacher_layout='replicated')
  mesh, widths = sharding.make_mesh(data=1, fsdp=4, tensor=2), structs.Widths(8, 24)
  trained = programs.training(made, widths, mesh, name='target')
  taught = programs.training(made, widths, mesh, name='train')
  whole = lambda tree: [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)]
  (state, teacher, *_), (_, frozen, *_) = trained.arguments, taught.arguments
  assert teacher is None and all(whole(frozen)) and not all(whole(state.params))
  assert jax.tree.structure(state.params) == jax.tree.structure(frozen)
  assert trained.lower().as_text()


PUBLISHED = dict(pod_t5_xl=('t5-v1.1-xl', 't5-v1.1-small'),
                 pod_t5_xxl=('t5-v1.1-xxl', 't5-v1.1-small'),
                 pod_lm1b=('lm1b-234m', 'lm1b-33m'),
                 pod_llama3_70b=('llama-3.1-70b', 'llama-3.2-1b'),
                 pod_qwen3_32b=('qwen3-32b', 'qwen3-0.6b'))


@pytest.mark.parametrize('name', PUBLISHED)
def test_models_of_the_pod_configs_are_the_published_ones(name):
  made = test_configs.load(CONFIGS / f'{name}.py').get_config()
  for which, model in zip(('target', 'draft'), PUBLISHED[name]):
    found = families.config(made[which].model, vocab_size=made.task.vocab_size)
    assert found == variants.config(model)
  assert chips.count(made.topology) >= 4


def test_predicted_speedup_is_that_of_the_reports():
  """tau / (gamma c + v), with the turns' own times."""
  rows = {name: dict(iteration=dict(seconds=seconds))
          for name, seconds in dict(generate=10.0, draft=1.0, speculate=17.0).items()}
  found = report.prediction(rows, gamma=3, batch_size=2, alpha=0.5)
  assert (found['cost_ratio'], found['verify_ratio']) == (0.1, 1.4)
  point, = found['predicted']
  assert point['block_efficiency'] == 1.875
  assert point['speedup_predicted'] == pytest.approx(
      1.875 / (3 * found['cost_ratio'] + found['verify_ratio']))
  assert point['tokens_per_second'] == pytest.approx(2 * 1.875 / 17)
  assert len(report.prediction(rows, 3, 1)['predicted']) == len(report.ALPHAS)
  assert report.prediction({'train': {}}, 3, 1) is None


def test_arguments_are_counted_as_one_device_holds_them():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  program = programs.decoding(config(), structs.Widths(8, 24), mesh, name='draft', shape=2)
  leaves = jax.tree.leaves(program.arguments[0])
  share = lambda shape: 2 if {256, 2, 128} & set(shape) else 1  # vocabulary, heads, MLP
  weights = sum(leaf.dtype.itemsize * leaf.size // share(leaf.shape) for leaf in leaves)
  assert ahead.arguments(program) == weights + 4 * 8 + 4, 'weights, a prompt and its length'


def test_a_cycle_with_a_tree_needs_its_nodes():
  """The target reads all of them; the draft is fed what is committed, and nodes with children."""
  mesh, tokens = sharding.make_mesh(data=2, fsdp=2, tensor=2), config().evaluate.max_new_tokens
  def flops(tree):
    program = programs.decoding(config(), structs.Widths(8, 24), mesh, name='speculate',
                                shape=tree_names.parse(tree))
    return needed.flops(program.reference(), program.steps)
  a_node = flops('0 1 2 00') - flops('0 1 00')
  two = flops('0 1 2 00 01') - flops('0 1 00')
  assert a_node > 0 and two == pytest.approx(2 * a_node, rel=0.01)
  assert flops('0 1 00 10') - flops('0 1 00') > a_node, 'a node more is fed'
  assert a_node % tokens == 0


def test_what_a_tree_costs_is_not_predicted_from_an_acceptance_rate():
  rows = {name: dict(iteration=dict(seconds=1.0)) for name in programs.DECODING}
  assert report.prediction(rows, 5, 1, alpha=0.8, tree='eagle1')['predicted'] == []
  found = report.prediction(rows, 5, 1, tau=3.0, tree='eagle1')
  assert [p['block_efficiency'] for p in found['predicted']] == [3.0]
  assert '| eagle1 |' in report.table([dict(study='x', decode_topology='y', programs=[],
                                            prediction=found)])


def test_summary_has_a_line_for_each_study_that_trains():
  rows = [dict(program='train', topology='v5e:4x4', needs_gib=6.52, hbm_gib=16, fits=True,
               roofline_seconds=0.0584, mfu=0.59),
          dict(program='speculate', topology='v5e:1x1', needs_gib=6.24, hbm_gib=16, fits=True)]
  points = [dict(alpha=alpha, speedup_predicted=9 * alpha) for alpha in (0.7, 0.8)]
  study = dict(study='one', programs=rows, prediction=dict(predicted=points))
  no_fit = dict(study='two', prediction=None,
                programs=[dict(program='train', topology='v4:2x2x1', needs_gib=40.0, hbm_gib=32,
                               fits=False)])
  decoding = dict(study='three', programs=rows[1:], prediction=None)
  _, _, *lines = report.summary([study, no_fit, decoding]).splitlines()
  assert lines == ['| one | v5e:4x4 | 6.5 of 16 | 58 | 0.59 | v5e:1x1 | 6.2 of 16 | 7.2 |',
                   '| two | v4:2x2x1 | 40.0 of 32 | - | - | - | - | - |']


def rows_of(config_file, topology):
  made = test_configs.load(CONFIGS / f'{config_file}.py').get_config()
  return compile_command.grown(made, topology).distill.train.batch_size


def test_a_grown_batch_has_as_many_rows_a_chip():
  assert rows_of('pod_t5_xl', 'v5e:4x4') == 32 and rows_of('pod_t5_xl', 'v5e:16x16') == 512
  with pytest.raises(ValueError, match='no whole number of rows on v4:1x1x1'):
    rows_of('quickstart', 'v4:1x1x1')


def test_growth_names_what_grew():
  def document(topology, seconds, gathering):
    collectives = [dict(kind='all-gather', seconds=gathering), dict(kind='all-reduce', seconds=1.0)]
    return dict(study='x', programs=[dict(
        program='train', topology=topology, chips=1, mfu=0.5, roofline_seconds=seconds,
        kernel_seconds=seconds, network_seconds=2.0, collectives=collectives)])
  few, many = report.growth([document('v5e:4x4', 10.0, 0.5), document('v5e:8x8', 11.0, 0.75)])
  assert (few['relative'], few['grew']) == (1.0, [])
  assert (many['relative'], many['grew']) == (1.1, ['all-gather'])
  assert 'all-gather 750.000' in report.growth_table([few, many])


@needs_libtpu
def test_a_study_compiles_and_its_products_are_those_of_the_trace(tmp_path, capsys):
  found = compile_command.document(config(), 'v5e:2x2', 'v5e:1x2', ['train'], gamma=2,
                                   keep=tmp_path)
  train, = found['programs']
  assert found['fits'] and train['chips'] == 4
  assert train['flops'] == pytest.approx(train['needed_flops'], rel=0.02)
  assert 0 < train['needs_gib'] < 1 and 0 < train['mfu'] < 1
  assert train['aliased_bytes'] > 0, 'the state is not donated'
  assert {c['kind'] for c in train['collectives']} >= {'all-reduce'}
  json.dumps(found)
  capsys.readouterr()
  again = compile_command.document(config(), 'v5e:2x2', 'v5e:1x2', ['train'], gamma=2,
                                   keep=tmp_path)
  assert again == found, 'a kept compilation says the same'


@needs_libtpu
def test_what_is_too_large_says_what_it_needs():
  mesh = sharding.make_mesh(devices=chips.devices('v5e:2x2'))
  square = jax.ShapeDtypeStruct((65_536, 65_536), jnp.float32,
                                sharding=sharding.replicated(mesh))
  program = programs.Program('train', jax.jit(lambda x: (x @ x, x @ x.T)), (square,), mesh, 1, 1,
                             lambda: None)
  compiled = ahead.run(program, 'v5e:2x2')
  assert not compiled.fits
  assert 15 < compiled.available / 2 ** 30 < 16 < compiled.needs / 2 ** 30
  row = report.row(program, compiled, 'v5e:2x2')
  assert not row['fits'] and '| no |' in report.table(
      [dict(study='x', programs=[row], prediction=None)])
