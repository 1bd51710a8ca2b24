"""What `scripts/gpu_check.sh` runs: everything about a GPU that this project's own CI cannot show."""
