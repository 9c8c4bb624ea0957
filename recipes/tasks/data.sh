#!/bin/sh
# Draws the data of the recipes beside it, on as many cores as $1 says; about an hour of one core in all.
# sh recipes/tasks/data.sh 8
# sh recipes/tasks/data.sh 8 words plain   # only these styles: what base.yaml needs
set -e
out=runs/tasks/data
cores=${1:-2}
[ $# -gt 0 ] && shift
mkdir -p $out
list() {  # four times $4 examples of task $1 in style $2, in the folders $3-1 to $3-4
    for seed in 1 2 3 4; do echo $1 $2 $3 $4 $seed; done
}
for style in ${*:-words plain cot direct}; do
    case $style in
        words) list sat-seen words sat-words 1400; list jigsaw-seen words jigsaw-words 1400 ;;
        cot) list sat-seen cot sat-cot 600; list jigsaw-seen cot jigsaw-cot 600; list geometry cot geometry-cot 1000 ;;
        *) list sat $style sat-$style 500; list jigsaw $style jigsaw-$style 500; list geometry $style geometry-$style 500 ;;
    esac
done | OMP_NUM_THREADS=1 xargs -P "$cores" -L 1 sh -c \
    "test -e $out/\$2-\$4 || mirage data make \$0 --levels 1,2,3 --style \$1 --n \$3 --seed \$4 --n-test 0 --out $out/\$2-\$4 > /dev/null"
