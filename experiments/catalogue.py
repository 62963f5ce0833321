"""All experiments, in the order of the report; what an experiment needs stands before it. Add new ones here."""

from experiments.own import compare_methods, does_reliability_predict, vector_words
from experiments.paper import (
    figure_2_contrast_pca,
    figure_3_layer_sweep,
    figure_4_multipliers,
    figure_5_judged,
    figure_5_open_ended,
    figure_6_token_similarities,
    figure_7_cross_layer_cosines,
    figure_8_vector_transfer,
    figures_9_10_base_to_chat,
    layer_choice,
    section_3_vectors,
    table_3_system_prompts,
    table_14_data_tables,
    tables_4_10_13_finetuned_text,
    tables_4_10_13_finetuning,
    tables_5_12_knowledge,
)
from experiments.running.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    section_3_vectors.EXPERIMENT,
    figure_2_contrast_pca.EXPERIMENT,
    layer_choice.EXPERIMENT,
    figure_3_layer_sweep.EXPERIMENT,
    figure_4_multipliers.EXPERIMENT,
    figure_5_open_ended.EXPERIMENT,
    figure_5_judged.EXPERIMENT,
    table_3_system_prompts.EXPERIMENT,
    tables_5_12_knowledge.MMLU,
    tables_5_12_knowledge.TRUTHFUL_QA,
    figure_6_token_similarities.EXPERIMENT,
    vector_words.EXPERIMENT,
    figure_7_cross_layer_cosines.EXPERIMENT,
    figure_8_vector_transfer.EXPERIMENT,
    figures_9_10_base_to_chat.VECTORS,
    figures_9_10_base_to_chat.COSINES,
    figures_9_10_base_to_chat.TRANSFER,
    tables_4_10_13_finetuning.EXPERIMENT,
    tables_4_10_13_finetuned_text.EXPERIMENT,
    tables_4_10_13_finetuned_text.JUDGED,
    table_14_data_tables.EXPERIMENT,
    compare_methods.EXPERIMENT,
    does_reliability_predict.EXPERIMENT,
)
