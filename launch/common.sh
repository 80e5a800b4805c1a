# What the launch scripts share: settings, --dry_run, messages.  Sourced, not run.
# shellcheck shell=bash

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
fail() { echo "$(basename "$0"): $1" >&2; exit 1; }
need() { for name in "$@"; do [[ -n "${!name:-}" ]] || fail "$name is not set; $0 --help says what is needed"; done; }

# begin ACTIONS ARGUMENTS...: sets `action` and `dry`, and reads the file of settings where there is one.
begin() {
  local actions=" $1 "
  shift
  dry=0 action=
  for argument in "$@"; do
    case "$argument" in
      --dry_run) dry=1 ;;
      --settings=*) SETTINGS=${argument#--settings=} ;;
      -h | --help) usage; exit 0 ;;
      *)
        [[ "$actions" == *" $argument "* ]] || fail "unknown argument '$argument'; $0 --help"
        action=$argument
        ;;
    esac
  done
  [[ -n "$action" ]] || { usage >&2; exit 1; }
  if [[ -n "${SETTINGS:-}" ]]; then
    [[ -f "$SETTINGS" ]] || fail "--settings: no such file $SETTINGS"
    set -a
    # shellcheck disable=SC1090  # the user's file
    source "$SETTINGS"
    set +a
  fi
}

# Runs a command, or prints it in a dry run.
execute() {
  if ((dry)); then printf '%q ' "$@"; echo; else "$@"; fi
}

# The committed state of this checkout, nothing else, in an archive.
pack() {
  archive=${TMPDIR:-/tmp}/tanuki_jax.tar.gz
  execute git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
}

# What a worker runs to install the archive, and to train.
install_command() {
  echo "mkdir -p tanuki_jax && tar -xzf tanuki_jax.tar.gz -C tanuki_jax && cd tanuki_jax && python3 -m venv .venv && .venv/bin/pip install --quiet --constraint requirements.lock --editable '.[tpu]'"
}
run_command() {
  # JAX finds the other workers of a slice, and the other slices, by itself.
  echo "cd tanuki_jax && TANUKI_COORDINATOR=auto .venv/bin/tanuki run --config=$(printf %q "$CONFIG") --workdir=$(printf %q "$WORKDIR")"
}
