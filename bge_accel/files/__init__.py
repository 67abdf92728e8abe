"""Reading and writing files with care: small JSON and YAML within limits, files that appear whole or not at all, locks, faults
named by file and line, and text that is safe to show. Knows nothing of rows or models."""

DOOR = {
    "atomic": "atomic_file atomic_folder check_room DISK_FULL finish_move flush move_into remove_checkpoint write_folder".split(),
    "changes": "differences".split(),
    "faults": "BrokenFileError Faults is_broken_file".split(),
    "finding": "EXTENSIONS find_files".split(),
    "lock": "is_empty LOCK lock_output locked unlock_outputs".split(),
    "outputs": "check_folder check_output check_replaced_folder".split(),
    "parsing": "BOM decode_json is_inside load_json load_yaml parse_json read_front_matter UNREADABLE".split(),
    "parts": "open_work part_name read_part read_parts what_is_kept write_part".split(),
    "text": "first_line installed_version installed_versions near_path printable shorten shown_name shown_number shown_size text_table".split(),
}
"""The names that other rooms and scripts may use, by module."""
