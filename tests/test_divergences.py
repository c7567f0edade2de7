"""Divergences against float64 closed forms, gradient identities, and forbidden tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax.losses import divergences

FUNCTIONS = {
    'forward_kl': divergences.forward_kl,
    'reverse_kl': divergences.reverse_kl,
    'jsd': divergences.jsd,
    'tvd': divergences.tvd,
    'acceptance_nll': divergences.acceptance_nll,
    'lk_hybrid': divergences.lk_hybrid,
}


def logits(seed, shape=(2, 3, 11), scale=2.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def probs(logits_btv):
  x = np.asarray(logits_btv, np.float64)
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def kl(p, q):
  return (p * (np.log(p) - np.log(q))).sum(-1)


def closed_form(name, q, p):
  if name == 'forward_kl':
    return kl(p, q)
  if name == 'reverse_kl':
    return kl(q, p)
  if name == 'jsd':
    return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)
  overlap = np.minimum(p, q).sum(-1)
  if name == 'tvd':
    return 1 - overlap
  if name == 'acceptance_nll':
    return -np.log(overlap)
  weight = np.exp(-3 * overlap.mean())
  return weight * kl(p, q) + (1 - weight) * (1 - overlap)


def gradient(function, student, teacher, **options):
  return jax.grad(lambda x: function(x, teacher, **options).sum())(student)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_closed_form_in_float64(name):
  student, teacher = logits(0), logits(1)
  expected = closed_form(name, probs(student), probs(teacher))
  actual = FUNCTIONS[name](student, teacher)
  assert actual.dtype == jnp.float32 and actual.shape == (2, 3)
  np.testing.assert_allclose(actual, expected, rtol=2e-5)


@pytest.mark.parametrize('beta', [0.1, 0.5, 0.9])
def test_jsd_with_beta_weighs_the_teacher(beta):
  student, teacher = logits(0), logits(1)
  q, p = probs(student), probs(teacher)
  mixture = beta * p + (1 - beta) * q
  expected = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
  np.testing.assert_allclose(divergences.jsd(student, teacher, beta=beta), expected, rtol=2e-5)


def test_jsd_is_symmetric_at_a_half_and_at_most_log_two():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(divergences.jsd(student, teacher),
                             divergences.jsd(teacher, student), rtol=1e-6)
  far = jnp.array([[[40., 0., 0.]]]), jnp.array([[[0., 40., 0.]]])
  np.testing.assert_allclose(divergences.jsd(*far), np.log(2), rtol=3e-6)  # of terms of 40
  assert np.all(divergences.jsd(logits(2, scale=50.), logits(3, scale=50.)) <= np.log(2) + 1e-6)


def test_jsd_tends_to_both_kls():
  """The meaning of beta differs between trainers: the teacher's weight, pinned here."""
  student, teacher = logits(0, scale=1.), logits(1, scale=1.)
  np.testing.assert_allclose(divergences.jsd(student, teacher, beta=1e-3) / 1e-3,
                             divergences.forward_kl(student, teacher), rtol=1e-2)
  np.testing.assert_allclose(divergences.jsd(student, teacher, beta=1 - 1e-3) / 1e-3,
                             divergences.reverse_kl(student, teacher), rtol=1e-2)


@pytest.mark.parametrize('beta', [0.0, 1.0, -0.1])
def test_jsd_refuses_weights_at_which_it_vanishes(beta):
  with pytest.raises(ValueError, match=f'beta is {beta}'):
    divergences.jsd(logits(0), logits(1), beta=beta)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_equal_models_have_no_divergence_and_no_gradient(name):
  student = logits(0)
  np.testing.assert_allclose(FUNCTIONS[name](student, student), 0, atol=1e-6)
  np.testing.assert_allclose(gradient(FUNCTIONS[name], student, student), 0, atol=1e-6)


def test_gradients_on_the_logits():
  """FKL: q - p. TVD: q (s - E_q s) / 2 with s = sign(q - p). -log alpha: TVD's over alpha."""
  student, teacher = logits(0), logits(1)
  q, p = probs(student), probs(teacher)
  np.testing.assert_allclose(gradient(divergences.forward_kl, student, teacher), q - p, atol=1e-6)
  log_ratio = np.log(q) - np.log(p)
  expected = q * (log_ratio - (q * log_ratio).sum(-1, keepdims=True))
  np.testing.assert_allclose(gradient(divergences.reverse_kl, student, teacher), expected,
                             atol=1e-5)
  sign = np.sign(q - p)
  expected = 0.5 * q * (sign - (q * sign).sum(-1, keepdims=True))
  np.testing.assert_allclose(gradient(divergences.tvd, student, teacher), expected, atol=1e-6)
  overlap = np.minimum(p, q).sum(-1, keepdims=True)
  np.testing.assert_allclose(gradient(divergences.acceptance_nll, student, teacher),
                             expected / overlap, atol=1e-5)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_no_gradient_reaches_the_teacher(name):
  student, teacher = logits(0), logits(1)
  grad = jax.grad(lambda x: FUNCTIONS[name](student, x).sum())(teacher)
  np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_half_precision_logits_are_computed_in_float32(name):
  """Divergences of bfloat16 logits were wrong in a public trainer until computed in float32."""
  student = logits(0, (2, 3, 512)).astype(jnp.bfloat16)
  teacher = logits(1, (2, 3, 512)).astype(jnp.bfloat16)
  actual = FUNCTIONS[name](student, teacher)
  assert actual.dtype == jnp.float32
  expected = closed_form(name, probs(student), probs(teacher))
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_token_forbidden_by_both_models_changes_nothing(name):
  student, teacher = logits(0), logits(1)
  def padded(x):
    return jnp.concatenate([x, jnp.full((2, 3, 2), -jnp.inf)], axis=-1)
  np.testing.assert_allclose(FUNCTIONS[name](padded(student), padded(teacher)),
                             FUNCTIONS[name](student, teacher), rtol=1e-5)
  grad = gradient(FUNCTIONS[name], padded(student), padded(teacher))
  np.testing.assert_allclose(grad[..., :-2], gradient(FUNCTIONS[name], student, teacher),
                             atol=1e-6)
  np.testing.assert_array_equal(grad[..., -2:], 0)


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('side', ['student', 'teacher', 'disjoint'])
def test_token_forbidden_by_one_model_is_never_nan(name, side):
  student, teacher = logits(0), logits(1)
  if side != 'teacher':
    student = student.at[..., :4].set(-jnp.inf)
  if side != 'student':
    teacher = teacher.at[..., 4 if side == 'disjoint' else 2:].set(-jnp.inf)
  value = FUNCTIONS[name](student, teacher)
  assert not np.any(np.isnan(value))
  q, p = probs(student), probs(teacher)
  infinite = {'forward_kl': np.any((p > 0) & (q == 0)), 'lk_hybrid': np.any((p > 0) & (q == 0)),
              'reverse_kl': np.any((q > 0) & (p == 0)), 'acceptance_nll': side == 'disjoint'}
  assert np.all(np.isposinf(value)) == infinite.get(name, False)
  assert np.all(np.isfinite(gradient(FUNCTIONS[name], student, teacher)))


def test_total_variation_is_one_minus_acceptance():
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(divergences.tvd(student, teacher),
                             1 - divergences.acceptance(student, teacher), atol=1e-6)


def test_lower_kl_is_not_higher_acceptance():
  """The example of the LK dossier: ten times the KL, and a better overlap."""
  teacher = jnp.log(jnp.array([[[0.50, 0.30, 0.15, 0.05]]]))
  first = jnp.log(jnp.array([[[0.42, 0.33, 0.18, 0.07]]]))
  second = jnp.log(jnp.array([[[0.52, 0.32, 0.159, 0.001]]]))
  np.testing.assert_allclose(divergences.forward_kl(first, teacher), 0.0144, atol=1e-4)
  np.testing.assert_allclose(divergences.forward_kl(second, teacher), 0.1479, atol=1e-4)
  np.testing.assert_allclose(divergences.acceptance(first, teacher), 0.920, atol=1e-4)
  np.testing.assert_allclose(divergences.acceptance(second, teacher), 0.951, atol=1e-4)


def test_acceptance_nll_of_a_point_mass_is_cross_entropy():
  student, labels = logits(0), jnp.array([[1, 2, 3], [4, 5, 6]])
  teacher = jnp.where(jax.nn.one_hot(labels, 11) > 0, 0., -jnp.inf)
  expected = divergences.cross_entropy(student, labels)
  np.testing.assert_allclose(divergences.acceptance_nll(student, teacher), expected, rtol=1e-6)
  np.testing.assert_allclose(divergences.forward_kl(student, teacher), expected, rtol=1e-6)
  chosen = np.take_along_axis(probs(student), np.array(labels)[..., None], -1)[..., 0]
  np.testing.assert_allclose(expected, -np.log(chosen), rtol=1e-5)


@pytest.mark.parametrize('gap', (20., 100., 150.))
def test_acceptance_nll_of_laws_far_apart(gap):
  """The overlap, exp(-gap), is the smallest float32 and less; loss and gradient are exact."""
  student, teacher = jnp.array([gap, 0.]), jnp.array([0., -jnp.inf])
  np.testing.assert_allclose(divergences.acceptance_nll(jnp.array([0., gap]), teacher), gap,
                             rtol=1e-6)
  np.testing.assert_allclose(gradient(divergences.acceptance_nll, jnp.array([0., gap]), teacher),
                             [-1., 1.], rtol=1e-6)
  np.testing.assert_allclose(divergences.acceptance_nll(student, teacher), np.exp(-gap), atol=1e-6)


def test_lk_hybrid_runs_from_kl_to_tvd_by_the_masked_acceptance():
  """One port averaged the two parts over different positions: the mask belongs to both."""
  student, teacher = logits(0), logits(1)
  np.testing.assert_allclose(divergences.lk_hybrid(student, teacher, eta=0.),
                             divergences.forward_kl(student, teacher), rtol=1e-6)
  np.testing.assert_allclose(divergences.lk_hybrid(student, teacher, eta=1e4),
                             divergences.tvd(student, teacher), rtol=1e-6)
  mask = jnp.array([[1., 1., 0.], [0., 0., 0.]])
  expected = divergences.lk_hybrid(student[:1, :2], teacher[:1, :2])
  np.testing.assert_allclose(
      divergences.lk_hybrid(student, teacher, mask_bt=mask)[:1, :2], expected, rtol=1e-6)


def test_vocabularies_must_agree():
  with pytest.raises(ValueError, match=r'\(2, 3, 11\).*\(2, 3, 12\).*one vocabulary'):
    divergences.forward_kl(logits(0), logits(1, (2, 3, 12)))
