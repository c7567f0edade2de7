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
# # Explore: watch speculation, token by token
#
# Which tokens does a draft guess, and where does it fail? Here the real sampler decodes one text,
# and every call of the target becomes a line: what the draft proposed, what was kept, and the
# target's own token behind it.

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
# Takes the models of a study's folder (`quickstart.ipynb` makes one; where there is none, it is
# made here first, in some ten minutes), or two Hugging Face directories with one vocabulary.

# %% tags=["parameters"]
WORKDIR = 'runs/quickstart'
TARGET, DRAFT = None, None   # or directories, as in '/models/Qwen2.5-7B', '/models/Qwen2.5-0.5B'
PROMPT = 'The yield expression is'
NEW_TOKENS = 60
GAMMA = 5                    # tokens of a drafted chain
TREE = '0 1 2 00 01 10 000 001 0000'   # ranks along the path to each node of a drafted tree
TEMPERATURE = 1.0            # of the sampled texts
SEED = 0

# %%
import html

import jax
from IPython.display import HTML, Image, display
from matplotlib import pyplot as plt
import numpy as np

import specdistill_jax as sd

if TARGET is None:
  folder = pathlib.Path(WORKDIR)
  if not (folder / 'done' / 'distill.json').exists():
    sd.quickstart(folder)
  target = sd.load_pretrained(folder / 'target')
  arms = sorted(path for path in (folder / 'distill').iterdir()
                if not path.name.startswith('cross_entropy'))
  drafts = dict(undistilled=sd.load_pretrained(folder / 'draft'),
                distilled=sd.load_pretrained(arms[0]))
else:
  target, drafts = sd.load_pretrained(TARGET), dict(draft=sd.load_pretrained(DRAFT))
draft = list(drafts.values())[-1]
for name, model in dict(target=target, **drafts).items():
  print(f'{name}: {model.num_parameters:,} parameters')

# %% [markdown]
# ## How to read a line
#
# `sd.trace` gives a record of each call. Kinds of token differ by mark, not only by colour.

# %%
LOOKS = dict(
    accepted='background:#cdeee0;border-bottom:3px solid #009E73',
    refused='color:#666;background:#f2f2f2;text-decoration:line-through 2px #333',
    correction='background:#fbdcc6;border:2px solid #D55E00;font-weight:bold',
    bonus='background:#cfe4f5;border:2px dashed #0072B2;font-weight:bold')
MEANING = dict(
    accepted='drafted and kept', refused='drafted and refused',
    correction='the target\'s own token where it refused the draft\'s',
    bonus='the target\'s own token behind a draft that was kept to its end')


def piece(token, before):
  """What a token adds to the text, given the one before it."""
  decode = target.vocabulary.decode
  text = decode([before, token])[len(decode([before])):]
  return text.replace('\n', '⏎') or '∎'


def span(kind, text, note=''):
  style = f'{LOOKS[kind]};color:#111;border-radius:3px;padding:0 2px;margin:1px'
  if kind == 'refused':
    style += ';' + LOOKS[kind]
  return (f'<span class="{kind}" style="{style};white-space:pre;display:inline-block" '
          f'title="{html.escape(note)}">{html.escape(text)}</span>')


def line(call, most_refused=8):
  """One call of the target: what was kept, what was refused, and what came in its place."""
  tokens = [call.root, *call.tokens]
  def drafted(kind, slot):
    chance = '' if call.probabilities is None else f', p = {call.probabilities[slot - 1]:.2f}'
    return span(kind, piece(tokens[slot], tokens[call.parents[slot - 1]]), f'drafted{chance}')
  kept = [drafted('accepted', slot) for slot in call.kept[1:]]
  lost = [slot for slot in range(1, len(tokens)) if slot not in call.kept]
  lost = lost if call.next_token is not None else []  # the text ended: these were not judged
  refused = [drafted('refused', slot) for slot in lost[:most_refused]]
  more = f' +{len(lost) - most_refused} more' if len(lost) > most_refused else ''
  kind = 'bonus' if call.is_bonus else 'correction'
  own = ([] if call.next_token is None else
         [span(kind, piece(call.next_token, tokens[call.kept[-1]]), f'the target\'s {kind}')])
  return ''.join(kept + own), ''.join(refused) + more


def show(calls, title):
  """All calls of a text, a row each."""
  rows = []
  for number, call in enumerate(calls, start=1):
    said, refused = line(call)
    cells = (str(number), said, refused, str(len(call.emitted)))
    rows.append('<tr>' + ''.join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
  count = sum(len(call.emitted) for call in calls)
  head = ''.join(f'<th style="text-align:left">{name}</th>' for name in (
      'call', 'the text goes on with', 'refused', 'tokens'))
  display(HTML(f'<h4>{html.escape(title)}: {count} tokens in {len(calls)} calls of the target, '
               f'{count / len(calls):.2f} a call</h4><table style="font-family:monospace">'
               f'<tr>{head}</tr>{"".join(rows)}</table>'))


display(HTML('<br>'.join(
    f'{span(kind, " token ")} {meaning}' for kind, meaning in MEANING.items())))

# %% [markdown]
# ## Chains
#
# The draft proposes `GAMMA` tokens in a row. At temperature 0 both models take their best token,
# and a drafted one is kept where it is the target's best. Hold the pointer over a token to see
# what chance the draft gave it.

# %%
def watch(**how):
  return sd.trace(target, draft, PROMPT, max_new_tokens=NEW_TOKENS, key=jax.random.key(SEED),
                  **how)

traces = {'chain, greedy': watch(gamma=GAMMA, temperature=0.0)}
show(traces['chain, greedy'], f'{PROMPT} … (chain, greedy)')

# %% [markdown]
# When sampling, a drafted token is kept with probability min(1, target / draft): one that the
# draft believed in more than the target does may go. A correction is then drawn from what the
# draft had too little of, and this is what makes the text follow the target's law exactly.

# %%
traces['chain, sampled'] = watch(gamma=GAMMA, temperature=TEMPERATURE)
show(traces['chain, sampled'], f'{PROMPT} … (chain, temperature {TEMPERATURE:g})')

# %% [markdown]
# ## Trees
#
# In a tree the draft hedges: several tokens for one place, which the target reads in one call too.
# At most one path is kept. More calls end late; every node costs a little.

# %%
for name, temperature in {'tree, greedy': 0.0, 'tree, sampled': TEMPERATURE}.items():
  traces[name] = watch(tree=TREE, temperature=temperature)
  show(traces[name], f'{PROMPT} … ({name})')

# %% [markdown]
# The tree of the call that kept most, as it was drafted (with the draft's probabilities), judged
# (green) and continued (orange):

# %%
from specdistill_jax.evaluation import drafted, tree_picture

calls = traces['tree, greedy']
number = max(range(len(calls)), key=lambda index: len(calls[index].kept))
call = calls[number]
tokens = [call.root, *call.tokens]
words = [piece(call.root, call.root)] + [
    piece(token, tokens[parent]) for token, parent in zip(call.tokens, call.parents)]
next_word = None if call.next_token is None else piece(call.next_token, tokens[call.kept[-1]])
tree_picture.draw(
    drafted.Tree(call.parents, words, call.probabilities, call.kept, next_word, number + 1),
    pathlib.Path('tree.png'), f'call {number + 1} of the greedy text')
display(Image('tree.png', width=760))

# %% [markdown]
# ## All ways beside one another
#
# Short texts differ by chance: a table of a study (`quickstart.ipynb`) has intervals.

# %%
rows = ''.join(
    f'<tr><td style="text-align:left">{name}</td><td>{sum(len(c.emitted) for c in calls)}</td>'
    f'<td>{len(calls)}</td><td>{sum(len(c.tokens) for c in calls)}</td>'
    f'<td>{sum(len(c.accepted) for c in calls)}</td>'
    f'<td>{sum(len(c.emitted) for c in calls) / len(calls):.2f}</td></tr>'
    for name, calls in traces.items())
head = ''.join(f'<th>{name}</th>' for name in (
    '', 'tokens', 'target calls', 'drafted', 'of them kept', 'tokens a call'))
display(HTML(f'<table><tr>{head}</tr>{rows}</table>'))

# %% [markdown]
# ## Agreement along a text
#
# `sd.overlap` gives, at every token, the chance that a token drafted there would be kept: the sum
# of min(target, draft) over the vocabulary. Its mean over texts of the target is α. Here along one
# text that the target wrote, a band for each draft: bright is agreement, dark is where it fails.

# %%
text = sd.generate(target, [PROMPT], max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE,
                   key=jax.random.key(SEED))
ids = text.tokens[0, :text.lengths[0]].tolist()
alphas = {name: sd.overlap(target, model, PROMPT, ids, temperature=TEMPERATURE)
          for name, model in drafts.items()}
root = traces['chain, sampled'][0].root
words = [piece(token, before) for before, token in zip([root, *ids], ids)]

COLUMNS = 12
lines = -(-len(ids) // COLUMNS)
figure, axes = plt.subplots(lines, 1, figsize=(11, 0.42 * (len(drafts) + 1) * lines),
                            squeeze=False, constrained_layout=True)
for row, axis in enumerate(axes[:, 0]):
  chosen = slice(row * COLUMNS, (row + 1) * COLUMNS)
  band = np.full((len(drafts), COLUMNS), np.nan)
  for index, alpha in enumerate(alphas.values()):
    band[index, :len(alpha[chosen])] = alpha[chosen]
  image = axis.imshow(band, cmap='cividis', vmin=0, vmax=1, aspect='auto')
  for (index, column), value in np.ndenumerate(band):
    if np.isfinite(value):
      axis.text(column, index, f'{value:.2f}', ha='center', va='center', fontsize=8,
                color='black' if value > 0.55 else 'white')
  shown = [word.replace('$', r'\$') for word in words[chosen]]
  axis.set_xticks(range(len(shown)), shown, fontsize=9, family='monospace')
  axis.xaxis.tick_top()
  axis.set_yticks(range(len(drafts)), list(drafts), fontsize=9)
  axis.tick_params(length=0)
  for side in axis.spines.values():
    side.set_visible(False)
figure.colorbar(image, ax=axes, label='chance to be kept', fraction=0.02, pad=0.01)
plt.show()
for name, alpha in alphas.items():
  print(f'{name}: α along this text {alpha.mean():.2f}, below 0.5 at {np.mean(alpha < 0.5):.0%} '
        'of its tokens')

# %% [markdown]
# ## What to try next
#
# * Prompts from another domain: where does the distilled draft lose its lead?
# * `TREE = 'dynamic k4 d4 n12'`: a tree that grows where the draft is sure (EAGLE-2).
# * `watch(gamma=8, min_confidence=0.4)`: chains that stop where the draft grows unsure.
# * `watch(gamma=5, rule='typical', epsilon=0.3)`: a lossy rule keeps more, and the text is no
#   longer the target's: `tradeoff.ipynb`.
