#!/usr/bin/env bash
# Make .venv: torch with its dependencies, then the lock file without dependencies, then petool-lite itself.
# Plain resolution cannot do it everywhere: unsloth asks for a newer certifi than some mirrors hold, and for
# torchvision and xformers, which do not load beside a CPU build of torch. TORCH_ARGS goes to pip for torch,
# CMAKE_ARGS to llama.cpp (such as -DGGML_CUDA=on).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
log=.venv/install.log

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: petool-lite needs Python 3.11 or newer, $python is $("$python" -V)" >&2; exit 3; }
command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "error: no C++ compiler; llama.cpp needs one (Debian: apt install g++)" >&2; exit 3; }

step() { # step TITLE COMMAND...: run quietly, show the seconds that pass, and the log's end if it fails
  local title=$1 start=$SECONDS shown=-10; shift
  "$@" >>"$log" 2>&1 & local pid=$!
  while kill -0 $pid 2>/dev/null; do
    if [ -t 2 ]; then
      printf '\r%s ... %d s ' "$title" $((SECONDS - start)) >&2
    elif [ $((SECONDS - start)) -ge $((shown + 10)) ]; then
      shown=$((SECONDS - start)); printf '%s ... %d s\n' "$title" "$shown" >&2
    fi
    sleep 0.5
  done
  if [ -t 2 ]; then printf '\r' >&2; fi
  wait $pid || { printf '\nerror: %s failed; the end of %s:\n' "$title" "$log" >&2; tail -n 20 "$log" >&2; exit 1; }
  printf '%s: done in %d s\n' "$title" $((SECONDS - start)) >&2
}

echo "Installing into .venv (once; log in $log)" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
: >"$log"
# of the modules that pip would compile, most are never imported: that would take half a minute here
pip=".venv/bin/python -m pip --disable-pip-version-check install --no-compile"
# Of llama.cpp only the libraries that Python loads: no programs, no images and sound, no HTTP client. scikit-build-core
# reads both variables, and brings cmake and ninja along where the machine has none.
parts="-DLLAVA_BUILD=OFF '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$PWD/requirements/llama.cmake' ${CMAKE_ARGS:-}"
built=.venv/llama
compile() { # beside what is fetched and unpacked meanwhile, which keeps one core busy
  rm -rf $built && mkdir $built
  local code=0
  CMAKE_ARGS="$parts" .venv/bin/python -m pip --disable-pip-version-check wheel --no-deps -w $built \
    -r requirements/llama.txt >$built/log 2>&1 || code=$?
  echo $code >$built/code
}
compiled() {
  # what is imported often; many containers set PYTHONDONTWRITEBYTECODE, where each process would compile it anew
  (cd .venv/lib/python3*/site-packages && ../../../bin/python -m compileall -q -j 2 accelerate anyio click datasets gguf \
    httpcore httpx huggingface_hub jinja2 jsonschema llguidance mcp numpy pandas peft pyarrow pydantic \
    rich starlette sympy tokenizers torch torchao transformers trl unsloth unsloth_zoo uvicorn) || true
  .venv/bin/python -m compileall -q petool_lite export bench recipes || true
  until [ -s $built/code ]; do sleep 0.5; done
  cat $built/log
  [ "$(cat $built/code)" = 0 ] && $pip --no-deps --no-index $built/*.whl && rm -rf $built
}
# shellcheck disable=SC2086
{
  compile & compiling=$!
  trap 'kill $compiling 2>/dev/null || true' EXIT
  step "1/4 torch" $pip ${TORCH_ARGS:-} -r requirements/torch.txt
  step "2/4 about 90 libraries" $pip --no-deps -r requirements/lock.txt -r requirements/test.txt
  step "3/4 llama.cpp, compiled here since the start" compiled
  step "4/4 petool-lite" $pip --no-deps --no-build-isolation -e .
}
echo "Installed in $SECONDS s" >&2
touch .venv/ready
