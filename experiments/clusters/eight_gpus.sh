#!/bin/sh
# One machine with eight GPUs: Ray is started by the command itself, listens on 127.0.0.1 only, and ends with it.
#
#     sh experiments/clusters/eight_gpus.sh meta-llama/Llama-2-7b-chat-hf [more words of the command]
#
# Killed or interrupted, the same line goes on where it stopped.
set -eu
cd "$(dirname "$0")/../.."
MODEL=${1:-meta-llama/Llama-2-7b-chat-hf}
[ $# -eq 0 ] || shift
exec python -m experiments all --model "$MODEL" --engine ray --workers 8 --num-gpus-per-worker 1 "$@"
