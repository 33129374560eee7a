#!/bin/sh
# Builds a fuzz target with libFuzzer's instrumentation and the address sanitizer, as cargo-fuzz does, and runs it on
# its corpus, or on the files that are named: ./run.sh TARGET [libFuzzer options] [files, relative to this folder]
set -eu
cd "$(dirname "$0")"
target=${1:?"which target? one of: $(cd fuzz_targets && echo *.rs | sed 's/\.rs//g')"}
shift
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
# What earlier runs have found, and small valid inputs: without them a fuzzer would have to guess the encoding.
mkdir -p corpus
tar -xJf corpus.tar.xz -C corpus --skip-old-files
cargo +nightly run --quiet --release --bin seeds -- corpus
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Zsanitizer=address --cfg fuzzing" \
    cargo +nightly build --release --target "$host" --bin "$target"
mkdir -p "artifacts/$target"
inputs=corpus/$target
if [ -f "$target.dict" ]; then set -- -dict="$target.dict" "$@"; fi
for argument; do
    if [ -f "$argument" ]; then inputs=; fi
done
exec "${CARGO_TARGET_DIR:-target}/$host/release/$target" -artifact_prefix="artifacts/$target/" "$@" $inputs
