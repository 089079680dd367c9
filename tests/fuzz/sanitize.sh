#!/usr/bin/env bash
# The kernels of csrc/cpu, without torch, under a sanitizer: sanitize.sh thread|address,undefined COUNT [SEED]
set -euo pipefail
cd "$(dirname "$0")/../.."
sanitizer=$1 count=$2 seed=${3:-0}
folder=build/kernels/${sanitizer/,/-}
mkdir -p "$folder"
flags=(-std=c++17 -O0 -g -ffp-contract=off "-fsanitize=$sanitizer" -fno-sanitize-recover=undefined -Wno-tsan)
flags+=(-Itests/fuzz/threads -Icsrc)
# The two with a host side of their own, which needs torch, are tested in the library.
sources=$(ls csrc/cpu/*.cpp | grep -v "_l1.cpp")
printf '%s\n' $sources tests/fuzz/kernels.cpp | xargs -P "$(nproc)" -I{} \
    sh -c '"${CXX:-c++}" "$@" -c {} -o '"$folder"'/$(basename {} .cpp).o' sh "${flags[@]}"
"${CXX:-c++}" "${flags[@]}" "$folder"/*.o -pthread -o "$folder/kernels"
"$folder/kernels" "$count" "$seed"
