#!/usr/bin/env bash
# Ask PyPI's advisory service about every pinned version. Fails on a known vulnerability. Where the service cannot be
# asked (no network, a mirror without it), it says so and does not fail: then nothing was audited.
set -euo pipefail
cd "$(dirname "$0")/.."
home=.venv/audit log=.venv/audit.log
skip() { printf 'audit: SKIPPED, %s; nothing was audited\n' "$1" >&2; exit 0; }

[ -x $home/bin/pip-audit ] || { .venv/bin/python -m venv $home && timeout 120 $home/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1 >$log 2>&1; } ||
  { rm -rf $home; skip "pip-audit cannot be installed"; }
files=$(printf -- '-r %s ' requirements/*.txt)
# shellcheck disable=SC2086
timeout 120 $home/bin/pip-audit $files --no-deps --disable-pip --progress-spinner off -f json >$log.json 2>$log && code=0 || code=$?
[ -s $log.json ] || skip "the advisory service does not answer"
.venv/bin/python - $log.json $code <<'PY'
import json, sys

found = json.load(open(sys.argv[1]))["dependencies"]
asked = [row for row in found if "vulns" in row]
bad = [(row["name"], row["version"], each["id"]) for row in asked for each in row["vulns"]]
print(f"audit: {len(asked)} of {len(found)} pinned versions could be asked about, {len(bad)} known vulnerabilities", file=sys.stderr)
if not asked:
    print("audit: SKIPPED, the index here has no advisories; nothing was audited", file=sys.stderr)
for line in bad:
    print("vulnerable:", *line, file=sys.stderr)
sys.exit(bool(bad))
PY
