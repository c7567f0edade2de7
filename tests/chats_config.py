"""A study of a few seconds with all stages, from a file of conversations to the report."""

import json
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent)]

import studies  # noqa: E402


def chats(count: int = 60) -> str:
  """JSON lines of conversations about counting."""
  talk = lambda n: [dict(role='user', content=f'Count on from {n}!'),
                    dict(role='assistant', content=' '.join(str(n + i) for i in range(1, 5)))]
  return ''.join(json.dumps(dict(messages=talk(7 * n))) + '\n' for n in range(count))


def get_config(arg: str):
  """`arg`: path of the conversations; with `,short` behind it nothing is distilled."""
  path, _, short = arg.partition(',')
  config = studies.config(steps=6, checkpoint_every=2, eval_every=6)
  config.task.update(name='conversations', chat_template='chatml', train_files=(path,),
                     vocab_size=290, max_length=80, validation_fraction=0.2)
  config.distill.update(control=False, data_source='fixed')
  if short:
    config.distill = None
  config.target.model.num_layers = 1
  config.draft.model.update(config.target.model)  # compiled once for both
  config.evaluate.update(temperatures=(0.0,), gammas=(2,), num_prompts=3, max_new_tokens=5,
                         bootstrap_samples=20)
  return config
