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
# # Trade-off: speed against quality
#
# Exact speculative decoding gives the target's text, faster. A **lossy** rule keeps drafted tokens
# that the exact one would refuse: faster still, but the text is no longer the target's, and its
# quality may fall. Three questions: what does each rule cost, how does it bend the law, and what
# speed can a draft reach at all?

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
# Reads the measured rows of a study's folder. Where there is none, `configs/lossy.py` is run
# first: word problems, whose solutions have a quality to lose; some ten minutes on two CPU cores.

# %% tags=["parameters"]
WORKDIR = 'runs/lossy'
CHANGES = {}               # fields of that config, where it is run here
TEMPERATURE = 1.0          # what the explorer begins with
RULE, EPSILON = 'typical', 0.05
GAMMA = 5
MAX_QUALITY_DROP = 0.05    # share of the target's quality that may be spent on speed
COST_RATIO = None          # c, the cost of a draft's step; None: as measured in the study
VERIFY_RATIO = None        # v, the cost of a verification; None: likewise

# %%
import jax
import jax.numpy as jnp
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
import numpy as np

import specdistill_jax as sd
from configs import lossy
from specdistill_jax.decoding import lossy_rules
from specdistill_jax.evaluation import formats
from specdistill_jax.evaluation import frontier
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.stages import report

try:
  import ipywidgets
except ImportError:
  ipywidgets = None   # the variables above are the controls then

results = pathlib.Path(WORKDIR) / 'results.jsonl'
if not (results.parent / 'done' / 'evaluate.json').exists():
  config = lossy.get_config()
  config.update_from_flattened_dict(CHANGES)
  sd.run(config, WORKDIR)
rows = rows_lib.read(results)
rows = [row for row in rows if row['config_hash'] == rows[-1]['config_hash']]
summaries = summary_lib.summarise(rows, samples=200)
METRIC = summaries[0].quality_metric
if METRIC is None:
  raise ValueError(f'{results} has no quality: take a study of a task that has a metric')
methods = list(dict.fromkeys(s.method for s in summaries))
print(f'{len(summaries)} settings of {rows[0]["task"]} on {rows[0]["device"]}, quality: {METRIC}')

# %% [markdown]
# ## What each rule costs
#
# Every marker is a setting. To the right is faster than the target alone, up is better text. The
# line joins what no other setting beats in both. Lossless settings (circles, squares) differ in
# quality by chance alone, and so say how much chance there is. Choose a setting: it is ringed and
# told.

# %%
COLORS = dict(zip(methods, ('#7a7a7a', '#0072B2', '#CC79A7', '#E69F00', '#009E73') * 3))
MARKERS = dict(exact='o', block='s', linear='^', square='v', exponential='D', typical='P',
               top_k='X', greedy_lenience='<')


def draw(temperature, chosen=None):
  mine = [s for s in summaries if s.temperature == temperature]
  figure, axis = plt.subplots(figsize=(9, 4.6))
  for s in mine:
    hollow = s.draft_sampling == 'greedy'
    axis.scatter(s.speedup_measured, s.quality, marker=MARKERS[s.rule], s=60, linewidth=1.4,
                 edgecolor=COLORS[s.method], facecolor='white' if hollow else COLORS[s.method],
                 zorder=3)
    if not s.lossless:
      axis.annotate(f'{s.epsilon:g}', (s.speedup_measured, s.quality), xytext=(6, 3),
                    textcoords='offset points', fontsize=8, color='#555555')
  axis.scatter(1, mine[0].target_quality, marker='*', s=220, color='black', zorder=4)
  alone = (1.0, mine[0].target_quality)
  best = [(s.speedup_measured, s.quality) for s in frontier.undominated(mine)]
  if not any(frontier.dominates(place, alone) for place in best):
    best = sorted([alone, *best])
  axis.plot(*zip(*best), color='black', linewidth=1, zorder=2)
  axis.axhline((1 - MAX_QUALITY_DROP) * mine[0].target_quality, color='#D55E00', linestyle=':')
  if chosen is not None:
    axis.scatter(chosen.speedup_measured, chosen.quality, s=330, facecolor='none',
                 edgecolor='#D55E00', linewidth=2.5, zorder=5)
  line = lambda **how: plt.Line2D([], [], linestyle='none', **how)
  handles = {'target alone': line(color='black', marker='*', markersize=12)}
  handles |= {name: line(color=COLORS[name], marker='o') for name in methods}
  handles |= {rule: line(color='#333333', marker=MARKERS[rule])
              for rule in dict.fromkeys(s.rule for s in mine)}
  handles['greedy drafts'] = line(color='#333333', marker='o', markerfacecolor='white')
  handles['quality budget'] = plt.Line2D([], [], color='#D55E00', linestyle=':')
  axis.legend(handles.values(), handles, loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
  axis.set_xlabel('measured speed-up over the target alone (numbers: ε)')
  axis.set_ylabel(f'{METRIC} (%)')
  axis.set_title('greedy (temperature 0)' if temperature == 0 else f'temperature {temperature:g}')
  axis.spines[['top', 'right']].set_visible(False)
  axis.grid(color='#eeeeee')
  axis.set_axisbelow(True)
  plt.show()


def tell(s):
  drop = 1 - s.quality / s.target_quality if s.target_quality else 0.0
  kind = 'lossless' if s.lossless else 'lossy'
  print(f'{s.method}; {s.way}; γ = {s.gamma} ({kind})\n'
        f'  {s.speedup_measured:.2f}x the target\'s speed, predicted {s.speedup_predicted:.2f}x '
        f'(c = {s.cost_ratio:.2f}, v = {s.verify_ratio:.2f})\n'
        f'  {s.block_efficiency:.2f} tokens a call\n'
        f'  {METRIC} {s.quality:.1f}, the target\'s {s.target_quality:.1f} ({-drop:+.0%})')


def explore(temperature=TEMPERATURE, rule=RULE, epsilon=EPSILON, gamma=GAMMA,
            method=methods[-1], drafts='sampled'):
  found = [s for s in summaries if (s.temperature, s.rule, s.gamma, s.method, s.draft_sampling) == (
      temperature, rule, gamma, method, drafts) and (s.lossless or s.epsilon == epsilon)]
  if not found:
    measured = sorted({(s.rule, s.epsilon, s.gamma) for s in summaries
                       if s.temperature == temperature})
    print('not measured; at this temperature there are (rule, ε, γ) =',
          ', '.join(f'({r}, {e:g}, {g})' for r, e, g in measured))
  else:
    tell(found[0])
  draw(temperature, found[0] if found else None)


values = lambda name: sorted({getattr(s, name) for s in summaries})
if ipywidgets is None:
  explore()
else:
  ipywidgets.interact(
      explore, temperature=values('temperature'), rule=values('rule'), epsilon=values('epsilon'),
      gamma=values('gamma'), method=methods, drafts=values('draft_sampling'))

# %% [markdown]
# The fastest setting within the quality budget, at each temperature. A lossless one always lies
# within it, by its law.

# %%
for temperature in values('temperature'):
  mine = [s for s in summaries if s.temperature == temperature]
  fastest = frontier.fastest_within(mine, MAX_QUALITY_DROP)
  print(f'temperature {temperature:g}, at most {MAX_QUALITY_DROP:.0%} of the quality spent:')
  if fastest is None:
    print('  nothing is faster than the target alone')
  else:
    tell(fastest)
display(Markdown(formats.markdown(*report.table(summaries))))

# %% [markdown]
# ## Leniency functions
#
# The exact rule keeps a drafted token with probability min(1, target / draft). DistillSpec puts a
# lenient f(target) in the target's place: target / ε (`linear`), target / ε² (`square`) or
# target^ε (`exponential`). At ε = 1 all are exact.

# %%
probability = np.linspace(1e-4, 1, 400)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for axis, (name, lenient) in zip(axes, lossy_rules.LENIENCE.items()):
  for epsilon, color, style in ((1.0, 'black', ':'), (0.7, '#0072B2', '-'), (0.4, '#009E73', '--'),
                                (0.1, '#D55E00', '-.')):
    kept = np.minimum(1, np.exp(lenient(np.log(probability), epsilon)) / 0.6)
    axis.plot(probability, kept, color=color, linestyle=style, linewidth=2,
              label=f'ε = {epsilon:g}' + ' (exact)' * (epsilon == 1))
  axis.axvline(0.6, color='#bbbbbb', linewidth=1, zorder=0)
  axis.set_title(name)
  axis.set_xlabel('target\'s probability of the token')
  axis.spines[['top', 'right']].set_visible(False)
axes[0].set_ylabel('chance to be kept\n(the draft gave it 0.6)')
axes[-1].legend(frameon=False, loc='lower right')
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What leniency does to the law
#
# On two laws over 50 tokens everything can be computed exactly. With a leniency function a
# position emits min(draft, f) + (1 - Σ min(draft, f)) · residual, the residual being max(0, target
# - draft), normalised. The rules with a threshold, `typical` and `top_k`, keep or refuse a token
# whatever the draft gave it, and put a draw from the target in its place.
#
# To the right: the three functions lie on one line. What they gain in acceptance is *exactly* what
# the emitted law loses in total variation; they differ only in how far an ε goes along the line
# (to the left). A threshold can only be worse by this measure: it also refuses tokens that the
# exact rule would keep. How much a distance in law hurts a task is another question: the plot
# above.

# %%
keys = jax.random.split(jax.random.key(0))
toy_target = np.asarray(jax.nn.softmax(2.0 * jax.random.normal(keys[0], (50,))))
toy_draft = np.asarray(jax.nn.softmax(
    jnp.log(toy_target) + 0.8 * jax.random.normal(keys[1], (50,))))
residual = np.maximum(toy_target - toy_draft, 0) / np.maximum(toy_target - toy_draft, 0).sum()


def bend(rule, epsilon):
  """Acceptance, and the total variation between what is emitted and the target's law."""
  if rule in lossy_rules.LENIENCE:
    lenient = np.exp(np.asarray(lossy_rules.LENIENCE[rule](jnp.log(toy_target), epsilon)))
    kept, instead = np.minimum(toy_draft, lenient), residual
  else:
    least = lossy_rules.THRESHOLDS[rule](jnp.log(toy_target), epsilon)
    kept, instead = toy_draft * (np.log(toy_target) >= np.asarray(least)), toy_target
  emitted = kept + (1 - kept.sum()) * instead
  return kept.sum(), 0.5 * np.abs(emitted - toy_target).sum()


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
EPSILONS = np.geomspace(0.3, 1, 40)
for rule, color, style in (('linear', '#0072B2', '-'), ('square', '#E69F00', '--'),
                           ('exponential', '#009E73', '-.')):
  acceptance, distance = np.array([bend(rule, epsilon) for epsilon in EPSILONS]).T
  left.plot(EPSILONS, acceptance, color=color, linestyle=style, linewidth=2, label=rule)
right.plot(acceptance, distance, color='#333333', linewidth=2,
           label='linear, square, exponential')
for rule, color, epsilons in (('typical', '#CC79A7', (0.5, 0.05)),
                              ('top_k', '#D55E00', (0.5, 0.2, 0.05))):
  for epsilon in epsilons:
    place = bend(rule, epsilon)
    right.plot(*place, marker=MARKERS[rule], markersize=8, color=color, linestyle='none',
               label=rule if epsilon == epsilons[0] else None)
    right.annotate(f'{epsilon:g}', place, xytext=(-6, -14), textcoords='offset points', fontsize=8)
right.plot(*bend('linear', 1.0), marker='o', markersize=8, color='black', linestyle='none',
           label='exact')
left.set_xlabel('ε')
left.set_ylabel('acceptance rate')
right.set_xlabel('acceptance rate (numbers: ε)')
right.set_ylabel('distance from the target\'s law\n(total variation)')
for axis in (left, right):
  axis.legend(frameon=False, fontsize=9)
  axis.spines[['top', 'right']].set_visible(False)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What speed a draft can reach
#
# If every drafted token is kept with chance α, a call gives τ = (1 - α^(γ + 1)) / (1 - α) tokens,
# and the speed-up is τ / (γ c + v). The draft's cost c eats long drafts; the verification's cost
# v, near 1 on accelerators and well above on CPUs, divides everything. The lines take one v for
# all lengths; the ring is the best length of each.

# %%
exact = next((s for s in summaries if s.rule == 'exact' and s.method == methods[-1]
              and s.temperature == TEMPERATURE), summaries[0])
c = exact.cost_ratio if COST_RATIO is None else COST_RATIO
v = exact.verify_ratio if VERIFY_RATIO is None else VERIFY_RATIO


def draw_predicted(c, v):
  gammas = np.arange(1, 16)
  figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
  for axis, (name, c, v) in zip(axes, (('here, as measured' if COST_RATIO is None else 'as given',
                                        c, v), ('an accelerator, say', 0.05, 1.05))):
    for alpha, color in zip((0.5, 0.6, 0.7, 0.8, 0.9), plt.cm.viridis(np.linspace(0, 0.85, 5))):
      tau = (1 - alpha ** (gammas + 1)) / (1 - alpha)
      speed = np.array([measures.speedup_predicted(t, g, c, v) for t, g in zip(tau, gammas)])
      axis.plot(gammas, speed, color=color, linewidth=2)
      axis.annotate(f'α = {alpha:g}', (15, speed[-1]), xytext=(4, -3),
                    textcoords='offset points', fontsize=9, color=color)
      best = speed.argmax()
      axis.plot(gammas[best], speed[best], marker='o', markersize=9, markerfacecolor='none',
                markeredgecolor=color, markeredgewidth=2)
    axis.axhline(1, color='black', linestyle=':', linewidth=1)
    axis.set_title(f'{name}: c = {c:.2f}, v = {v:.2f}')
    axis.set_xlabel('draft length γ')
    axis.set_xlim(0.5, 17)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('predicted speed-up')
  figure.tight_layout()
  plt.show()


if ipywidgets is None:
  draw_predicted(c, v)
else:
  ipywidgets.interact(
      draw_predicted,
      c=ipywidgets.FloatSlider(value=c, min=0.0, max=1.0, step=0.01),
      v=ipywidgets.FloatSlider(value=v, min=1.0, max=6.0, step=0.05))

# %% [markdown]
# The study's own setting against the formula, which takes positions to be independent, and lines
# of text to go on for ever:

# %%
alpha, gamma = exact.alpha, exact.gamma
tau = (1 - alpha ** (gamma + 1)) / (1 - alpha)
speed = measures.speedup_predicted(tau, gamma, exact.cost_ratio, exact.verify_ratio)
print(f'{exact.method}, {exact.way}, γ = {gamma}, temperature {exact.temperature:g}: '
      f'α = {alpha:.2f}\n'
      f'  τ: {tau:.2f} by the formula, {exact.block_efficiency:.2f} measured\n'
      f'  speed-up: {speed:.2f} by the formula, {exact.speedup_predicted:.2f} with the measured τ, '
      f'{exact.speedup_measured:.2f} measured')

# %% [markdown]
# ## What to try next
#
# * `MAX_QUALITY_DROP = 0.2`: what else comes within the budget?
# * `COST_RATIO, VERIFY_RATIO = 0.02, 1.0`: a larger target on an accelerator.
# * `CHANGES = {'evaluate.gammas': (3, 5, 7)}` and another `WORKDIR`: leniency makes longer drafts
#   pay.
# * `explore.ipynb` with `rule='typical'`: which tokens does leniency let through?
