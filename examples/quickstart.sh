#!/usr/bin/env bash
# From nothing to a model that draws and captions, and a report about it; `make demo` runs this.
#
# Knobs (environment):
#   OUT=runs/demo     run folder: checkpoints, pictures, report (FULL=1: runs/demo-full; SMOKE=1: -smoke behind it)
#   DATA=data/demo    where the pairs are kept, named likewise
#   SEED=0            same seed, same machine: same report, but for the seconds
#   CHOICE_SEED=0     which concepts are taken, and which pairs are held out
#   FULL=1            all emoji in eight styles and composed scenes instead of 120 concepts in six: hours instead of minutes
#   SMOKE=1           two to four minutes in all: few pairs, few steps; shows that it works, not that it learns
#   WORKERS=2         processes that train together; without it one per core up to 4, and one where there is a GPU
#   VILG=vilg         the command to run
#   PYTHON=python3    the interpreter that it belongs to
set -euo pipefail
cd "$(dirname "$0")/.."

name=demo
[[ "${FULL:-0}" == 1 ]] && name=demo-full
# Folders of its own: the real demo would be refused its few pairs and its short run.
folder="$name"
[[ "${SMOKE:-0}" == 1 ]] && folder="$name-smoke"
OUT="${OUT:-runs/$folder}"
DATA="${DATA:-data/$folder}"
SEED="${SEED:-0}"
CHOICE_SEED="${CHOICE_SEED:-0}"
VILG="${VILG:-vilg}"
PYTHON="${PYTHON:-python3}"

has_gpu=0
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=1; fi
if [[ -z "${WORKERS:-}" ]]; then
  WORKERS=1
  cores="$(nproc 2>/dev/null || echo 1)"
  ((has_gpu)) || WORKERS=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
fi

# Waiting threads that spin steal the time of everything else on a machine with few cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
launch=($VILG)
if ((WORKERS > 1)); then
  # A process per core, of one thread each: the image tokenizer gets through half more pictures than with one process of
  # as many threads, the model through as many pairs.
  # torchrun, but for Ctrl-C, which is the processes' to handle: they save.
  # The number of threads is what torchrun takes by itself, with six lines of warning.
  launch=(
    env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}"
    "$PYTHON" -m megatron_vilg.parallel.agent --standalone --nproc-per-node "$WORKERS" -m megatron_vilg
  )
fi

data_options=(--choice-seed "$CHOICE_SEED")
train_options=("train.seed=$SEED" "image_tokenizer_train.seed=$SEED")
((WORKERS > 1)) && train_options+=(
  "parallel.replica=$WORKERS" parallel.zero=1 # a small model is quickest whole on each process, all the time
)
# Four drawings of each prompt, as the picture shows: one of 58 prompts leaves a share uncertain by more.
measure_options=(--samples-per-prompt 4)
reranker_options=("reranker.seed=$SEED")
restyler_options=("restyler.seed=$SEED")
if [[ "${SMOKE:-0}" == 1 ]]; then
  data_options+=(--concepts 12 --held-out-concepts 2)
  train_options+=(
    image_tokenizer_train.num_steps=30 image_tokenizer_train.warmup_steps=3
    train.num_steps=30 optim.warmup_steps=3 train.eval_every=15 train.sample_every=15 data.num_views=1
  )
  measure_options+=(sample.rerank=2 sample.caption_candidates=2)
  reranker_options+=(reranker.num_steps=10)
  restyler_options+=(restyler.num_steps=10)
fi

if [[ "${FULL:-0}" == 1 ]]; then
  data_options+=(--concepts 0 --scenes 4000 --styles all)
  if ((has_gpu)); then train_options+=(ops.compile=true); fi # small kernels, fused
else
  measure_options+=(--max-prompts 80) # all 58 unseen pairs, and about as many trained ones
fi

say() { printf '\n== %s\n' "$*"; }

say "1/5 pairs of Chinese captions and pictures: $DATA"
$VILG data demo --out "$DATA" "${data_options[@]}"

say "2/5 train both directions: $OUT"
"${launch[@]}" train --preset "$name" --data "$DATA" --out "$OUT" "${train_options[@]}"
if [[ "${FULL:-0}" == 1 && ! -d "$OUT/reranker" ]]; then
  $VILG train-reranker --load "$OUT" "${reranker_options[@]}" # a second opinion on the drawings
fi
if [[ "${FULL:-0}" == 1 && ! -d "$OUT/restyler" ]]; then
  $VILG train-restyler --load "$OUT" --data "$DATA" "${restyler_options[@]}" # draws what was never shown together
fi

# A few trained pairs, and held-out ones whose concept and style were never seen together, as files: their captions
# become prompts, their pictures are to be captioned.
examples="$OUT/examples"
rm -rf "$examples"
for split in train val-pairs; do
  mkdir -p "$examples/$split"
  tar -tf "$DATA/$split-00000.tar" | awk '/\.txt$/ && ++count <= 2' | while read -r caption; do
    tar -xf "$DATA/$split-00000.tar" -C "$examples/$split" "$caption" "${caption%.txt}.png"
  done
done
for caption in "$examples"/*/*.txt; do
  cat "$caption"
  echo
done | awk 'NF' >"$examples/prompts"

say "3/5 draw: $OUT/drawn"
$VILG generate --load "$OUT" --prompt-file "$examples/prompts" -n 2 --seed "$SEED" --out "$OUT/drawn"

say "4/5 caption"
$VILG caption --load "$OUT" "$examples"/*/*.png

say "5/5 measure: $OUT/report.json"
"${launch[@]}" evaluate --load "$OUT" --data "$DATA" --out "$OUT" "${measure_options[@]}"

say "done"
"$PYTHON" examples/show_report.py "$OUT/report.json"
echo "  picture: $OUT/report.png"
echo "  report:  $OUT/report.json"
