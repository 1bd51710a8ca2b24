# Once more from the last checkpoint, unless it is done or would end in the same way.
if grep -qE '"status": "(failed|timeout)"' "$run_dir/status.json" && [ "$attempt" -lt {{max_restarts}} ]; then
    cp "$run_dir/status.json" "$run_dir/status.$attempt.json"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
