"""Objectives: masks, pooling, temperature and the acceptance rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import structs
from specdistill_jax.losses import divergences
from specdistill_jax.losses import objectives

# Three ragged rows; the last has nothing to learn.
MASK = jnp.array([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], jnp.float32)
LABELS = jnp.array([[3, 4, 5, 1, 0], [3, 4, 5, 1, 0], [3, 4, 5, 1, 0]])


def logits(seed):
  return 2 * jax.random.normal(jax.random.key(seed), (3, 5, 7))


def totals(objective, student=None, teacher=None, mask=MASK):
  student = logits(0) if student is None else student
  if not objective.needs_teacher:
    return objectives.supervised(objective, student, LABELS, mask)
  teacher = logits(1) if teacher is None else teacher
  return objectives.distillation(objective, student, teacher, mask)


def test_sequence_normalisation_is_the_mean_of_row_means():
  loss_bt = np.asarray(divergences.forward_kl(logits(0), logits(1)))
  expected = (loss_bt[0, 1:4].mean() + loss_bt[1, 3]) / 2
  np.testing.assert_allclose(totals(objectives.Objective('forward_kl')).loss, expected, rtol=1e-6)


def test_token_normalisation_is_the_mean_over_tokens():
  loss_bt = np.asarray(divergences.forward_kl(logits(0), logits(1)))
  expected = (loss_bt[0, 1:4].sum() + loss_bt[1, 3]) / 4
  actual = totals(objectives.Objective('forward_kl', normalisation='token'))
  np.testing.assert_allclose(actual.loss, expected, rtol=1e-6)
  assert actual.num_tokens == 4


@pytest.mark.parametrize('normalisation', objectives.NORMALISATIONS)
def test_row_with_nothing_to_learn_changes_nothing(normalisation):
  objective = objectives.Objective('tvd', normalisation=normalisation)
  without = objectives.distillation(objective, logits(0)[:2], logits(1)[:2], MASK[:2])
  np.testing.assert_allclose(totals(objective).loss, without.loss, rtol=1e-6)


@pytest.mark.parametrize('normalisation', objectives.NORMALISATIONS)
def test_totals_of_parts_add_up_to_those_of_the_whole(normalisation):
  """Denominators were wrong under gradient accumulation in a public trainer, twice."""
  objective = objectives.Objective('reverse_kl', normalisation=normalisation)
  parts = [objectives.distillation(objective, logits(0)[i:i + 1], logits(1)[i:i + 1],
                                   MASK[i:i + 1]) for i in range(3)]
  added = jax.tree.map(lambda *xs: sum(xs), *parts)
  whole = totals(objective)
  np.testing.assert_allclose(added.loss, whole.loss, rtol=1e-6)
  np.testing.assert_allclose(added.alpha, whole.alpha, rtol=1e-6)


def test_alpha_is_the_overlap_of_the_supervised_tokens():
  overlap_bt = np.asarray(divergences.acceptance(logits(0), logits(1)))
  expected = (overlap_bt[0, 1:4].sum() + overlap_bt[1, 3]) / 4
  np.testing.assert_allclose(totals(objectives.Objective('jsd')).alpha, expected, rtol=1e-6)


@pytest.mark.parametrize('name', [objectives.CROSS_ENTROPY, *objectives.DIVERGENCES])
@pytest.mark.parametrize('hole', [jnp.nan, jnp.inf])
def test_masked_tokens_reach_neither_value_nor_gradient(name, hole):
  objective = objectives.Objective(name)
  def holed(x):
    return jnp.where(MASK[..., None] > 0, x, hole)
  def loss(student, teacher):
    return totals(objective, student, teacher).loss
  value, grad = jax.value_and_grad(loss)(logits(0), logits(1))
  holed_value, holed_grad = jax.value_and_grad(loss)(holed(logits(0)), holed(logits(1)))
  np.testing.assert_array_equal(holed_value, value)
  np.testing.assert_array_equal(holed_grad, grad)
  np.testing.assert_array_equal(grad[MASK == 0], 0)
  assert np.abs(grad[MASK > 0]).max(axis=-1).min() > 0


def test_end_token_is_learnt_and_padding_is_not():
  """The end token was masked out in a public trainer because padding had the same id."""
  tokens = jnp.array([[5, 6, 1, 1, 1], [5, 6, 7, 8, 1]])
  loss_mask = jnp.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]], jnp.float32)
  labels, mask = structs.labels_and_mask(tokens, loss_mask)
  np.testing.assert_array_equal(mask, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
  np.testing.assert_array_equal(labels[mask > 0], [6, 1, 6, 7, 8, 1])


def test_first_token_is_never_predicted():
  _, mask = structs.labels_and_mask(jnp.array([[5, 6, 1]]), jnp.ones((1, 3)))
  np.testing.assert_array_equal(mask, [[1, 1, 0]])


def test_temperature_divides_both_models():
  cool = totals(objectives.Objective('forward_kl', temperature=2.0))
  expected = totals(objectives.Objective('forward_kl'), logits(0) / 2, logits(1) / 2)
  np.testing.assert_allclose(cool.loss, expected.loss, rtol=1e-6)
  np.testing.assert_allclose(cool.alpha, expected.alpha, rtol=1e-6)
  assert abs(cool.loss - totals(objectives.Objective('forward_kl')).loss) > 0.1


def test_jsd_gets_its_beta():
  losses = [totals(objectives.Objective('jsd', beta=beta)).loss for beta in (0.1, 0.5)]
  expected = divergences.jsd(logits(0), logits(1), beta=0.1)
  np.testing.assert_allclose(losses[0], (expected[0, 1:4].mean() + expected[1, 3]) / 2, rtol=1e-6)
  assert abs(losses[0] - losses[1]) > 1e-2


@pytest.mark.parametrize('wrong, match', [
    (dict(name='forward_lk'), "'forward_lk'.*forward_kl"),
    (dict(normalisation='row'), "'row'.*sequence, token"),
    (dict(temperature=0.0), 'temperature is 0.0'),
    (dict(name='jsd', beta=1.0), 'beta is 1.0'),
])
def test_impossible_objectives_are_refused(wrong, match):
  with pytest.raises(ValueError, match=match):
    objectives.Objective(**wrong)
