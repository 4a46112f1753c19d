#!/bin/bash
# Checks gptlab on a GPU: bash tests/gpu/check.sh 1   (correctness, about 7 minutes)
#                         bash tests/gpu/check.sh 2   (speed, about 5 minutes)
# README.md in this directory explains the environment variables. A failed check does not stop the others.
set -u
PART=${1:-1}
HERE=$(dirname "$(readlink -f "$0")"); ROOT=$(dirname "$(dirname "$HERE")")
OUT=$(realpath -m "${OUT:-/tmp/gptlab-gpu/out}"); BASE=$(realpath -m "${WORK:-/tmp/gptlab-gpu/work}"); WORK=$BASE/part$PART
PY=${PY:-python3}; case $PY in */*) PY=$(realpath -s "$PY");; esac
JOBS=${JOBS:-8}; LIMIT=${LIMIT:-$([ "$PART" = 1 ] && echo 450 || echo 300)}   # seconds; checks that would exceed it are skipped
read -ra EXTRA <<<"${ARGS:-}"
NANOGPT=${NANOGPT:+$(realpath -m "$NANOGPT")}
STARTED=$SECONDS; TOKENS=$BASE/random_tokens
rm -rf "$WORK"; mkdir -p "$OUT" "$WORK"
SITE=
if [ -n "${WHEELS:-}" ]; then
  SITE=$(mktemp -d); trap 'rm -rf "$SITE"' EXIT
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl 2>&1 | tail -2
fi
export PYTHONPATH=${SITE:+$SITE:}$ROOT/src:$HERE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export GPTLAB_CACHE=${GPTLAB_CACHE:-$BASE/cache} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$BASE/inductor}

left() { echo $((LIMIT - SECONDS + STARTED)); }
at() { echo "---- $((SECONDS - STARTED)) s: $*"; }
chosen() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }
# go NAME SECONDS COMMAND...: runs a command in its own directory, with its output in log and its exit code in rc
go() {
  local name=$1 most=$2 room; shift 2
  chosen "$name" || return
  mkdir -p "$WORK/$name"; cd "$WORK/$name" || return
  room=$(left); [ "$room" -lt 15 ] && { echo skipped >rc; return; }
  [ "$most" -gt "$room" ] && most=$room
  timeout -k 5 "$most" "$@" >log 2>&1; echo $? >rc
}
many() { while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done; go "$@" & }   # JOBS at a time
t() { local name=$1; shift; many "$name" 150 "${TRAIN[@]}" "${SMALL[@]}" "$@" "${EXTRA[@]}"; }
show() { [ ! -e "$WORK/$1/log" ] || grep -E "$2" "$WORK/$1/log"; }

TRAIN=("$PY" -m gptlab.train)
SMALL=(train.max_steps=50 train.eval_every=25 train.eval_windows=64 train.log_every=1 callbacks.samples.max_new_tokens=20)
F32=(trainer.precision=32-true)
G=("${GPU:-trainer=gpu}")
MODERN=(model=gpt2_modern tokenizer=bytes model.n_layer=4 model.n_embd=256 model.n_head=2 model.block_size=256)
BENCH=(data=shards "data.path=$TOKENS" tokenizer=gpt2 trainer=gpu train.eval_windows=32 callbacks=none)

correctness() {
  at "first run on the CPU, which prepares the data"
  go cpu32 120 "${TRAIN[@]}" "${SMALL[@]}" trainer=cpu "${F32[@]}" train.compile=false "${EXTRA[@]}"
  at "checks in one process"
  go unit 130 "$PY" -W ignore "$HERE/unit_checks.py"; show unit '^(PASS|FAIL|INFO)'
  at "runs, $JOBS at a time"
  ( runs; wait )   # a subshell limits the scope of exports
  go sample 60 "$PY" -m gptlab.sample run="$(echo "$WORK"/gpu16/outputs/*/*)" max_new_tokens=64 report=true
  at "GPT-2 124M with its defaults, 32 x 1024"
  random_tokens gpt2
  go gpt2 150 "${TRAIN[@]}" "${BENCH[@]}" model=gpt2 train.max_steps=60 train.eval_every=60 train.global_batch_size=32
  at "benchmark of generation"
  go bench 60 "$PY" -m gptlab.bench suite=generate rounds=1; show bench tokens
}

runs() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TORCHINDUCTOR_COMPILE_THREADS=4
  t gpu32 "${G[@]}" "${F32[@]}" train.compile=false
  t gpu32c "${G[@]}" "${F32[@]}" train.compile=true
  t gpu16 "${G[@]}"
  t ddp trainer=ddp trainer.devices=1 "${F32[@]}"
  t fsdp trainer=fsdp trainer.devices=1 "${F32[@]}"
  t ddp16 trainer=ddp trainer.devices=1 trainer.precision=bf16-mixed train.compile=false train.micro_batch_size=4
  t fsdp16 trainer=fsdp trainer.devices=1 trainer.precision=bf16-mixed train.compile=false train.micro_batch_size=4
  t tf32 "${G[@]}" "${F32[@]}" trainer.float32_matmul=tf32 train.compile=false
  t offload trainer=fsdp trainer.devices=1 trainer.cpu_offload=true "${F32[@]}" train.compile=false
  t masked "${G[@]}" "${F32[@]}" data.documents=masked
  t maskedcpu trainer=cpu "${F32[@]}" data.documents=masked train.compile=false
  t modern "${G[@]}" "${MODERN[@]}" model.attention_window=64 model.value_embeddings=1 data.documents=masked train.global_batch_size=8
  t graphs "${G[@]}" "${F32[@]}" train.compile_mode=reduce-overhead
  t graphs3 "${G[@]}" "${F32[@]}" train.compile_mode=reduce-overhead train.micro_batch_size=4
  traces "" "${TRAIN[@]}"
  traces _d "${TRAIN[@]}" trainer.deterministic=true
  t muoncpu trainer=cpu "${F32[@]}" optimizer=muon optimizer.ns_dtype=float32 train.compile=false
  t muon "${G[@]}" "${F32[@]}" optimizer=muon optimizer.ns_dtype=float32 train.compile=false
  t muonfsdp trainer=fsdp trainer.devices=1 "${F32[@]}" optimizer=muon optimizer.ns_dtype=float32 train.compile=false
  t chunked "${G[@]}" "${F32[@]}" train.loss_chunk=100 train.compile=false
  t accumulated trainer=ddp trainer.devices=1 "${F32[@]}" train.micro_batch_size=4
  t modernfsdp trainer=fsdp trainer.devices=1 "${MODERN[@]}"
  t ema "${G[@]}" train.ema_decay=0.9 callbacks.checkpoint.asynchronous=true model.activation_checkpointing=true
  t maskedac trainer=ddp trainer.devices=1 data.documents=masked model.activation_checkpointing=true
  t maskeddrop "${G[@]}" data.documents=masked model.dropout=0.1
  t dropout "${G[@]}" model.dropout=0.1
  t oom "${G[@]}" model=gpt2 train.global_batch_size=4096 train.micro_batch_size=4096 train.compile=false
  t growing "${G[@]}" 'train.batch_schedule=[[10,6]]'
  many synced 120 "$PY" "$HERE/count_syncs.py" "${SMALL[@]}" "${G[@]}" train.max_steps=20 train.log_every=100 callbacks=none "${EXTRA[@]}"
}

# traces SUFFIX COMMAND...: a run, a repetition of it, and the same run killed after a checkpoint and resumed
traces() {
  local suffix=$1; shift
  local run=("$@" "${SMALL[@]}" "${G[@]}" train.max_steps=12 train.eval_every=6 "callbacks=[default,trace]" "${EXTRA[@]}")
  many "whole$suffix" 150 "${run[@]}"
  many "again$suffix" 150 "${run[@]}"
  many "half$suffix" 170 bash -c '! "$@" +callbacks.kill._target_=kill_at_step.KillAtStep +callbacks.kill.step=8 &&
    "$@" callbacks.kill=null resume="$(echo outputs/*/*)"' _ "${run[@]}"
}

# random_tokens NAME...: writes random tokens if one of these checks is selected
random_tokens() {
  local name
  for name in "$@"; do
    if chosen "$name"; then [ -e "$TOKENS/val.bin" ] || "$PY" "$HERE/random_tokens.py" "$TOKENS"; return; fi
  done
}

speed() {
  random_tokens nanogpt gpt2_best gpt2 speedrun
  at "ceilings"; go unit 40 "$PY" -W ignore "$HERE/unit_checks.py" ceilings; show unit '^(PASS|FAIL|INFO)'
  if [ -n "$NANOGPT" ]; then
    at "nanoGPT"
    mkdir -p "$WORK/nanogpt/data"; cp "$NANOGPT"/{model,train,configurator}.py "$WORK/nanogpt/"; ln -sfn "$TOKENS" "$WORK/nanogpt/data/synth"
    go nanogpt 90 "$PY" train.py --dataset=synth --batch_size=32 --gradient_accumulation_steps=1 --max_iters=60 --eval_iters=1 \
      --eval_interval=100000 --always_save_checkpoint=False --bias=True
  fi
  at "GPT-2 124M: padded vocabulary, no loss chunks"
  go gpt2_best 90 "${TRAIN[@]}" "${BENCH[@]}" model=gpt2 model.pad_vocab_to_multiple_of=64 train.loss_chunk=null train.max_steps=80 \
    train.eval_every=80 train.global_batch_size=32
  at "GPT-2 124M with its defaults"
  go gpt2 100 "${TRAIN[@]}" "${BENCH[@]}" model=gpt2 train.max_steps=60 train.eval_every=60 train.global_batch_size=32
  at "kernels"
  go profile 60 bash -c '"$@" none; "$@" 333' _ "$PY" -W ignore "$HERE/profile_step.py"; show profile .
  at "experiment=speedrun_gpu, 4 micro-batches of 32 x 1024 per step"
  go speedrun 100 "${TRAIN[@]}" experiment=speedrun_gpu data.path="$TOKENS" train.global_batch_size=128 train.max_steps=24 train.log_every=4 \
    train.eval_every=24 train.eval_windows=32 callbacks=none trainer.devices=1 model.pad_vocab_to_multiple_of=128
}

"$PY" - <<'P' 2>&1 | tail -4
import platform
import lightning
import torch

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print("INFO env: python", platform.python_version(), "torch", torch.__version__, "lightning", lightning.__version__, gpu)
P
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader 2>/dev/null | sed 's/^/INFO nvidia-smi: /'
if [ "$PART" = 1 ]; then correctness; else speed; fi
at "results"
read -ra NAMES <<<"${ONLY:-}"
"$PY" "$HERE/judge_runs.py" "$WORK" "$PART" "${NAMES[@]}" | tee "$OUT/judged-$PART.txt"
cd "$WORK" && tar czf "$OUT/logs-$PART.tgz" */log */rc $(ls -d */outputs/*/*/{metrics.csv,forecast.json,train.log} 2>/dev/null) 2>/dev/null
at "done"
