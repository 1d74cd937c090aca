#!/bin/sh
# Makes a tiny model from nothing: tokenizer, training (one GPU), evaluation. PYTHON names another interpreter.
# --family FAMILY comes first if it is given; the other options are train.py's.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
family=kimi_linear
if [ "${1:-}" = --family ]; then
    family=$2
    shift 2
fi
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"
"$python" train_tokenizer.py --family "$family"
exec "$python" train.py --family "$family" "$@"
