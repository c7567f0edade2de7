"""The same study on your own files.

A file says by its name what it is: `.jsonl[.gz]` has one object a line, `.txt[.gz]` has
paragraphs parted by blank lines (each a document, for language modelling), and two files whose
lines correspond are given as a pair. Questions and answers in a JSONL file, scored by the
exact answer (what follows `####`, else the last number, else the whole text):

  python -m specdistill_jax.main --config=configs/local_files.py --workdir=W \
    --config.task.train_files=questions.jsonl.gz \
    --config.task.inputs_field=question --config.task.targets_field=answer \
    --config.task.metric=accuracy

German to English from parallel files, with held-out files of its own, scored by BLEU:

  python -m specdistill_jax.main --config=configs/local_files.py --workdir=W \
    --config.task.train_files="(('train.de.gz', 'train.en.gz'),)" \
    --config.task.validation_files="(('val.de.gz', 'val.en.gz'),)" \
    --config.task.max_length=96 --config.task.metric=bleu

Plain text, or one field of a JSONL file (`--config.task.inputs_field=`, nothing after the sign):

  python -m specdistill_jax.main --config=configs/local_files.py --workdir=W \
    --config.task.train_files="('a.txt', 'b.txt.gz')" --config.task.prompt_length=16

Several files: a tuple as above, or the flag repeated. Without `validation_files`, 5 % of the
documents are held out. Rows that do not fit `max_length` tokens are left out, and `prepare`
says how many: raise `max_length` where that is many. Cost: no more than the quickstart's a
step and a row, but the time of a step grows with `max_length`.
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  if arg:
    raise ValueError(f"configs/local_files.py takes no ':{arg}'; name the files with "
                     '--config.task.train_files.')
  config = common.study('local_files')
  config.task.name = 'local_files'
  config.task.vocab_size = 2000
  config.task.max_length = 256
  config.target.model.update(num_layers=4, width=192, num_heads=4, num_kv_heads=4, head_dim=48,
                             mlp_width=512)
  config.draft.model.update(num_layers=1, width=96, num_heads=2, num_kv_heads=2, head_dim=48,
                            mlp_width=256)
  config.evaluate.max_new_tokens = 64
  return config
