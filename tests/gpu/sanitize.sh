#!/bin/sh
# Runs kernels, forward and backward, under compute-sanitizer and prints one line a tool: clean, what was found, or cut.
#
#     tests/gpu/sanitize.sh [-o DIR] [-c "CASE .."] [-k "CLASS .."] [-j] [TOOL ..]
#
#     TOOL     memcheck, racecheck, synccheck or initcheck (default: memcheck racecheck)
#     -o DIR   folder for TOOL.log, written as the tool speaks (default: a temporary one, shown where something is wrong)
#     -c       an operator, or operator:case, of tests/gpu/sanitized.py (default: all cases, which launch every kernel)
#     -k       float32, tf32 or half (default: all three)
#     -j       all tools at once
#
# The exit status is 0 if every tool is clean. Needs compute-sanitizer (part of the CUDA toolkit) on the path; PYTHON
# names the interpreter (default: python3). Nothing needs to be installed.
set -u
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
out= cases= classes= beside=
while getopts o:c:k:j option; do
    case $option in
    o) mkdir -p "$OPTARG" && out=$(cd "$OPTARG" && pwd) || exit 2 ;;
    c) cases=$OPTARG ;;
    k) classes=$OPTARG ;;
    j) beside=yes ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || set -- memcheck racecheck
for tool; do
    case $tool in
    memcheck | racecheck | synccheck | initcheck) ;;
    *) echo "$tool: no such tool, expected memcheck, racecheck, synccheck or initcheck" >&2 && exit 2 ;;
    esac
done
keep=$out
[ -n "$out" ] || out=$(mktemp -d)
cd "$(dirname "$0")/../.." || exit 2
wrong=0 started= told= ending= over=

start() { # TOOL
    only=
    # PyTorch asks the driver for what it may not have, on purpose.
    [ "$1" = memcheck ] && only="--report-api-errors no"
    # The values, too: where threads write the same to one place, nothing is lost.
    [ "$1" = racecheck ] && only="--racecheck-report all"
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds are known.
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" $only --error-exitcode 1 \
        --target-processes application-only \
        "${PYTHON:-python3}" tests/gpu/sanitized.py $cases ${classes:+--class $classes} >"$out/$1.log" 2>&1 &
    eval "pid_$1=$!"
    started="$started $1"
}

verdict() { # TOOL
    # A signal may come between any two lines: what was waited for is kept, and told once.
    case " $told " in *" $1 "*) return ;; esac
    eval "[ -n \"\${status_$1:-}\" ]" || { eval "wait \$pid_$1" && eval "status_$1=0" || eval "status_$1=$?"; }
    eval "status=\$status_$1"
    [ -n "$over" ] || trap 'ending=yes' INT TERM
    log=$out/$1.log
    begun=$(grep -c ' \(float32\|tf32\|half\)$' "$log")
    finished=$(grep -c '^all cases ran$' "$log")
    if [ "$status" -eq 0 ] && [ "$finished" -eq 1 ]; then
        echo "$1: clean, $begun cases"
    elif [ -n "$over" ] && [ "$finished" -eq 0 ]; then
        wrong=1
        found=$(grep -c '^=========.*\(Error\|Warning\|Invalid\|hazard\|Uninitialized\|Barrier\|Leaked\)' "$log")
        echo "$1: CUT in case $begun, $found lines of findings so far"
    else
        wrong=1
        [ -n "$keep" ] && where=$log || where=below
        echo "$1: FAILED in case $begun, exit status $status, see $where"
    fi
    [ "$wrong" -eq 0 ] || [ -n "$keep" ] || cat "$log" >&2
    told="$told $1"
    [ -n "$over" ] || trap cut INT TERM
    [ -n "$over" ] || [ -z "$ending" ] || cut
}

# A time limit ends the shell: it takes the tools with it and tells how far each came.
cut() {
    trap '' INT TERM
    ending=yes over=yes
    for signal in TERM KILL; do
        for tool in $started; do
            case " $told " in *" $tool "*) ;; *) eval "kill -$signal \$pid_$tool" 2>/dev/null ;; esac
        done
        sleep 1
    done
    for tool in $started; do verdict "$tool"; done
    exit 1
}
trap cut INT TERM
[ -n "$keep" ] || trap 'rm -rf "$out"' EXIT

for tool; do
    start "$tool"
    [ -n "$beside" ] || verdict "$tool"
done
if [ -n "$beside" ]; then
    for tool; do verdict "$tool"; done
fi
exit $wrong
