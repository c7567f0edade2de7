"""Each wrong config ends in one sentence with field, value and what would be right."""

import pytest

from configs import common
from specdistill_jax.decoding import rules
from specdistill_jax.drafters import families
from specdistill_jax.evaluation import tradeoff
from specdistill_jax.losses import objectives
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import feature_checks

WRONG = [
    # Field, value, and what the sentence must name beside both.
    ('distill.objective', 'forwad_kl', 'forward_kl'),
    ('distill.objective', 'kl', 'reverse_kl'),
    ('distill.objective', 'lk_hybrid,eta=fast', 'eta must be at least 0'),
    ('distill.objective', 'lk_hybrid,beta=1', 'eta, kl_weight'),
    ('distill.objective', 'tvd,kl_weight=0.5', 'of lk_hybrid only'),
    ('distill.objective', 'jsd,beta=0.3', 'config.distill.beta'),
    ('distill.objective', 'tvd,keep=0.4', "the draft of 'tvd'"),
    ('distill.also', ('forward_kl',), 'already'),
    ('distill.also', ('jsd', 'jsd'), 'without repeated'),
    ('distill.data_source', 'drafts', 'draft_stored'),
    ('distill.student_fraction', 1.5, 'from 0 to 1'),
    ('distill.student_fraction', 0.75, 'fixed+draft'),
    ('distill.beta', 0.0, 'above 0'),
    ('distill.beta', 0.1, 'jsd'),
    ('distill.temperature', 0.0, 'above 0'),
    ('distill.normalisation', 'mean', 'sequence'),
    ('distill.seeds', (), 'at least one'),
    ('distill.seeds', (1, 1), 'without repeated'),
    ('distill.rollout.temperature', -1.0, 'at least 0'),
    ('distill.rollout.max_new_tokens', 90, 'at most 80'),
    ('distill.rollout.top_k', 0, 'at least 1'),
    ('evaluate.gammas', (0, 3), 'at least 1'),
    ('evaluate.gammas', (2.5,), 'whole number'),
    ('evaluate.trees', 'eagle1', 'a tuple'), ('evaluate.trees', ('eagle1',) * 2, 'repeated'),
    ('evaluate.trees', ('eagle2',), "or as in 'dynamic k10 d6 n60'"),
    ('evaluate.trees', ('dynamic k3 d2 n13',), 'draft only 12 tokens to choose from'),
    ('evaluate.temperatures', (-0.5,), 'at least 0'),
    ('evaluate.temperatures', (float('nan'),), 'at least 0'),
    ('evaluate.top_p', 0.0, 'above 0 and at most 1'),
    ('evaluate.top_p', 1.1, 'above 0 and at most 1'),
    ('evaluate.rules', (), 'pairs'),
    ('evaluate.rules', ('exact',), 'pairs'),
    ('evaluate.rules', (('exact', 1.0), ('linear', 0.0)), 'above 0 and at most 1'),
    ('evaluate.rules', (('exact', 1.0), ('linear', 1.2)), 'above 0 and at most 1'),
    ('evaluate.rules', (('exact', 1.0), ('typcal', 0.3)), "did you mean 'typical'"),
    ('evaluate.rules', (('exact', 1.0), ('exact', 1.0)), 'without repetition'),
    ('evaluate.draft_sampling', ('best',), 'greedy'),
    ('evaluate.min_confidences', (1.0,), 'below 1'),
    ('evaluate.max_quality_drop', 1.0, 'below 1'),
    ('evaluate.batch_size', 5, 'multiple'),
    ('evaluate.max_new_tokens', 200, 'at most 80'),
    ('target.train.steps', 0, 'at least 1'),
    ('target.train.steps', True, 'at least 1'),
    ('draft.train.accumulation', 3, 'multiple'),
    ('draft.train.warmup_steps', 300, 'below'),
    ('draft.train.optimizer', 'sgd', 'adamw'),
    ('draft.train.learning_rate', float('inf'), 'above 0'),
    ('target.train.schedule', 'cosin', "did you mean 'cosine'"),
    ('target.model.num_kv_heads', 3, 'multiple'),
    ('target.model.head_dim', 7, 'even'),
    ('target.model.dtype', 'float16', 'bfloat16'),
    ('target.model.family', 'T5', 'one of decoder, t5'),
    ('task.name', 'stdlib_doc', 'stdlib_docs'),
    ('task.prompt_length', 96, 'below'),
    ('task.validation_fraction', 1.0, 'below 1'),
    ('task.train_files', ('a.txt',), 'local_files'),
    ('task.metric', 'rouge', 'rouge2'),
    ('mesh.data', 0, 'at least 1, or -1'),
    ('study', '', 'non-empty'),
]


def refused(config) -> str:
  with pytest.raises(ValueError) as caught:
    checks.check(config)
  sentence = str(caught.value)
  assert '\n' not in sentence
  return sentence


def place(config, path: str, value) -> None:
  *parents, name = path.split('.')
  for parent in parents:
    config = config[parent]
  with config.ignore_type():
    config[name] = value


@pytest.mark.parametrize('path,value,right', WRONG, ids=lambda x: str(x))
def test_wrong_value(path, value, right):
  config = common.study('x')
  place(config, path, value)
  sentence = refused(config)
  # Fields of a model are named by the model's own words, below the section.
  field = path if '.model.' not in path else path.rsplit('.', 1)[0]
  assert field.split('.')[-1] in sentence and right in sentence
  assert str(value) in sentence or repr(value) in sentence


@pytest.mark.parametrize('section,name,meant', [
    ('', 'distil', 'distill'), ('distill', 'objectiv', 'objective'),
    ('evaluate', 'gamma', 'gammas'), ('distill.rollout', 'temprature', 'temperature'),
    ('target.model', 'num_layer', 'num_layers'), ('target.train', 'step', 'steps')])
def test_misspelt_field(section, name, meant):
  config = common.study('x')
  place(config, f'{section}.{name}'.lstrip('.'), 1)
  sentence = refused(config)
  assert name in sentence and f'did you mean {meant}' in sentence


def test_a_tree_needs_tokens_and_a_rule():
  config = common.study('x')
  config.evaluate.trees = ('0 1 00', 'dynamic k9 d2 n9')
  checks.check(config)
  config.task.vocab_size = 8
  assert "'dynamic k9 d2 n9', of up to 9 children a node" in refused(config)
  config.task.vocab_size, config.evaluate.rules = 1000, (('block', 1.0),)
  assert "add ('exact', 1.0)" in refused(config)


def test_a_plateau_begins_before_its_end():
  config = common.study('x')
  config.draft.train.update(schedule='plateau_cosine', steps=300, warmup_steps=150)
  checks.check(config)
  config.draft.train.warmup_steps = 151
  assert 'warmup_steps is 151; under plateau_cosine it must be at most half' in refused(config)


def test_models_have_the_fields_of_their_family_and_one_family():
  config = common.study('x')
  config.target.model, config.draft.model = common.t5(), common.t5()
  checks.check(config)
  config.target.model.relative_buckets = 6
  assert 'relative_buckets is 6; it must be a multiple of 4' in refused(config)
  config.target.model = common.t5()
  config.target.model.num_layers = 3
  assert 'no field target.model.num_layers; did you mean num_' in refused(config)
  config.target.model = common.decoder()
  sentence = refused(config)
  assert "'decoder'" in sentence and "'t5'" in sentence and 'family' in sentence


def test_missing_field_and_section():
  config = common.study('x')
  del config.evaluate.gammas
  assert 'evaluate.gammas' in refused(config)
  config = common.study('x')
  with config.ignore_type():
    config.task = None
  assert 'config.task is None' in refused(config)


@pytest.mark.parametrize('model,stage', [('target', 'distill'), ('draft', 'distill'),
                                         ('target', 'evaluate')])
def test_stage_without_its_model(model, stage):
  config = common.study('x')
  config[model] = None
  if stage == 'evaluate':
    config.distill = None
  sentence = refused(config)
  assert f'config.{model} is None' in sentence and f'config.{stage} is set' in sentence


def test_left_out_sections_are_legal():
  config = common.study('x')
  config.distill = None
  checks.check(config)
  config.evaluate = None
  config.draft = None
  checks.check(config)


def test_contradictions_on_the_mesh():
  config = common.study('x')
  config.mesh.fsdp = -1
  assert 'only one' in refused(config)
  config = common.study('x')
  config.mesh.data, config.mesh.fsdp = 3, 2
  assert 'multiple of mesh.data x mesh.fsdp, 6' in refused(config)


def test_local_files_need_files():
  config = common.study('x')
  config.task.name = 'local_files'
  assert 'task.train_files' in refused(config)
  config.task.train_files = ('a.jsonl', ('b.de', 'b.en'))
  checks.check(config)
  config.task.train_files = (('b.de', 'b.en', 'b.fr'),)
  assert 'pairs' in refused(config)


def test_mixture_may_have_a_student_fraction():
  config = common.study('x')
  config.distill.data_source = 'fixed+draft'
  config.distill.student_fraction = 0.75
  checks.check(config)


def test_names_are_those_that_the_stages_know():
  """A name added to a stage but not here could not be asked for, and the other way round."""
  assert checks.DATA_SOURCES == distill.DATA_SOURCES
  assert set(checks.OBJECTIVES) == {*objectives.DIVERGENCES, objectives.CROSS_ENTROPY,
                                    objectives.FEATURE}
  assert checks.RULES == rules.NAMES and set(tradeoff.RULES) == set(rules.NAMES)
  assert set(feature_checks.FAMILIES) == set(families.FEATURE_DRAFTS)


@pytest.mark.parametrize('pairs,right', [
    ((('exact', 0.5),), 'has no leniency; it must be 1'),
    ((('exact', 1.0), ('typical', 1.0)), 'epsilon below 1'),
    ((('exact', 1.0), ('top_k', 0.4)), '1 / 2, 1 / 3'),
    ((('linear', 0.5),), 'no lossless rule at temperature 0'),
])
def test_rules_that_make_no_sense(pairs, right):
  config = common.study('x')
  config.evaluate.rules = pairs
  sentence = refused(config)
  assert 'config.evaluate.rules' in sentence and right in sentence


def test_a_rule_needs_one_temperature_that_it_is_for():
  config = common.study('x')
  config.evaluate.rules = (('exact', 1.0), ('linear', 0.5), ('greedy_lenience', 0.5))
  checks.check(config)
  config.evaluate.temperatures = (0.0,)
  assert "('linear', 0.5)" in refused(config)
  config.evaluate.temperatures = (0.7,)
  assert "('greedy_lenience', 0.5)" in refused(config)


def test_files_of_plain_text_have_rows_of_prompt_and_continuation():
  config = common.study('x')
  config.task.update(name='local_files', train_files=('a.txt.gz', 'b.txt'), max_length=64,
                     prompt_length=32)
  config.distill.rollout.max_new_tokens = config.evaluate.max_new_tokens = 60
  assert 'less task.prompt_length, 32, so that it must be at most 32' in refused(config)
  config.task.train_files = ('a.jsonl',)
  checks.check(config)


def test_a_misspelt_feature_draft_is_told():
  with pytest.raises(ValueError, match="'eagel'; it must be one of eagle, fspad, eagle3"):
    common.feature_draft('eagel')
