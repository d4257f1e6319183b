#!/bin/sh
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary copy of the tree, and run
# their tests there. Usage: tools/sanitize.sh [pytest arguments]. The variable PYTHON selects the interpreter.
set -eu
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/csrc" "$root/fastprefix" "$root/tests" "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$copy"
cd "$copy"
rm -f fastprefix/_native/*.so
FASTPREFIX_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1" \
  "$python" setup.py build_ext --inplace
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so)" \
  "$python" -m pytest -p no:cacheprovider --capture=sys tests/ops/test_prefix_attention_cpu.py tests/ops/test_prompt_embedding_cpu.py "$@"
