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
# # Your own divergence, in ten lines
#
# Distillation minimises a divergence between the target's and the draft's next-token laws. Which
# one matters, since a small draft stops short of its target, and *where* it stops is up to the
# divergence. Here you see that on a toy, write a divergence yourself, and distil with it beside
# the forward KL.

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
# If `START`, here or in a folder above, holds a study (`quickstart.ipynb` and the README's first
# command make one), its target and draft are taken; else both are trained here first, which takes
# some minutes more.

# %% tags=["parameters"]
WORKDIR = 'runs/own_divergence'
START = 'runs/quickstart'
TARGET_STEPS = 300
DRAFT_STEPS = 600
DISTILL_STEPS = 200
GAMMAS = (5,)
NUM_PROMPTS = 16
TOY_STEPS = 1500
CHANGES = {}           # any other field of the config

# %%
import jax
import jax.numpy as jnp
from IPython.display import Image, Markdown, display
from matplotlib import pyplot as plt
import numpy as np

import specdistill_jax as sd
from configs import quickstart
from specdistill_jax.losses import toy

# %% [markdown]
# ## A toy: one Gaussian drafts for three modes
#
# After Figure 2 of [LK losses](https://arxiv.org/abs/2602.23881). The target's law has three
# modes, the draft is one Gaussian: it can't have them all. The **forward KL** punishes what the
# draft leaves out, so it covers everything, thinly. The **reverse KL** punishes what the draft
# makes up, so it sits on one mode. The **total variation** is one minus the *overlap*, and the
# overlap is the chance that a drafted token is accepted: it takes the compromise that decodes
# fastest.

# %%
FITS = {'forward KL': (sd.divergences.forward_kl, '#0072B2', '--'),
        'reverse KL': (sd.divergences.reverse_kl, '#E69F00', '-.'),
        'total variation': (sd.divergences.tvd, '#009E73', '-')}
GRID = np.asarray(toy.GRID_V)


def density(logits):
  return np.asarray(jax.nn.softmax(logits)) / (GRID[1] - GRID[0])


def draw_toy(fits):
  figure, axis = plt.subplots(figsize=(8, 3.6))
  law = density(toy.target_logits())
  axis.fill_between(GRID, law, color='#dddddd', label='target')
  for name, (divergence, color, style) in fits.items():
    mean, width, overlap = toy.fit(divergence, steps=TOY_STEPS)
    axis.plot(GRID, density(toy.gaussian_logits(mean, width)), color=color, linestyle=style,
              linewidth=2, label=f'{name}: overlap {overlap:.3f}')
  axis.set_xlim(-12, 12)
  axis.set_ylim(0, None)
  axis.set_xlabel('token (of a vocabulary on a line)')
  axis.set_ylabel('probability density')
  axis.legend(frameon=False)
  axis.spines[['top', 'right']].set_visible(False)
  plt.show()


draw_toy(FITS)

# %% [markdown]
# ## Ten lines
#
# A divergence takes the draft's logits (the *student*'s) and the target's (the *teacher*'s), both
# `[..., vocabulary]`, and returns a loss for each token, `[...]`. The project masks, pools and
# differentiates it. This one is a Rényi divergence, which lies between the two extremes that it
# mixes: order 1/2 is symmetric.

# %%
def renyi(student_logits, teacher_logits, order=0.5):
  """log(sum teacher^order student^(1 - order)) / (order - 1), in nats."""
  student = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
  mixed = order * teacher + (1 - order) * student
  return jax.nn.logsumexp(mixed, axis=-1) / (order - 1)


# %% [markdown]
# A look before hours are spent on it: zero where the laws are equal, positive elsewhere, and what
# it makes of the toy.

# %%
logits = jax.random.normal(jax.random.key(0), (2, 4, 50))
print('equal laws:', np.asarray(jnp.abs(renyi(logits[0], logits[0])).max()),
      ' different laws:', np.asarray(renyi(logits[0], logits[1])).round(3))
draw_toy({**FITS, 'yours': (renyi, '#CC79A7', ':')})

# %% [markdown]
# ## Distil with it
#
# An objective's name with a dot is a function: `__main__.renyi` is the one of this notebook. Saved
# in a file `my_losses.py` it is `my_losses.renyi`, which the command line takes too
# (`--config.distill.objective=my_losses.renyi`). The study's `config.json` keeps its lines, and
# goes on only with the same ones: after a change, take another `WORKDIR`.
#
# `also` adds the forward KL as a second arm, on the same draft, data and steps.

# %%
config = quickstart.get_config()
config.update_from_flattened_dict({
    'target.train.steps': TARGET_STEPS, 'draft.train.steps': DRAFT_STEPS,
    'distill.objective': '__main__.renyi', 'distill.also': ('forward_kl',),
    'distill.train.steps': DISTILL_STEPS, 'distill.seeds': (0,), 'distill.control': False,
    'evaluate.gammas': GAMMAS, 'evaluate.num_prompts': NUM_PROMPTS})
here = pathlib.Path.cwd()
start = next((folder / START for folder in (here, *here.parents) if all(
    (folder / START / 'done' / f'{name}.json').exists() for name in ('target', 'draft'))), None)
print(f'from {start}' if start else f'{START} holds no trained models: both are trained here')
if start:
  config.update_from_flattened_dict({
      'target.init_from': f'{start}/target', 'target.train.steps': 0,
      'draft.init_from': f'{start}/draft', 'draft.train.steps': 0})
config.update_from_flattened_dict(CHANGES)
seconds = sd.run(config, WORKDIR)

# %%
report = (pathlib.Path(WORKDIR) / 'report.md').read_text()
display(Markdown(report.split('## Results')[1].split('## Plots')[0]))
for name in ('training_alpha', 'block_efficiency'):
  display(Image(f'{WORKDIR}/{name}.png', width=620))

# %% [markdown]
# Differences within the brackets are chance: more prompts and seeds (`distill.seeds`) tell more.
#
# ## What to try next
#
# * `order=0.9` is nearly the forward KL, `0.1` nearly the reverse one (over its order). Which is
#   best at temperature 0, which at 1?
# * `return 1 - jnp.sum(jnp.minimum(...))` is the total variation. From a draft that knows nothing
#   it hardly learns: set `draft.train.steps` to 1 and `draft.train.warmup_steps` to 0 in `CHANGES`
#   (and `START` to nothing), and see.
# * `sd.divergences` has `forward_kl`, `reverse_kl`, `jsd`, `tvd`, `acceptance_nll` and
#   `lk_hybrid`; `configs/lk_losses.py` compares those of the LK paper.
