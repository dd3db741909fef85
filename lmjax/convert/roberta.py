"""RoBERTa in Hugging Face's names (Liu et al. 2019, arXiv 1907.11692).

Its position table begins with the rows up to that of padding, whose token is 1; position 0 is row 2.
"""

from lmjax.convert import encoders
from lmjax.convert.encoders import label_heads, layer_norm, linear
from lmjax.convert.family import Family, Field, Key

_OFFSET = 2

FAMILY = Family(
    model_type="roberta",
    architectures={
        "RobertaForMaskedLM": dict(head="lm"), "RobertaForSequenceClassification": dict(head="sequence"),
        "RobertaForTokenClassification": dict(head="token"), "RobertaForMultipleChoice": dict(head="choice"),
        "RobertaForQuestionAnswering": dict(head="span"), "RobertaModel": dict(head="none"),
        "SentenceTransformer": dict(head="pooled")},
    fixed=dict(encoders.FIXED, pooler="tanh", tie_embeddings=True, position_offset=_OFFSET),
    fields=(*encoders.FIELDS,
            Field("max_position_embeddings", "max_positions", 512,
                  read=lambda value, flat: value - _OFFSET if isinstance(value, int) else value,
                  write=lambda ours, cfg: ours and ours + _OFFSET),
            # The head of the language model has gelu whatever the blocks have.
            Field("hidden_act", "activation", "gelu", (("gelu", "gelu"),))),
    required=dict(encoders.REQUIRED, tie_word_embeddings=True, pad_token_id=_OFFSET - 1),
    ignored_fields=encoders.IGNORED_FIELDS,
    written=dict(encoders.WRITTEN, pad_token_id=_OFFSET - 1),
    unused=("rope_theta",),
    keys=(
        *encoders.bert_embeddings("roberta.embeddings."),
        *encoders.bert_blocks("roberta.encoder.layer."),
        *linear("roberta.pooler.dense", "O", "D", "choice_head/pooler", "none_head/pooler"),
        *linear("lm_head.dense", "E", "D", "head_transform/dense"),
        *layer_norm("lm_head.layer_norm", "head_transform/norm", "E"),
        Key("lm_head.bias", "V", "head/bias", "V"),
        *linear("classifier.dense", "O", "D", "sequence_head/pooler"),
        *linear("classifier.out_proj", "L", "D", "sequence_head/out"),
        *label_heads(("token", "choice")),
    ),
    prefix="roberta.",
    # Released files hold the pooler whatever their config.json says they are for.
    ignored_keys=(r"roberta\.embeddings\.position_ids", r"roberta\.pooler\..*"),
    tied=(("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
          ("lm_head.decoder.bias", "lm_head.bias")),
)
