#!/usr/bin/env bash
# Make this checkout runnable: the system's libraries (apt), a .venv with pinned versions, our package in it.
#
#   tools/setup.sh                            all of it; when nothing changed it ends within a second
#   PYTHON=python3.12 tools/setup.sh          another interpreter (3.10 to 3.12)
#   SIMPLEVLA_SKIP_SYSTEM=1 tools/setup.sh    leave the system alone: no apt, no check of its libraries
#
# Knows Debian 12 and Ubuntu 24.04. Needs root or sudo only while something is missing from the system.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MESA_NEEDED=24.3 # older software renderers (lavapipe) lack what SAPIEN asks of Vulkan
readonly STAMP=.venv/simplevla-setup.stamp
readonly LOG=.venv/simplevla-setup.log
# library that must load : Debian and Ubuntu package that brings it : who needs it
readonly LIBRARIES=(
  libusb-1.0.so.0:libusb-1.0-0    # pyrealsense2
  libudev.so.1:libudev1           # pyrealsense2
  libvulkan.so.1:libvulkan1       # SAPIEN
  libX11.so.6:libx11-6            # SAPIEN
  libGL.so.1:libgl1               # OpenCV
  libgthread-2.0.so.0:libglib2.0-0 # OpenCV
  libEGL.so.1:libegl1             # SAPIEN, where an NVIDIA driver renders
)

main() {
  if [[ -z ${SIMPLEVLA_SKIP_SYSTEM:-} ]]; then install_system; fi
  local python wanted
  python=$(find_python) || fail "no Python 3.10, 3.11 or 3.12 was found: install python3.11 and python3.11-venv, or name one: PYTHON=/path/to/python make ..."
  wanted=$(fingerprint "$python")
  if [[ -f $STAMP && $(cat "$STAMP") == "$wanted" ]]; then return; fi
  install_python "$python"
  echo "$wanted" >"$STAMP"
  echo "setup: .venv is ready ($("$python" -V))"
}

# --- the system -----------------------------------------------------------------------------------

install_system() {
  local missing=() entry known python
  known=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p)
  for entry in "${LIBRARIES[@]}"; do
    [[ $known == *"${entry%%:*} "* ]] || missing+=("${entry##*:}")
  done
  if python=$(find_python); then
    can_make_venv "$python" || missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
  elif ! command -v python3 >/dev/null; then
    missing+=(python3 python3-venv)
  fi
  local needed=("${missing[@]}")
  mesa_is_new_enough "$(mesa_installed)" || needed+=(mesa-vulkan-drivers)
  if ((${#needed[@]} == 0)); then return; fi

  command -v apt-get >/dev/null || fail "this set-up knows Debian 12 and Ubuntu 24.04; elsewhere install ${missing[*]-} and Mesa >= $MESA_NEEDED (Vulkan drivers) by hand, then: SIMPLEVLA_SKIP_SYSTEM=1 make ..."
  [[ $(id -u) == 0 ]] || command -v sudo >/dev/null || fail "the system lacks ${needed[*]}: run as root or install sudo"
  echo "setup: installing system libraries: ${needed[*]}"
  as_root apt-get update -qq || echo "setup: apt-get update complained; going on with the lists there are" >&2
  if ((${#missing[@]})); then apt_install "${missing[@]}"; fi
  mesa_is_new_enough "$(mesa_installed)" || install_mesa
}

install_mesa() {
  local id codename
  id=$(. /etc/os-release && echo "$ID")
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  if mesa_is_new_enough "$(mesa_candidate)"; then
    apt_install mesa-vulkan-drivers
  elif [[ $id == debian && $codename == bookworm ]]; then
    add_backports "$codename"
    apt_install -t "$codename-backports" mesa-vulkan-drivers
  fi
  mesa_is_new_enough "$(mesa_installed)" ||
    fail "this system is too old: it offers Mesa $(mesa_candidate), rendering needs $MESA_NEEDED or newer; use Debian 12 (with backports) or Ubuntu 24.04 (with updates)"
}

# Add the suite of backports from the mirror that this machine's own sources already name.
add_backports() {
  local codename=$1 suite=$1-backports source mirror key
  if grep -rqsE "^[^#]*\b$suite\b" /etc/apt/sources.list /etc/apt/sources.list.d; then return; fi
  source=$(apt-get indextargets --format '$(REPO_URI) $(SIGNED_BY)' \
    'Created-By: Packages' "Release: $codename" 'Component: main')
  read -r mirror key <<<"$source" || true
  [[ -n ${mirror:-} ]] || fail "no source of $codename/main was found in /etc/apt: add $suite by hand, then run this again"
  [[ $key == /* ]] || key= # apt leaves the field's name where the source names no key
  as_root sh -c 'echo "$1" >"$2"' sh "deb ${key:+[signed-by=$key] }${mirror%/} $suite main" \
    "/etc/apt/sources.list.d/$suite.list"
  as_root apt-get update -qq || true
}

can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
mesa_installed() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }
mesa_candidate() { apt-cache policy mesa-vulkan-drivers | awk '/Candidate:/ { print $2 }'; }
mesa_is_new_enough() { [[ -n ${1:-} && $1 != "(none)" ]] && dpkg --compare-versions "$1" ge "$MESA_NEEDED"; }

apt_install() {
  as_root apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "$@" >/dev/null ||
    fail "apt-get could not install: $*"
}

as_root() {
  local sudo=()
  if [[ $(id -u) != 0 ]]; then
    sudo=(sudo)
    [[ -t 0 ]] || sudo+=(-n)
  fi
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive "$@" </dev/null
}

# --- Python ---------------------------------------------------------------------------------------

# Print the interpreter to use: $PYTHON, else python3 if it fits, else the newest that fits.
find_python() {
  local name names=(python3 python3.12 python3.11 python3.10)
  [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
  for name in "${names[@]}"; do
    # The base interpreter: making .venv anew from inside .venv would saw off the branch.
    "$name" -c 'import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12): sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null && return
  done
  return 1
}

lock_of() { "$1" -c 'import sys; print("requirements/lock-py%d%d.txt" % sys.version_info[:2])'; }

fingerprint() {
  { "$1" -VV && echo "$1" && pwd && cat "$(lock_of "$1")" setup.cfg setup.py pyproject.toml; } | sha256sum | cut -d' ' -f1
}

install_python() {
  local python=$1 lock
  lock=$(lock_of "$python")
  if [[ ! -x .venv/bin/python || $(.venv/bin/python -V) != "$("$python" -V)" ]]; then
    "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment: install its venv module"
  fi
  rm -f "$STAMP"
  echo "setup: installing $(grep -c == "$lock") pinned packages into .venv (minutes at first; log: $LOG)"
  pip_install -r "$lock"
  # openpi's own client, for the tests and benchmarks that talk to it: it asks for numpy<2 and runs with 2.
  pip_install --no-deps openpi-client==0.1.2
  pip_install --no-deps --no-build-isolation -e .
}

pip_install() {
  .venv/bin/python -m pip install --no-input --disable-pip-version-check "$@" >>"$LOG" 2>&1 </dev/null || {
    tail -n 15 "$LOG" >&2
    fail "pip failed (whole log: $LOG): check the network and the free disk, then run this again"
  }
}

fail() {
  echo "setup: $1" >&2
  exit 1
}

main "$@"
