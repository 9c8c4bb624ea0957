#!/bin/sh
# Draws the data of the recipes beside it, on as many cores as $1 says; about 50 minutes of one core in all.
# sh recipes/tasks/data.sh 8
set -e
out=runs/tasks/data
mkdir -p $out
list() {  # of style $1: $2 examples of sat and jigsaw, $3 of geometry, each of four times
    for seed in 1 2 3 4; do
        echo sat $seed $1 $2; echo jigsaw $seed $1 $2; echo geometry $seed $1 $3
    done
}
{ list words 1000 2000; list plain 400 800; list cot 600 1000; list direct 400 400; } | OMP_NUM_THREADS=1 xargs -P "${1:-2}" -L 1 sh -c \
    "test -e $out/\$0-\$2-\$1 || mirage data make \$0 --seed \$1 --style \$2 --n \$3 --n-test 0 --out $out/\$0-\$2-\$1"
