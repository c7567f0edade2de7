"""What is measured while a model trains: on several devices as on one, within bounds."""

import jax
import numpy as np
import pytest

import models
import studies
from specdistill_jax import sharding
from specdistill_jax.models import base
from specdistill_jax.stages import heldout
from specdistill_jax.training import rollouts


def measured(workdir, monkeypatch, mesh, tensor=None):
  """The figures, and the meshes in context where prompts were decoded."""
  seen, contest = [], heldout.contest
  def watched(*arguments, **keywords):
    seen.append((dict(jax.sharding.get_abstract_mesh().shape), arguments[2].tokens_bt.sharding))
    return contest(*arguments, **keywords)
  monkeypatch.setattr(heldout, 'contest', watched)
  size = dict(vocab_size=studies.VOCAB_SIZE, num_layers=1)
  teacher = models.tiny(0, scale=2.0, **size)
  student = models.perturbed(teacher, 0.3)
  placed = lambda model: base.Model(sharding.laid_out(model.module, mesh), model.config)
  found = heldout.HeldOut(workdir / 'data', mesh, batch_size=8, seed=0, teacher=placed(teacher),
                          max_new_tokens=4, tensor=tensor).measure(placed(student))
  return found, seen[0]


def test_devices_change_no_figure_and_share_rows_and_heads(tmp_path, monkeypatch):
  studies.write_data(tmp_path)
  monkeypatch.setattr(heldout, 'GAMMA', 2)
  alone, _ = measured(tmp_path, monkeypatch, sharding.make_mesh(devices=jax.devices()[:1]))
  mesh = sharding.make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
  found, (shape, rows) = measured(tmp_path, monkeypatch, mesh, tensor=2)
  assert shape == dict(data=1, fsdp=2, tensor=2)
  assert rows.is_equivalent_to(sharding.batch_sharding(sharding.regrouped(mesh, 2)), 2)
  assert 1.1 < alone['block_efficiency'] < 2.9
  assert found.keys() == alone.keys()
  for name, value in alone.items():
    if value is not None:
      np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_what_cannot_be_decoded_on_the_chips_that_train_is_not(tmp_path, monkeypatch):
  studies.write_data(tmp_path)
  monkeypatch.setattr(heldout, 'contest', None)
  monkeypatch.setattr(heldout, '_continue', None)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = models.tiny(0, vocab_size=studies.VOCAB_SIZE, num_layers=1)
  found = heldout.HeldOut(tmp_path / 'data', mesh, batch_size=8, seed=0, teacher=model,
                          max_new_tokens=4, tensor=0).measure(model)
  assert found['validation_alpha'] == pytest.approx(1) and 'block_efficiency' not in found


@pytest.mark.parametrize('batch, ways, prompt, rows', [
    (8, 1, 16, 8), (1024, 16, 64, 64), (16, 4, 1536, 8), (64, 32, 1536, 32), (128, 128, 16, 128)])
def test_caches_have_a_bound(batch, ways, prompt, rows):
  assert rollouts.held_out_rows(batch, ways, prompt) == rows
  assert rollouts.held_out(prompt, 512).max_new_tokens == 128
