"""Prompts for evaluation only: MT-bench, Spec-Bench and HumanEval files, BIG-bench-hard.

None of these is trained on. A prompt keeps the category that its file gives it; beside others the
eight of MT-bench are one, as Spec-Bench counts them.
"""

from collections.abc import Iterator, Sequence
import json
import pathlib

from specdistill_jax import storage
from specdistill_jax.data import files
from specdistill_jax.data import papers
from specdistill_jax.data import splits

# The 23 tasks of BIG-bench-hard (Suzgun et al., arXiv 2210.09261) as its public repository
# names them: two of the tasks come in three sizes, which makes 27 files.
BBH_FILES = (
    'boolean_expressions', 'causal_judgement', 'date_understanding', 'disambiguation_qa',
    'dyck_languages', 'formal_fallacies', 'geometric_shapes', 'hyperbaton',
    'logical_deduction_five_objects', 'logical_deduction_seven_objects',
    'logical_deduction_three_objects', 'movie_recommendation', 'multistep_arithmetic_two',
    'navigate', 'object_counting', 'penguins_in_a_table', 'reasoning_about_colored_objects',
    'ruin_names', 'salient_translation_error_detection', 'snarks', 'sports_understanding',
    'temporal_sequences', 'tracking_shuffled_objects_five_objects',
    'tracking_shuffled_objects_seven_objects', 'tracking_shuffled_objects_three_objects',
    'web_of_lies', 'word_sorting')


MT_BENCH = frozenset(('writing', 'roleplay', 'reasoning', 'math', 'coding', 'extraction', 'stem',
                      'humanities'))


def bbh(data_dir: str) -> list[splits.Example]:
  """The examples of the task files in a folder, with a zero-shot chain-of-thought prompt.

  Files of some tasks only are fine; the category of an example is the name of its file.

  Raises:
    ValueError: no folder, no file, a file of an unknown name, or one of another layout than
      `{"canary": ..., "examples": [{"input": ..., "target": ...}, ...]}`.
  """
  folder = storage.path(data_dir).expanduser()
  if not folder.is_dir():
    raise ValueError(f"task.data_dir '{data_dir}' is not a folder; the task 'bbh' expects one "
                     f'with a JSON file for each task, as in {BBH_FILES[0]}.json.')
  paths = sorted(folder.glob('*.json'))
  if not paths:
    raise ValueError(f"task.data_dir '{data_dir}' has no JSON file; the task 'bbh' expects "
                     f'{BBH_FILES[0]}.json and the like.')
  if unknown := [path.name for path in paths if path.stem not in BBH_FILES]:
    raise ValueError(f"task.data_dir '{data_dir}' has files that are no task of "
                     f'BIG-bench-hard: {", ".join(unknown)}; the tasks are '
                     f'{", ".join(BBH_FILES)}.')
  return [example for path in paths for example in _bbh_file(path)]


def _bbh_file(path: pathlib.Path) -> Iterator[splits.Example]:
  try:
    rows = json.loads(path.read_text(encoding='utf-8'))['examples']
    texts = [(row['input'], row['target']) for row in rows]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"'{path}' is not in the layout of BIG-bench-hard, {{\"canary\": ..., "
                     '"examples": [{"input": ..., "target": ...}]}: '
                     f'{type(error).__name__} {error}.') from error
  for index, (question, answer) in enumerate(texts):
    place = f"'{path}', example {index}"
    question = files.check_text(question, 'input', place)
    yield splits.Example(f'Q: {question}\n{papers.THINK}',
                         files.check_text(answer, 'target', place),
                         f'{path}:{index}', category=path.stem)


def read(paths: Sequence[str]) -> tuple[list[splits.Example], int]:
  """Prompts of JSON lines files, and how many later turns were left out.

  A line has `turns`, a list of what the user says (MT-bench, Spec-Bench; with `question_id`
  and `category`), or `prompt` (HumanEval; with `task_id`). The first turn is always a prompt. A
  later one needs the answers to those before it: where the line's `reference` has them it is a
  prompt of its own, with them as context; otherwise it is left out, and counted. Answering it
  turn by turn with the target's own answers is up to whoever evaluates.

  Raises:
    ValueError: a file or a line that is not like this, with its number.
  """
  found, left_out = [], 0
  for path in paths:
    if not isinstance(path, str) or not path.endswith(('.jsonl', '.jsonl.gz')):
      raise ValueError(f'Prompts are read from .jsonl or .jsonl.gz files, not {path!r}.')
    for number, record in files.json_objects(path):
      examples, missed = _prompt(record, f"'{path}', line {number}", f'{path}:{number}')
      found += examples
      left_out += missed
  return _pooled(found), left_out


def _pooled(examples: list[splits.Example]) -> list[splits.Example]:
  """Where there are other categories beside them, those of MT-bench are one."""
  if all(one.category in MT_BENCH for one in examples):
    return examples
  return [one._replace(category='MT-bench') if one.category in MT_BENCH else one
          for one in examples]


def _prompt(record: dict, place: str, document: str) -> tuple[list[splits.Example], int]:
  if 'prompt' in record:
    prompt = files.check_text(record['prompt'], 'prompt', place)
    solution = files.check_text(record.get('canonical_solution', ''), 'canonical_solution', place)
    category = str(record.get('category', str(record.get('task_id', '')).partition('/')[0]))
    return [splits.Example(prompt, solution, document, category=category,
                           turns=(('user', prompt), ('assistant', solution)))], 0
  if 'turns' not in record:
    raise ValueError(f"{place}, has neither 'turns' (MT-bench, Spec-Bench) nor 'prompt' "
                     f'(HumanEval); it has {", ".join(map(repr, record)) or "none"}.')
  turns = _texts(record['turns'], 'turns', place)
  if not turns:
    raise ValueError(f"{place}: 'turns' is empty.")
  answers = _texts(record.get('reference') or [], 'reference', place)
  # A later prompt is there as far as the answers before it are.
  usable = turns[:len(answers) + 1]
  examples, said = [], ()
  for index, turn in enumerate(usable):
    answer = answers[index] if index < len(answers) else ''
    said += (('user', turn), ('assistant', answer))
    examples.append(splits.Example(
        '\n'.join(text for _, text in said[:-1]), answer,
        f'{document}#{index + 1}' if len(usable) > 1 else document,
        category=str(record.get('category', '')), turns=said))
  return examples, len(turns) - len(usable)


def _texts(values: object, name: str, place: str) -> list[str]:
  if not isinstance(values, list):
    raise ValueError(f"{place}: the field '{name}' must be a list of strings; it is "
                     f'{values!r:.60}.')
  return [files.check_text(value, name, place) for value in values]
