"""The programs of feature-level drafts, as the compile command builds them; nothing is compiled."""

import jax
import pytest

import test_compile
import test_configs
from configs import common
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import ahead
from specdistill_jax.costs import needed
from specdistill_jax.costs import programs
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import families
from specdistill_jax.models import variants

WIDTHS = structs.Widths(8, 24)
ROWS, TOKENS, D, F, VOCAB = 4, 32, 64, 128, 256


def config(family):
  made = test_compile.config()
  made.draft.model = common.feature_draft(family)
  made.draft.train.steps = 0
  made.distill.update(objective='feature', data_source='fixed', control=False)
  made.distill.train.update(batch_size=ROWS, head_chunk=8, remat='full')
  return made


def mesh():
  return sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])


def test_there_is_no_on_policy_training():
  assert programs.names(config('fspad')) == (
      'target', 'train', 'held_out', 'generate', 'draft', 'speculate')
  with pytest.raises(ValueError, match="no program on_policy: 'fspad' learns on given text"):
    programs.training(config('fspad'), WIDTHS, mesh(), name='on_policy')


def test_a_training_step_costs_what_its_equations_say():
  """By hand, product by product. What is not differentiated has no backward pass: the target, its
  head's weights, and what comes from it into the first products."""
  program = programs.training(config('fspad'), WIDTHS, mesh(), name='train')
  tokens, scores = ROWS * TOKENS, 2 * ROWS * TOKENS ** 2 * D  # one of attention's two products
  target = 2 * tokens * (4 * D * D + 3 * D * F) + 2 * scores
  heads = 2 * tokens * VOCAB * D * 3  # teacher, student, and back to its features
  fusion, gate = 4 * tokens * 2 * D * D, 4 * tokens * D * F
  layer = 6 * tokens * (2 * D * F + 4 * D * D + 2 * D * F + 2 * D * F) + 6 * scores
  assert needed.flops(program.reference(), 0) == target + heads + fusion + gate + layer
  assert 'while' in program.lower().as_text()  # the head's chunks


@pytest.mark.parametrize('family, shape', [
    ('fspad', 2), ('fspad', tree_lib.EAGLE1), ('eagle3', tree_lib.Dynamic(3, 2, 5))],
                         ids=['chain', 'static', 'dynamic'])
def test_decoding_holds_the_target_once(family, shape):
  one = lambda name: programs.decoding(config(family), WIDTHS, mesh(), name=name, shape=shape)
  both, target, alone = one('speculate'), one('generate'), one('draft')
  held = [ahead.arguments(program) for program in (both, target, alone)]
  inputs = 4 * 8 + 4
  ends = VOCAB * D * 2 // 2 + D * 4  # the tied embedding in bfloat16, on two chips; the last norm
  assert held[0] == held[1] + held[2] - inputs - ends
  for program in (both, alone) if family == 'fspad' else (both,):
    text = program.lower().as_text()
    assert 'stablehlo.while' in text and 'callback' not in text


@pytest.mark.parametrize('name, arg, target, millions', [
    ('pod_feature_vicuna', '7b-fspad', 'vicuna-7b', 416),
    ('pod_feature_vicuna', '33b-eagle', 'vicuna-33b', 557),
    ('pod_feature_vicuna', '33b-fspad', 'vicuna-33b', 1101),
    ('pod_feature_llama3', '8b-fspad', 'llama-3-8b', 416),
    ('pod_feature_llama3', '8b-eagle3', 'llama-3-8b', 425),
    ('pod_feature_llama3', '70b-eagle', 'llama-3-70b', 990)])
def test_models_of_the_pod_configs_are_the_published_ones(name, arg, target, millions):
  made = test_configs.load(test_configs.CONFIGS / f'{name}.py').get_config(arg)
  found = families.config(made.target.model, vocab_size=made.task.vocab_size)
  assert found == variants.config(target)
  draft = families.config(made.draft.model, found)
  abstract = jax.eval_shape(lambda: families.init(draft, jax.random.key(0)))
  assert abs(sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6 - millions) < 0.6
