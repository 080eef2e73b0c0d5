# Shared by tools/demo and tools/check; sourced by bash, with `root` set to the repository.

# Print the path of a Python that is new enough. PYTHON names one to use instead.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "needs Python 3.11 or newer; PYTHON=... names one" >&2
  return 1
}

# make_env NAME PIP-ARGUMENT...
# Make $root/.venv-NAME with the project (editable) and what the arguments say, and set `bin` to its bin folder.
# Made again only if pyproject.toml, the constraints, the arguments or the Python changed.
make_env() {
  local name=$1 env python stamp
  shift
  env=$root/.venv-$name
  bin=$env/bin
  python=$(find_python) || return 1
  stamp=$(
    {
      "$python" -V
      printf '%s\n' "$root" "$@"
      cat "$root/pyproject.toml" "$root/tools/constraints.txt"
    } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
  ) || return 1
  if [ -x "$bin/python" ] && [ "$(cat "$env/.stamp" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi

  echo "making ${env#"$root"/} (the first time takes some minutes) ..." >&2
  rm -rf "$env"
  # Debian splits ensurepip off; the pip of that Python then fills the environment from outside.
  if "$python" -m venv "$env" >/dev/null 2>&1; then
    "$bin/python" -m pip install -qq -c "$root/tools/constraints.txt" --upgrade pip || return 1
  else
    rm -rf "$env"
    "$python" -m venv --without-pip "$env" || return 1
    "$python" -m pip --python "$bin/python" install --quiet -c "$root/tools/constraints.txt" pip || return 1
  fi
  (cd "$root" && "$bin/python" -m pip install -qq -c tools/constraints.txt "$@") || return 1
  echo "$stamp" >"$env/.stamp"
}
