#!/bin/sh
# nvcc, as CMake calls it, with `-Xptxas -v`: what ptxas says of every kernel goes to FOLDER/<unit>.ptxas.txt for
# scripts/gpu_report.py, everything else to the build's output. Usage: nvcc_kept.sh FOLDER nvcc ARGUMENT...
folder=$1
shift
unit=
for argument; do
  if [ "$previous" = -o ]; then unit=$(basename "$argument" .o); fi
  previous=$argument
done
log=$folder/$(basename "${unit:-none}" .cu).ptxas.txt
"$@" 2>"$log.part"
code=$?
grep -Ev '^ptxas info|^ +[0-9]+ bytes (stack|gmem)|^$' "$log.part" >&2
if [ $code -eq 0 ]; then mv "$log.part" "$log"; else rm -f "$log.part" "$log"; fi
exit $code
