"""DistilBERT in Hugging Face's names (Sanh et al. 2019, arXiv 1910.01108): BERT without token types and pooler."""

from lmjax.convert import encoders
from lmjax.convert.encoders import label_heads, layer_norm, linear
from lmjax.convert.family import Family, Field, Key

_BLOCK = "distilbert.transformer.layer.{layer}"

FAMILY = Family(
    model_type="distilbert",
    architectures={
        "DistilBertForMaskedLM": dict(head="lm", pooler="relu"),
        "DistilBertForSequenceClassification": dict(head="sequence", pooler="relu"),
        "DistilBertForTokenClassification": dict(head="token", pooler="relu"),
        "DistilBertForMultipleChoice": dict(head="choice", pooler="relu"),
        "DistilBertForQuestionAnswering": dict(head="span", pooler="relu"),
        "DistilBertModel": dict(head="none", pooler="none"), "SentenceTransformer": dict(head="pooled", pooler="relu")},
    fixed=dict(encoders.FIXED, token_types=0, norm_eps=1e-12),
    fields=(
        Field("n_layers", "num_layers"),
        Field("dim", "embed_dim"),
        Field("n_heads", "num_heads"),
        Field("hidden_dim", "mlp_dim"),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "max_positions", 512),
        Field("activation", "activation", "gelu", encoders.ACTIVATIONS),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("initializer_range", "init_std", 0.02),
    ),
    required=dict(encoders.REQUIRED, tie_weights_=True),
    # Dropout acts in training only; sinusoids are what the position table, which the file holds, once started as.
    ignored_fields=("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds",
                    "output_past"),
    written=dict(dropout=0.0, attention_dropout=0.0),
    unused=("rope_theta",),
    keys=(
        Key("distilbert.embeddings.word_embeddings.weight", "V,E", "embed/embedding", "VE"),
        Key("distilbert.embeddings.position_embeddings.weight", "P,E", "embed/position", "PE"),
        *layer_norm("distilbert.embeddings.LayerNorm", "embed/norm", "E"),
        *linear(f"{_BLOCK}.attention.q_lin", "NH", "D", "layers/attention/query"),
        *linear(f"{_BLOCK}.attention.k_lin", "NH", "D", "layers/attention/key"),
        *linear(f"{_BLOCK}.attention.v_lin", "NH", "D", "layers/attention/value"),
        *linear(f"{_BLOCK}.attention.out_lin", "D", "NH", "layers/attention/out"),
        *layer_norm(f"{_BLOCK}.sa_layer_norm", "layers/attention_norm"),
        *linear(f"{_BLOCK}.ffn.lin1", "F", "D", "layers/mlp/up"),
        *linear(f"{_BLOCK}.ffn.lin2", "D", "F", "layers/mlp/down"),
        *layer_norm(f"{_BLOCK}.output_layer_norm", "layers/mlp_norm"),
        *linear("vocab_transform", "E", "D", "head_transform/dense"),
        *layer_norm("vocab_layer_norm", "head_transform/norm", "E"),
        Key("vocab_projector.weight", "V,E", "head/kernel", "VE"),
        Key("vocab_projector.bias", "V", "head/bias", "V"),
        *linear("pre_classifier", "O", "D", "sequence_head/pooler", "choice_head/pooler"),
        *label_heads(("sequence", "token", "choice")),
    ),
    prefix="distilbert.",
    ignored_keys=(r"distilbert\.embeddings\.position_ids",),
    tied=(("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),),
)
