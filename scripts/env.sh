# shellcheck shell=bash
# Sourced by the other scripts: sets ROOT, the repository, and PYTHONPATH; `ensure_env` sets PYTHON.
# It never changes the working directory, so that a relative path on the command line keeps its meaning.
# Written for bash 3.2, which macOS has: there an empty "${array[@]}" is an error under `set -u`.

ROOT=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
VENV=$ROOT/.venv
LOCK=$ROOT/.venv.lock
LOG=$VENV/setup.log
case $OSTYPE in
    msys* | cygwin*) VENV_PYTHON=$VENV/Scripts/python.exe ;;
    *) VENV_PYTHON=$VENV/bin/python ;;
esac

fail() { # fail STATUS SENTENCE
    echo "error: $2" >&2
    exit "$1"
}

# --- Which Python

# ensure_env [dev | mpi]: sets PYTHON to an interpreter with the requirements (dev: and the development tools; mpi: and an
# MPI library). That is the running one if it has them, otherwise that of .venv, which is made if need be.
ensure_env() {
    KIND=${1:-core}
    FILES=("$ROOT/requirements.txt")
    [ "$KIND" = core ] || FILES+=("$ROOT/requirements-$KIND.txt")
    RUNNING=$(running_python) || RUNNING=''
    if [ -n "$RUNNING" ] && ! [ "${VIRTUAL_ENV:-}" -ef "$VENV" ] && has_requirements "$RUNNING"; then
        PYTHON=$RUNNING
    else
        PYTHON=$VENV_PYTHON
        venv_is_ready || set_up || exit
    fi
}

new_python() { # prints the path of a Python, if that is new enough (a shim may be there and not even run)
    "$1" -c "import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.${2:-executable})" 2>/dev/null
}

running_python() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then # `python` is the environment's, `python3` need not be
        new_python python || new_python python3
    else
        new_python python3 || new_python python
    fi
}

missing() { # prints which requirements a Python lacks, or has too old; imports none, as torch takes seconds
    "$1" -P -c '
import re, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]

def lacking(name, least):
    try:
        found = version(name)
    except PackageNotFoundError:  # perhaps put there without pip or conda: nobody knows which version
        return "" if find_spec(name.replace("-", "_")) else name
    return "%s>=%s (it has %s)" % (name, least, found) if numbers(found) < numbers(least) else ""

ranges, *files = [open(path, encoding="utf-8").read() for path in sys.argv[1:]]
least = dict(re.findall(r"\"([\w-]+)>=([\d.]+)\"", ranges))
names = re.findall(r"^(?!types-|mpich)\w[\w-]*", "".join(files), re.M)  # stubs and a C library, which are no modules
print(", ".join(filter(None, (lacking(name, least.get(name, "0")) for name in names))))
' "$ROOT/setup.py" "${FILES[@]}" 2>/dev/null
}

has_requirements() {
    local lacking
    lacking=$(missing "$1") && [ -z "$lacking" ]
}

# --- .venv
# A .venv that these scripts made holds the file `made-by-scripts` from the first moment, and KIND.ready, a checksum of
# the requirements, from the last. A .venv without the former is somebody else's: used, completed, but not removed.

checksum() { cat "${FILES[@]}" | cksum; }

venv_is_ready() {
    { [ ! -e "$VENV/made-by-scripts" ] || [ "$(cat "$VENV/$KIND.ready" 2>/dev/null)" = "$(checksum)" ]; } &&
        has_requirements "$PYTHON"
}

venv_can_be_kept() {
    new_python "$PYTHON" >/dev/null && { [ ! -e "$VENV/made-by-scripts" ] || [ -e "$VENV/core.ready" ]; }
}

set_up() ( # a subshell, so that its traps and exits are its own
    what="the requirements" lacking=''
    case $KIND in
        dev) what="the requirements and the development tools" ;;
        mpi) what="the requirements and MPI" ;;
    esac
    [ -w "$ROOT" ] || fail 1 "cannot write in $ROOT, where .venv belongs; make it writable, or activate an environment \
that has $what (pip install -r requirements.txt)"
    trap 'stopped 130' INT
    trap 'stopped 143' TERM
    lock
    trap 'rm -f "$LOCK"' EXIT
    venv_is_ready && exit 0 # another process set it up while this one waited

    if venv_can_be_kept; then
        echo "bringing .venv up to date with $what (takes up to a few minutes) ..." >&2
    else
        [ -e "$VENV/made-by-scripts" ] || ! [ -x "$VENV_PYTHON" ] || fail 1 "$VENV was not made by these scripts and \
has no Python 3.11 or newer; remove it, or activate an environment that has $what"
        base=$(find_python) || exit
        [ -z "$RUNNING" ] || lacking=$(missing "$RUNNING") || true
        echo "setting up .venv with $what (once; takes a few minutes)${lacking:+, as $RUNNING lacks $lacking} ..." >&2
        rm -rf "$VENV"
        mkdir "$VENV"
        : >"$VENV/made-by-scripts"
        "$base" -m venv "$VENV" >"$LOG" 2>&1 || set_up_failed
    fi
    rm -f "$VENV"/*.ready
    # -I: what PYTHONPATH offers today must not count as installed.
    "$PYTHON" -I -m pip install --no-input --disable-pip-version-check -r "${FILES[${#FILES[@]} - 1]}" >"$LOG" 2>&1 ||
        set_up_failed
    has_requirements "$PYTHON" ||
        fail 1 "pip ended well, but $PYTHON lacks $(missing "$PYTHON"); the whole log is in $LOG"
    [ "$KIND" = core ] || checksum >"$VENV/$KIND.ready"
    FILES=("$ROOT/requirements.txt")
    checksum >"$VENV/core.ready"
)

stopped() { # stopped STATUS: by Ctrl-C or SIGTERM
    echo "stopped; the same command sets up again" >&2
    exit "$1"
}

# start ARGUMENT ...: becomes `python -m text_diffusion ARGUMENT ...`, in NPROC processes if that says so.
start() {
    case ${NPROC:-1} in
        *[!0-9]* | 0) fail 2 "NPROC must be a number of processes, found '$NPROC'; $USAGE" ;;
        1) ensure_env && STARTER=() ;;
        *)
            ensure_env mpi
            STARTER=("$(dirname "$PYTHON")/mpiexec") # of the MPI that mpi4py beside it finds first
            [ -x "${STARTER[0]}" ] || STARTER=(mpiexec)
            command -v "${STARTER[0]}" >/dev/null || fail 1 "NPROC=$NPROC needs mpiexec, found none beside $PYTHON or in \
PATH; pip install mpich, or load the MPI module of your cluster"
            STARTER+=(-n "$NPROC")
            ;;
    esac
    # -P: a random.py in the working directory must not shadow Python's own.
    exec ${STARTER[@]+"${STARTER[@]}"} "$PYTHON" -P -m text_diffusion "$COMMAND" "$@"
}

set_up_failed() {
    tail -n 12 "$LOG" >&2
    fail 1 "setting up .venv failed, for the reason in the lines above (whole log: $LOG); \
mend that and run the same command again"
}

find_python() { # prints the first interpreter that can make .venv, or fails in a sentence
    local name base old='' bare=''
    for name in python3 python3.13 python3.12 python3.11 python; do
        # The base, as the one in front may be that of the .venv that is about to be made again.
        if base=$(new_python "$name" _base_executable); then
            "$base" -c 'import ensurepip, venv' 2>/dev/null && echo "$base" && return
            bare=${bare:-$base}
        else
            old=${old:-$("$name" --version 2>&1)} || old=''
        fi
    done
    [ -z "$bare" ] || fail 1 "$bare cannot make .venv, as it comes without ensurepip; install that (Debian and Ubuntu: \
apt install python3-venv), or activate an environment that has the requirements"
    fail 1 "Python 3.11 or newer is needed, found ${old:-none}; install one, or activate an environment that has it"
}

lock() { # waits while another process sets up .venv
    local said=
    # A symbolic link comes into being whole, with its holder's name in it, and only where there is none.
    until ln -s "$$@$HOSTNAME" "$LOCK" 2>/dev/null; do
        if lock_is_stale; then
            # Of several that see this one gets it away, and what it got is looked at again: it may be a new one by now.
            mv "$LOCK" "$LOCK.$$" 2>/dev/null || continue
            lock_is_stale "$LOCK.$$" || ln -s "$(readlink "$LOCK.$$")" "$LOCK" 2>/dev/null || true
            rm -f "$LOCK.$$"
        else
            [ -n "$said" ] || echo "waiting for another process that sets up .venv (if there is none, remove $LOCK) ..." >&2
            said=yes
            sleep 1
        fi
    done
}

lock_is_stale() { # its holder was on this machine and is dead
    local holder
    holder=$(readlink "${1:-$LOCK}") || return 1
    [ "${holder#*@}" = "$HOSTNAME" ] && ! kill -0 "${holder%@*}" 2>/dev/null
}

# --- Arguments; the scripts set COMMAND, of `python -m text_diffusion`, and USAGE

# positionals NAME ... -- ARGUMENT ...: sets the variables NAME ... to the arguments before the first --flag (an empty
# one leaves its variable as it is) and REST to the others. --help ends here.
positionals() {
    local name names=()
    while [ "$1" != -- ]; do
        names+=("$1")
        shift
    done
    shift
    help_if_asked "$@"
    for name in "${names[@]}"; do
        if [ $# -eq 0 ] || [ "${1#--}" != "$1" ]; then break; fi
        [ -z "$1" ] || printf -v "$name" %s "$1"
        shift
    done
    if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
        fail 2 "at most ${#names[@]} arguments go before the first --flag, found '$1' after them; $USAGE"
    fi
    # shellcheck disable=SC2034  # the scripts use it
    REST=("$@")
}

help_if_asked() { # help_if_asked ARGUMENT ...: ends here if --help is among them
    local argument
    for argument in "$@"; do
        case $argument in -h | --help) show_help ;; esac
    done
}

show_help() {
    echo "$USAGE"
    echo "(an empty argument, \"\", means its default; everything after the first --flag goes to the program below)"
    echo
    ensure_env
    exec "$PYTHON" -P -m text_diffusion "$COMMAND" --help
}

true_or_false() { # true_or_false NAME: checks that variable and settles its case
    case ${!1} in
        [Tt][Rr][Uu][Ee]) printf -v "$1" True ;;
        [Ff][Aa][Ll][Ss][Ee]) printf -v "$1" False ;;
        *) fail 2 "$1 must be True or False, found '${!1}'; $USAGE" ;;
    esac
}
