"""One run of several processes: who does what, what is said while it works, the signals that stop it, and child processes."""

DOOR = {
    "children": "run_child".split(),
    "group": "from_first gather leave_processes Processes rank_and_world share_of SharedCounters".split(),
    "launch": "errors_of_any keep_own_gpu start_processes".split(),
    "progress": "progress say warn".split(),
    "signals": "interruptible StopSignals".split(),
}
"""The names that other rooms and scripts may use, by module."""
