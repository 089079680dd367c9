#!/usr/bin/env bash
# The kernels of csrc/cpu and tests/fuzz/kernels.cpp, without torch, as FOLDER/kernels: build.sh FOLDER FLAGS...
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
shift
mkdir -p "$folder"
flags=(-std=c++17 -g -ffp-contract=off -Wno-tsan -Itests/fuzz/threads -Icsrc "$@")
# Those with a host side of their own, which needs torch, are tested in the library.
sources=$(grep -L STABLE_TORCH_LIBRARY_IMPL csrc/cpu/*.cpp)
printf '%s\n' $sources tests/fuzz/kernels.cpp | xargs -P "$(nproc)" -I{} \
    sh -c '"${CXX:-c++}" "$@" -c {} -o '"$folder"'/$(basename {} .cpp).o' sh "${flags[@]}"
"${CXX:-c++}" "${flags[@]}" "$folder"/*.o -pthread -o "$folder/kernels"
