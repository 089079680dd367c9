#!/usr/bin/env bash
# The kernels under a sanitizer, with the corpus and with random inputs: sanitize.sh thread|address,undefined COUNT [SEED]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=build/kernels/${1/,/-}
tests/fuzz/build.sh "$folder" -O0 "-fsanitize=$1" -fno-sanitize-recover=undefined
"$folder/kernels" tests/fuzz/corpus/*
"$folder/kernels" "$2" "${3:-0}"
