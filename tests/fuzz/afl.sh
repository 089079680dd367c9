#!/usr/bin/env bash
# Coverage-guided fuzzing of the kernels: afl.sh SECONDS, with afl-g++, afl-fuzz and afl-cmin on the PATH.
# Afterwards tests/fuzz/corpus has one input for each branch that was found; what crashed is in build/kernels/afl/found.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=build/kernels/afl corpus=tests/fuzz/corpus
CXX=afl-g++ tests/fuzz/build.sh "$folder" -O0
rm -rf "$folder/found" "$folder/inputs"
export AFL_NO_UI=1 AFL_SKIP_CPUFREQ=1 AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES=1 AFL_NO_AFFINITY=1
# timeout ends afl-fuzz with Ctrl-C, which is how it is meant to be ended.
timeout --signal=INT "$1" afl-fuzz -i "$corpus" -o "$folder/found" -m none -t 2000+ -- "$folder/kernels" @@ || true
mkdir "$folder/inputs"
cp "$corpus"/* "$folder/inputs"
find "$folder/found" -path '*/queue/id*' -exec cp -t "$folder/inputs" {} +
rm -rf "$folder/smallest"
afl-cmin -e -m none -i "$folder/inputs" -o "$folder/smallest" -- "$folder/kernels" @@
rm "$corpus"/*
for input in "$folder/smallest"/*; do
    cp "$input" "$corpus/$(sha256sum "$input" | cut -c -16)"
done
grep -E 'execs_done|unique_crashes|unique_hangs|paths_total|corpus_count|saved_' "$(find "$folder/found" -name fuzzer_stats)"
