#!/bin/sh
# Draws the data of the recipes beside it, on as many cores as $1 says; about an hour of one core in all.
# sh recipes/tasks/data.sh 8
set -e
out=runs/tasks/data
mkdir -p $out
list() {  # four times $4 examples of task $1 in style $2, in the folders $3-1 to $3-4
    for seed in 1 2 3 4; do echo $1 $2 $3 $4 $seed; done
}
{
    list sat-seen words sat-words 1000; list jigsaw-seen words jigsaw-words 1000; list geometry-seen words geometry-words 2000
    list sat cot sat-cot 600; list jigsaw cot jigsaw-cot 600; list geometry cot geometry-cot 1000
    list sat direct sat-direct 400; list jigsaw direct jigsaw-direct 400; list geometry direct geometry-direct 400
    list sat plain sat-plain 400; list jigsaw plain jigsaw-plain 400; list geometry plain geometry-plain 400
} | OMP_NUM_THREADS=1 xargs -P "${1:-2}" -L 1 sh -c \
    "test -e $out/\$2-\$4 || mirage data make \$0 --style \$1 --n \$3 --seed \$4 --n-test 0 --out $out/\$2-\$4"
