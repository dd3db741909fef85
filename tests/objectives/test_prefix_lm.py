"""What a prefix is, which targets count, and what the model then sees, by gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import ModelConfig, UserError, base_config, from_config_dict, resolve_model
from lmjax.config_checks import check_objective
from lmjax.data.packing import Concat
from lmjax.models import blockwise, families
from lmjax.models.attention import AttentionSpec, dot_product_attention
from lmjax.models.transformer import init_params, make_model


def test_prefixes_have_all_lengths_and_targets_after_them_count(task):
  made = task("llama", seq_len=12, name="prefix_lm")
  lengths = []
  for number in range(640):
    row, example = made.row(number), made.texts[number % 64]
    real = int(example["weights"].sum())
    length = int(row["prefix"].sum())
    assert row["prefix"].tolist() == [1] * length + [0] * (12 - length)
    assert row["weights"].tolist() == [0] * (length - 1) + [1] * (real - length + 1) + [0] * (12 - real)
    assert np.array_equal(row["targets"], example["targets"]) and np.array_equal(row["inputs"], example["inputs"])
    lengths.append((length - 1) / (real - 1) if real > 1 else 0.5)
  assert np.mean(lengths) == pytest.approx(0.5, abs=0.04) and min(lengths) == 0 and max(lengths) == 1


def test_each_document_has_a_prefix_of_its_own(task, store):
  made = task("llama", seq_len=32, name="prefix_lm")
  packed = Concat(store((9, 4, 12, 60, 7, 3, 20, 1, 16)), 32, 256, document_mask=True)
  for number in range(len(packed)):
    example = packed[number]
    row = made.make(example, (0, number))
    for segment in range(1, example["segment_ids"].max() + 1):
      here = example["segment_ids"] == segment
      length, whole = int(row["prefix"][here].sum()), int(here.sum())
      assert length >= 1 and row["prefix"][here].tolist() == [1] * length + [0] * (whole - length)
      assert row["weights"][here].tolist() == [0] * (length - 1) + [1] * (whole - length + 1)
    assert not row["prefix"][example["segment_ids"] == 0].any()


# Rows are queries, columns keys: a prefix of three of six tokens, one of a single token, and two documents.
TABLES = {
    "three": (dict(), [1, 1, 1, 0, 0, 0], None, "111000 111000 111000 111100 111110 111111"),
    "one": (dict(), [1, 0, 0, 0, 0, 0], None, "100000 110000 111000 111100 111110 111111"),
    "all": (dict(), [1, 1, 1, 1, 1, 1], None, "111111 111111 111111 111111 111111 111111"),
    "documents": (dict(), [1, 1, 0, 1, 1, 0], [1, 1, 1, 2, 2, 2], "110000 110000 111000 000110 000110 000111"),
    "relative": (dict(position="relative"), [1, 1, 1, 0, 0, 0], None, "111000 111000 111000 111100 111110 111111"),
    "alibi": (dict(position="alibi"), [1, 1, 1, 0, 0, 0], None, "111000 111000 111000 111100 111110 111111")}


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("name", TABLES)
def test_logits_depend_on_exactly_what_may_be_seen(name, implementation, monkeypatch):
  """One layer, so that a token depends on what it sees and not on what that has seen."""
  monkeypatch.setattr(blockwise, "_BLOCK", 2)
  changes, prefix, segments, table = TABLES[name]
  model = make_model(ModelConfig(**{
      **dict(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, vocab_size=16,
             max_positions=8, position="rotary", attention_impl=implementation, init_std=0.1), **changes}))
  params = init_params(model, jax.random.key(0))
  params = jax.tree.map(lambda x: x.unbox(), params, is_leaf=lambda x: hasattr(x, "unbox"))
  tokens = jnp.array([[3, 5, 7, 2, 9, 4]])
  segment_ids = None if segments is None else jnp.array([segments])

  def of_embedding(rows_TD, query):
    """Each place has a token of its own, so that its row of the embedding is its place's."""
    table = params["embed"]["embedding"].at[tokens[0]].set(rows_TD)
    changed = {**params, "embed": {**params["embed"], "embedding": table}}
    x = model.apply({"params": changed}, tokens, None, segment_ids, prefix_BT=jnp.array([prefix]) > 0,
                    method="features")[0]
    return x[0, query].sum() + (x[0, query] ** 2).sum()

  rows_TD = params["embed"]["embedding"][tokens[0]]
  grads = jax.jit(jax.vmap(jax.grad(of_embedding), (None, 0)))(rows_TD, jnp.arange(6))
  assert " ".join("".join(str(int(x)) for x in row) for row in np.asarray(grads).any(-1)) == table


def test_a_kernel_without_prefixes_is_refused():
  config = base_config()
  config.model.update({**families.debug(families.llama()), "attention_impl": "cudnn"})
  config.train.num_steps, config.objective.name = 1, "prefix_lm"
  with pytest.raises(UserError, match="config.model.attention_impl is cudnn, which does not do prefixes; set it to au"):
    check_objective(resolve_model(from_config_dict(config), 256))


def test_both_implementations_have_the_same_gradients_where_rows_differ():
  """Rows long enough to be folded, a part of the heads after another, and cut into many blocks."""
  B, T, N, H = 3, 600, 6, 8
  q, k, v = (jax.random.normal(key, (B, T, N, H)) for key in jax.random.split(jax.random.key(0), 3))
  prefix = jnp.arange(T) < jnp.array([[1], [250], [600]])
  assert blockwise._rows_together(B * N, T) < B * N

  def grads(implementation):
    attend = lambda *x: dot_product_attention(*x, AttentionSpec(), prefix_BS=prefix, implementation=implementation)
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2)))(q, k, v)

  for one, other in zip(grads("xla"), grads("chunked")):
    np.testing.assert_allclose(one, other, atol=2e-5)
