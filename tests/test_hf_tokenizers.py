"""Tokenizers of Hugging Face directories, the pairing of padded vocabularies, and studies."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import json
import logging as std_logging
import types

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers as tokenizers_lib

from configs import common
from specdistill_jax import api
from specdistill_jax import convert
from specdistill_jax import sharding
from specdistill_jax.checkpoints import pretrained
from specdistill_jax.checkpoints import store
from specdistill_jax.data import shards
from specdistill_jax.data import tokenizers
from specdistill_jax.stages import checks
from specdistill_jax.stages import distill
from specdistill_jax.stages import imports
from specdistill_jax.stages import prepare
from specdistill_jax.stages import token_rows
from specdistill_jax.stages import train
import hub
import studies

TEXT = [f'The {a} {b} jumps over the lazy {c}.\n' for a in ('quick', 'slow', 'old')
        for b in ('fox', 'hare', 'cat') for c in ('dog', 'cow', 'hen')]
SAMPLE = 'The slow cat jumps over the old hen.'
T5_FILE = 'spiece.model'
SPECIAL = ['<s>', '</s>', '<pad>', '<|user|>']


def write_json_tokenizer(directory, *, bos=True, **settings):
  """A byte-level BPE whose special tokens have no ids that anyone would guess."""
  made = tokenizers_lib.Tokenizer(tokenizers_lib.models.BPE())
  made.pre_tokenizer = tokenizers_lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers_lib.decoders.ByteLevel()
  made.train_from_iterator(TEXT, tokenizers_lib.trainers.BpeTrainer(
      vocab_size=300, show_progress=False,
      initial_alphabet=tokenizers_lib.pre_tokenizers.ByteLevel.alphabet()))
  made.add_special_tokens(SPECIAL)
  if bos:
    made.post_processor = tokenizers_lib.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', made.token_to_id('<s>'))])
  made.enable_truncation(4)  # as some files have it; it must not cut our texts
  directory.mkdir(parents=True, exist_ok=True)
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>',
      eos_token={'__type': 'AddedToken', 'content': '</s>', 'special': True},
      pad_token='<pad>') | settings))


def write_sentencepiece(directory, name, vocab_size, **ids):
  directory.mkdir(parents=True, exist_ok=True)
  with open(directory / name, 'wb') as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=file, vocab_size=vocab_size, minloglevel=2,
        model_type='unigram' if name == 'spiece.model' else 'bpe', **ids)


def write_model(directory, rows, seed=0, **fields):
  """A llama with as many rows of embedding, beside the tokenizer that is there."""
  hub.build('llama', seed, vocab_size=rows, **fields).save_pretrained(directory)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """Target and draft of one family: 304 tokens, in 320 rows and in 308."""
  root = tmp_path_factory.mktemp('pair')
  for name, rows, layers in (('target', 320, 2), ('draft', 308, 1)):
    write_json_tokenizer(root / name)
    write_model(root / name, rows, num_hidden_layers=layers)
  return root


def test_json_tokenizer_is_that_of_transformers(tmp_path):
  write_json_tokenizer(tmp_path)
  found = tokenizers.load(tmp_path)
  fast = hub.transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert found.size == len(fast) == 304
  assert (found.pad_id, found.eos_id, found.bos_id) == (
      fast.pad_token_id, fast.eos_token_id, fast.bos_token_id) == (302, 301, 300)
  assert found.encode(SAMPLE) == fast(SAMPLE, add_special_tokens=False)['input_ids']
  assert [*found.prefix_ids, *found.encode(SAMPLE)] == fast(SAMPLE)['input_ids']
  assert found.encode_batch([SAMPLE, 'a']) == [found.encode(SAMPLE), found.encode('a')]
  assert found.decode([300, *found.encode(SAMPLE), 301, 302]) == SAMPLE
  with pytest.raises(ValueError, match='304 is outside the vocabulary of 304'):
    found.decode([304])


def test_digest_is_that_of_the_ids_not_of_the_file(tmp_path):
  write_json_tokenizer(tmp_path / 'a')
  write_json_tokenizer(tmp_path / 'b', bos=False, chat_template='x')
  path = tmp_path / 'b' / 'tokenizer.json'
  path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
  first, second = tokenizers.load(tmp_path / 'a'), tokenizers.load(tmp_path / 'b')
  assert first.digest == second.digest and second.prefix_ids == ()
  path.write_text(path.read_text().replace('<|user|>', '<|other|>'))
  assert tokenizers.load(tmp_path / 'b').digest != first.digest


def test_special_tokens_fall_back_on_the_config(tmp_path):
  write_json_tokenizer(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(ValueError, match='which token ends a text'):
    tokenizers.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(dict(eos_token_id=[301, 303])))
  found = tokenizers.load(tmp_path)
  assert (found.eos_id, found.pad_id, found.bos_id) == (301, 301, None)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<end>')))
  with pytest.raises(ValueError, match="eos_token '<end>', which the tokenizer does not have"):
    tokenizers.load(tmp_path)


def test_sentencepiece_of_llama_and_of_t5(tmp_path):
  write_sentencepiece(tmp_path / 'llama', 'tokenizer.model', 60, unk_id=0, bos_id=1, eos_id=2)
  (tmp_path / 'llama' / 'added_tokens.json').write_text(json.dumps({'<pad>': 60}))
  (tmp_path / 'llama' / 'tokenizer_config.json').write_text(json.dumps({'pad_token': '<pad>'}))
  llama = tokenizers.load(tmp_path / 'llama')
  assert (llama.size, llama.pad_id, llama.eos_id, llama.bos_id) == (61, 60, 2, 1)
  assert llama.prefix_ids == (1,)
  assert llama.decode([1, *llama.encode(SAMPLE), 2, 60, 60]) == SAMPLE
  write_sentencepiece(tmp_path / 't5', 'spiece.model', 34, pad_id=0, eos_id=1, unk_id=2,
                      bos_id=-1)
  t5 = tokenizers.load(tmp_path / 't5')
  assert (t5.size, t5.pad_id, t5.eos_id, t5.bos_id, t5.prefix_ids) == (134, 0, 1, None, ())
  assert t5.decode([*t5.encode(SAMPLE), 1, 0, 133]) == SAMPLE
  (tmp_path / 't5' / 'spiece.model').write_bytes(b'nothing')
  with pytest.raises(ValueError, match='spiece.model is not a SentencePiece model'):
    tokenizers.load(tmp_path / 't5')


@pytest.mark.parametrize('saved_as', ['spiece.model', 'tokenizer.json'])
def test_prompts_of_t5_end_as_those_of_transformers(saved_as, tmp_path):
  """Its encoder reads an end token; sentinels are found; newlines are spaces."""
  write_sentencepiece(tmp_path, T5_FILE, 34, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  reference = hub.transformers.T5Tokenizer.from_pretrained(tmp_path)
  if saved_as == 'tokenizer.json':
    reference.save_pretrained(tmp_path)
  found = tokenizers.load(tmp_path)
  assert type(found).__name__ == {'spiece.model': 'SentencePieceTokenizer',
                                  'tokenizer.json': 'JsonTokenizer'}[saved_as]
  assert (found.size, found.pad_id, found.eos_id) == (134, 0, 1)
  texts = [SAMPLE, 'The cow\n', ' The  old\nhen.', 'Zebra <extra_id_3> hen<extra_id_12>']
  for text, ids in zip(texts, found.encode_batch(texts)):
    assert ids == found.encode(text)
    assert [*found.prefix_ids, *ids, *found.suffix_ids] == reference(text)['input_ids'], text


def test_prompts_in_rows_begin_and_end_as_their_tokenizer_says(tmp_path):
  """A T5's prompt ends in an end token, cut or not; each row of a decoder begins with its own."""
  write_sentencepiece(tmp_path, T5_FILE, 34, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
  write_json_tokenizer(tmp_path / 'json')
  t5, decoder = tokenizers.load(tmp_path), tokenizers.load(tmp_path / 'json')
  def rows(vocabulary, inputs, **settings):
    array = lambda text: np.array(vocabulary.encode(text) if text else [], np.int32)
    example = types.SimpleNamespace(
        inputs=array(inputs), targets=array(SAMPLE), reference=SAMPLE, document='', category='')
    settings = dict(name='local_files', max_inputs=None, max_targets=None, max_length=80,
                    prompt_length=3) | settings
    counts = {}
    return list(token_rows.from_texts([example], settings, vocabulary, counts, '')), counts
  [row], _ = rows(t5, 'The old hen\n')
  assert row.tokens[:row.prompt_length].tolist() == [*t5.encode('The old hen'), 1]
  [row], counts = rows(t5, 'The old hen\n', max_inputs=5)
  assert row.tokens[:row.prompt_length].tolist() == [*t5.encode('The old hen')[:4], 1]
  assert counts['cut_inputs'] == 1
  [row], _ = rows(decoder, 'The old hen\n')
  assert row.tokens[:row.prompt_length].tolist() == [300, *decoder.encode('The old hen\n')]
  texts, counts = rows(decoder, '', max_length=6)
  assert len(texts) > 1 and all(row.tokens[0] == 300 for row in texts)
  assert np.concatenate([row.tokens[1:] for row in texts]).tolist() == decoder.encode(
      SAMPLE)[:sum(len(row.tokens) - 1 for row in texts)]
  assert counts['too_short'] + len(texts) == -(-len(decoder.encode(SAMPLE)) // 5)


def test_a_copied_tokenizer_keeps_what_config_json_said(tmp_path):
  write_json_tokenizer(tmp_path / 'a')
  (tmp_path / 'a' / 'tokenizer_config.json').write_text('{"model_max_length": 9}')
  (tmp_path / 'a' / 'config.json').write_text(json.dumps(
      dict(eos_token_id=303, bos_token_id=300, pad_token_id=-1)))
  first = tokenizers.load(tmp_path / 'a')
  tokenizers.copy(first, tmp_path / 'b')
  second = tokenizers.load(tmp_path / 'b')
  for name in ('eos_id', 'bos_id', 'pad_id', 'prefix_ids', 'suffix_ids', 'size', 'digest'):
    assert getattr(first, name) == getattr(second, name), name
  assert (second.eos_id, second.pad_id, second.bos_id) == (303, 303, 300)
  assert json.loads((tmp_path / 'b' / 'tokenizer_config.json').read_text()
                    )['model_max_length'] == 9


def test_seqio_sees_the_same_tokens(pair):
  tensorflow = pytest.importorskip('tensorflow')
  from specdistill_jax.data import tasks
  tokenizer = tokenizers.load(pair / 'target')
  vocabulary = tasks.seqio_vocabulary(tokenizer)
  ids = tokenizer.encode(SAMPLE)
  assert list(vocabulary.encode(SAMPLE)) == ids == vocabulary.encode_tf(SAMPLE).numpy().tolist()
  assert vocabulary.decode([*ids, 301, 5]) == SAMPLE
  assert vocabulary.decode_tf(tensorflow.constant([*ids, 301, 5])).numpy().decode() == SAMPLE
  assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.vocab_size) == (301, 302, 304)
  assert vocabulary == tasks.seqio_vocabulary(tokenizers.load(pair / 'draft'))


def test_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path):
  write_json_tokenizer(tmp_path)
  write_model(tmp_path, 303)
  with pytest.raises(ValueError, match='has 304 ids and the embedding 303 rows'):
    pretrained.load(tmp_path)


def test_padded_vocabularies_share_their_real_tokens(pair, caplog):
  """Greedy text is the target's argmax over real tokens, though a padding id would win."""
  target, draft = (pretrained.load(pair / name) for name in ('target', 'draft'))
  assert target.config.eos_id == 301
  head = target.module.head_vd[...].at[:, 310].multiply(50.0).at[:, 311].multiply(-50.0)
  target.module.head_vd[...] = head
  prompts = ['The quick', 'The old cow jumps over']
  settings = dict(max_new_tokens=6, temperature=0.0, key=jax.random.key(0))
  alone = api.generate(target, prompts, **settings).tokens
  assert np.isin(alone, (310, 311)).any(), 'the test needs a padding id that wins'
  api._say_shared.cache_clear()
  std_logging.getLogger('absl').setLevel('INFO')
  with caplog.at_level('INFO'):
    for _ in range(2):
      narrow, narrow_draft = api.check_same_vocabulary(target, draft)
  said = [record.getMessage() for record in caplog.records if '304' in record.getMessage()]
  assert len(said) == 1 and all(size in said[0] for size in ('320', '308', '304'))
  assert narrow.config.vocab_size == narrow_draft.config.vocab_size == 304
  ids = np.arange(7)[None]
  full, cut = (m.module.causal(ids).logits_btv for m in (target, narrow))
  np.testing.assert_array_equal(full[..., :304], cut)
  wanted = api.generate(narrow, prompts, **settings)
  found = api.speculate(target, draft, prompts, gamma=2, **settings)
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  assert int(found.tokens.max()) < 304


def test_other_vocabularies_are_still_refused(pair, tmp_path):
  target = pretrained.load(pair / 'target')
  write_json_tokenizer(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|user|>', '<|other|>'))
  write_model(tmp_path, 308)
  with pytest.raises(ValueError, match='different vocabularies'):
    api.check_same_vocabulary(target, pretrained.load(tmp_path))
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='vocabulary of 320 tokens and draft one of 308'):
    api.check_same_vocabulary(target, pretrained.load(tmp_path))


def test_what_is_imported_together_has_one_vocabulary(pair, tmp_path):
  """Target, draft, and the arms of another study."""
  arm = tmp_path / 'forward_kl-draft-seed0'
  arm.mkdir()
  write_json_tokenizer(arm)
  path = arm / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|user|>', '<|other|>'))
  write_model(arm, 308)
  config = studies.config()
  config.target.init_from, config.distill.init_from = str(pair / 'target'), str(tmp_path)
  config.distill.update(data_source='draft')
  with pytest.raises(ValueError, match='target and .*-seed0 have different vocabularies'):
    imports.vocabulary(config)
  config.target.init_from = None
  assert imports.vocabulary(config) is not None
  config.distill.init_from = str(pair)
  with pytest.raises(ValueError, match='no directory'):
    imports.vocabulary(config)


def test_convert_there_and_back(pair, tmp_path, capsys):
  ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
  for source, destination in ((pair / 'target', ours), (ours, theirs)):
    assert convert.main(['x', f'--source={source}', f'--destination={destination}']) == 0
  assert 'a checkpoint of specdistill_jax' in (out := capsys.readouterr().out)
  assert 'a Hugging Face directory' in out
  first, second = (hub.transformers.AutoModelForCausalLM.from_pretrained(d)
                   for d in (pair / 'target', theirs))
  for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
    assert hub.torch.equal(one, other), name
  new, old = (json.loads((d / 'config.json').read_text()) for d in (theirs, pair / 'target'))
  assert new['max_position_embeddings'] == old['max_position_embeddings'] == 128
  assert new['eos_token_id'] == 301  # what the tokenizer ends texts with
  fast = hub.transformers.AutoTokenizer.from_pretrained(theirs)
  model = pretrained.load(ours)
  assert model.vocabulary.encode(SAMPLE) == fast(SAMPLE, add_special_tokens=False)['input_ids']
  assert convert.main(['x', f'--source={ours}', f'--destination={theirs}']) == 2
  half, back = tmp_path / 'half', tmp_path / 'back'
  convert.convert(pair / 'target', half, dtype='bfloat16')
  convert.convert(half, back)
  assert {tensor.dtype for tensor in hub.transformers.AutoModelForCausalLM.from_pretrained(
      back, dtype='auto').parameters()} == {hub.torch.bfloat16}


class Unmeasured:
  """In place of the measurements during training: most of their time, and tested elsewhere."""

  def __init__(self, *_, **__):
    pass

  def measure(self, _):
    return {}


def test_a_study_starts_from_imported_models(pair, tmp_path, monkeypatch):
  """Target as it is, draft fine-tuned and distilled, though their paddings differ."""
  monkeypatch.setattr(train.heldout, 'HeldOut', Unmeasured)
  monkeypatch.setattr(sharding, 'make_mesh', lambda *a, make=sharding.make_mesh, **k: make(
      devices=jax.devices()[:1]))
  lines = [json.dumps(dict(inputs=f'{n} {text[:9]}', targets=text[9:].strip()))
           for n, text in enumerate(TEXT)]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(lines))
  config = studies.config(steps=1, warmup_steps=0)
  config.task.update(name='local_files', train_files=(str(tmp_path / 'rows.jsonl'),),
                     max_length=64, validation_fraction=0.4)
  half = pretrained.load(pair / 'target', parameter_dtype='bfloat16')
  pretrained.save(half, tmp_path / 'half')
  config.target.update(init_from=str(tmp_path / 'half'))
  config.draft.update(init_from=str(pair / 'draft'))
  config.target.train.steps = 0
  config.distill.update(data_source='fixed', control=False)
  config.evaluate = None
  checks.check(config)
  prepare.run(config, tmp_path)
  row = shards.rows(tmp_path / 'data', 'train')[0]
  vocabulary = tokenizers.load(tmp_path / 'data' / 'tokenizer')
  assert row.tokens[0] == 300 and row.tokens[-1] == 301 and row.tokens.max() <= 301
  assert vocabulary.decode(row.tokens) in {
      '\n'.join(json.loads(line).values()) for line in lines}
  for which in ('target', 'draft'):
    train.run(config, tmp_path, which)
  taken = pretrained.load(tmp_path / 'target', parameter_dtype=None)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(half.module),
               jax.tree.leaves(taken.module))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(taken.module)} == {'bfloat16'}
  assert taken.vocabulary.digest == half.vocabulary.digest
  before, after = pretrained.load(pair / 'draft'), pretrained.load(tmp_path / 'draft')
  moved = np.abs(before.module.head_vd[...] - after.module.head_vd[...]).max()
  assert 0 < moved < 0.1, 'one step from where it was imported'
  distill.run(config, tmp_path)
  arm = store.load_model(tmp_path / 'distill' / 'forward_kl-fixed-seed0')
  assert (arm.config.vocab_size, arm.config.vocab_padding) == (304, 4)
  assert convert.main(['x', f'--source={tmp_path}/distill/forward_kl-fixed-seed0',
                       f'--destination={tmp_path}/out']) == 0
  out = hub.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert out.config.vocab_size == 308


@pytest.mark.parametrize('init_from, steps, told', [
    (None, 0, 'steps is 0; it must be a whole number of at least 1'),
    ('nowhere', 5, 'config.draft.init_from .*nowhere is no directory'),
    ('', 5, 'init_from is .*non-empty string')])
def test_settings_of_an_import_are_checked_first(init_from, steps, told):
  config = studies.config()
  config.draft.init_from, config.draft.train.steps = init_from, steps
  with pytest.raises(ValueError, match=told):
    checks.check(config)


def test_an_import_brings_its_vocabulary_and_its_family(pair):
  config = studies.config()
  config.draft.init_from, config.evaluate = str(pair / 'draft'), None
  checks.check(config)
  config.task.vocabulary = 'other.model'
  with pytest.raises(ValueError, match="vocabulary is 'other.model', but config.draft.init_from"):
    checks.check(config)
  config.task.vocabulary = None
  config.target.model = common.t5()
  with pytest.raises(ValueError, match="config.target.model.family is 't5' and "
                                       "config.draft.init_from is of the family 'decoder'"):
    checks.check(config)
