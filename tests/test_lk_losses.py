"""LK losses and their competitors: closed forms in float64, over positions, parts and chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax.losses import blocks
from specdistill_jax.losses import chunked
from specdistill_jax.losses import divergences
from specdistill_jax.losses import figures
from specdistill_jax.losses import objectives
from specdistill_jax.losses import selection
from specdistill_jax.losses import toy

B, T, G, D, V = 2, 5, 3, 6, 13
IDS = np.array([0, 1, 3, 4, 6, 7, 8, 11])  # what a truncated draft can draft
# Of three positions; the second row is short, so that later positions run out first.
MASK = np.ones((B, T, G), np.float32)
for _g in range(G):
  MASK[1, 3 - _g:, _g] = 0
MASK[0, 0, :] = 0

NAMES = {
    'forward_kl': {}, 'reverse_kl': {}, 'jsd': dict(beta=0.3), 'tvd': {}, 'acceptance_nll': {},
    'lk_hybrid': {}, 'lk_hybrid fixed': dict(kl_weight=0.5), 'dspark': {},
    'lk_hybrid by token': dict(alpha_over='token'), 'end_to_end_tvd': {},
    'forward_kl adaptive': dict(position_weights='adaptive'),
    'acceptance_nll uniform': dict(position_weights='uniform', normalisation='token')}


def objective(name):
  return objectives.Objective(name.split()[0], **dict(normalisation='sequence', temperature=1.3)
                              | NAMES[name])


@functools.cache
def arrays():
  keys = jax.random.split(jax.random.key(0), 4)
  return dict(student_btgd=jax.random.normal(keys[0], (B, T, G, D)),
              teacher_btgd=jax.random.normal(keys[1], (B, T, G, D)),
              student_vd=jax.random.normal(keys[2], (V, D)),
              teacher_vd=jax.random.normal(keys[3], (V, D)))


def totals(chosen, a, mask, chunk=None, truncated=False, **options):
  """Of heads over all tokens, or of a student's over `IDS` alone."""
  head_vd = a['student_vd'][IDS] if truncated else a['student_vd']
  restrict = (lambda x: jnp.take(x, IDS, axis=-1)) if truncated else None
  return chunked.distillation(
      chosen, lambda x: x @ head_vd.T, a['student_btgd'], lambda x: x @ a['teacher_vd'].T,
      a['teacher_btgd'], jnp.asarray(mask), chunk=chunk, restrict=restrict, **options)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def figures_of(chosen, a, mask, chunk, truncated):
  loss = lambda a: (lambda t: (t.loss, t))(totals(chosen, a, mask, chunk, truncated))
  return jax.grad(loss, has_aux=True)(a)[::-1]


def assert_all(compare, found, expected):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    compare(x, y)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def closed_form(name, truncated=False):
  """Loss, overlaps, and the loss's gradient on the student's logits, in float64."""
  chosen, a = objective(name), {k: np.asarray(x, np.float64) for k, x in arrays().items()}
  scale = 1 / chosen.temperature
  q = softmax(a['student_btgd'] @ a['student_vd'][IDS if truncated else ...].T * scale)
  p = softmax(a['teacher_btgd'] @ a['teacher_vd'].T * scale)
  if truncated:
    p = p[..., IDS]
  renormalised = p / p.sum(-1, keepdims=True)
  overlap = np.minimum(p, q).sum(-1)
  through = lambda on_q: q * (on_q - (q * on_q).sum(-1, keepdims=True))  # the softmax's Jacobian
  kl = (renormalised * np.log(renormalised / q)).sum(-1)
  on_kl, on_tvd = q - renormalised, through(0.5 * np.sign(q - p))
  count = MASK.sum((0, 1))
  alpha_g = (overlap * MASK).sum((0, 1)) / count
  weight = 0.8 ** np.arange(G)
  kind = name.split()[0]
  if kind == 'forward_kl':
    loss, grad = kl, on_kl
  elif kind == 'reverse_kl':
    log_ratio = np.log(q / renormalised)
    loss, grad = (q * log_ratio).sum(-1), through(log_ratio)
  elif kind == 'jsd':
    m = 0.3 * renormalised + 0.7 * q
    loss = (0.3 * renormalised * np.log(renormalised / m) + 0.7 * q * np.log(q / m)).sum(-1)
    grad = through(0.7 * np.log(q / m))
  elif kind == 'tvd':
    loss, grad = 1 - overlap, on_tvd
  elif kind == 'acceptance_nll':
    loss, grad = -np.log(overlap), on_tvd / overlap[..., None]
  elif kind == 'dspark':
    loss, grad = 0.1 * kl + 1.8 * (1 - overlap), 0.1 * on_kl + 1.8 * on_tvd
  elif kind == 'lk_hybrid':
    mixed = {'lk_hybrid': np.exp(-3 * alpha_g), 'lk_hybrid fixed': np.full(G, 0.5),
             'lk_hybrid by token': np.exp(-3 * overlap)}[name]
    loss = mixed * kl + (1 - mixed) * (1 - overlap)
    mixed = np.broadcast_to(mixed, loss.shape)[..., None]
    grad = mixed * on_kl + (1 - mixed) * on_tvd
  elif kind == 'end_to_end_tvd':
    passed = np.where(MASK > 0, overlap, 1).cumprod(-1)
    loss, weight = 1 - passed, np.ones(G)
    # How much all later positions lose with this one's overlap.
    share = np.stack([(passed * MASK)[..., n:].sum(-1) for n in range(G)], -1) / overlap
    grad = share[..., None] * on_tvd
  if chosen.position_weights == 'uniform':
    weight = np.ones(G)
  if chosen.position_weights == 'adaptive':
    passed = np.where(MASK > 0, (overlap + 1) / 2, 1).cumprod(-1) * MASK
    weight = np.stack([passed[..., n:].sum(-1) for n in range(G)], -1)
  counted = MASK * weight
  tokens = MASK[:, :, 0].sum(1)
  by = tokens[:, None, None] * B if chosen.normalisation == 'sequence' else tokens.sum()
  return ((loss * counted / by).sum(), alpha_g,
          grad * (MASK * (1 if kind == 'end_to_end_tvd' else weight) / by)[..., None] * scale)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('truncated', [False, True])
def test_values_and_gradients_are_the_closed_forms(name, truncated):
  """In the direct and the chunked form; a truncated vocabulary in the chunked one."""
  value, alpha_g, on_logits = closed_form(name, truncated)
  a = {k: np.asarray(x, np.float64) for k, x in arrays().items()}
  head_vd = a['student_vd'][IDS if truncated else ...]
  on_head = np.einsum('btgv,btgd->vd', on_logits, a['student_btgd'])
  for chunk in (2 * G,) if truncated else (None, 2 * G):
    found, grads = figures_of(objective(name), arrays(), MASK, chunk, truncated)
    np.testing.assert_allclose(found.loss, value, rtol=1e-5)
    np.testing.assert_allclose(found.alpha_g, alpha_g, rtol=1e-5)
    np.testing.assert_allclose(grads['student_btgd'], on_logits @ head_vd, atol=1e-6)
    np.testing.assert_allclose(grads['student_vd'][IDS if truncated else ...], on_head, atol=2e-6)
    np.testing.assert_array_equal(grads['teacher_vd'], 0)
    np.testing.assert_array_equal(grads['teacher_btgd'], 0)
  assert np.abs(on_head).max() > 1e-2


@pytest.mark.parametrize('name', NAMES)
def test_masked_tokens_change_nothing_whatever_they_hold(name):
  hole = lambda x: jnp.where(MASK[..., None] > 0, x, jnp.nan)
  holed = arrays() | {k: hole(arrays()[k]) for k in ('student_btgd', 'teacher_btgd')}
  for chunk in (None, 2 * G):
    found, expected = (figures_of(objective(name), a, MASK, chunk, False)
                       for a in (holed, arrays()))
    assert_all(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize('name', NAMES)
def test_equal_models_accept_everything_and_have_nothing_to_learn(name):
  a = arrays() | dict(teacher_btgd=arrays()['student_btgd'], teacher_vd=arrays()['student_vd'])
  # An L1 distance operation by operation: where both models round alike it has no gradient, fused
  # differently the sign of their rounding.
  with jax.disable_jit(not name.startswith(('forward_kl', 'reverse_kl', 'jsd'))):
    found, grads = figures_of(objective(name), a, MASK, 2 * G, False)
  np.testing.assert_allclose(found.loss, 0, atol=1e-5)
  np.testing.assert_allclose(found.alpha_g, 1, atol=1e-5)
  np.testing.assert_allclose(grads['student_vd'], 0, atol=2e-6)


def test_a_point_mass_teacher_gives_the_label_s_negative_log_likelihood():
  a = arrays() | dict(teacher_btgd=300 * arrays()['teacher_btgd'])
  labels = np.argmax(a['teacher_btgd'] @ a['teacher_vd'].T, axis=-1)
  expected = chunked.supervised(
      objectives.Objective(), lambda x: x @ a['student_vd'].T / 1.3, a['student_btgd'],
      jnp.asarray(labels), jnp.asarray(MASK)).loss
  by_name = {name: figures_of(objective(name), a, MASK, None, False)[0]
             for name in ('acceptance_nll uniform', 'forward_kl')}
  chosen = objectives.Objective('acceptance_nll', temperature=1.3, position_weights='uniform')
  np.testing.assert_allclose(totals(chosen, a, MASK).loss, expected, rtol=1e-5)
  assert by_name['acceptance_nll uniform'].loss > 1  # the teacher is not the student


def test_eta_leads_from_kl_to_tvd_at_each_position():
  of = lambda name, **fields: totals(objectives.Objective(name, **fields), arrays(), MASK).loss
  np.testing.assert_allclose(of('lk_hybrid', eta=0.0), of('forward_kl'), rtol=1e-6)
  np.testing.assert_allclose(of('lk_hybrid', eta=1e4), of('tvd'), rtol=1e-6)
  np.testing.assert_allclose(of('lk_hybrid', kl_weight=1.0), of('forward_kl'), rtol=1e-6)
  # A position of its own acceptance rate has its own weight.
  alpha_g = jnp.array([0.9, 0.5, 0.1])
  weights = objectives.Objective('lk_hybrid').mixture(alpha_g)
  np.testing.assert_allclose(weights, np.exp(-3 * np.asarray(alpha_g)), rtol=1e-6)


def test_parts_add_up_to_the_whole_given_its_alpha():
  """Micro-batches: loss and alpha by position, with the weights of the whole batch."""
  chosen = objective('lk_hybrid')
  whole = totals(chosen, arrays(), MASK)
  row = lambda i: arrays() | {k: arrays()[k][i:i + 1] for k in ('student_btgd', 'teacher_btgd')}
  for chunk in (None, G):
    parts = [totals(chosen, row(i), MASK[i:i + 1], chunk, alpha=whole.alpha_g) for i in range(B)]
    added = jax.tree.map(lambda *xs: sum(xs), *parts)
    assert_all(functools.partial(np.testing.assert_allclose, rtol=1e-5), added, whole)
  assert abs(totals(chosen, row(0), MASK[:1]).loss - parts[0].loss) > 1e-4


def rows_of_one_law():
  """A standalone draft's arrays: rows of seven tokens, of which some are a prompt or missing."""
  keys = jax.random.split(jax.random.key(1), 2)
  mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], np.float32)
  return arrays() | dict(student_btgd=jax.random.normal(keys[0], (B, 7, D)),
                         teacher_btgd=jax.random.normal(keys[1], (B, 7, D))), mask


def test_a_standalone_draft_is_taken_in_blocks():
  """Uniform blocks change nothing; end to end, a token pays for all behind it in its block."""
  a, mask = rows_of_one_law()
  of = lambda name, chunk=None, **fields: totals(
      objectives.Objective(name, normalisation='token', **fields), a, mask, chunk)
  for chunk in (None, 3):
    np.testing.assert_allclose(
        of('tvd', chunk, block=3, position_weights='uniform').loss, of('tvd').loss, rtol=1e-6)
    np.testing.assert_allclose(of('tvd', chunk, block=3).alpha, of('tvd').alpha, rtol=1e-6)
  student, teacher = (softmax(np.asarray(a[f'{x}_btgd'] @ a[f'{x}_vd'].T, np.float64))
                      for x in ('student', 'teacher'))
  overlap = np.minimum(student, teacher).sum(-1)
  o = overlap[0]
  lost = [1 - o[2], 1 - o[3], 1 - o[3] * o[4], 1 - o[3] * o[4] * o[5], 1 - o[6]]
  o = overlap[1]
  lost += [1 - o[0], 1 - o[0] * o[1], 1 - o[0] * o[1] * o[2], 1 - o[3]]
  for chunk in (None, 3):
    np.testing.assert_allclose(of('end_to_end_tvd', chunk, block=3).loss, np.mean(lost), rtol=1e-5)


def test_selection_keeps_what_a_reference_has_learnt_and_the_student_has_not():
  """Of each row and position the largest excess of the student's KL over the reference's."""
  a = arrays()
  reference_btgd = a['student_btgd'] + 0.5 * a['teacher_btgd']
  head = lambda x: x @ a['student_vd'].T
  select = functools.partial(
      selection.selected, head, a['student_btgd'], head, reference_btgd,
      lambda x: x @ a['teacher_vd'].T, a['teacher_btgd'], jnp.asarray(MASK), keep=0.4)
  q, r, p = (softmax(np.asarray(x, np.float64)) for x in (
      head(a['student_btgd']), head(reference_btgd), a['teacher_btgd'] @ a['teacher_vd'].T))
  excess = (p * np.log(r / q)).sum(-1)
  for chunk in (None, G):
    kept = np.asarray(select(chunk=chunk))
    for b in range(B):
      for g in range(G):
        there = np.flatnonzero(MASK[b, :, g])
        number = int(np.ceil(0.4 * len(there)))
        best = there[np.argsort(-excess[b, there, g])[:number]]
        np.testing.assert_array_equal(np.flatnonzero(kept[b, :, g]), np.sort(best))


@pytest.mark.parametrize('truncated', [False, True])
def test_figures_by_position(truncated):
  a = arrays()
  restrict = (lambda x: jnp.take(x, IDS, axis=-1)) if truncated else None
  head_vd = a['student_vd'][IDS] if truncated else a['student_vd']
  found = figures.measured(
      lambda x: x @ head_vd.T, a['student_btgd'], lambda x: x @ a['teacher_vd'].T,
      a['teacher_btgd'], jnp.asarray(MASK), chunk=2 * G, restrict=restrict).means()
  q = softmax(np.asarray(a['student_btgd'] @ head_vd.T, np.float64))
  whole = softmax(np.asarray(a['teacher_btgd'] @ a['teacher_vd'].T, np.float64))
  p = whole[..., IDS] if truncated else whole
  mean = lambda x: (x * MASK).sum((0, 1)) / MASK.sum((0, 1))
  renormalised = p / p.sum(-1, keepdims=True)
  entropy = lambda x: -(x * np.log(x)).sum(-1)
  ids = IDS if truncated else np.arange(V)
  expected = dict(
      count=MASK.sum((0, 1)), alpha=mean(np.minimum(p, q).sum(-1)),
      agreement=mean(ids[q.argmax(-1)] == whole.argmax(-1)),
      kl=mean((renormalised * np.log(renormalised / q)).sum(-1)),
      tvd=mean(1 - np.minimum(p, q).sum(-1)), student_entropy=mean(entropy(q)),
      teacher_entropy=mean(entropy(whole)))
  for name, value in expected.items():
    np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, err_msg=name)


def test_simulated_block_efficiency():
  found = blocks.simulated_block_efficiency(jnp.array([0.8, 0.5, 0.1]))
  np.testing.assert_allclose(found, 1 + 0.8 + 0.4 + 0.04, rtol=1e-6)


@pytest.mark.parametrize('wrong, match', [
    (dict(eta=-1.0), 'eta is -1.0'), (dict(kl_weight=1.5), 'kl_weight is 1.5'),
    (dict(alpha_over='chunk'), "'chunk'.*batch, previous or token"), (dict(block=0), 'block is 0'),
    (dict(position_weights='d_pace'), "'d_pace'.*uniform, decay or adaptive"),
    (dict(keep=0.0), 'keep is 0.0'), (dict(decay=1.2), 'decay is 1.2')])
def test_impossible_settings_are_refused(wrong, match):
  with pytest.raises(ValueError, match=match):
    objectives.Objective('lk_hybrid', **wrong)


@pytest.mark.parametrize('name, mean, width, overlap', [
    ('forward_kl', -0.50, 4.17, 0.502), ('reverse_kl', -3.95, 1.10, 0.507),
    ('tvd', -2.95, 2.05, 0.602)])
def test_one_gaussian_on_three_modes(name, mean, width, overlap):
  """The paper's toy: neither KL stops where most is accepted."""
  found = toy.fit(getattr(divergences, name))
  np.testing.assert_allclose(found[0], mean, atol=0.03)
  np.testing.assert_allclose(found[1], width, atol=0.03)
  np.testing.assert_allclose(found[2], overlap, atol=1e-3)
