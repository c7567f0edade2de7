"""Hugging Face `generate`, plain and assisted, on exported weights: who we are compared with.

Runs as a program of its own, so that neither library's threads or memory come in the other's way;
it reads a request a line and answers each with a line. It is the one file outside of tests that
imports torch and transformers, and does so only when it runs.
"""

from collections.abc import Sequence
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

LIBRARIES = ('torch', 'transformers')


def missing() -> list[str]:
  """Which of the libraries are not installed."""
  return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


class Peer:
  """A running peer; a context manager.

  `target` and `draft` are directories that transformers loads; `dtype` is 'float32' or
  'bfloat16'.
  """

  def __init__(self, target: pathlib.Path, draft: pathlib.Path, dtype: str):
    self._errors = tempfile.TemporaryFile('w+')
    settings = dict(target=str(target), draft=str(draft), dtype=dtype)
    self._process = subprocess.Popen(
        [sys.executable, '-m', __spec__.name, json.dumps(settings)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        env=os.environ | dict(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error'))
    self.pid = self._process.pid
    self.about = self._answer()

  def generate(self, prompts_bt: Sequence[Sequence[int]], new_tokens: int,
               gamma: int = 0) -> dict[str, Any]:
    """Greedy decoding of `new_tokens` tokens a row, assisted by the draft if gamma is not 0.

    Returns:
      seconds (prefill included), tokens (the new ones of each row), target_calls (prefill
      included).
    """
    request = dict(prompts=[[int(token) for token in row] for row in prompts_bt],
                   new_tokens=new_tokens, gamma=gamma)
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      self._errors.seek(0)
      last = (self._errors.read().strip().splitlines() or ['it said nothing'])[-1]
      raise RuntimeError(f'the Hugging Face peer ended early: {last}')
    return json.loads(line)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._process.stdin.close()
    self._process.wait(timeout=300)
    self._process.stdout.close()
    self._errors.close()


def _load(settings):
  """Target, draft and device."""
  torch = importlib.import_module('torch')
  transformers = importlib.import_module('transformers')
  torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
                        else os.cpu_count())
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  models = []
  for name in ('target', 'draft'):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings[name], dtype=getattr(torch, settings['dtype'])).to(device).eval()
    model.generation_config.eos_token_id = None  # rows run their full length
    model.generation_config.pad_token_id = 0
    models.append(model)
  constant = models[1].generation_config
  constant.num_assistant_tokens_schedule = 'constant'
  constant.assistant_confidence_threshold = 0.0
  return torch, transformers, device, *models


def _serve(settings: dict[str, Any]) -> None:
  torch, transformers, device, target, draft = _load(settings)
  calls = [0]
  target.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
  say = lambda **answer: print(json.dumps(answer), flush=True)
  say(torch=torch.__version__, transformers=transformers.__version__, device=device,
      threads=torch.get_num_threads())
  for line in sys.stdin:
    request = json.loads(line)
    prompts_bt = torch.tensor(request['prompts'], device=device)
    count = request['new_tokens']
    options = dict(attention_mask=torch.ones_like(prompts_bt), do_sample=False,
                   min_new_tokens=count, max_new_tokens=count)
    if request['gamma']:
      draft.generation_config.num_assistant_tokens = request['gamma']
      options['assistant_model'] = draft
    calls[0] = 0
    started = time.perf_counter()
    with torch.inference_mode():
      output = target.generate(prompts_bt, **options)
      tokens = output[:, prompts_bt.shape[1]:].tolist()  # waits for the device
    say(seconds=time.perf_counter() - started, tokens=tokens, target_calls=calls[0])


if __name__ == '__main__':
  _serve(json.loads(sys.argv[1]))
