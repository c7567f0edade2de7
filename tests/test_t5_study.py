"""A T5 pair through every stage: trained, distilled on-policy, evaluated, and kept apart."""

import functools
import json

import jax
import numpy as np
import pytest

from configs import common
import studies
from specdistill_jax import sharding
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.evaluation import rows
from specdistill_jax.models import decoder
from specdistill_jax.models import t5
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import evaluate
from specdistill_jax.stages import train


def study():
  config = studies.config(steps=4, checkpoint_every=4, eval_every=4)
  size = dict(num_encoder_layers=1, num_decoder_layers=2, width=16, num_heads=2, head_dim=8,
              mlp_width=32)
  config.target.model, config.draft.model = common.t5(), common.t5()
  config.target.model.update(size)
  config.draft.model.update(size | dict(num_decoder_layers=1, width=8, num_heads=1))
  config.distill.update(data_source='fixed+draft', control=False)
  config.distill.train.steps = 8
  config.evaluate.update(temperatures=(0.0,), gammas=(2,), num_prompts=3, max_new_tokens=5,
                         bootstrap_samples=20)
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """One device: compiling for it is faster; test_t5.py is about several."""
  config, path = study(), tmp_path_factory.mktemp('study')
  checks.check(config)
  studies.write_data(path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(
        sharding.make_mesh, devices=jax.devices()[:1]))
    for which in ('target', 'draft'):
      train.run(config, path, which)
    distill.run(config, path)
    evaluate.run(config, path)
    yield path


def test_every_stage_leaves_what_it_should(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  for run in ('target', 'draft'):
    first, *_, last = [line for line in lines if line['run'] == run]
    assert last['validation_cross_entropy'] < first['validation_cross_entropy']
  arm = [line for line in lines if line['stage'] == 'distill']
  assert len(arm) == 9 and 1 <= arm[-1]['block_efficiency'] <= 6
  assert 0 < arm[-1]['validation_alpha'] <= 1 and 0 < arm[-1]['rollout_share']
  assert {line['on_policy'] for line in arm[1:]} == {0.0, 1.0}, 'the mixture drew one kind only'
  found = rows.read(workdir / 'results.jsonl')
  assert [row['objective'] for row in found] == ['none', 'forward_kl']
  for row in found:
    assert (row['target'], row['draft']) == ('t5 1+2x16', 't5 1+1x8')
    assert 0 <= row['alpha'] <= 1 <= row['block_efficiency'] <= 3
    assert row['prefill_seconds'] > 0


def test_alpha_is_counted_on_the_continuations_only(workdir):
  """At temperature 0, tokens of `overlap` are the tokens that the target emitted alone."""
  for row in rows.read(workdir / 'results.jsonl'):
    column = lambda name: sum(line[rows.COUNTS.index(name)] for line in row['counts'])
    assert column('overlap_tokens') == column('autoregressive_emitted') == column('emitted')


def test_model_file_says_what_it_is(workdir):
  model = store.load_model(workdir / 'distill' / distill.arm_names(study())[0])
  assert isinstance(model.config, t5.T5Config) and model.config.num_decoder_layers == 1
  assert json.loads((workdir / 'target' / 'model.json').read_text())['kind'] == 't5'
  metadata = shards.read_metadata(workdir / 'data', 'train')
  stored = shards.rows(workdir / 'data', 'train')
  assert metadata['longest_prompt'] == studies.PROMPT_LENGTH
  assert metadata['longest_completion'] == max(
      len(row.tokens) for row in stored) - studies.PROMPT_LENGTH


def test_a_decoder_draft_of_a_t5_target_is_refused(workdir, tmp_path):
  for name in ('data', 'target'):
    (tmp_path / name).symlink_to(workdir / name)
  config = decoder.DecoderConfig(vocab_size=studies.VOCAB_SIZE, num_layers=1, width=8,
                                 num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=8)
  store.write_model_file(tmp_path / 'draft', config)
  with store.Store(tmp_path / 'draft') as checkpoints:
    checkpoints.save(1, decoder.init(config, jax.random.key(0)), {'count': np.int32(1)}, {})
  with pytest.raises(ValueError, match="family 't5' and the draft of 'decoder'"):
    distill.run(study(), tmp_path)
