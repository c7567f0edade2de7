"""Chat templates as data: a conversation becomes text that is learnt and text that is not.

A conversation is rendered turn by turn into segments, and the segments are tokenised one by
one. Which tokens are learnt follows from the segment they come from, so the loss mask cannot
slip against the tokens. What is learnt: the assistant's words and the end of its turn.

Templates are those of the models' publishers: Llama 2 and 3 (Meta), Vicuna v1.1 (FastChat),
ChatML and Qwen2.5 (Qwen), Gemma (Google). Jinja templates are not read.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
import re
from typing import NamedTuple

import numpy as np

from specdistill_jax import storage

Turns = Sequence[tuple[str, str]]

SHOWN_CHARACTERS = 600  # of a text in an error
END_OF_SEQUENCE = '</s>'  # stands for the vocabulary's own end token


@dataclasses.dataclass(frozen=True)
class Template:
  """How turns are written down. `{content}` stands for what is said.

  Attributes:
    user: a turn of the user.
    answer: what the assistant says, learnt.
    end: the end of the assistant's turn, learnt; `</s>` is the vocabulary's end token.
    assistant: the head of the assistant's turn, not learnt.
    begin: opens every conversation.
    after: stands between the end of an assistant's turn and the next one; not learnt.
    system: the system's turn; '' where it has none of its own.
    system_in_user: the first user turn's content where there is a system prompt,
      `{system}` standing for that.
    default_system: system prompt of conversations without one.
    special: pieces that a vocabulary should hold whole.
  """
  user: str
  answer: str
  end: str
  assistant: str = ''
  begin: str = ''
  after: str = ''
  system: str = ''
  system_in_user: str = ''
  default_system: str = ''
  special: tuple[str, ...] = ()


_CHATML = Template(
    system='<|im_start|>system\n{content}<|im_end|>\n',
    user='<|im_start|>user\n{content}<|im_end|>\n',
    assistant='<|im_start|>assistant\n', answer='{content}', end='<|im_end|>', after='\n',
    special=('<|im_start|>', '<|im_end|>'))
_LLAMA_3_HEAD = '<|start_header_id|>{role}<|end_header_id|>\n\n'

TEMPLATES = {
    'llama-2': Template(
        user='<s>[INST] {content} [/INST]', answer=' {content} ', end=END_OF_SEQUENCE,
        system_in_user='<<SYS>>\n{system}\n<</SYS>>\n\n{content}', special=('<s>',)),
    'llama-3': Template(
        begin='<|begin_of_text|>',
        system=_LLAMA_3_HEAD.replace('{role}', 'system') + '{content}<|eot_id|>',
        user=_LLAMA_3_HEAD.replace('{role}', 'user') + '{content}<|eot_id|>',
        assistant=_LLAMA_3_HEAD.replace('{role}', 'assistant'), answer='{content}',
        end='<|eot_id|>',
        special=('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')),
    'vicuna': Template(
        begin='<s>', system='{content} ', user='USER: {content} ', assistant='ASSISTANT:',
        answer=' {content}', end=END_OF_SEQUENCE, special=('<s>',),
        default_system=(
            'A chat between a curious user and an artificial intelligence assistant. The '
            "assistant gives helpful, detailed, and polite answers to the user's questions.")),
    'chatml': _CHATML,
    'qwen': dataclasses.replace(
        _CHATML, default_system='You are Qwen, created by Alibaba Cloud. You are a helpful '
        'assistant.'),
    'gemma': Template(
        begin='<bos>', user='<start_of_turn>user\n{content}<end_of_turn>\n',
        assistant='<start_of_turn>model\n', answer='{content}', end='<end_of_turn>', after='\n',
        system_in_user='{system}\n\n{content}',
        special=('<bos>', '<start_of_turn>', '<end_of_turn>')),
}


class Segment(NamedTuple):
  """A piece of a rendered conversation.

  Attributes:
    text: `END_OF_SEQUENCE`, where it ends an answer, is the vocabulary's end token.
    is_learnt: whether the assistant says it.
    ends_answer: whether an answer ends with it: what lies before is complete.
  """
  text: str
  is_learnt: bool
  ends_answer: bool = False


class Tokenised(NamedTuple):
  """A conversation's int32 `tokens`, its uint8 `loss_mask`, and where its last answer begins."""
  tokens: np.ndarray
  loss_mask: np.ndarray
  prompt_length: int
  num_answers: int


def load(name: str) -> Template:
  """The template of a name, or of a JSON file that holds the fields of `Template`.

  Raises:
    ValueError: neither; a field is unknown, missing or no text.
  """
  if name in TEMPLATES:
    return TEMPLATES[name]
  if not name.endswith('.json') or os.path.basename(name) == 'tokenizer_config.json':
    raise ValueError(f"task.chat_template is '{name}'; there are {', '.join(TEMPLATES)}, or a "
                     '.json file with the fields of a template. Jinja templates, as in '
                     'tokenizer_config.json, are not read.')
  try:
    with open(storage.local(name), encoding='utf-8') as file:
      fields = json.load(file)
  except (OSError, ValueError) as error:
    raise ValueError(f"Cannot read the chat template '{name}': {error}.") from error
  return _from_fields(fields, name)


def _from_fields(fields: object, name: str) -> Template:
  legal = [field.name for field in dataclasses.fields(Template)]
  if not isinstance(fields, dict):
    raise ValueError(f"The chat template '{name}' must be a JSON object with the fields "
                     f'{", ".join(legal)}.')
  if unknown := [field for field in fields if field not in legal]:
    raise ValueError(f"The chat template '{name}' has no field '{unknown[0]}'; the fields are "
                     f'{", ".join(legal)}.')
  if missing := [field for field in ('user', 'answer', 'end') if field not in fields]:
    raise ValueError(f"The chat template '{name}' lacks the field '{missing[0]}'.")
  special = tuple(fields.pop('special', ()))
  for field, value in fields.items():
    if not isinstance(value, str):
      raise ValueError(f"The chat template '{name}': '{field}' must be a string, not {value!r}.")
  return Template(**fields, special=special)


def render(template: Template, turns: Turns) -> list[Segment]:
  """The segments of a conversation in order.

  Args:
    turns: (role, text), at most one `system`, first; then `user` and `assistant` in turn.

  Raises:
    ValueError: there is a system prompt, and the template has no place for one.
  """
  system = template.default_system
  if turns[0][0] == 'system':
    (_, system), *turns = turns
    if system and not template.system and not template.system_in_user:
      raise ValueError(f'A conversation has the system prompt {system!r:.60}, and its chat '
                       "template no place for one: give it 'system' or 'system_in_user'.")
  pending, segments = template.begin, []
  if system and template.system:
    pending += template.system.replace('{content}', system)
  for index, (role, text) in enumerate(turns):
    if role == 'user':
      if system and not index and template.system_in_user:
        text = _fill(template.system_in_user, system=system, content=text)
      pending += template.after * bool(segments) + template.user.replace('{content}', text)
    else:
      segments.append(Segment(pending + template.assistant, False))
      answer = template.answer.replace('{content}', text)
      if template.end == END_OF_SEQUENCE:
        segments += [Segment(answer, True), Segment(END_OF_SEQUENCE, True, True)]
      else:
        segments.append(Segment(answer + template.end, True, True))
      pending = ''
  return [segment for segment in segments if segment.text or segment.ends_answer]


def _fill(pattern: str, **texts: str) -> str:
  # In one pass: a system prompt that speaks of '{content}' must not be filled in.
  return re.sub(r'\{(system|content)\}', lambda match: texts[match[1]], pattern)


def _is_end_token(segment: Segment) -> bool:
  return segment.ends_answer and segment.text == END_OF_SEQUENCE


def tokenise(conversations: Sequence[Sequence[Segment]], vocabulary, max_length: int,
             max_inputs: int | None = None) -> list[Tokenised | None]:
  """Each conversation's tokens, cut after the last answer that fits; None where none does.

  An answer fits if the row has at most `max_length` tokens after it, and `max_inputs` before it.

  The end token closes every row, learnt, where the end of a turn is not it already: decoding
  stops there and nowhere else. Give many conversations at once: a call costs more than its
  tokens.
  """
  texts = [segment.text for segments in conversations for segment in segments
           if not _is_end_token(segment)]
  encoded = iter(vocabulary.encode_batch(texts))
  eos_id = vocabulary.eos_id
  return [_fit(segments, [[eos_id] if _is_end_token(segment) else next(encoded)
                          for segment in segments], eos_id, max_length, max_inputs)
          for segments in conversations]


def _fit(segments: Sequence[Segment], pieces: Sequence[list[int]], eos_id: int,
         max_length: int, max_inputs: int | None) -> Tokenised | None:
  tokens, mask, answer_start, best, num_answers = [], [], 0, None, 0
  was_learnt = False
  for segment, piece in zip(segments, pieces, strict=True):
    if segment.is_learnt and not was_learnt:
      answer_start = len(tokens)
    was_learnt = segment.is_learnt
    tokens += piece
    mask += [int(segment.is_learnt)] * len(piece)
    if segment.ends_answer:
      closing = [] if tokens[-1] == eos_id else [eos_id]
      if len(tokens) + len(closing) > max_length or answer_start > (max_inputs or max_length):
        break
      num_answers += 1
      best = (len(tokens), closing, answer_start)
  if best is None:
    return None
  length, closing, prompt_length = best
  return Tokenised(np.array(tokens[:length] + closing, np.int32),
                   np.array(mask[:length] + [1] * len(closing), np.uint8), prompt_length,
                   num_answers)


def check(name: str, segments: Sequence[Segment], turns: Turns, loss_mask: np.ndarray) -> None:
  """Refuses a template that would train on nothing, on everything, or not on the answers.

  Raises:
    ValueError: with the rendered text, the learnt parts between `⟦` and `⟧`.
  """
  learnt = ''.join(segment.text for segment in segments if segment.is_learnt)
  answers = [text for role, text in turns if role == 'assistant']
  if not learnt or not loss_mask[1:].any():
    fault = 'has a loss mask of all zeros: nothing would be learnt'
  elif loss_mask[1:].all():
    fault = 'has a loss mask of all ones: the prompts would be learnt too'
  elif any(answer not in learnt for answer in answers):
    fault = "leaves the assistant's words out of its loss mask"
  else:
    return
  shown = marked((segment.text, segment.is_learnt) for segment in segments)
  raise ValueError(f"The chat template '{name}' {fault}. It renders, {shown}")


def marked(pieces: Iterable[tuple[str, bool]]) -> str:
  """Text for an error: pieces (text, is learnt) joined, what is learnt between `⟦` and `⟧`."""
  shown = ''.join(f'⟦{text}⟧' if is_learnt else text for text, is_learnt in pieces)
  if len(shown) > SHOWN_CHARACTERS:
    shown = f'{shown[:SHOWN_CHARACTERS]}... ({len(shown)} characters)'
  return f'with what is learnt between ⟦ and ⟧: {shown!r}'
