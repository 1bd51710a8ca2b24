#!/usr/bin/env bash
# Trains the same small GPT twice on this machine's CPU, through Megatron's own training loop:
#   4 ranks with megatron_loong (head parallel 2 x ring 2), then 1 rank with Megatron's attention,
# and shows that the losses are the same. scripts/demo.sh [STEPS, default 80]; results in runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

steps=${1:-80}
out=runs/demo
make_env 3.12
python="$env_dir/.venv-3.12/bin/python"
mkdir -p "$out"
"$python" -W ignore scripts/demo_data.py "$out/text"

training=(
    # the model: RoPE, grouped-query attention (8 query heads, 4 KV heads)
    --num-layers 4 --hidden-size 128 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights
    # the data
    --data-path "$out/text" --data-cache-path "$out/cache" --split "100,0,0" --num-workers 0
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1
    --seq-length 512 --max-position-embeddings 512 --no-create-attention-mask-in-dataloader
    # the optimizer
    --micro-batch-size 2 --global-batch-size 8 --train-iters "$steps" --lr 2e-3 --min-lr 2e-4
    --lr-decay-style cosine --lr-warmup-iters 5 --clip-grad 1.0 --weight-decay 0.01 --seed 1234
    --attention-dropout 0 --hidden-dropout 0
    # a line of log per step, nothing else
    --log-interval 1 --eval-iters 0 --eval-interval 1000000 --distributed-timeout-minutes 3
)

# train NAME RANKS THREADS ARGUMENTS...: one run, its log in $out/NAME.log.
train() {
    local name=$1 ranks=$2 threads=$3
    shift 3
    OMP_NUM_THREADS=$threads "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
        -m megatron_loong --cpu scripts/pretrain_gpt.py "${training[@]}" "$@" 2>&1 |
        "$python" scripts/demo_report.py watch --log "$out/$name.log"
}

say "1 of 2: 4 ranks share each sequence, megatron_loong with head parallel 2 x ring 2"
train loong 4 1 --context-parallel-size 4 --context-parallel-impl loong --loong-head-parallel-size 2
say "2 of 2: 1 rank, Megatron's own attention"
train native 1 "$(nproc)"
say "Do they agree?"
"$python" scripts/demo_report.py compare "$out/loong.log" "$out/native.log" --picture "$out/loss.png"
