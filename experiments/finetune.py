"""A trained model fine-tuned on labelled tasks: `finetune.py:TASK`, of any that lmjax/data/task_specs.py names.

    lmjax train --config=experiments/finetune.py:glue/mrpc --workdir=runs/mrpc \\
        --config.checkpoint.finetune_from=DIR --config.data.data_dir=/data/tfds
    lmjax train --config=experiments/finetune.py:stdlib/packages --workdir=runs/packages \\
        --config.checkpoint.finetune_from=runs/bert

DIR is the workdir of a run or a Hugging Face folder (or hf:OWNER/NAME): its model, without its head, its tokenizer and
its parameters are what training starts from. Several tasks, with commas between, get a head each. A decoder or an
encoder-decoder learns tasks of labels as text with `--config.objective.name=text_to_text --config.model.head=lm`.
Batch and schedule are those of BERT's fine-tuning (Devlin et al. 2018, arXiv 1810.04805, appendix A.3): 32 texts, three
epochs, Adam at 5e-5 with a linear decay, a tenth of it warmup here, dropout of 0.1.
Hardware: a model of 110 million parameters needs 1.8 GB and what a batch takes. How long it takes follows from the
task; what MiniLM (22.7 million parameters) reaches on stdlib/packages is in the README.
"""

from lmjax.config import base_config
from lmjax.data.task_specs import set_tasks


def get_config(tasks="stdlib/packages"):
  config = set_tasks(base_config(), tasks)
  config.model.dropout = 0.1
  config.data.update(seq_len=128)
  config.optim.update(learning_rate=5e-5, schedule="linear", warmup_epochs=0.3, final_learning_rate_ratio=0.0,
                      beta2=0.999, weight_decay=0.01)
  config.train.update(num_epochs=3.0, batch_size=32, sample_length=0)
  config.eval.update(every_epochs=1.0, num_batches=None)
  return config
