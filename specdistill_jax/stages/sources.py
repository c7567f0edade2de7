"""Where the examples of each task come from, and how they part into splits."""

from collections.abc import Mapping
import random
from typing import Any

from specdistill_jax.data import chat
from specdistill_jax.data import conversations
from specdistill_jax.data import embedded
from specdistill_jax.data import files
from specdistill_jax.data import papers
from specdistill_jax.data import prompts
from specdistill_jax.data import splits

LOCAL = ('local_files', 'conversations')  # these read task.train_files
EVALUATION_ONLY = ('bbh', 'prompts')      # these have prompts to decode and nothing to train on
NAMES = (*embedded.METRICS, *LOCAL, *papers.PAPERS, *EVALUATION_ONLY)
# The quality metric of a task; None where there is nothing to compare with.
METRICS = {**embedded.METRICS, **{name: paper.metric for name, paper in papers.PAPERS.items()},
           'bbh': 'exact_answer'}

Examples = dict[str, list[splits.Example]]
Dropped = dict[str, dict[str, int]]


def split_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
  """The splits that a task has; `prompts`, where there are some, is what `evaluate` decodes."""
  training = () if settings['name'] in EVALUATION_ONLY else ('train', 'validation')
  own = (splits.PROMPTS,) if not training or settings['prompt_files'] else ()
  return training + own


def metric(settings: Mapping[str, Any]) -> str | None:
  """The quality metric: the config's, else the task's own."""
  return settings['metric'] or METRICS.get(settings['name'])


def dataset(settings: Mapping[str, Any]) -> str | None:
  """Name, config and version of the TFDS data set that is read; None where none is."""
  if settings['name'] not in papers.PAPERS:
    return None
  depth = papers.PAPERS[settings['name']].dataset.count('/') + 2
  return '/'.join(papers.directory(settings['name'], settings['data_dir']).split('/')[-depth:])


def lengths(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
  """Most tokens of a prompt and of a completion: the config's, else the paper's, else no bound."""
  paper = papers.PAPERS.get(settings['name'])
  return (settings['max_inputs'] or (paper and paper.max_inputs),
          settings['max_targets'] or (paper and paper.max_targets))


def kind(examples: Examples, split: str) -> str:
  """Of the rows of a split: one of `splits.kinds`, or for evaluation only."""
  return splits.PROMPTS if split == splits.PROMPTS else next(iter(splits.kinds(examples[split])))


def load(settings: Mapping[str, Any]) -> tuple[Examples, Dropped]:
  """Examples by split, training shuffled, and how many were left out of each and why.

  Raises:
    ValueError: files or folders are missing or unfit, or nothing is left of a split.
  """
  examples, dropped = {}, {}
  if settings['name'] not in EVALUATION_ONLY:
    examples, dropped = _training(settings)
  if splits.PROMPTS in split_names(settings):
    examples[splits.PROMPTS], dropped[splits.PROMPTS] = _prompts(settings)
  if settings['chat_template']:
    examples = {split: [_as_conversation(e) for e in found]
                for split, found in examples.items()}
  return examples, dropped


def _as_conversation(example: splits.Example) -> splits.Example:
  if example.inputs is None:
    raise ValueError('task.chat_template is for prompts with completions and for '
                     f"conversations; '{example.document}' is plain text: leave it at None.")
  if example.turns:
    return example
  return example._replace(turns=(('user', example.inputs), ('assistant', example.targets)))


def _prompts(settings: Mapping[str, Any]) -> tuple[list[splits.Example], dict[str, int]]:
  left_out = 0
  if settings['name'] == 'bbh':
    found = prompts.bbh(settings['data_dir'])
  else:
    found, left_out = prompts.read(settings['prompt_files'])
  kept = [e for e in found if e.inputs.strip()]
  if not kept:
    raise ValueError('The split of prompts is empty: '
                     f"{settings['prompt_files'] or settings['data_dir']!r} has no prompt.")
  name = metric(settings)
  if name and (without := [e.document for e in kept if not e.targets.strip()]):
    raise ValueError(f"task.metric is '{name}', but {len(without)} of {len(kept)} prompts have "
                     f"no reference to compare with, the first at '{without[0]}'; leave it at "
                     'None.')
  return kept, {'empty': len(found) - len(kept), 'later_turn_without_answer': left_out}


def _training(settings: Mapping[str, Any]) -> tuple[Examples, Dropped]:
  found, dropped = _read(settings)
  kept = {split: splits.without_empty(examples) for split, examples in found.items()}
  for split, examples in found.items():
    dropped[split]['empty'] = len(examples) - len(kept[split])
  if not kept['train']:
    raise ValueError("The training split is empty: "
                     f"{settings['train_files'] or settings['name']!r} has no example.")
  if found['validation'] and not kept['validation'] or (
      settings['validation_files'] and not kept['validation']):
    raise ValueError("The validation split is empty: "
                     f"{settings['validation_files'] or settings['name']!r} has no example.")
  if not kept['validation']:
    kept['train'], kept['validation'] = splits.split(
        kept['train'], settings['validation_fraction'], settings['seed'])
  if len(splits.kinds(kept['train'] + kept['validation'])) > 1:
    raise ValueError('task.train_files and task.validation_files must both have prompts with '
                     'completions, or both plain text.')
  train = splits.without_leaks(kept['train'], kept['validation'])
  dropped['train']['also_in_validation'] = len(kept['train']) - len(train)
  if not train:
    raise ValueError('The training split is empty: every example of it also stands in the '
                     'validation split.')
  random.Random(settings['seed']).shuffle(train)
  return {'train': train, 'validation': kept['validation']}, dropped


def _read(settings: Mapping[str, Any]) -> tuple[Examples, Dropped]:
  """As the sources have them; the validation split may be empty, to be held out of the other."""
  name, dropped = settings['name'], {'train': {}, 'validation': {}}
  if name in papers.PAPERS:
    papers.directory(name, settings['data_dir'])  # told without seconds of TensorFlow
    from specdistill_jax.data import tasks  # pylint: disable=g-import-not-at-top
    task = tasks.paper(name, settings['data_dir'])
    return {'train': tasks.examples(task, 'train', settings['max_examples']),
            'validation': tasks.examples(task, 'validation')}, dropped
  if name == 'local_files':
    fields = {key: settings[key] for key in ('inputs_field', 'targets_field')}
    return {split: files.examples(settings[f'{split}_files'], **fields)
            for split in dropped}, dropped
  if name == 'conversations':
    found = {}
    for split in dropped:
      found[split], dropped[split] = conversations.read(settings[f'{split}_files'])
    return found, dropped
  return {'train': embedded.examples(name, settings['seed']), 'validation': []}, dropped


def check(settings: Mapping[str, Any]) -> None:
  """Refuses what the config alone shows to be unfit."""
  name = settings['name']
  if name not in NAMES:
    raise ValueError(f"task.name is '{name}'; there are {', '.join(NAMES)}.")
  if name in LOCAL and not settings['train_files']:
    raise ValueError("task.train_files is empty; name the files, for example "
                     "--config.task.train_files=train.jsonl.gz")
  if name == 'prompts' and not settings['prompt_files']:
    raise ValueError("task.prompt_files is empty; name the files, for example "
                     "--config.task.prompt_files=\"('question.jsonl',)\"")
  if (name in papers.PAPERS or name == 'bbh') and not settings['data_dir']:
    raise ValueError(f"task.data_dir is {settings['data_dir']!r}; the task '{name}' needs the "
                     'folder or bucket of its data set.')
  given = settings['vocabulary'] or settings.get('imported_vocabulary')
  if name in EVALUATION_ONLY and not given:
    raise ValueError(f"task.vocabulary is None; the task '{name}' has nothing to train one on, "
                     "so name the models' own, a SentencePiece model.")
  if name == 'conversations' and not settings['chat_template']:
    raise ValueError("task.chat_template is None; conversations need one: "
                     f'{", ".join(chat.TEMPLATES)}, or a .json file.')
