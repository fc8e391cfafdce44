#!/bin/bash
# Starts the bring-up with what /etc/simplevla/robot.env says; simplevla.service runs it.
set -eo pipefail

fail() {
    echo "bring_up: $1; see /etc/simplevla/robot.env" >&2
    exit 1
}

for name in ROS_SETUP WORKSPACE_SETUP VENV RIG TASK SERVER SESSION_RECORD; do
    [[ -n ${!name:-} ]] || fail "$name is not set"
done
for file in "$ROS_SETUP" "$WORKSPACE_SETUP" "$VENV/bin/activate" "$RIG"; do
    [[ -r $file ]] || fail "$file cannot be read"
done
# Without set -u: ROS's own setup files read names that may be missing.
source "$ROS_SETUP"
source "$VENV/bin/activate"
source "$WORKSPACE_SETUP"
# Not plainly ros2: its script names the system's Python, which does not see the virtual environment.
exec "$VENV/bin/python" "$(command -v ros2)" launch simplevla bringup.launch.py \
    "rig:=$RIG" "task:=$TASK" "server:=$SERVER" "session_record:=$SESSION_RECORD"
