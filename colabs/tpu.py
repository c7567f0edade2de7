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
# # TPU: ask the compiler before you pay, then launch
#
# Before a slice costs money, the TPU compiler can say, on any machine, whether a study fits on it:
# bytes for each chip, and the least time a step can take. Then a script launches the study. Here
# you do both without a TPU; on a TPU the notebook also runs the real thing.

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

# %% tags=["parameters"]
CONFIG = 'configs/pod_t5_xl.py'   # or another of configs/pod_*.py, or your own
TOPOLOGY = 'v5e:4x4'              # the slice: chip and shape
PROGRAMS = 'train'                # of train, on_policy, generate, draft, speculate; with commas
WORKDIR = 'runs/tpu'              # of the study that runs where there is a TPU

# %%
import json

from IPython.display import Markdown, display
import jax

import specdistill_jax as sd

ROOT = pathlib.Path(sd.__file__).resolve().parents[1]


def show(*command, **environment):
  """Runs a command in the project's folder; prints what it says and returns its lines."""
  print('$', *command)
  # The compiler looks for the TPU's tools, not for a TPU: JAX itself stays on the CPU.
  done = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **environment})
  shown = done.stdout.rsplit('\n{', 1)[0]
  print(shown if done.returncode in (0, 1) else done.stdout + done.stderr)
  return done.stdout.splitlines()


# %% [markdown]
# ## Does it fit?
#
# `specdistill_jax.compile` compiles the study's programs for the slice: real compilations, so a
# large model takes a minute or two for each. It needs `libtpu`, the TPU's compiler (`pip install
# -r launch/requirements-tpu-compile.txt -c constraints.txt`).

# %%
if importlib.util.find_spec('libtpu') is None:
  print('Not compiled: libtpu is not installed here; in the folder of specdistill_jax, pip install '
        '-r launch/requirements-tpu-compile.txt -c constraints.txt, and run this cell again.')
else:
  lines = show(sys.executable, '-m', 'specdistill_jax.compile', f'--config={CONFIG}',
               f'--topology={TOPOLOGY}', f'--programs={PROGRAMS}')
  document = json.loads(lines[-1])['documents'][0]
  print(f'\n{document["study"]} on {document["topology"]}: '
        f'{"fits" if document["fits"] else "does not fit"}')

# %% [markdown]
# Memory is the compiler's own count. Times are *rooflines*: what arithmetic, memory and network
# take at their published rates, so lower bounds, not measurements. `--sweep` finds the smallest
# slice of a chip that fits; `--programs=speculate` says what decoding needs. Studies that were
# compiled before:

# %%
table = (ROOT / 'README.md').read_text().split('<!-- tpu_slices -->')[1]
display(Markdown(table))

# %% [markdown]
# ## Launch
#
# On your own machine (with `gcloud`, and a Google Cloud project with TPU quota) one command asks
# for the slice, puts the code on its hosts, runs the study with its folder in a bucket, and takes
# it up again after a loss. `--dry_run` prints every command and runs none:

# %%
settings = pathlib.Path('tpu_example.env').resolve()
settings.write_text('''PROJECT=my-project
ZONE=us-west4-a
BUCKET=gs://my-bucket/specdistill
NAME=my-slice
ACCELERATOR_TYPE=v5litepod-16
RUNTIME_VERSION=v2-alpha-tpuv5-lite
''')
lines = show('launch/tpu_vm.sh', 'up', '--dry_run', f'--env={settings}', '--allow_uncommitted',
             CONFIG)

# %% [markdown]
# In earnest: `cp launch/tpu.env.example launch/tpu.env`, fill it in, and leave `--dry_run` out. A
# slice costs money until `launch/tpu_vm.sh delete`. The cells of a sweep, one a slice:
# `launch/tpu_sweep.sh --slices=4 --delete configs/feature_drafts.py`; it knows `--dry_run` too.

# %% [markdown]
# ## On a TPU
#
# In Colab choose a TPU under *Runtime, Change runtime type*. The quickstart then runs on it, its
# batch spread over all chips; nothing in the config changes.

# %%
kind = jax.devices()[0].device_kind
if jax.devices()[0].platform != 'tpu':
  print(f'Not run: this machine has no TPU, but {kind}.')
else:
  print(f'{len(jax.devices())} chips of {kind}')
  seconds = sd.quickstart(WORKDIR)
  report = (pathlib.Path(WORKDIR) / 'report.md').read_text()
  display(Markdown(report.split('## Plots')[0]))

# %% [markdown]
# ## What to try next
#
# * `CONFIG = 'configs/pod_llama3_70b.py'`, `TOPOLOGY = 'v5e:8x8'`: a 70B target. Does it fit on
#   `4x4`?
# * `PROGRAMS = 'draft,speculate'`: adds the predicted c and v of decoding, and so the speed-up.
# * [docs/tpu_slices.md](../docs/tpu_slices.md): all pod studies from 16 to 256 chips.
# * `quickstart.ipynb`, `explore.ipynb`: what a study finds, and what its draft does.
