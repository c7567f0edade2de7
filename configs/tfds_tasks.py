"""One of the papers' tasks, from data that TFDS wrote: models trained from scratch, laptop size.

  python -m specdistill_jax.main --config=configs/tfds_tasks.py:gsm8k --workdir=W \
    --config.task.data_dir=DIR

DIR is a folder or a bucket (`gs://...`) in which TFDS has prepared the data set, as
`tfds.builder('gsm8k', data_dir=DIR).download_and_prepare()` leaves it, in
`DIR/gsm8k/1.0.0/`. Nothing is downloaded here; the newest version in DIR is read.

`:task` | TFDS data set | prompt | tokens in / out | held-out split | metric
---|---|---|---|---|---
xsum | xsum | `summarize: ` | 1024 / 64 | validation | ROUGE-2
cnn_dailymail | cnn_dailymail | `summarize: ` | 2048 / 128 | validation | ROUGE-2
wmt14_en_de | wmt14_translate/de-en | `translate English to German:` | 80 / 80 | validation | BLEU
gsm8k | gsm8k | `Q: ... A: Let's think step by step.` | 512 / 320 | test | exact answer
lm1b | lm1b | none: plain text | 64 together | test | none

Lengths and prefixes are those of mjbooo/RLSD, a re-implementation of DistillSpec (Zhou et al.,
arXiv 2310.08461); GSM8K's lengths are of the kind of GKD's (arXiv 2306.13649; uncertain), its
zero-shot prompt and LM1B's length ours. Longer prompts and completions are cut, and the metadata in
W/data says how many. `task.max_inputs`, `task.max_targets` and `task.max_length` change the
lengths; `task.metric=rougeL` the metric; `task.max_examples` bounds what is read.

Cost: a step grows with `task.max_length`, up to twenty times a quickstart step (cnn_dailymail).
The papers' figures are of pretrained T5 models and not to be expected from these.
"""

import ml_collections

from configs import common

# Task -> (tokens of a row, new tokens in rollouts and evaluation).
_LENGTHS = dict(xsum=(1088, 64), cnn_dailymail=(2176, 128), wmt14_en_de=(160, 80),
                gsm8k=(832, 256), lm1b=(64, 48))


def get_config(arg: str = 'gsm8k') -> ml_collections.ConfigDict:
  if arg not in _LENGTHS:
    raise ValueError(f"configs/tfds_tasks.py knows no task ':{arg}'; it takes "
                     f'{", ".join(":" + name for name in _LENGTHS)}.')
  config = common.study(f'tfds_{arg}')
  config.task.name = arg
  config.task.vocab_size = 8000
  config.task.max_length, new_tokens = _LENGTHS[arg]
  config.task.prompt_length = 8  # lm1b only
  config.draft.model.update(num_layers=1, width=128, num_heads=2, num_kv_heads=2, mlp_width=352)
  config.distill.rollout.max_new_tokens = new_tokens
  config.evaluate.max_new_tokens = new_tokens
  return config
