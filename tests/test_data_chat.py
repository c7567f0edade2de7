"""Conversations: how templates write them, what of them is learnt, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from configs import common
from specdistill_jax.data import chat
from specdistill_jax.data import conversations
from specdistill_jax.data import shards
from specdistill_jax.data import vocabulary
from specdistill_jax.stages import checks
from specdistill_jax.stages import prepare

TURNS = (('system', 'Be kind.'), ('user', 'Hi {content}?'), ('assistant', 'Hello, hello.'),
         ('user', 'More'), ('assistant', 'Fine.'))
# As the publishers' own templates write TURNS; what is learnt stands between ⟦ and ⟧.
WRITTEN = {
    'llama-2': '<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi {content}? [/INST]⟦ Hello, hello. '
               '</s>⟧<s>[INST] More [/INST]⟦ Fine. </s>⟧',
    'llama-3': '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>'
               '<|start_header_id|>user<|end_header_id|>\n\nHi {content}?<|eot_id|>'
               '<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello, hello.<|eot_id|>⟧'
               '<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>'
               '<|start_header_id|>assistant<|end_header_id|>\n\n⟦Fine.<|eot_id|>⟧',
    'vicuna': '<s>Be kind. USER: Hi {content}? ASSISTANT:⟦ Hello, hello.</s>⟧USER: More '
              'ASSISTANT:⟦ Fine.</s>⟧',
    'chatml': '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi {content}?<|im_end|>\n'
              '<|im_start|>assistant\n⟦Hello, hello.<|im_end|>⟧\n<|im_start|>user\n'
              'More<|im_end|>\n<|im_start|>assistant\n⟦Fine.<|im_end|>⟧',
    'gemma': '<bos><start_of_turn>user\nBe kind.\n\nHi {content}?<end_of_turn>\n'
             '<start_of_turn>model\n⟦Hello, hello.<end_of_turn>⟧\n<start_of_turn>user\nMore'
             '<end_of_turn>\n<start_of_turn>model\n⟦Fine.<end_of_turn>⟧',
}
WRITTEN['qwen'] = WRITTEN['chatml']
TALK = [{'conversations': [
    {'from': 'human', 'value': f'What is {i} plus one?'},
    {'from': 'gpt', 'value': f'It is {i + 1}.'},
    {'from': 'human', 'value': 'Again?'},
    {'from': 'gpt', 'value': f'Still {i + 1}, and it stays {i + 1}.'}]} for i in range(40)]


def marked(segments) -> str:
  return ''.join(f'⟦{s.text}⟧' if s.is_learnt else s.text for s in segments).replace('⟧⟦', '')


def put(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def study(path, **task):
  config = common.study('test')
  config.task.update(name='conversations', train_files=(path,), vocab_size=305, max_length=160,
                     chat_template='chatml', validation_fraction=0.2)
  config.task.update(task)
  return config


def prepared(workdir, config):
  checks.check(config)
  prepare.run(config, workdir)
  return vocabulary.Vocabulary(workdir / 'data' / 'vocabulary.model'), list(
      shards.rows(workdir / 'data', 'train')), shards.read_metadata(workdir / 'data', 'train')


@pytest.mark.parametrize('name', chat.TEMPLATES)
def test_templates_write_as_their_publishers_do(name):
  segments = chat.render(chat.TEMPLATES[name], TURNS)
  assert marked(segments) == WRITTEN[name]
  # What is learnt follows what is not: never two of a kind that tokenise apart for nothing.
  assert not segments[0].is_learnt and segments[-1].ends_answer


def test_texts_that_look_like_the_template_stay_texts():
  turns = (('system', 'Say {content}.'), ('user', '{system}'), ('assistant', '</s>'))
  assert marked(chat.render(chat.TEMPLATES['gemma'], turns)).startswith(
      '<bos><start_of_turn>user\nSay {content}.\n\n{system}<end_of_turn>')
  bare = chat.Template(user='{content} ', answer='{content}', end='</s>')
  class Letters:
    eos_id = 1
    def encode_batch(self, texts):
      return [[ord(letter) for letter in text] for text in texts]
  found, = chat.tokenise([chat.render(bare, turns[1:])], Letters(), 99)
  assert found.tokens[found.prompt_length:].tolist() == [*map(ord, '</s>'), 1]
  with pytest.raises(ValueError, match="prompt 'Say .* no place for one: give it 'system'"):
    chat.render(bare, turns)


def test_default_system_prompts():
  question = TURNS[1:3]
  assert marked(chat.render(chat.TEMPLATES['vicuna'], question)).startswith(
      '<s>A chat between a curious user')
  assert 'You are Qwen' in marked(chat.render(chat.TEMPLATES['qwen'], question))
  for name in ('llama-2', 'llama-3', 'chatml', 'gemma'):
    assert 'ystem' not in marked(chat.render(chat.TEMPLATES[name], question))


@pytest.mark.parametrize('name', chat.TEMPLATES)
def test_learnt_tokens_are_the_answers_and_their_ends(name, tmp_path):
  """Decoded from the rows that training reads, not from the segments."""
  config = study(put(tmp_path / 'a.jsonl', TALK), chat_template=name, max_length=300)
  vocab, rows, metadata = prepared(tmp_path, config)
  template = chat.TEMPLATES[name]
  end = '' if template.end == '</s>' else template.end
  assert len(rows) == metadata['num_examples'] == 32 and metadata['kind'] == 'pairs'
  for row in rows:
    number = int(row.document.rsplit(':', 1)[1])   # of the line, from 1: the answer
    answers = [f'It is {number}.', f'Still {number}, and it stays {number}.']
    learnt = row.tokens[row.loss_mask == 1]
    assert vocab.decode(learnt) == ''.join(
        template.answer.replace('{content}', a) + end for a in answers)
    # An end token for each answer where the template ends turns with it, else one at the end.
    assert (learnt == vocab.eos_id).sum() == (1 if end else 2) and learnt[-1] == vocab.eos_id
    unlearnt = vocab.decode(row.tokens[row.loss_mask == 0])
    assert 'What is' in unlearnt and 'Again?' in unlearnt and 'Still' not in unlearnt
    # The prompt of a row is everything before its last answer.
    completion = row.tokens[row.prompt_length:]
    assert row.loss_mask[row.prompt_length:].all() and not row.loss_mask[row.prompt_length - 1]
    assert vocab.decode(completion) == template.answer.replace('{content}', answers[1]) + end
    assert row.reference == answers[1]
  for piece in template.special:
    assert len(vocab.encode(piece)) == 1


def test_openai_layout_and_untidy_conversations(tmp_path):
  user, answer = {'role': 'user', 'content': ' Hi '}, {'role': 'assistant', 'content': 'Yes'}
  system = {'role': 'system', 'content': 'S'}
  path = put(tmp_path / 'a.jsonl', [
      {'messages': [system, user, answer, user, answer]},
      {'messages': [answer, user, answer, user]},      # from the first question to the answer
      {'messages': [user, user, answer]},
      {'messages': [user]}, {'messages': [answer, user]}, {'messages': []}, {'messages': [system]},
      {'messages': [user, {'role': 'assistant', 'content': ' '}]}])
  found, dropped = conversations.read((path,))
  assert [example.turns for example in found] == [
      (('system', 'S'),) + (('user', 'Hi'), ('assistant', 'Yes')) * 2,
      (('user', 'Hi'), ('assistant', 'Yes'))]
  assert dropped == {'no_answer': 4, 'not_alternating': 2}


def test_a_row_ends_with_an_answer_to_a_prompt_that_leaves_room_for_samples(tmp_path):
  path = put(tmp_path / 'a.jsonl', TALK * 3)
  _, rows, _ = prepared(tmp_path / 'whole', study(path))
  most = max(row.prompt_length for row in rows)
  _, rows, metadata = prepared(tmp_path / 'as_long', study(path, max_inputs=most))
  assert metadata['longest_prompt'] == most and not metadata['dropped']['cut_conversations']
  _, rows, metadata = prepared(tmp_path / 'cut', study(path, max_inputs=most - 1))
  assert metadata['longest_prompt'] < most and metadata['dropped']['cut_conversations']
  assert all(row.loss_mask[row.prompt_length:].all() for row in rows)


def test_long_conversations_end_with_an_answer_or_are_dropped(tmp_path):
  long_first = {'conversations': [{'from': 'human', 'value': 'Hm? ' * 100},
                                  {'from': 'gpt', 'value': 'No.'}]}
  long_second = {'conversations': TALK[1]['conversations'][:3] + [
      {'from': 'gpt', 'value': 'On and on. ' * 100}]}
  path = put(tmp_path / 'a.jsonl', TALK[1:] + [long_first, long_second])
  held_out = put(tmp_path / 'b.jsonl', TALK[:1])
  vocab, rows, metadata = prepared(tmp_path, study(path, validation_files=(held_out,)))
  assert metadata['dropped']['too_long'] == metadata['dropped']['cut_conversations'] == 1
  assert len(rows) == len(TALK)
  cut, = (row for row in rows if row.document.endswith(':41'))
  assert vocab.decode(cut.tokens).endswith('It is 2.<|im_end|>')
  assert cut.tokens[-1] == vocab.eos_id and cut.reference == 'It is 2.'
  assert cut.loss_mask[cut.prompt_length:].all()


def test_pairs_can_be_asked_with_a_template(tmp_path):
  path = put(tmp_path / 'a.jsonl', [
      {'q': f'What is {i} plus one?', 'a': f'It is {i + 1}.'} for i in range(40)])
  vocab, rows, _ = prepared(tmp_path, study(
      path, name='local_files', inputs_field='q', targets_field='a'))
  assert {vocab.decode(row.tokens[:row.prompt_length]) for row in rows} <= {
      f'<|im_start|>user\nWhat is {i} plus one?<|im_end|>\n<|im_start|>assistant\n'
      for i in range(40)}
  assert all(row.reference + '<|im_end|>' == vocab.decode(
      row.tokens[row.prompt_length:]) for row in rows)


@pytest.mark.parametrize('fields, fault', [
    # Learns nothing, learns the prompts, learns only the end of the turn.
    (dict(user='{content}\n', answer='', assistant='{content}', end=''), 'all zeros'),
    (dict(user='', answer='{content}', end='</s>'), 'all ones'),
    (dict(user='Q: {content}\nA: ', answer='', end='</s>'), "leaves the assistant's words out"),
])
def test_a_template_with_a_wrong_mask_stops_the_run_and_shows_the_text(fields, fault, tmp_path):
  (tmp_path / 'mine.json').write_text(json.dumps(fields))
  config = study(put(tmp_path / 'a.jsonl', TALK), chat_template=str(tmp_path / 'mine.json'))
  with pytest.raises(ValueError, match=fault) as caught:
    prepare.run(config, tmp_path / 'work')
  assert 'mine.json' in str(caught.value) and len(str(caught.value)) < 1200
  if fields['user']:
    assert 'plus one?' in str(caught.value)
  assert not list((tmp_path / 'work').iterdir())


def test_the_mask_check_sees_each_fault_by_itself():
  segments = chat.render(chat.TEMPLATES['chatml'], TURNS)
  good = np.array([0, 0, 1, 1, 0, 1])
  chat.check('x', segments, TURNS, good)
  for mask, words in ((good * 0, 'all zeros'), (good * 0 + 1, 'all ones'),
                      (np.eye(6, dtype=int)[0], 'all zeros')):   # the first is never predicted
    with pytest.raises(ValueError, match=words):
      chat.check('x', segments, TURNS, mask)
  long = (('user', 'long ' * 1000), ('assistant', 'a'))
  with pytest.raises(ValueError, match='characters') as caught:
    chat.check('x', chat.render(chat.TEMPLATES['chatml'], long), long, good * 0)
  assert len(str(caught.value)) < 1000


def test_templates_from_files(tmp_path):
  path = tmp_path / 'mine.json'
  path.write_text(json.dumps(dataclasses.asdict(chat.TEMPLATES['gemma'])))
  assert chat.load(str(path)) == chat.TEMPLATES['gemma']
  for content, message in (
      ('{', 'Cannot read the chat template'), ('[]', 'must be a JSON object'),
      ('{"usr": ""}', "has no field 'usr'; the fields are user, answer"),
      ('{"user": "", "answer": ""}', "lacks the field 'end'"),
      ('{"user": 1, "answer": "", "end": ""}', "'user' must be a string, not 1")):
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
      chat.load(str(path))
  for name in ('llama-4', 'tokenizer_config.json'):
    with pytest.raises(ValueError, match='there are llama-2, .* Jinja .* not read'):
      chat.load(name)


@pytest.mark.parametrize('record, message', [
    ({'text': 'a'}, "line 1, has neither 'conversations' .* nor 'messages' .*; it has 'text'"),
    ({'messages': 'a'}, "'messages' must be a list of turns; it is 'a'"),
    ({'messages': [{'role': 'user'}]}, "turn 0 of 'messages' must have 'role' and 'content'"),
    ({'conversations': [{'from': 'tool', 'value': 'a'}]}, "turn 0 is said by 'tool'; known are"),
    ({'conversations': [{'from': 'gpt', 'value': None}]}, "'value' must be a string; it is None"),
])
def test_bad_conversations_are_named_with_their_line(tmp_path, record, message):
  with pytest.raises(ValueError, match=message):
    conversations.read((put(tmp_path / 'a.jsonl', [record]),))
  with pytest.raises(ValueError, match="read from .jsonl .* not 'a.txt'"):
    conversations.read(('a.txt',))


@pytest.mark.parametrize('task, words', [
    (dict(chat_template=None), ('task.chat_template is None', "'conversations'", 'vicuna')),
    (dict(chat_template='vicunna'), ("'vicunna'", "did you mean 'vicuna'", '.json')),
    (dict(train_files=()), ('task.train_files is ()', "'conversations'")),
    (dict(name='stdlib_docs', train_files=()), ("'chatml'", 'stdlib_docs', 'plain text')),
    (dict(max_targets=20), ('task.max_targets is 20', 'whole turns')),
])
def test_settings_that_cannot_work_are_refused_in_one_sentence(task, words):
  with pytest.raises(ValueError) as caught:
    checks.check(study('a.jsonl', **task))
  assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)
