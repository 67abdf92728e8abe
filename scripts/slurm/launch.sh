# Sourced by the sbatch files beside it: runs scripts/SCRIPT.py with one process for each task of the job.
#
#     source launch.sh SCRIPT FLAGS...
#
# SCRIPT has --output_dir; on SIGUSR1 and SIGTERM it saves, leaves a file `requeue` in that folder and exits with status
# 0. Needs REPO, LOGS and ACCELERATE_CONFIG; everything else comes from SLURM.

set -eo pipefail
script=$1
shift
mkdir -p "$LOGS"

# Wrong flags end the job here, in one line, before a GPU is touched. Prints the folder, which may stand in the YAML.
output_dir=$(
  PYTHONPATH=$REPO/scripts python - "$script" "$@" <<'PYTHON'
import importlib, sys
from bge_accel.config import parse_config

script = importlib.import_module(sys.argv.pop(1))
sys.argv[0] = f"{script.__name__}.py"
print(parse_config(script.Config, refused=script.REFUSED).output_dir)
PYTHON
)

# srun itself starts every process. SLURM's signals reach the processes that srun starts, not their children, so under
# torchrun or `accelerate launch` the training would hear of nothing. Of the launcher only its reading of the YAML is
# wanted: the variables that it sets.
settings=$(
  accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines 1 --num_processes 1 --main_process_port 0 \
    --no_python env | grep -E '^(ACCELERATE|FSDP|PARALLELISM_CONFIG)_'
)
mapfile -t settings <<<"$settings"
export "${settings[@]}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# All processes meet at the first node, at a port that is free there: below those that Linux gives to outgoing connections,
# and drawn, since jobs of different clusters or users may share the node's network.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=${MASTER_PORT:-$(
  python - <<'PYTHON'
import random, socket

for port in random.sample(range(20000, 30000), 100):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:  # somebody has it
            continue
        print(port)
        break
PYTHON
)}
export MASTER_PORT

# What torchrun would tell each process. The warning is ignored until the script listens to it: there is nothing to save
# while Python starts.
task='
trap "" USR1
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
exec python "$@"'
# srun does not take the job's --cpus-per-task over in every version of SLURM.
status=0
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  --output="$LOGS/%x-%j-%t.log" --open-mode=append \
  bash -c "$task" task "$REPO/scripts/$script.py" "$@" || status=$?

# A dead node is SLURM's business: it kills this shell and requeues the job (--requeue). Other errors end it.
if ((status != 0)); then
  echo "$script.py failed with status $status: the first task named above broke. The last line of each process:"
  shopt -s nullglob
  for log in "$LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID"-*.log; do
    echo "$log: $(tail -c 4000 "$log" | tr '\r' '\n' | tail -n 1)"
  done
  exit "$status"
fi
# A job that was cancelled, or that SLURM requeues by itself, is no longer running.
if [[ -e $output_dir/requeue && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  echo "$script.py was stopped and has saved: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
