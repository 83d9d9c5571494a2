#!/bin/sh
# Runs every kernel, forward and backward, under compute-sanitizer and prints one line a tool: clean, or what was found.
#
#     tests/gpu/sanitize.sh [memcheck] [racecheck] [synccheck] [initcheck]     (default: memcheck racecheck)
#
# Needs compute-sanitizer (part of the CUDA toolkit) on the path; PYTHON names the interpreter (default: python3). What
# runs is tests/gpu/sanitized.py. Nothing needs to be installed.
set -u
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- memcheck racecheck
log=$(mktemp) && trap 'rm -f "$log"' EXIT
wrong=0
for tool; do
    case $tool in
    memcheck) only="--report-api-errors no" ;; # PyTorch asks the driver for what it may not have, on purpose
    racecheck | synccheck | initcheck) only= ;;
    *) echo "$tool: no such tool, expected memcheck, racecheck, synccheck or initcheck" >&2 && exit 2 ;;
    esac
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds are known.
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" $only --error-exitcode 1 \
        --target-processes application-only "${PYTHON:-python3}" tests/gpu/sanitized.py >"$log" 2>&1; then
        echo "$tool: clean, $(grep -c ' \(float32\|tf32\|half\)$' "$log") cases"
    else
        cat "$log" >&2
        echo "$tool: FAILED, see above"
        wrong=1
    fi
done
exit $wrong
