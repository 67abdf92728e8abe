"""From embeddings to rankings and metrics: search, sets of queries and judgements, metrics, comparisons, TREC files, and the
evaluation of a model while it trains."""

DOOR = {
    "comparison": "choose_metric compare Difference difference_cells".split(),
    "in_training": "Best EncodingSettings EvaluationOptions Evaluations read_eval_sets retrieval_from_rows".split(),
    "retrieval": "choose_cutoffs evaluate_retrieval evaluate_run Evaluation EvaluationData ranking_rows".split(),
    "search": "build_index can_search_on_gpu check_index_factory FAISS_PACKAGES installed_faiss search".split(),
    "set_files": "files_of_beir".split(),
    "sets": "corpus_rows EvaluationData in_words query_rows read_evaluation_data".split(),
    "systems": "about_model result_of show_comparison show_system System system_names".split(),
    "tables": "moved_into_top side_by_side_table".split(),
    "trec": "judged_ids Rankings read_run run_lines".split(),
}
"""The names that other rooms and scripts may use, by module."""
