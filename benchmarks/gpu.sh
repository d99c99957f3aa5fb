#!/usr/bin/env bash
set -uo pipefail
cd "$(dirname "$0")/.."
exec </dev/null
shopt -s inherit_errexit

usage() {
  cat <<'EOF'
usage: benchmarks/gpu.sh [OPTION]... [PHASE]... [-- ARGUMENT...]

Everything that needs a GPU: builds the package, tests it, checks it with compute-sanitizer and
measures it. Phases, all of them without a name:

  build      an environment in build/gpu on top of the Python that is used, and the package in it
  test       tests/gpu
  sanitize   memcheck and racecheck of a few gates, where compute-sanitizer is there
  bench      benchmarks.gpu

A phase that fails does not keep the next from running. The exit status is 1 if one failed, 0 otherwise.
Arguments after -- go to pytest or benchmarks.gpu; name one phase then.

  --python PATH      a Python with PyTorch, Triton, pytest, hypothesis, timm, rich and numpy. Default: that
                     of .venv, else python3; where neither sees a GPU, `make build` downloads what is needed
  --output FOLDER    for results, pictures and a log of each phase (default benchmarks/results)
  --limit SECONDS    time for each phase (default 540); a phase that takes longer is stopped, and has failed
  --quick            fewer tests and measurements
  --continue         measure only what today's results lack, for a benchmark in several commands
  --help

CBAM_FUSED_CPP=0 in the environment builds without the C++ library, which the GPU does not need.
EOF
}

python= output=benchmarks/results limit=540 quick= continue=
phases=() arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --python | --output | --limit)
      [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --quick | --continue) printf -v "${1#--}" %s "$1" ;;
    --help) usage; exit ;;
    --) shift; arguments=("$@"); break ;;
    build | test | sanitize | bench) phases+=("$1") ;;
    *) echo "gpu.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
[[ $limit =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: --limit must be a number of seconds; got $limit" >&2; exit 2; }
if [ ${#arguments[@]} -gt 0 ] && [[ ${#phases[@]} -ne 1 || ! ${phases[0]} =~ ^(test|bench)$ ]]; then
  echo "gpu.sh: arguments after -- need one phase, test or bench" >&2
  exit 2
fi
[ ${#phases[@]} -gt 0 ] || phases=(build test sanitize bench)

environment=build/gpu/environment
run=$environment/bin/python
mkdir -p "$output" build/gpu
output=$(cd "$output" && pwd)
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 MPLBACKEND=Agg

# limited COMMAND...: the command, interrupted when the time of its phase is over. On an interrupt
# pytest still prints what has failed, and benchmarks.gpu keeps what it has measured.
limited() {
  local left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || { echo "gpu.sh: no time left for: $*"; return 124; }
  timeout --signal=INT --kill-after=20 "$left" "$@"
}

sees_gpu() {
  "$1" -c 'import torch, triton; assert torch.cuda.is_available()' 2>/dev/null
}

# The Python to build on: the one asked for, or one that sees the GPU, or a new one.
find_python() {
  local candidate
  if [ -n "$python" ]; then
    sees_gpu "$python" || { echo "gpu.sh: $python has no PyTorch with Triton that sees a GPU" >&2; return 1; }
    command -v "$python"
    return
  fi
  for candidate in .venv/bin/python python3; do
    if sees_gpu "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  make build >&2 && sees_gpu .venv/bin/python && echo "$PWD/.venv/bin/python" && return
  echo "gpu.sh: no Python with PyTorch that sees a GPU" >&2
  return 1
}

# A virtual environment that also sees everything of the Python it stands on, so that the package
# can be installed without a change to that one.
phase_build() {
  local base site
  base=$(find_python) || return
  limited "$base" -m venv --clear --without-pip "$environment" || return
  site=$("$run" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
  "$base" - >"$site/base.pth" <<'EOF' || return
import sys
for path in sys.path:
    if path.rstrip("/").endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
EOF
  "$run" - <<'EOF' || return
import importlib.util
needed = ("torch", "triton", "pip", "setuptools", "pytest", "hypothesis", "timm", "rich", "numpy")
missing = [name for name in needed if not importlib.util.find_spec(name)]
if missing:
    raise SystemExit(f"gpu.sh: missing in this Python: {', '.join(missing)} (versions: requirements.txt)")
EOF
  limited "$run" -m pip install -q --disable-pip-version-check --no-index --no-build-isolation --no-deps \
    --ignore-installed -e . || return
  limited "$run" -m cbam_fused info
}

phase_test() {
  local status=0 alone=0 workers=() files=(tests/gpu)
  sees_gpu "$run" || { echo "gpu.sh: there is no GPU that PyTorch can use here" >&2; return 1; }
  [ -z "$quick" ] || files+=(--ignore=tests/gpu/test_gradients.py --ignore=tests/gpu/test_large.py)
  local pytest=("$run" -m pytest -q -rfEs --tb=short "${files[@]}")
  limited "${pytest[@]}" -m "alone and not exhaustive" "${arguments[@]}" || alone=$?
  if "$run" -c 'import xdist' 2>/dev/null; then
    workers=(-n auto --maxprocesses 12)
  fi
  limited "${pytest[@]}" -m "not alone and not exhaustive" "${workers[@]}" "${arguments[@]}" || status=$?
  # 5: no tests; of a selection in the arguments one of the two runs may have none.
  [ "$alone" -ne 5 ] || { alone=0 && [ "$status" -ne 5 ]; } || return 5
  [ "$status" -ne 5 ] || status=0
  return $((alone > 0 ? alone : status))
}

phase_sanitize() {
  local tool status=0 backend usable
  sees_gpu "$run" || { echo "gpu.sh: there is no GPU that PyTorch can use here" >&2; return 1; }
  tool=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
    echo "compute-sanitizer is not here: skipped"
    return 0
  }
  usable=$("$run" -c 'from tests.gpu import FUSED; print(*FUSED)') || return
  for backend in $usable; do
    sanitize "$backend" "$backend" odd light_even residual_relu || status=1
  done
  # No case is so large that the planner takes the skewed order by itself.
  if [[ " $usable " == *" cuda "* ]]; then
    CBAM_FUSED_CUDA_STRATEGY=skewed sanitize cuda-skewed cuda stage1 || status=1
  fi
  return "$status"
}

# sanitize NAME BACKEND CASE...: a backend's gates of these cases under every tool of $tool.
sanitize() {
  local name=$1 gates=("$run" -m tests.fingerprint "$2" --device cuda --case "${@:3}")
  local log=build/gpu/$name status=0 check
  # Without it first: the kernels are compiled, and the hashes are what the others must be.
  limited "${gates[@]}" >"$log-plain.json" || return
  for check in memcheck racecheck synccheck initcheck; do
    echo "$name: $check"
    # Every tensor gets memory of its own, so that what lies beyond its end is not another's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$tool" --tool "$check" --error-exitcode 1 \
      --log-file "$log-$check.log" "${gates[@]}" >"$log-$check.json" || status=1
    tail -n 40 "$log-$check.log"
    cmp "$log-plain.json" "$log-$check.json" || status=1
  done
  return "$status"
}

phase_bench() {
  # A configuration takes up to a minute; the last one shall end by itself.
  local begin_until=$((deadline - SECONDS - 60))
  limited "$run" -m benchmarks.gpu --output "$output" --time-limit "$begin_until" $quick $continue \
    "${arguments[@]}"
}

results=() failed=0
phase() {
  local name=$1 begin=$SECONDS status word
  printf '\n== %s\n' "$name"
  deadline=$((SECONDS + limit))
  (set -o pipefail; "phase_$name" 2>&1 | tee "$output/gpu-$name.log")
  status=$?
  word=ok
  if [ "$status" -ne 0 ]; then
    failed=1
    word="failed with status $status"
    [ "$status" -eq 124 ] && word="stopped after $limit s"
    [ "$name" = bench ] && [ "$status" -eq 2 ] && word="not all measured: --continue"
  fi
  results+=("$(printf '%-9s %s (%s s)' "$name" "$word" "$((SECONDS - begin))")")
  return "$status"
}

if [[ ! " ${phases[*]} " == *" build "* ]] && [ ! -x "$run" ]; then
  phases=(build "${phases[@]}")
fi
for name in "${phases[@]}"; do
  phase "$name"
  if [ "$name" = build ] && [ ! -x "$run" ]; then
    echo "gpu.sh: nothing can run without the environment" >&2
    break
  fi
done
printf '\n== results in %s\n' "$output"
printf '%s\n' "${results[@]}"
exit "$failed"
