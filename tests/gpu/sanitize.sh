#!/bin/sh
# Runs the kernels' GPU tests on small shapes under compute-sanitizer: out-of-bounds accesses, then shared-memory races.
# Needs compute-sanitizer (part of the CUDA toolkit) on the path. Takes the files to run, or runs every GPU test of kernels.
set -e
cd "$(dirname "$0")/../.."
files="${*:-tests/gpu}"
for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        python -m pytest -q -m gpu -p no:cacheprovider -k "edge_grid" $files
done
