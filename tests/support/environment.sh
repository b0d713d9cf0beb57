# Sourced by demo/run, tests/run and .ci/run: the one virtual environment of this checkout, in .venv.
#
# `make_environment` gives the run-time dependencies, `make_environment dev` the tools as well. Nothing is done, and no
# network is touched, while setup.py has not changed since the last time.

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
environment="$checkout/.venv"

# Print the first Python that is new enough and can make environments. A name on the PATH proves nothing (it may be
# an old version, a shim, or a distribution without ensurepip), so each candidate is run.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        if [ -n "$candidate" ] && [ "$candidate" = "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON is not a Python >= 3.11 that can make virtual environments." >&2
            return 1
        fi
    done
    echo "tornado_proxy needs Python >= 3.11 with its venv module (Debian: apt-get install python3-venv);" \
        "none was found. Install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

make_environment() {
    local extra="${1:-}" python stamp wanted
    # An editable install points to the checkout, so it is stale when the checkout was moved or copied.
    wanted="$(cksum <"$checkout/setup.py") $checkout"
    stamp="$environment/.installed${extra:+-$extra}"
    if [ -x "$environment/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
        "$environment/bin/python" -c '' 2>/dev/null; then
        return
    fi
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "Making a virtual environment in $environment" >&2
        "$python" -m venv --clear "$environment"
    fi
    echo "Installing tornado_proxy${extra:+[$extra]}" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$checkout${extra:+[$extra]}"
    # Every extra brings the run-time dependencies too.
    printf '%s\n' "$wanted" | tee "$stamp" >"$environment/.installed"
}
