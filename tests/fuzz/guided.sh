#!/usr/bin/env bash
# Coverage-guided fuzzing of every reader, RUNS cases each. Where atheris does not install, says so and does not fail:
# then only the tests beside this file were run.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=.venv/atheris runs=${1:-20000}
[ -d $home ] || timeout 120 .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target $home atheris==3.0.0 >.venv/atheris.log 2>&1 ||
  { rm -rf $home; echo "guided fuzzing: SKIPPED, atheris does not install here" >&2; exit 0; }
for target in recipe entry data reply request body gguf weights; do
  log=.venv/guided-$target.log
  PYTHONPATH=$home .venv/bin/python tests/fuzz/guided.py $target "$runs" >"$log" 2>&1 ||
    { echo "guided fuzzing: $target failed; the end of $log:" >&2; tail -n 30 "$log" >&2; exit 1; }
  grep -o "DONE.*corp: [0-9]*" "$log" | sed "s/^DONE */guided fuzzing: $target, $runs cases, /" >&2
done
