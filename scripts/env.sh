# Sourced by the other scripts: cd to the repository and have a .venv with the extra named in $1 (demo or dev),
# in the versions of constraints.txt. Made again only when pyproject.toml or constraints.txt change.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=".venv/.installed-$1"
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing llm2clip[$1] into .venv (torch is large: about 6 GB on disk)" >&2
    if [ ! -x .venv/bin/python ]; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "constraints.txt needs Python 3.11 or newer; python3 is $(python3 --version)" >&2
            exit 2
        fi
        python3 -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
# glibc keeps freed memory instead of giving it back at every step (docs/benchmarks.md).
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=536870912
