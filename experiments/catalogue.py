"""All experiments, in the order of the report; what an experiment needs stands before it. Add new ones here."""

from experiments import (
    base_to_chat,
    contrast_pca,
    cross_layer_cosines,
    data_tables,
    extraction,
    finetuned_text,
    finetuning,
    judged,
    knowledge,
    layer_sweep,
    multipliers,
    open_ended,
    system_prompts,
    token_similarities,
    vector_transfer,
    vector_words,
)
from experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    extraction.EXPERIMENT,
    contrast_pca.EXPERIMENT,
    layer_sweep.EXPERIMENT,
    multipliers.EXPERIMENT,
    open_ended.EXPERIMENT,
    judged.EXPERIMENT,
    system_prompts.EXPERIMENT,
    knowledge.MMLU,
    knowledge.TRUTHFUL_QA,
    token_similarities.EXPERIMENT,
    vector_words.EXPERIMENT,
    cross_layer_cosines.EXPERIMENT,
    vector_transfer.EXPERIMENT,
    base_to_chat.VECTORS,
    base_to_chat.COSINES,
    base_to_chat.TRANSFER,
    finetuning.EXPERIMENT,
    finetuned_text.EXPERIMENT,
    finetuned_text.JUDGED,
    data_tables.EXPERIMENT,
)
