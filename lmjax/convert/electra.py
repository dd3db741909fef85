"""ELECTRA in Hugging Face's names (Clark et al. 2020, arXiv 2003.10555): a generator and a discriminator."""

from lmjax.convert import encoders
from lmjax.convert.encoders import label_heads, layer_norm, linear
from lmjax.convert.family import Family, Field, Key

FAMILY = Family(
    model_type="electra",
    architectures={
        "ElectraForPreTraining": dict(head="replaced", pooler="gelu"),
        "ElectraForMaskedLM": dict(head="lm", pooler="gelu"),
        "ElectraForSequenceClassification": dict(head="sequence", pooler="gelu"),
        "ElectraForTokenClassification": dict(head="token", pooler="gelu"),
        "ElectraForMultipleChoice": dict(head="choice", pooler="gelu"),
        "ElectraForQuestionAnswering": dict(head="span", pooler="gelu"),
        "ElectraModel": dict(head="none", pooler="none"), "SentenceTransformer": dict(head="pooled", pooler="gelu")},
    fixed=encoders.FIXED,
    fields=(*encoders.FIELDS,
            Field("embedding_size", "embedding_dim", 128),
            Field("max_position_embeddings", "max_positions", 512),
            Field("tie_word_embeddings", "tie_embeddings", True),
            # The heads of the generator and of sequences have gelu whatever the blocks have.
            Field("hidden_act", "activation", "gelu", (("gelu", "gelu"),))),
    required=dict(encoders.REQUIRED, summary_type="first", summary_use_proj=True, summary_activation="gelu"),
    ignored_fields=(*encoders.IGNORED_FIELDS, "summary_last_dropout"),
    written=dict(encoders.WRITTEN, summary_type="first", summary_use_proj=True, summary_activation="gelu"),
    unused=("rope_theta",),
    keys=(
        *encoders.bert_embeddings("electra.embeddings."),
        *linear("electra.embeddings_project", "D", "E", "embed/projection"),
        *encoders.bert_blocks("electra.encoder.layer."),
        *linear("generator_predictions.dense", "E", "D", "head_transform/dense"),
        *layer_norm("generator_predictions.LayerNorm", "head_transform/norm", "E"),
        Key("generator_lm_head.weight", "V,E", "head/kernel", "VE"),
        Key("generator_lm_head.bias", "V", "head/bias", "V"),
        *linear("discriminator_predictions.dense", "O", "D", "replaced_head/dense"),
        *linear("discriminator_predictions.dense_prediction", "1", "D", "replaced_head/out"),
        *linear("classifier.dense", "O", "D", "sequence_head/pooler"),
        *linear("classifier.out_proj", "L", "D", "sequence_head/out"),
        *linear("sequence_summary.summary", "O", "D", "choice_head/pooler"),
        *label_heads(("token", "choice")),
    ),
    prefix="electra.",
    ignored_keys=(r"electra\.embeddings\.position_ids",),
    tied=(("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),),
)
