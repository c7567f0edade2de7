# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: distil a draft, and measure what it buys
#
# A large *target* language model writes one token at a time, and each costs a pass through all of
# its weights. In **speculative decoding** a small *draft* proposes a few tokens, and the target
# reads them in one pass: it keeps those that it could have said itself, and adds one of its own.
# The text follows exactly the target's law; what changes is how many passes it takes.
#
# How many depends on how well the draft agrees with the target. **Distillation** trains the draft
# to agree: here on its own samples, with the target's probabilities as the lesson
# ([DistillSpec](https://arxiv.org/abs/2310.08461)).
#
# This notebook does all of it with tiny models, trained from scratch on Python's own
# documentation: about ten minutes on two CPU cores.

# %%
# Finds the project, or fetches it with what it needs (in Colab, some minutes); does nothing where
# specdistill_jax can be imported. If pip asks for a restart, restart the session and run on.
import importlib.util
import os
import pathlib
import subprocess
import sys

REPOSITORY = 'https://github.com/YOUR-NAME/specdistill_jax'  # put in where your copy lies
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

if importlib.util.find_spec('specdistill_jax') is None:
  here = pathlib.Path.cwd()
  checkout = here / 'specdistill_checkout'
  root = next((folder for folder in (here, *here.parents)
               if (folder / 'specdistill_jax' / '__init__.py').is_file()), checkout)
  if root == checkout and not checkout.is_dir():
    if 'YOUR-NAME' in REPOSITORY:
      raise ValueError(f'REPOSITORY is {REPOSITORY!r}; put in where your copy lies')
    subprocess.run(['git', 'clone', '--depth=1', REPOSITORY, str(root)], check=True)
  if root == checkout and not (checkout / '.installed').exists():
    has_tpu = any(map(os.path.exists, ('/dev/accel0', '/dev/vfio/0')))
    needs = 'launch/requirements-tpu.txt' if has_tpu else 'requirements.txt'
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '-c', root / 'constraints.txt']
    subprocess.run([*pip, '-r', root / needs], check=True)
    if os.path.exists('/dev/nvidia0'):
      from importlib.metadata import version
      subprocess.run([*pip, f'jax[cuda12]=={version("jax")}'], check=True)
    (checkout / '.installed').touch()
  sys.path.insert(0, str(root))

# %% [markdown]
# ## Settings
#
# The defaults are those of `configs/quickstart.py`. Everything is kept in `WORKDIR`: run the
# notebook again and it skips what is done; stop it and it resumes. A folder holds one study: after
# a change of settings, name another.

# %% tags=["parameters"]
WORKDIR = 'runs/quickstart'
TARGET_STEPS = 300     # training the target, from nothing
DRAFT_STEPS = 600      # training the draft, from nothing
DISTILL_STEPS = 350    # distilling it, once for each seed
SEEDS = (0, 1)
GAMMAS = (3, 5, 7)     # draft lengths to measure
NUM_PROMPTS = 16       # to measure on
CHANGES = {}           # any other field, as in {'distill.objective': 'reverse_kl'}

# %%
import jax
from IPython.display import Image, Markdown, display

import specdistill_jax as sd
from configs import quickstart

config = quickstart.get_config()
config.update_from_flattened_dict({
    'target.train.steps': TARGET_STEPS, 'draft.train.steps': DRAFT_STEPS,
    'distill.train.steps': DISTILL_STEPS, 'distill.seeds': SEEDS,
    'evaluate.gammas': GAMMAS, 'evaluate.num_prompts': NUM_PROMPTS, **CHANGES})
print(f'JAX {jax.__version__} on {jax.devices()[0].device_kind} ({len(jax.devices())} device(s))')

# %% [markdown]
# ## 1. A target and a draft
#
# The stage `prepare` cuts the text into rows of tokens, with a vocabulary trained on it. `target`
# and `draft` train two language models on the rows. The draft is ten times smaller: fast, and not
# very good, which is the point.

# %%
seconds = sd.run(config, WORKDIR, stages=('prepare', 'target', 'draft'))

# %%
target = sd.load_pretrained(f'{WORKDIR}/target')
undistilled = sd.load_pretrained(f'{WORKDIR}/draft')
print(f'target {target.num_parameters:,} parameters, draft {undistilled.num_parameters:,}')

# %% [markdown]
# ## 2. Distillation
#
# The draft writes; at each of its tokens the divergence between target and draft is its loss. The
# *control* gets as many more steps of ordinary training on the text: what it gains is not due to
# distillation.
#
# **α** is the measure of agreement: the sum over tokens of min(target, draft), on average the
# chance that a drafted token is kept.

# %%
seconds = sd.run(config, WORKDIR, stages=('distill',))

# %% [markdown]
# ## 3. What it buys
#
# The stage `evaluate` decodes held-out prompts with every draft, and without one, and `report`
# makes tables and plots of that. Read them so:
#
# * **block efficiency** τ: tokens for each pass of the target. 1 without a draft, at most γ + 1.
# * **c**: the cost of a draft's step, **v**: that of verifying γ + 1 tokens at once, both in steps
#   of the target. The predicted speed-up is τ / (γ c + v).
# * **standard SD** is the draft as it was before distillation.
#
# On a CPU v is far above 1, and a target this small decodes from the processor's cache: drafts pay
# more on accelerators and with larger targets. Compare the drafts with each other.

# %%
seconds = sd.run(config, WORKDIR, stages=('evaluate', 'report'))

# %%
report = (pathlib.Path(WORKDIR) / 'report.md').read_text()
display(Markdown(report.split('## Plots')[0]))

# %%
for name in ('training_alpha', 'block_efficiency', 'acceptance_by_position', 'speedup'):
  display(Image(f'{WORKDIR}/{name}.png', width=760))

# %% [markdown]
# ## 4. Use it
#
# Without randomness (temperature 0) speculative decoding gives the target's own text, token for
# token, whatever the draft:

# %%
distilled = sd.load_pretrained(
    f'{WORKDIR}/distill/{config.distill.objective}-{config.distill.data_source}-seed{SEEDS[0]}')
prompts = ['The yield expression is', 'Return a new list', 'If the file is not found']
how = dict(max_new_tokens=40, temperature=0.0, key=jax.random.key(0))

alone = sd.generate(target, prompts, **how)
for name, draft in dict(undistilled=undistilled, distilled=distilled).items():
  found = sd.speculate(target, draft, prompts, gamma=max(GAMMAS), **how)
  # Where numbers are rounded coarsely, as on accelerators, two equally good tokens may swap.
  said = 'the same text' if (found.tokens == alone.tokens).all() else 'a text with a tie broken'
  per_call = found.stats.emitted_b.sum() / found.stats.target_calls_b.sum()
  print(f'{name} draft: {said}, {per_call:.2f} tokens a target call')
for prompt, tokens, length in zip(prompts, found.tokens, found.lengths):
  print(f'\n{prompt} …\n  {target.vocabulary.decode(tokens[:length].tolist())}')

# %% [markdown]
# ## What to try next
#
# * `CHANGES = {'distill.objective': 'lk_hybrid'}` and another `WORKDIR`: the loss that aims at the
#   acceptance rate itself. `distill.also` puts several objectives into one table.
# * `CHANGES = {'evaluate.trees': ('0 1 00 01 10 000',)}`: draft trees in place of chains.
# * `explore.ipynb` shows what the draft guessed right, token by token.
# * `tradeoff.ipynb` gives up the target's exact law for speed, and shows what that costs.
# * `own_divergence.ipynb`: your own loss, in ten lines.
# * `configs/local_files.py`: your own data and models.
