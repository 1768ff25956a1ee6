# Sourced by the scripts of this folder with the name of the log; README.md lists the variables.
set -u
cards=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$cards/../.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$PWD}
devices=${DEVICES:---gpus 1}
mkdir -p "$out"
exec > >(tee "$out/$1.log") 2>&1
logger=$!
work=$(mktemp -d)
trap 'cd /; rm -rf "$work"; exec >&- 2>&-; wait "$logger"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-cache-dir --target "$work/site" "$WHEELS"/*.whl || exit
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
cd "$work"
"$python" -P -c "import launcher, training" 2>/dev/null || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
cp "$cards"/programs/* .

launch() { timeout "${LIMIT:-120}" "$python" -P -m launcher "$@"; }

# The process of rank 0 of attempt $2 of run $1: its standard output is the log of the rank.
rank_of() {
    for each in /proc/[0-9]*; do
        [ "$(readlink "$each/fd/1")" = "$work/runs/$1/logs/$2/0.log" ] && echo "${each#/proc/}" && return
    done
}

title() { printf '\n== %s\n' "$*"; }

title "$(date -u +%Y-%m-%d), commit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown), $devices"
