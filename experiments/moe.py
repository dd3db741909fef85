"""A small mixture of experts on Python's own source: quickstart.py with eight experts in place of each MLP.

    lmjax train --config=experiments/moe.py --workdir=runs/moe
"""

from lmjax.config import base_config
from lmjax.models import families


def get_config():
  config = base_config()
  config.model.update(families.llama_style(), num_layers=4, embed_dim=128, num_heads=2, scan_layers=False,
                      qk_norm="head", init_std=0.05, num_experts=8, experts_per_token=2, expert_dim=176)
  config.data.update(tokenizer="bpe", tokenizer_vocab_size=4096, seq_len=256)
  config.objective.update(router_balance=0.01, router_z_loss=1e-3)
  config.optim.update(name="muon", learning_rate=1.5e-2, schedule="linear", warmup_steps=20,
                      final_learning_rate_ratio=0.02, weight_decay=0.05)
  config.train.update(num_steps=700, batch_size=8)
  config.eval.update(every_steps=250, num_batches=16)
  config.checkpoint.update(every_steps=250)
  return config
