#!/usr/bin/env bash
# The tests on this host's GPUs and a whole job, then the benchmark. `cargo xtask hw` makes the folder that this lies in and runs it; on a host
# without Rust or a network, run it by hand. It ends with 1 if a test failed or a result was wrong.
set -u

usage="usage: run.sh [tests|bench] [--sanitize] [--json FILE] [--mib N] [--rounds N] [--arena-mib N]
  tests, bench   only these
  --sanitize     the kernels' tests once more under each tool of compute-sanitizer, where it is installed
  --json FILE    where the benchmark's results go; hw.json beside this file unless said
  the rest       see \`hw --help\`"

# Seconds for one test binary; sanitizers make kernels a hundred times slower.
plain_seconds=300
sanitized_seconds=900

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || exit 1
json=$here/hw.json
sanitize=no
parts="tests bench"
options=()
while [ $# -gt 0 ]; do
    case $1 in
    --json | --mib | --rounds | --arena-mib)
        [ $# -ge 2 ] || { echo "$usage" >&2; exit 2; }
        if [ "$1" = --json ]; then json=$2; else options+=("$1" "$2"); fi
        shift
        ;;
    --sanitize) sanitize=yes ;;
    tests | bench) parts=$1 ;;
    -h | --help)
        echo "$usage"
        exit 0
        ;;
    *)
        echo "$usage" >&2
        exit 2
        ;;
    esac
    shift
done

# Without a device the tests fail instead of being skipped.
export WEIGHTSYNC_HW=1
log=$(mktemp) || exit 1
trap 'rm -f -- "$log"' EXIT
failed=()

# check NAME SECONDS COMMAND...: what it skipped and its last words; all of its output if it failed.
check() {
    local name=$1 seconds=$2
    shift 2
    echo "==> $name"
    if timeout -k 10 "$seconds" "$@" >"$log" 2>&1; then
        sed -n '/^skipped: /p' "$log" | sort | uniq -c
        grep -E '^(test result|=+ ERROR SUMMARY|verified)' "$log"
    else
        local status=$?
        cat "$log"
        [ "$status" -ne 124 ] || echo "$name has not ended after $seconds s"
        failed+=("$name")
    fi
}

run_tests() {
    local binary
    for binary in "$here"/tests/*; do
        # One at a time: some of them fill the GPU's memory.
        check "${binary##*/}" "$plain_seconds" "$binary" --test-threads=1 --show-output
    done
    # A whole job, in processes; it writes its checkpoint (1.2 GB) on the first run.
    check "demo" "$plain_seconds" "$here/weightsync" demo --device cuda
    check "demo, offloaded" "$plain_seconds" "$here/weightsync" demo --device cuda --offload --fp8
    check "demo, passed on" "$plain_seconds" "$here/weightsync" demo --device cuda --replicas 2 --relay per-host
}

run_sanitized() {
    local sanitizer tool binary flags
    sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
        echo "skipped: no compute-sanitizer"
        return
    }
    for tool in memcheck racecheck synccheck initcheck; do
        # Calls that fail are checked by the tests, some of which make them on purpose.
        flags=()
        [ "$tool" = memcheck ] && flags=(--report-api-errors no)
        for binary in "$here"/tests/weight-ops.*; do
            check "${binary##*/} under $tool" "$sanitized_seconds" "$sanitizer" --tool "$tool" --error-exitcode 1 \
                --print-limit 20 "${flags[@]}" "$binary" --test-threads=1
        done
    done
}

case $parts in *tests*) run_tests ;; esac
[ "$sanitize" = yes ] && run_sanitized
case $parts in
*bench*)
    echo "==> benchmark"
    "$here/hw" --json "$json" "${options[@]}" || failed+=("benchmark")
    ;;
esac
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
