#!/usr/bin/env bash
# The kernels of csrc/cpu and tests/fuzz/kernels.cpp, without torch, as FOLDER/kernels: build.sh FOLDER FLAGS...
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
shift
mkdir -p "$folder"
flags=(-std=c++17 -g -ffp-contract=off -Wno-tsan -Itests/fuzz/threads -Icsrc "$@")
printf '%s\n' csrc/cpu/*.cpp tests/fuzz/kernels.cpp | xargs -P "$(nproc)" -I{} \
    sh -c '"${CXX:-c++}" "$@" -c {} -o '"$folder"'/$(basename {} .cpp).o' sh "${flags[@]}"
"${CXX:-c++}" "${flags[@]}" "$folder"/*.o -pthread -o "$folder/kernels"
