#!/usr/bin/env bash
# Copies beside training, exhausted memory, values of CUDA_VISIBLE_DEVICES, and the tests of `training`. See README.md.
. "$(dirname "$0")/common.sh" c

title "a save beside training"
"$python" -P "$cards/copies.py" --gib "${GIB:-3}"

title "exhausted memory"
"$python" -P exhausted.py

card=$(nvidia-smi -L | grep -o 'GPU-[0-9a-f-]*' | head -1)
for value in 0 ${card:+"$card" "${card%????}"} -1 7; do
    title "CUDA_VISIBLE_DEVICES=$value"
    CUDA_VISIBLE_DEVICES=$value launch -- --max-steps 3 | grep -E "^  (on|gpu) |^launch: (succeeded|failed|stopped)"
done

title "tests/training"
cd "$root"
timeout 240 "$python" -m pytest -q -p no:cacheprovider -m "not slow" ${TESTS:-tests/training} | tail -15
