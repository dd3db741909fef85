"""BERT in Hugging Face's names (Devlin et al. 2018, arXiv 1810.04805)."""

from lmjax.convert import encoders
from lmjax.convert.encoders import label_heads, layer_norm, linear
from lmjax.convert.family import Family, Field, Key

FAMILY = Family(
    model_type="bert",
    architectures={
        "BertForMaskedLM": dict(head="lm"), "BertForPreTraining": dict(head="pretraining"),
        "BertForNextSentencePrediction": dict(head="sentence"), "BertForSequenceClassification": dict(head="sequence"),
        "BertForTokenClassification": dict(head="token"), "BertForMultipleChoice": dict(head="choice"),
        "BertForQuestionAnswering": dict(head="span"), "BertModel": dict(head="none"),
        "SentenceTransformer": dict(head="pooled")},
    fixed=dict(encoders.FIXED, pooler="tanh", tie_embeddings=True),
    fields=(*encoders.FIELDS,
            Field("max_position_embeddings", "max_positions", 512),
            Field("hidden_act", "activation", "gelu", encoders.ACTIVATIONS)),
    required=dict(encoders.REQUIRED, tie_word_embeddings=True),
    ignored_fields=(*encoders.IGNORED_FIELDS, "directionality", "pooler_fc_size", "pooler_num_attention_heads",
                    "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    written=encoders.WRITTEN,
    unused=("rope_theta",),
    keys=(
        *encoders.bert_embeddings("bert.embeddings."),
        *encoders.bert_blocks("bert.encoder.layer."),
        *linear("bert.pooler.dense", "O", "D", *(
            f"{head}_head/pooler" for head in ("pretraining", "sentence", "sequence", "choice", "none"))),
        *linear("cls.predictions.transform.dense", "E", "D", "head_transform/dense"),
        *layer_norm("cls.predictions.transform.LayerNorm", "head_transform/norm", "E"),
        Key("cls.predictions.bias", "V", "head/bias", "V"),
        *linear("cls.seq_relationship", "2", "D", "pretraining_head/out", "sentence_head/out"),
        *label_heads(("sequence", "token", "choice")),
    ),
    prefix="bert.",
    # Released files hold the pooler and the head of sentence pairs whatever their config.json says they are for.
    ignored_keys=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
    tied=(("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
          ("cls.predictions.decoder.bias", "cls.predictions.bias")),
)
