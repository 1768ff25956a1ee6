#!/usr/bin/env bash
# Programs that use CUDA before their rank does, that hold the memory of a card when they die, and that hang. See README.md.
. "$(dirname "$0")/common.sh" b

for program in asks at_import holds; do
    title "$program.py"
    launch $devices --name $program $program:main
done
nvidia-smi --query-gpu=memory.used --format=csv,noheader

title "asks.py, with the check of torch that leaves CUDA alone"
PYTORCH_NVML_BASED_CUDA_CHECK=1 launch $devices asks:main

title "asks.py, in a fresh interpreter"
printf 'backend = "local"\nstart_method = "spawn"\n' > spawn.toml
launch $devices --cluster ./spawn.toml asks:main

title "hangs.py: $(date +%T)"
printf 'backend = "local"\nhang_after = 8\n' > hang.toml
launch $devices --cluster ./hang.toml --max-restarts 0 --name hangs hangs:main
date +%T
nvidia-smi --query-gpu=memory.used --format=csv,noheader

printf 'backend = "local"\n[node]\ngpus = 2\n' > two.toml
for variable in NOTHING=1 NCCL_MULTI_RANK_GPU_ENABLE=1; do
    title "two ranks on a machine with one card, $variable"
    env "$variable" timeout 120 "$python" -P -m launcher --gpus 2 --cluster ./two.toml --max-restarts 1 -- --max-steps 20
done
