#!/usr/bin/env bash
# Everything that makes a GPU count as tested and tuned, stage by stage; each is made to end within ten minutes.
#
#   bench/on_gpu.sh check OUT       GPU tests of kernels and step
#   bench/on_gpu.sh sanitize OUT    memcheck and racecheck over every kernel
#   bench/on_gpu.sh tune OUT        faster configurations; they are kept in simmp_fast/kernels/measured.txt
#   bench/on_gpu.sh step OUT        the training step, eager and all options together, and its profile
#   bench/on_gpu.sh compiled OUT    the training step in the other forms that are compiled
#   bench/on_gpu.sh operators OUT   operators, blocks, DS-GIM, loss and network
#   bench/on_gpu.sh sweeps OUT      cost and memory against N, K, M, D and batch
#   bench/on_gpu.sh report OUT      one report of all that these stages left below OUT
#   bench/on_gpu.sh demo OUT        the demo, from the prepared cache that SIMMP_FAST_DEMO_CACHE names
#
# OUT is a folder for what a stage says and finds. Needs no installation: only what pyproject.toml names, and
# compute-sanitizer (CUDA toolkit) for one stage. PYTHON names the interpreter (default: python3).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
stage=${1:-} out=${2:-}
if [ -z "$stage" ] || [ -z "$out" ]; then
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$out"

# Runs a command for at most so many seconds; all that it says goes to a file, the end of it to the terminal too.
run() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 status
    shift 2
    echo "== $name: $*"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n "${TAIL:-25}" "$out/$name.log"
    echo "== $name: exit status $status after $SECONDS seconds"
    return "$status"
}

case $stage in
check)
    parallel=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 6 --dist worksteal")
    # shellcheck disable=SC2086
    run check 580 "$python" -m pytest tests/gpu -m gpu -q -p no:cacheprovider $parallel --durations=10
    ;;
sanitize)
    run sanitize 580 env PYTHON="$python" sh tests/gpu/sanitize.sh
    ;;
tune)
    run tune 580 "$python" -m simmp_fast.kernels.tune --dtype half --minutes 8
    cp simmp_fast/kernels/measured.txt "$out/measured.txt"
    ;;
step)
    # Compilation can take minutes: what is compiled is measured by calls of its own, so that none costs the others.
    run step-eager 260 "$python" -m simmp_fast.cli bench training_step --dtype bfloat16 float32 --seconds 15 \
        --backend reference portable triton triton-channels-last triton-graph --out "$out/step-eager"
    run step-fast 220 "$python" -m simmp_fast.cli bench training_step --dtype bfloat16 --seconds 10 \
        --backend triton-fast --out "$out/step-fast"
    run profile 100 "$python" -m bench.profile --backend triton-fast --out "$out/profile"
    ;;
compiled)
    for form in portable-compiled triton-compiled; do
        run "step-$form" 290 "$python" -m simmp_fast.cli bench training_step --dtype bfloat16 --seconds 10 \
            --backend "$form" --out "$out/step-$form"
    done
    ;;
report)
    run report 120 "$python" -m simmp_fast.cli bench --out "$out/report" --merge "$out"/*/results.jsonl
    ;;
operators)
    run operators 580 "$python" -m simmp_fast.cli bench --group operators blocks context dsgim loss network \
        --seconds 1 --out "$out/operators"
    ;;
sweeps)
    run sweeps 580 "$python" -m simmp_fast.cli bench --group "sweep N" "sweep K" "sweep M" "sweep D" "sweep B" \
        evaluation data --seconds 1 --out "$out/sweeps"
    ;;
demo)
    run demo 580 "$python" -m simmp_fast.cli demo --out "$out/demo" --cache "${SIMMP_FAST_DEMO_CACHE:?}" \
        --set train.precision=bfloat16
    ;;
*)
    echo "stage: got '$stage', expected check, sanitize, tune, step, compiled, operators, sweeps, report or demo" >&2
    exit 2
    ;;
esac
