#!/usr/bin/env bash
# The driver's answers, the bundled job in every precision, equal runs, and a run that is killed. See README.md.
. "$(dirname "$0")/common.sh" a
steps=${STEPS:-400}

title driver
nvidia-smi -L
nvidia-smi | sed -n 3p
ls /proc/driver/nvidia/gpus
"$python" -P gpus.py
launch doctor

title "a model of 6 layers x 384"
"$python" -P model.py m 6 384 12 1536 || exit

job() { # NAME STEPS [OPTION]...
    local name=$1 length=$2
    shift 2
    title "$name: $length steps $*"
    launch $devices --name "$name" -- --model m --batch-size 32 --epochs 99 --log-with= --max-steps "$length" "$@" | tail -4
    found "$name"
}

found() { # the first digits of the hash of the model, and the seconds for which each save held up training
    sha256sum "runs/$1/model/model.safetensors" | cut -c1-12
    echo "blocked: $(grep -ho '"blocked": *[0-9.]*' "runs/$1/events.jsonl" | grep -o '[0-9.]*$' | tr '\n' ' ')"
}

title "the default run"
launch --name default
found default

short=$((steps * 3 / 20))
job once "$short" --save-every $((short / 3))
job again "$short" --save-every $((short / 3))
job once-deterministic "$short" --deterministic
job again-deterministic "$short" --deterministic
job bf16 "$short" --precision bf16
job fp16 "$short" --precision fp16
job compiled "$short" --precision bf16 --compile

job undisturbed "$steps" --deterministic --save-every $((steps / 8))
title "killed after a quarter of the steps"
launch $devices --name killed --detach -- --model m --batch-size 32 --epochs 99 --log-with= --max-steps "$steps" \
    --deterministic --save-every $((steps / 8))
until grep -qs "\"step\": *$((steps / 4))," runs/killed/metrics.jsonl || [ -e runs/killed/result.json ]; do sleep 0.05; done
kill -9 "$(rank_of killed 1)"
until [ -e runs/killed/result.json ]; do sleep 0.2; done
launch status killed | head -20
found killed
found undisturbed
