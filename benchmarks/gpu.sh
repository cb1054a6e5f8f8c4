#!/usr/bin/env bash
# Everything that takes an NVIDIA GPU, in one go: what TensorRT-RTX says to the device, the tests marked gpu, the
# quickstart built and verified for the GPU's targets, and the latency of BERT-base beside torch and ONNX Runtime.
#
#   benchmarks/gpu.sh [NAME]     writes benchmarks/results/gpu-NAME.md; NAME is made from the device's if not given
#
# A step that fails is written down, the others follow, and the exit status is 1. PYTHON chooses the interpreter.
set -u
cd "$(dirname "$0")/.." || exit 1

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    echo "gpu.sh: there is no NVIDIA GPU here (nvidia-smi finds none); nothing was run" >&2
    echo "  fix: run it on a machine with a GPU and its driver, after: pip install -e '.[build,rtx,dev]';" >&2
    echo "       for onnxruntime-cuda also: pip uninstall -y onnxruntime; pip install -e '.[gpu]'" >&2
    exit 1
fi

if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
DEVICE=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
NAME=${1:-$(echo "$DEVICE" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-//; s/-$//')}
RESULT=benchmarks/results/gpu-$NAME.md
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
FAILED=0
MEDCOMPILE=("$PYTHON" -c 'from medcompile.cli import main; main()')

# step TITLE COMMAND...: run it, show it, and write its output and exit status into the result.
step() {
    local title=$1 status
    shift
    echo "== $title" >&2
    "$@" 2>&1 | tee "$SCRATCH/step" >&2
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || FAILED=1
    {
        printf '\n## %s\n\n' "$title"
        [ "$status" -eq 0 ] || printf 'Failed with exit status %s.\n\n' "$status"
        printf '```\n'
        tail -n 60 "$SCRATCH/step" | sed "s#$PWD#.#g; s#$SCRATCH#SCRATCH#g"
        printf '```\n'
    } >>"$RESULT"
}

mkdir -p benchmarks/results
{
    echo "# $DEVICE"
    echo
    echo "Made by \`benchmarks/gpu.sh\` on $(uname -s) $(uname -m), $(date -u +%Y-%m-%d), $(nproc) CPU cores."
} >"$RESULT"

step "Device" nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv
step "Does TensorRT-RTX take it?" "$PYTHON" benchmarks/gpu_accepts.py
step "Tests on the device" "$PYTHON" -m pytest -m gpu -rs tests
step "Quickstart, built for the GPU" "${MEDCOMPILE[@]}" build recipes/quickstart.yaml \
    --out "$SCRATCH/quickstart" --set 'targets=[tensorrt-rtx, onnxruntime-cuda]' \
    --set 'variants={fp32: {}, fp16: {float: float16}, int8: {weights: int8, activations: int8, float: float16}}'
step "Quickstart, verified on the device" "${MEDCOMPILE[@]}" verify "$SCRATCH/quickstart"
step "BERT-base latency" "$PYTHON" benchmarks/gpu_latency.py --out "$SCRATCH/latency.md"
if [ -s "$SCRATCH/latency.md" ]; then
    printf '\n## The table\n\n' >>"$RESULT"
    cat "$SCRATCH/latency.md" >>"$RESULT"
fi

echo "written: $RESULT" >&2
exit $FAILED
