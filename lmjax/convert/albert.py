"""ALBERT in Hugging Face's names (Lan et al. 2019, arXiv 1909.11942): one block for all layers, narrow embeddings."""

from lmjax.convert import encoders
from lmjax.convert.encoders import label_heads, layer_norm, linear
from lmjax.convert.family import Family, Field, Key

_BLOCK = "albert.encoder.albert_layer_groups.0.albert_layers.0"

FAMILY = Family(
    model_type="albert",
    architectures={
        "AlbertForMaskedLM": dict(head="lm"), "AlbertForPreTraining": dict(head="pretraining"),
        "AlbertForSequenceClassification": dict(head="sequence"), "AlbertForTokenClassification": dict(head="token"),
        "AlbertForMultipleChoice": dict(head="choice"), "AlbertForQuestionAnswering": dict(head="span"),
        "AlbertModel": dict(head="none"), "SentenceTransformer": dict(head="pooled")},
    fixed=dict(encoders.FIXED, share_layers=True, pooler="tanh", tie_embeddings=True),
    fields=(*encoders.FIELDS,
            Field("embedding_size", "embedding_dim", 128),
            Field("max_position_embeddings", "max_positions", 512),
            Field("hidden_act", "activation", "gelu_new", encoders.ACTIVATIONS)),
    # Several groups of layers, or several layers in a group, would not all share their parameters.
    required=dict(encoders.REQUIRED, tie_word_embeddings=True, num_hidden_groups=1, inner_group_num=1,
                  down_scale_factor=1),
    ignored_fields=(*encoders.IGNORED_FIELDS, "classifier_dropout_prob"),
    written=dict(encoders.WRITTEN, num_hidden_groups=1, inner_group_num=1),
    unused=("rope_theta",),
    keys=(
        *encoders.bert_embeddings("albert.embeddings."),
        *linear("albert.encoder.embedding_hidden_mapping_in", "D", "E", "embed/projection"),
        *linear(f"{_BLOCK}.attention.query", "NH", "D", "layers/attention/query"),
        *linear(f"{_BLOCK}.attention.key", "NH", "D", "layers/attention/key"),
        *linear(f"{_BLOCK}.attention.value", "NH", "D", "layers/attention/value"),
        *linear(f"{_BLOCK}.attention.dense", "D", "NH", "layers/attention/out"),
        *layer_norm(f"{_BLOCK}.attention.LayerNorm", "layers/attention_norm"),
        *linear(f"{_BLOCK}.ffn", "F", "D", "layers/mlp/up"),
        *linear(f"{_BLOCK}.ffn_output", "D", "F", "layers/mlp/down"),
        *layer_norm(f"{_BLOCK}.full_layer_layer_norm", "layers/mlp_norm"),
        *linear("albert.pooler", "O", "D", *(
            f"{head}_head/pooler" for head in ("pretraining", "sequence", "choice", "none"))),
        *linear("predictions.dense", "E", "D", "head_transform/dense"),
        *layer_norm("predictions.LayerNorm", "head_transform/norm", "E"),
        Key("predictions.bias", "V", "head/bias", "V"),
        *linear("sop_classifier.classifier", "2", "D", "pretraining_head/out"),
        *label_heads(("sequence", "token", "choice")),
    ),
    prefix="albert.",
    # Released files hold the pooler and the head of sentence pairs whatever their config.json says they are for.
    ignored_keys=(r"albert\.embeddings\.position_ids", r"albert\.pooler\..*", r"sop_classifier\..*"),
    tied=(("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
          ("predictions.decoder.bias", "predictions.bias")),
)
