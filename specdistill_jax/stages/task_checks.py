"""What the fields of `config.task` must be to one another; part of `stages.checks`."""

from typing import Any

from specdistill_jax.data import chat
from specdistill_jax.data import papers
from specdistill_jax.stages import sources

# Field of the task -> the tasks that read it.
_READERS = dict(
    train_files=sources.LOCAL, validation_files=sources.LOCAL,
    prompt_files=('prompts', 'conversations'),
    data_dir=(*papers.PAPERS, 'bbh'))
_OPTIONAL = {*((name, 'validation_files') for name in sources.LOCAL),
             ('conversations', 'prompt_files')}


def is_language_modelling(task: Any) -> bool:
  """Rows are running text, of which the first `prompt_length` tokens serve as the prompt."""
  return task.name in ('stdlib_docs', 'lm1b') or (
      task.name == 'local_files' and (not task.inputs_field or _is_plain_text(task.train_files)))


def _is_plain_text(paths: Any) -> bool:
  """Whether files hold no prompts, by their names; pairs of parallel files do."""
  return bool(paths) and all(
      isinstance(path, str) and path.endswith(('.txt', '.txt.gz')) for path in paths)


def check(task: Any, imported: str | None = None) -> None:
  """Raises a ValueError of one sentence at the first field that does not go with the others.

  Args:
    imported: the field that names an imported model, whose vocabulary is then the task's.
  """
  wishes = dict(data_dir='the folder or bucket of its data set, as in --config.task.data_dir=DIR')
  for field, readers in _READERS.items():
    if task.name not in readers and task[field]:
      raise ValueError(f'config.task.{field} is {task[field]!r}, but the task is '
                       f'{task.name!r}; only {", ".join(map(repr, readers))} read it')
    if task.name in readers and not task[field] and (task.name, field) not in _OPTIONAL:
      wish = wishes.get(field, f'at least one path, as in --config.task.{field}='
                        "\"('train.jsonl',)\"")
      raise ValueError(f'config.task.{field} is {task[field]!r}; the task {task.name!r} needs '
                       f'{wish}')
  if imported and task.vocabulary:
    raise ValueError(f'config.task.vocabulary is {task.vocabulary!r}, but config.{imported} names '
                     'a model that has its own; leave it at None')
  if task.name in sources.EVALUATION_ONLY and not task.vocabulary and not imported:
    raise ValueError(f'config.task.vocabulary is None; the task {task.name!r} has nothing to '
                     "train one on and needs the models' own SentencePiece model")
  if is_language_modelling(task) and task.prompt_length >= task.max_length:
    raise ValueError(f'config.task.prompt_length is {task.prompt_length}; it must be below '
                     f'task.max_length, {task.max_length}')
  _check_template(task)
  _check_lengths(task)


def _check_template(task: Any) -> None:
  if task.name == 'conversations' and task.chat_template is None:
    raise ValueError("config.task.chat_template is None; the task 'conversations' needs one of "
                     f'{", ".join(chat.TEMPLATES)}, or the path of a .json file')
  if is_language_modelling(task) and task.chat_template is not None:
    raise ValueError(f'config.task.chat_template is {task.chat_template!r}, but the task '
                     f'{task.name!r} is plain text; leave it at None')


def _check_lengths(task: Any) -> None:
  """A prompt and a completion of the greatest length must fit into a row."""
  if task.chat_template is not None or is_language_modelling(task):
    is_chat = task.chat_template is not None
    for field in ('max_targets', *(() if is_chat else ('max_inputs',))):
      if task[field] is not None:
        why = 'whole turns' if is_chat else 'plain text'
        raise ValueError(f'config.task.{field} is {task[field]}, but rows are made of {why} '
                         'here; leave it at None')
    if not is_chat:
      return
  most = [length or 0 for length in sources.lengths(task)]
  if task.name in sources.EVALUATION_ONLY:
    most[1] = 0
  if sum(most) > task.max_length:
    raise ValueError(
        f'config.task.max_length is {task.max_length}; prompts of up to {most[0]} and '
        f'completions of up to {most[1]} tokens (task.max_inputs and task.max_targets) need at '
        f'least {sum(most)}')
