#!/usr/bin/env bash
# A model of the shape of BERT-base: the bundled job beside the plain loop of its recipe, and what a save costs. See README.md.
. "$(dirname "$0")/common.sh" d

title "a model of ${LAYERS:-12} layers x ${WIDTH:-768}"
"$python" -P model.py m "${LAYERS:-12}" "${WIDTH:-768}" 12 $((${WIDTH:-768} * 4)) || exit
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -P -m benchmarks.cards.throughput --model m \
    --epochs "${EPOCHS:-3}" --max-steps "${STEPS:-0}" ${DATA:+--data "$DATA"} -- ${OPTIONS:---precision bf16 --compile}

title "a save of the size of BERT-base with both moments of AdamW"
"$python" -P "$cards/copies.py" --gib "${GIB:-1.22}"
