"""The papers' data sets: which TFDS data set, which texts, lengths, splits and metric.

DistillSpec (Zhou et al., arXiv 2310.08461) gives neither lengths nor prefixes: those of XSum,
CNN/DailyMail and WMT are of its re-implementation mjbooo/RLSD, GSM8K's lengths of the kind of GKD's
(arXiv 2306.13649; uncertain), LM1B's ours; the zero-shot chain-of-thought prompt is that of Kojima
et al. (arXiv 2205.11916). TFDS writes a
data set as `<data_dir>/<name>[/<config>]/<version>/`; nothing is ever downloaded here.
"""

from collections.abc import Mapping
import json
import os
import re
from typing import NamedTuple

from specdistill_jax import storage

THINK = "A: Let's think step by step."


class Paper(NamedTuple):
  """One of the papers' tasks.

  Attributes:
    dataset: TFDS name, with its config after a slash.
    inputs_field: of the prompt; None in language modelling.
    targets_field: of the completion; the whole text in language modelling.
    splits: TFDS splits that serve as `train` and `validation`.
    metric: name of the quality metric, or None.
    prefix: put before the prompt.
    suffix: put after the prompt, and kept where a long prompt is cut.
    max_inputs: tokens of a prompt, the rest is cut; None is no bound.
    max_targets: tokens of a completion, the rest is cut; None is no bound.
  """
  dataset: str
  inputs_field: str | None
  targets_field: str
  splits: Mapping[str, str]
  metric: str | None
  prefix: str = ''
  suffix: str = ''
  max_inputs: int | None = None
  max_targets: int | None = None


_OWN_VALIDATION = {'train': 'train', 'validation': 'validation'}
_TEST_ONLY = {'train': 'train', 'validation': 'test'}  # these have no other held-out split

PAPERS = {
    'xsum': Paper('xsum', 'document', 'summary', _OWN_VALIDATION, 'rouge2', 'summarize: ',
                  max_inputs=1024, max_targets=64),
    'cnn_dailymail': Paper('cnn_dailymail', 'article', 'highlights', _OWN_VALIDATION, 'rouge2',
                           'summarize: ', max_inputs=2048, max_targets=128),
    'wmt14_en_de': Paper('wmt14_translate/de-en', 'en', 'de', _OWN_VALIDATION, 'bleu',
                         'translate English to German: ', max_inputs=80, max_targets=80),
    'gsm8k': Paper('gsm8k', 'question', 'answer', _TEST_ONLY, 'accuracy', 'Q: ', f'\n{THINK}',
                   max_inputs=512, max_targets=320),
    'lm1b': Paper('lm1b', None, 'text', _TEST_ONLY, None),
}


def directory(name: str, data_dir: str) -> str:
  """The folder of the newest version of a task's data set below `data_dir`.

  Looked for before TFDS can: TFDS would try the network for minutes.

  Args:
    name: of the task, a key of `PAPERS`.
    data_dir: a folder, or a bucket (`gs://...`).

  Raises:
    ValueError: there is no such folder, no version of the data set in it, or a split is absent.
  """
  paper = PAPERS[name]
  root = storage.path(os.path.expanduser(data_dir))
  place = root / paper.dataset
  expected = f"the task '{name}' expects the TFDS data set '{place}/<version>/'"
  if not root.is_dir():
    raise ValueError(f"task.data_dir '{data_dir}' is not a folder; {expected}.")
  found = [path for path in (place.iterdir() if place.is_dir() else ())
           if re.fullmatch(r'\d+\.\d+\.\d+', path.name)
           and (path / 'dataset_info.json').exists()]
  if not found:
    raise ValueError(
        f"task.data_dir '{data_dir}' has no such data set: {expected} with its "
        f"dataset_info.json, as tfds.builder('{paper.dataset}').download_and_prepare() "
        'leaves it.')
  newest = max(found, key=lambda path: tuple(map(int, path.name.split('.'))))
  _check_splits(paper, newest)
  return os.fspath(newest)


def _check_splits(paper: Paper, place) -> None:
  info = json.loads((place / 'dataset_info.json').read_text())
  there = [split['name'] for split in info.get('splits', ())]
  for split in paper.splits.values():
    if split not in there:
      raise ValueError(f"The TFDS data set '{place}' has no split '{split}'; it has "
                       f'{", ".join(there) or "none"}.')
