"""Conversations in JSON lines, in the layout of ShareGPT or of UltraChat and OpenAI.

  python -m specdistill_jax.main --config=configs/conversations.py --workdir=W \
    --config.task.train_files="('chats.jsonl.gz',)" --config.task.chat_template=vicuna

A line is `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}`
or `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`.
Templates: llama-2, llama-3, vicuna, chatml, qwen, gemma, or a .json file with the fields of
`specdistill_jax.data.chat.Template`. All answers are learnt, each with the end of its turn;
rollouts continue each conversation from before its last answer. A conversation longer than
`task.max_length` tokens ends with the last answer that fits; the metadata in W/data counts
those cut and those left out.

Cost: as the quickstart, times the ratio of the rows' lengths.
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  if arg:
    raise ValueError(f"configs/conversations.py takes no ':{arg}'; name the files with "
                     '--config.task.train_files.')
  config = common.study('conversations')
  config.task.name = 'conversations'
  config.task.chat_template = 'chatml'
  config.task.vocab_size = 4000
  config.task.max_length = 512
  config.draft.model.update(num_layers=1, width=128, num_heads=2, num_kv_heads=2, mlp_width=352)
  return config
