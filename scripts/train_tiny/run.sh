#!/bin/sh
# Makes thalweg-tiny from nothing: tokenizer, training (one GPU), evaluation. PYTHON names another interpreter.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"
"$python" train_tokenizer.py
exec "$python" train.py "$@"
