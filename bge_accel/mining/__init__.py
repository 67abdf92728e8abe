"""From rankings to hard negatives: the pool of candidates, what is chosen of it, and the rows that are written."""

DOOR = {
    "choice": "Choice choose_negatives DROPS Mined parse_range QueryGroups rank_targets Ranking Target".split(),
    "histogram": "plot_histogram text_histogram".split(),
    "pool": "normalise_text read_pool_texts text_key TextPool write_pool".split(),
    "rows": "new_row rounded".split(),
}
"""The names that other rooms and scripts may use, by module."""
